"""``shrink_`` changes the model and its optimizer whole, or not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import UsageError
from secateur.drive.training.finetune import FineTune

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 4)
           for i in range(4)]  # fmt: skip


class Median(nn.Module):
    """A median over units that may go: the masked network has another one than the cut network.

    It is looked at only where ``a`` has fewer than ``below`` units.
    """

    def __init__(self, below: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)
        self.below = below

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        y: Tensor = self.b(h)
        return y * h.median(1, keepdim=True)[0] if len(self.a.bias) < self.below else y


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    attributes = {
        path: {k: v for k, v in vars(m).items() if not k.startswith("_")}
        for path, m in model.named_modules()
    }
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return copy.deepcopy((attributes, model.state_dict(), gradients, optimizer.state_dict()))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("data", [None, BATCHES])
@pytest.mark.parametrize(("below", "rounds"), [(64, 1), (40, 3)])
def test_after_a_proof_that_fails_the_model_is_as_it_was(
    below: int, rounds: int, data: Any
) -> None:
    model = Median(below)
    optimizer = trained(model)
    before = everything(model, optimizer)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.3), rounds=rounds, align=1)
    # The width is pinned, and there is no other.
    with pytest.raises(UsageError, match="takes part"):
        secateur.shrink_(model, recipe, X, data, optimizer=optimizer)
    assert same(everything(model, optimizer), before)
    assert same(before, before)


def test_after_an_interrupted_fine_tuning_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = trained(model)
    before = everything(model, optimizer)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=FineTune())

    def stop(stage: str, done: float, total: float) -> None:
        if stage not in ("tracing", "proving") and done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.shrink_(model, recipe, X, BATCHES, optimizer=optimizer, progress=stop)
    assert same(everything(model, optimizer), before)


def test_what_shrink_does_to_a_copy_happens_to_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = trained(model)
    parameters = list(model.parameters())
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), rounds=2, align=1)
    graph = model(X).sum()  # of the last loss, still alive
    wanted = secateur.shrink(model, recipe, X, BATCHES)
    found = secateur.shrink_(model, recipe, X, BATCHES, optimizer=optimizer)
    assert found.model is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert same(dict(model.state_dict()), dict(wanted.model.state_dict()))
    assert found.surgery == wanted.surgery
    for parameter in parameters:
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    del graph
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()
