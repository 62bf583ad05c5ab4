"""A target that is missed is told in the unit in which it was asked for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from secateur import FineTune, Gradual, Recipe, Target, attach_, prune, recipes
from secateur.allocate import Given
from secateur.core.errors import BudgetError
from secateur.pattern import PerRow
from secateur.schedule import Linear


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


def test_a_near_miss_is_told_with_digits_that_show_it() -> None:
    net = nn.Sequential(nn.Linear(80, 160, bias=False), nn.ReLU(), nn.Linear(160, 4))
    given = Given({"0.weight": 1 - 5 / 12800})
    text = note_of(net, Recipe(target=Target("sparsity", 0.99962), allocation=given))
    assert text.startswith("asked for 99.962 % sparsity, reached 99.961 % sparsity: ")


DATA = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(5)]


@pytest.mark.parametrize("target", ["params=100", "macs=100", "99%", "bytes=1500"])
def test_a_training_that_misses_its_target_says_so_as_one_shot_does(target: str) -> None:
    def net() -> nn.Module:
        layers = (m for _ in range(6) for m in (nn.Linear(16, 16, bias=False), nn.ReLU()))
        return nn.Sequential(*layers, nn.Linear(16, 4))

    at_once = Recipe(target=Target.parse(target), pattern=PerRow())
    schedule = Linear(0, 1, 0.2, "epochs")
    trained = replace(at_once, schedule=schedule, recovery=FineTune(2))
    assert note_of(net(), trained, DATA) == note_of(net(), at_once, DATA)
    met = replace(trained, target=Target("sparsity", 0.5))
    assert not [n for n in prune(net(), met, DATA).facts.notes if n.topic == "target"]


def test_an_early_end_tells_how_far_it_came_and_resuming_keeps_a_missed_target() -> None:
    def begin() -> tuple[nn.Module, Gradual]:
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = Linear(0, 4, 1, "steps")
        recipe = Recipe(target=Target("sparsity", 0.99), pattern=PerRow(), schedule=schedule)
        return net, Gradual(net, optimizer, recipe)

    net, pruner = begin()
    pruner.step()
    state, weights = pruner.state_dict(), net.state_dict()
    (note,) = (n for n in pruner.finalize(early=True).facts.notes if n.topic == "target")
    said = (
        "asked for sparsity=0.99, reached sparsity=0.25: the training ended after 25 % of the way"
    )
    assert note.text == said
    net, pruner = begin()
    net.load_state_dict(weights)
    pruner.load_state_dict(state)
    for _ in range(4):
        pruner.step()
    state, weights = pruner.state_dict(), net.state_dict()
    net, pruner = begin()
    net.load_state_dict(weights)
    pruner.load_state_dict(state)
    (note,) = (n for n in pruner.finalize().facts.notes if n.topic == "target")
    assert note.text.startswith("asked for 99 % sparsity, reached 93.75 % sparsity: ")


@pytest.mark.parametrize("target", ["75%", "params=60%", "macs=50%"])
def test_an_early_end_is_told_once_and_a_whole_one_not_at_all(target: str) -> None:
    for steps, told in ((2, 1), (4, 0)):
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        recipe = Recipe(target=Target.parse(target), schedule=Linear(0, 4, 1, "steps"))
        pruner = Gradual(net, optimizer, recipe, data=DATA)
        for _ in range(steps):
            pruner.step()
        pruned = pruner.finalize(early=True)
        notes = [n.text for n in pruned.facts.notes if n.topic == "target"]
        assert len(notes) == told
        for text in notes:
            assert text.startswith(f"asked for {recipe.target.unit}={recipe.target.value:g}")
            assert f"sparsity={pruned.masks.sparsity:.4g}: the training ended after 50 %" in text


@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_a_count_above_the_dense_one_is_refused(unit: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(BudgetError, match="Nothing would be removed"):
        prune(net, Recipe(target=Target(unit, 1e6)))
    with pytest.raises(BudgetError, match="inf is no finite number"):
        Target(unit, float("inf"))


def test_what_was_pruned_before_is_more_than_asked_only_if_it_is() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    first = prune(net, Recipe(target=Target("sparsity", 0.99), pattern=PerRow()))
    attach_(first.model, first.masks)
    for asked, told in ((0.99, "93.75 % were pruned before"), (0.5, "before, more than asked")):
        again = prune(first.model, Recipe(target=Target("sparsity", asked), pattern=PerRow()))
        texts = [n.text for n in again.facts.notes if n.text.startswith("nothing was added")]
        assert len(texts) == 1
        assert texts[0].endswith(told)
