"""A run draws its random numbers from a state of its own, and touches no other."""

from __future__ import annotations

import pytest
import torch
from oneshot_cases import ROWS, mlp

from secateur import Recipe, ShrinkRecipe, prune, shrink
from secateur.core.randomness import own_random
from secateur.score import Random, RandomGroups


@pytest.mark.parametrize("kind", ["prune", "shrink"])
def test_a_run_on_the_cpu_seeds_no_other_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states are not kept, so the caller's draws there would go on from another place."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: pytest.fail("seeded"))
    net, before = mlp(), torch.get_rng_state()
    if kind == "prune":
        prune(net, Recipe(Random()), ROWS)
    else:
        shrink(net, ShrinkRecipe(RandomGroups()), data=ROWS)
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_gives_the_draws_that_torch_gives() -> None:
    net = mlp()
    before = torch.get_rng_state()
    with own_random(net, 5):
        drawn = torch.rand(4)
    assert torch.equal(before, torch.get_rng_state())
    with own_random(net):
        first = torch.rand(4)
    assert torch.equal(first, torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))
