"""A pruner beside other tools that work on the same network, or keep the state of its optimizer their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import secateur
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.held import (
    attach_,
    detach_,
    masks_of,
    require_free,
)
from secateur.schedule import Polynomial
from secateur.score import Magnitude, Movement

LAST = 4
aten = torch.ops.aten


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Gradual, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        pruner.step()


# -- the network is changed under a pruner ---------------------------------------------------------


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "orthogonal": lambda n: parametrizations.orthogonal(n[2]),
    "weight_norm": lambda n: parametrizations.weight_norm(n[2]),
    "prune": lambda n: prune.l1_unstructured(n[2], "weight", 0.25),
    "prune, removed": lambda n: prune.remove(prune.l1_unstructured(n[2], "weight", 0.25), "weight"),
    "replaced": lambda n: n.__setitem__(2, nn.Linear(8, 8)),
    "deleted": lambda n: n.__delitem__(slice(1, 3)),
    "deleted to the end": lambda n: n.__delitem__(slice(2, 5)),
}


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()])
@pytest.mark.parametrize("when", [0, LAST])
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_is_no_longer_there_is_named(change: str, when: int, criterion: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recipe = secateur.Recipe(
        criterion, target=secateur.Target("sparsity", 0.5), schedule=Polynomial(0, LAST, 1)
    )
    pruner = Gradual(model, optimizer, recipe)
    train(model, optimizer, pruner, when)
    CHANGES[change](model)

    def go_on() -> None:
        train(model, optimizer, pruner, LAST - when)
        pruner.finalize()

    with pytest.raises(UsageError, match=r"'2\.weight'.*(no longer|no such|any more)"):
        go_on()


def test_a_mask_that_torch_put_in_the_place_of_ours_is_none_of_ours() -> None:
    model = nn.Linear(4, 4)
    attach_(model, Masks({"weight": torch.ones(4, 4, dtype=torch.bool)}))
    prune.l1_unstructured(model, "weight", 0.25)
    assert not masks_of(model)
    assert not detach_(model)
    with pytest.raises(UsageError, match="of its own"):
        require_free(model, ["weight"])
    prune.remove(model, "weight")
    mask = Masks({"weight": model.weight.detach() != 0})
    attach_(model, mask)
    assert masks_of(model) == mask
    assert detach_(model) == mask
    assert "_secateur_masks" not in vars(model)
