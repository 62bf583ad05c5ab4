"""A target that is missed is told in the unit in which it was asked for."""

from typing import Any

import pytest
import torch
from torch import nn

from secateur import Recipe, Target, prune, recipes
from secateur.allocate import Given


def note_of(net: nn.Module, recipe: Recipe, data: Any = None) -> str:
    (note,) = (note for note in prune(net, recipe, data).facts.notes if note.topic == "target")
    return note.text


def test_sparsity_is_told_as_a_share_of_zeros() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    text = note_of(net, recipes.wanda(0.5), [torch.randn(8, 3)])
    assert text.startswith("asked for 50 % sparsity, reached 33.33 % sparsity: ")


@pytest.mark.parametrize(
    ("value", "asked", "reached"),
    [(0.5, "50 % of the params", "83.78 % of the params"), (40, "40 params", "62 params")],
)
def test_counts_are_told_for_the_whole_model(value: float, asked: str, reached: str) -> None:
    # 74 parameters, of which a quarter of 48 is pruned.
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    recipe = Recipe(target=Target("params", value), allocation=Given({"0.weight": 0.25}))
    assert note_of(net, recipe).startswith(f"asked for {asked}, reached {reached}: ")
