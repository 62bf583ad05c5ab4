"""Gradual pruning over time: schedules, their units, early ends, and runs that are resumed."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from gradual_cases import net, recipe, train
from torch import nn

from secateur import Gradual, masks_of, recipes
from secateur.allocate import Ranked
from secateur.core.errors import NeedsData, UsageError
from secateur.schedule import (
    Alternating,
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    OneShot,
    Polynomial,
    events,
    share_at,
)
from secateur.score import Magnitude, Movement, Smoothed, Snip

# -- schedules ------------------------------------------------------------------------------------


def test_cubic_is_zhu_and_guptas() -> None:
    schedule = Polynomial(begin=20, end=120, frequency=10)
    for final in (0.5, 0.9):
        for t in range(20, 121):
            paper = final + (0 - final) * (1 - (t - 20) / 100) ** 3
            assert final * share_at(schedule, t, final) == pytest.approx(paper)
    assert share_at(schedule, 20, 0.9) == 0.0
    assert share_at(schedule, 120, 0.9) == share_at(schedule, 500, 0.9) == 1.0


def test_exponential_keeps_the_same_fraction_each_round() -> None:
    schedule = Exponential(begin=0, end=4)
    kept = [1 - 0.9 * share_at(schedule, t, 0.9) for t in range(5)]
    assert [b / a for a, b in itertools.pairwise(kept)] == pytest.approx([0.1**0.25] * 4)


def test_synflow_makes_the_rounds_it_promises() -> None:
    for rounds in (1, 2, 100):
        schedule = recipes.synflow(0.9, rounds=rounds).schedule
        assert sum(share_at(schedule, t, 0.9) > 0 for t in events(schedule)) == rounds


@pytest.mark.parametrize(
    "build",
    [
        lambda: Polynomial(begin=5, end=4),
        lambda: Linear(begin=-1, end=4),
        lambda: Cosine(0, 4, frequency=0),
        lambda: Linear(0, 4, 1, unit="step"),
        lambda: OneShot(unit="step"),
        lambda: OneShot(begin=-1),
        lambda: Polynomial(power=-1),
    ],
)
def test_schedules_that_cannot_run_are_refused(build: Any) -> None:
    with pytest.raises(UsageError):
        build()


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_epoch", "schedule", "epochs"),
    [
        (3, Polynomial(0, 2, 0.5, unit="epochs"), 2),
        (7, Polynomial(0.5, 2.3, 0.21, unit="epochs"), 3),
        (4, Linear(1, 1.1, 0.05, unit="epochs"), 2),
        (3, OneShot(1, "epochs"), 2),
        (2, Cosine(0, 3, 10, unit="epochs"), 3),
        (3, recipes.window(6), 3),
    ],
)
def test_schedules_in_epochs(per_epoch: int, schedule: Any, epochs: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Gradual(model, optimizer, recipe(schedule, 0.6), steps_per_epoch=per_epoch)
    levels = []
    for t in range(per_epoch * epochs):
        train(model, pruner, 1, t)
        levels.append(pruner.masks.sparsity)
        time = (t + 1) / per_epoch
        reached = 0.6 * share_at(schedule, time, 0.6)
        assert levels[-1] <= reached + 2 / 192
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(0.6, abs=2 / 192)
    pruner.finalize()


@pytest.mark.parametrize(
    "schedule", [Linear(0.5, 8.5, 1), Linear(0, 8, 1.5), Polynomial(1.5, 7.2, 2)]
)
def test_steps_that_are_no_whole_numbers(schedule: Any) -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(schedule))
    changes = []
    for t in range(9):
        before = pruner.masks.kept
        train(model, pruner, 1, t)
        changes.append(pruner.masks.kept < before)
    due = sorted({math.ceil(moment) for moment in events(schedule)})
    expected = [t for t in due if share_at(schedule, t, 0.75) > 0]
    assert [t for t, changed in enumerate(changes, start=1) if changed] == expected


@pytest.mark.parametrize("schedule", [Linear(0, 2.5, 1, "epochs"), Linear(0, 5, 2)])
def test_every_change_was_imminent(schedule: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Gradual(model, optimizer, recipe(schedule), steps_per_epoch=2)
    for t in range(6):
        imminent, before = pruner.imminent, pruner.masks.kept
        train(model, pruner, 1, t)
        assert (pruner.masks.kept < before) == imminent, t


def test_units_are_not_mixed() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match="steps_per_epoch"):
        Gradual(model, optimizer, recipe(Linear(0, 2, 1, unit="epochs")))
    with pytest.raises(UsageError, match="rounds"):
        Gradual(model, optimizer, recipe(Exponential(end=3)))


def test_finalize_too_early() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(Linear(0, 8, 2)))
    train(model, pruner, 4)
    with pytest.raises(UsageError, match=r"step 4.*ends at 8.*50 %"):
        pruner.finalize()
    assert masks_of(model).total == 192, "a refused finalize() changes nothing"
    pruned = pruner.finalize(early=True)
    assert pruned.facts.sparsity == pytest.approx(0.375, abs=0.01)


@pytest.mark.parametrize("schedule", [Alternating(0, 6, 1), Cyclic(0, 6, 2, cycles=2)], ids=repr)
def test_a_cyclic_schedule_has_not_ended_when_it_is_at_its_target(schedule: Any) -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(schedule))
    while pruner.masks.sparsity < 0.74:
        train(model, pruner, 1, pruner.steps)
    assert pruner.steps < 6
    with pytest.raises(UsageError, match="ends at 6"):
        pruner.finalize()
    train(model, pruner, 6 - pruner.steps, pruner.steps)
    assert pruner.finalize().facts.sparsity == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("criterion", [Movement(), Snip()], ids=repr)
def test_step_without_gradients(criterion: Any) -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(criterion=criterion))

    def two_steps() -> None:
        for _ in range(2):
            pruner.optimizer.step()
            pruner.step()

    with pytest.raises(NeedsData, match="radient"):
        two_steps()


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UsageError, match="no parameter takes part"):
        Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())


# -- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
@pytest.mark.parametrize(
    "criterion",
    [Magnitude(), Movement(), Snip(), Smoothed(Magnitude()), Smoothed(Movement(), 0.5)],
    ids=repr,
)
def test_a_resumed_run_is_the_uninterrupted_run(criterion: Any, stop: int) -> None:
    wanted = recipe(Polynomial(0, 9, 2), 0.7, criterion=criterion, allocation=Ranked())

    def start() -> tuple[nn.Module, Gradual]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        return model, Gradual(model, optimizer, wanted)

    whole, pruner = start()
    train(whole, pruner, 12)
    expected = pruner.finalize()

    model, pruner = start()
    train(model, pruner, stop)
    saved = copy.deepcopy((model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()))
    model, pruner = start()
    model.load_state_dict(saved[0])
    pruner.optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    train(model, pruner, 12 - stop, stop)
    found = pruner.finalize()
    assert found.masks == expected.masks
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_recipe_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = Gradual(model, optimizer, recipe()).state_dict()
    other = Gradual(model, optimizer, recipe(sparsity=0.5))
    with pytest.raises(UsageError, match="Another recipe"):
        other.load_state_dict(state)
