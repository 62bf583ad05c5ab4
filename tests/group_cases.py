"""What the tests of group criteria share: small networks, their groups, and one call to score."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.groups import Groups, groups_of
from secateur.frontends import discover
from secateur.stats import (
    collect_groups,
)
from secateur.structure import couple


def close(a: Tensor, b: Any, rtol: float = 1e-5) -> None:
    expected = torch.as_tensor(np.asarray(b)).double()
    torch.testing.assert_close(a.detach().double(), expected, rtol=rtol, atol=1e-9)


def coupled(model: nn.Module, example: Any) -> dict[str, Groups]:
    found = groups_of(model, couple(model, example).widths, discover(model))
    return {groups.name: groups for groups in found}


def scores(criterion: Any, model: nn.Module, groups: dict[str, Groups], batches: Any) -> Any:
    stats = collect_groups(model, list(groups.values()), criterion.needs, batches)
    return {name: criterion(g, stats) for name, g in groups.items()}


def mlp(sizes: tuple[int, ...] = (5, 6, 4, 3), act: Any = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
