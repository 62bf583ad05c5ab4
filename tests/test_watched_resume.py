"""A watched pruner is saved and continued like the pruner itself; parts without a state are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from restless import X, Y, net
from torch import nn

from secateur import Gradual, Recipe, Target
from secateur.core.errors import UsageError
from secateur.drive.training.regrow import Regrow
from secateur.drive.training.resume import Training, resume_, save_checkpoint
from secateur.experiments import EventLog, Watched, read
from secateur.schedule import OneShot, Polynomial

RECIPE = Recipe(target=Target("sparsity", 0.75), schedule=Polynomial(0, 10, 2))


def start() -> tuple[Training, EventLog]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    log = EventLog(model, {"test": [(X, Y)]})
    return Training(model, optimizer, Watched(Gradual(model, optimizer, RECIPE), log)), log


def train(run: Training, begin: int, end: int) -> None:
    for step in range(begin, end):
        x, y = X[step::4], Y[step::4]
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.pruner.step()


def test_a_watched_pruner_continues_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole, log = start()
    train(whole, 0, 5)
    assert whole.fingerprint == RECIPE.fingerprint()
    save_checkpoint(tmp_path, whole, step=5)
    train(whole, 5, 12)
    again, later = start()
    assert resume_(tmp_path, again) == 5
    assert again.pruner.steps == 5
    train(again, 5, 12)
    assert later.events == log.events
    assert [e.label for e in log.events] == ["step 2", "step 4", "step 6", "step 8", "step 10"]
    first, second = whole.pruner.finalize(), again.pruner.finalize()
    assert first.masks == second.masks
    assert first.facts.history == second.facts.history
    assert first.facts.sparsity == pytest.approx(0.75, abs=0.01)


def test_exchanges_in_place_of_a_step_are_logged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rigl = Regrow(frequency=3, end=1.0)
    recipe = Recipe(target=RECIPE.target, schedule=OneShot(0, "steps"), regrow=rigl)
    data: Any = {"test": [(X, Y)]}
    log = EventLog(model, data)
    run = Training(model, optimizer, Watched(Gradual(model, optimizer, recipe, steps=12), log))
    losses = [read(model, data).loss]
    for step in range(12):
        train(run, step, step + 1)
        losses.append(read(model, data).loss)
    steps = [int(e.label.removeprefix("step ")) for e in log.events]
    assert steps == [3, 6, 9]  # at the end nothing is exchanged any more
    assert [e.before.loss for e in log.events] == [losses[step - 1] for step in steps]
    assert [e.after.loss for e in log.events] == [losses[step] for step in steps]


class Mute:
    def step(self) -> None: ...


@pytest.mark.parametrize("place", ["pruner", "rate", "feed", "others"])
def test_a_part_without_a_state_is_refused(place: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    mute: Any = {"mute": Mute()} if place == "others" else Mute()
    training = Training(model, torch.optim.SGD(model.parameters(), 0.1), **{place: mute})
    for act in (
        lambda: resume_(tmp_path, training),
        lambda: save_checkpoint(tmp_path, training, step=1),
    ):
        with pytest.raises(UsageError, match=r"Mute: it has no state_dict\(\)"):
            act()
    assert not list(tmp_path.iterdir())
