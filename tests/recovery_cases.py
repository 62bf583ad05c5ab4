"""Correlated inputs, their statistics, and the error that a changed weight makes on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur import Recipe, Target
from secateur.core.weight import Weight
from secateur.drive.layerwise import MaskChoice
from secateur.pattern import NM, Pattern
from secateur.stats import Gram, InputNorm, Moments, Stats


def correlated(rows: int, size: int, *, decay: float = 0.5) -> Tensor:
    """Gaussian inputs whose covariance has a falling spectrum in a random basis, in float64."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    scale = decay ** torch.arange(size, dtype=torch.float64)
    return torch.randn(rows, size, dtype=torch.float64) @ (basis * (scale + 0.02) @ basis.T)


def measured(weight: Weight, rows: Tensor) -> Stats:
    """All statistics of rows ``(groups, n, fan_in)``."""
    stats = Stats()
    for stat in (Gram(), InputNorm(), Moments()):
        stats.update(stat, weight, rows, rows.shape[1])
    return stats


def error(weight: Weight, rows: Tensor, values: Tensor) -> float:
    """||(W - W') X||^2 / n from the rows themselves."""
    change = (weight.matrix() - values).double().reshape(len(rows), -1, rows.shape[2])
    return float((rows.double() @ change.mT).square().sum()) / rows.shape[1]


def choice(
    weight: Weight, stats: Stats, criterion: Any, pattern: Pattern, sparsity: float
) -> MaskChoice:
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    recipe = Recipe(criterion, pattern, target)
    groups = pattern.fold(criterion(weight, stats), weight.axes).mean(2)
    return MaskChoice(weight, recipe, groups, sparsity)
