"""Second moments whose rounding errors are larger than what was added to their diagonal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import Recipe, Scope, Target, prune
from secateur.core.cholesky import cholesky
from secateur.core.errors import NonFinite
from secateur.recover import ExactObs, FisherUpdate
from secateur.score import ObsSaliency, WoodFisher


def moments(rank: int, size: int, rows: int) -> Tensor:
    """Sums of products in float32, one by one."""
    total = torch.zeros(size, size)
    basis = torch.randn(rank, size) * torch.exp(torch.randn(size))
    for _ in range(rows):
        row = torch.randn(rank) @ basis
        total += row[:, None] * row
    return total.double() / rows


def test_only_what_is_indefinite_is_changed() -> None:
    good, bad = moments(60, 50, 400), moments(1, 50, 400)
    assert torch.linalg.cholesky_ex(bad)[1] > 0
    lower = cholesky(torch.stack([good, bad]))
    assert torch.equal(lower[0], torch.linalg.cholesky(good))
    change = lower[1] @ lower[1].T - bad
    assert 0 < float(change.diagonal().mean()) < 1e-3 * float(bad.diagonal().mean())
    assert float((change - change.diagonal().mean() * torch.eye(50)).abs().max()) < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[1, 1] = bad
    with pytest.raises(NonFinite, match="1 of 2 matrices"):
        cholesky(torch.stack([torch.eye(3), matrix]))


@pytest.mark.parametrize("recovery", [(), (FisherUpdate(),)], ids=["score", "update"])
def test_large_gradients(recovery: Any) -> None:
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    data = [(torch.randn(8, 64), torch.randn(8) * 1e3)]
    pruned = prune(net, Recipe(WoodFisher(), recovery=recovery), data)
    assert pruned.masks.sparsity == 0.5
    assert all(bool(torch.isfinite(p).all()) for p in pruned.model.parameters())


def test_little_damping_and_many_inputs() -> None:
    """From 2,049 inputs on the Gram matrix is summed in float32."""
    net = nn.Sequential(nn.Linear(2100, 2), nn.ReLU(), nn.Linear(2, 2))
    data = [((torch.rand(64, 1) + 1) @ (torch.rand(1, 2100) + 0.5), torch.arange(64) % 2)]
    scope, target = Scope(include=("0",)), Target("sparsity", 0.5)
    pruned = prune(net, Recipe(ObsSaliency(damp=1e-6), target=target, scope=scope), data)
    assert pruned.masks.sparsity == 0.5


def test_exact_obs_on_inputs_of_low_rank() -> None:
    x = moments(1, 40, 400).float()[None]
    assert bool(torch.isfinite(ExactObs(damp=0.0).trace(torch.randn(3, 40).double(), x[0])).all())
