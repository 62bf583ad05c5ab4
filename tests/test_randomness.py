"""What a run draws for itself leaves the caller's generators alone, those of other devices too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.core.randomness import devices_of, own_random
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import Shrinking
from secateur.schedule import Linear

GIVEN = torch.Generator().manual_seed(0)
BATCHES = [(x, x[:, :2].argmax(1)) for x in torch.randn(3, 16, 8, generator=GIVEN)]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def shrinking(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pace = Pace(Linear(0, 1, 1))
    example, recipe = torch.zeros(1, 8), secateur.ShrinkRecipe()
    Shrinking(model, optimizer, recipe, pace=pace, example_inputs=example).step()


RUNS: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda model: secateur.prune(model, secateur.recipes.wanda(0.5), BATCHES),
    "shrink": lambda model: secateur.shrink(model, None, torch.zeros(1, 8)),
    "shrinking": shrinking,
}


@pytest.mark.parametrize("kind", RUNS)
def test_generators_of_other_devices_are_not_seeded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    model, before = net(), torch.get_rng_state()
    RUNS[kind](model)
    assert not seeds
    assert torch.equal(before, torch.get_rng_state())


def test_a_device_that_is_not_known_is_seeded_with_all_others() -> None:
    assert devices_of(None) is None
    with own_random(None, 3):
        assert torch.initial_seed() == 3
        drawn = torch.rand(2)
    with own_random(net(), 3):
        assert torch.equal(drawn, torch.rand(2))


def test_a_seed_gives_the_draws_that_torch_gives() -> None:
    model, before = net(), torch.get_rng_state()
    with own_random(model, 5):
        drawn = torch.rand(4)
    assert torch.equal(before, torch.get_rng_state())
    with own_random(model):
        first = torch.rand(4)
    assert torch.equal(first, torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))
