"""A small network, and what criteria see of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.weight import LINEAR, Axes, Weight
from secateur.frontends import discover
from secateur.stats import Stats, collect

CONV = Axes(("out", "in", "kh", "kw"), groups=2)


def linear(out: int = 4, inn: int = 6) -> Weight:
    return Weight("w", torch.randn(out, inn), LINEAR)


def seen(weight: Weight, stat: Any, rows: Tensor) -> Stats:
    stats = Stats()
    stats.update(stat, weight, rows, rows.shape[1])
    return stats


def close(a: Tensor, b: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        a.double(), torch.as_tensor(np.asarray(b)).double(), rtol=rtol, atol=1e-9
    )


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3


def gradient(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), y), [model.get_parameter(name)])[0]


def scores_of(criterion: Any, model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    slots = [s for s in discover(model) if s.rows is not None]
    stats = collect(model, slots, criterion.needs, batches)
    slot = next(s for s in slots if s.name == name)
    return criterion(slot.weight(model), stats)


BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
