"""The state of optimizers is cut along, or refused before anything is done."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import UsageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TO = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=(), align=1)
ALL: Any = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.Adafactor, {}),
]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.Flatten(), nn.Linear(216, 4)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        found: Tensor = model(X).square().mean()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "options"), ALL)
def test_training_goes_on_with_the_state(kind: Any, options: dict[str, Any]) -> None:
    model = network()
    optimizer = kind(model.parameters(), **options)
    step(model, optimizer)
    before = copy.deepcopy([dict(optimizer.state[p]) for p in model.parameters()])
    pruned = secateur.shrink_(model, TO, X, optimizer=optimizer)
    assert pruned.surgery is not None
    names = [name for name, _ in model.named_parameters()]
    for name, p, old in zip(names, model.parameters(), before, strict=True):
        for key, slot in old.items():
            wanted = slot
            for axis, kept in pruned.surgery.cuts.get(name, {}).items():
                if isinstance(slot, Tensor) and slot.ndim and wanted.shape[axis] > 1:
                    wanted = wanted.index_select(axis, torch.tensor(kept.positions()))
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(wanted))
    step(model, optimizer)
    step(model, optimizer)


def test_state_of_all_parameters_in_one_is_refused() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"cutting the state of LBFGS.*a new one after the cut"):
        secateur.shrink_(model, TO, X, optimizer=optimizer)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    step(model, optimizer)


def test_factors_without_the_other_axis_are_refused() -> None:
    """Of a square weight nobody can tell which axis a vector belongs to."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["row"] = torch.zeros(16, 3, 3)
    with pytest.raises(UsageError, match=r"its slot 'row' of '0.weight' is \(16, 3, 3\)"):
        secateur.shrink_(model, TO, X, optimizer=optimizer)


@pytest.mark.parametrize("ndim", [2, 3])
def test_channels_last_stays(ndim: int) -> None:
    """Of weights, gradients and what an optimizer keeps; without it a network may be much slower."""
    layout = (torch.channels_last, torch.channels_last_3d)[ndim - 2]
    conv: Any = (nn.Conv2d, nn.Conv3d)[ndim - 2]
    model = nn.Sequential(conv(3, 16, 3), nn.ReLU(), conv(16, 4, 3)).to(memory_format=layout)
    x = torch.randn(2, 3, *[6] * ndim).to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    secateur.shrink_(model, TO, x, optimizer=optimizer)
    for layer in (model[0], model[2]):
        kept = [layer.weight, layer.weight.grad, optimizer.state[layer.weight]["exp_avg"]]
        assert all(each.shape == layer.weight.shape for each in kept)
        assert all(each.is_contiguous(memory_format=layout) for each in kept)
    assert model[0].out_channels < 16
