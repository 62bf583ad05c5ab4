"""Runs with regrowth: what goes wrong, what is resumed, and recipes as plain data."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from regrow_cases import (
    BATCHES,
    OPTIMIZERS,
    TOTAL,
    backward,
    kept,
    net,
    recipe,
    snapshot,
    start,
    train,
)

from secateur import Gradual, Recipe, Scope, Target, masks_of, prune, recipes
from secateur.allocate import ErdosRenyi, Uniform
from secateur.core.errors import NeedsData, NonFinite, UsageError
from secateur.drive.recipe_file import from_plain, to_plain
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.pattern import NM
from secateur.schedule import Alternating, Linear, OneShot, Polynomial
from secateur.score import Movement

# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_gradient_at_an_exchange_changes_nothing(bad: float, skip: bool) -> None:
    model, pruner = start(recipe(Regrow(frequency=4, skip_step=skip)))
    train(model, pruner, 3)
    before, masks = snapshot(model, pruner.optimizer), pruner.masks
    backward(model, pruner, 3)
    gradient = model.get_parameter("2.weight").grad
    assert gradient is not None
    gradient[0, 0] = bad
    with pytest.raises(NonFinite, match=r"step 4.*1 of 384 .*2\.weight.*NaN"):
        pruner.optimizer.step()
    assert pruner.masks == masks
    assert all(
        torch.equal(a, b) for a, b in zip(snapshot(model, pruner.optimizer), before, strict=True)
    )
    train(model, pruner, 37, 3)  # a finite gradient, and all goes on
    assert pruner.finalize().masks.kept == TOTAL // 4


def test_gradients_that_are_not_there() -> None:
    model, pruner = start(recipe(Regrow(frequency=1)))
    with pytest.raises(NeedsData, match="no pruned weight has a gradient"):
        pruner.optimizer.step()
    model, pruner = start(recipe(Regrow(frequency=4)))
    first = pruner.masks["2.weight"]
    model[2].weight.requires_grad_(False)  # frozen: it keeps its mask, the other moves
    other = pruner.masks["0.weight"]
    train(model, pruner, 4)
    assert torch.equal(pruner.masks["2.weight"], first)
    assert not torch.equal(pruner.masks["0.weight"], other)


def test_an_optimizer_step_left_out_is_made_up_for() -> None:
    """A gradient scaler leaves the optimizer's step out when it finds an infinity."""
    model, pruner = start(recipe(Regrow(frequency=4)))
    train(model, pruner, 3)
    masks = pruner.masks
    pruner.step()
    assert pruner.masks == masks
    state = copy.deepcopy(pruner.state_dict())
    assert state["regrow"]["owed"]
    train(model, pruner, 1, 3)
    assert pruner.masks != masks
    assert [r["step"] for r in pruner.facts.history] == [0, 5]


def test_with_a_gradient_scaler() -> None:
    model, pruner = start(recipe(Regrow(frequency=4)))
    scaler = torch.amp.GradScaler("cpu")
    for t in range(40):
        x, y = BATCHES[t % 3]
        pruner.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(pruner.optimizer)
        pruner.step()
        scaler.update()
    assert pruner.finalize().masks.kept == TOTAL // 4
    assert len(pruner.facts.history) > 5


def test_time_is_checked_before_training() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match="length of the training is not known"):
        Gradual(model, optimizer, recipe())
    with pytest.raises(UsageError, match=r"first exchange would be at step 31.*30 of 40"):
        Gradual(model, optimizer, recipe(Regrow(frequency=31)), steps=40)
    with pytest.raises(UsageError, match=r"ends at step 50.*after 40 steps"):
        Gradual(model, optimizer, recipe(schedule=Linear(0, 50, 5)), steps=40)
    with pytest.raises(UsageError, match="steps_per_epoch"):
        Gradual(model, optimizer, recipe(Regrow(frequency=1, unit="epochs")), steps=40)
    with pytest.raises(UsageError, match=r"ends at step 500.*after 6 steps"):
        prune(
            net(),
            Recipe(schedule=Linear(0, 500, 1), recovery=recipes.gmp(0.5, 2).recovery),
            BATCHES,
        )
    assert masks_of(model).total == 0, "nothing was attached"


def test_a_training_that_stops_early() -> None:
    model, pruner = start(recipe())
    train(model, pruner, 29)
    with pytest.raises(UsageError, match=r"step 29.*up to step 30 of 40"):
        pruner.finalize()
    train(model, pruner, 1, 29)
    pruner.finalize()
    model, pruner = start(recipe())
    train(model, pruner, 5)
    assert pruner.finalize(early=True).masks.kept == TOTAL // 4


# -- resume ---------------------------------------------------------------------------------------

RESUMED = {
    "rigl": recipe(Regrow(frequency=3), allocation=ErdosRenyi()),
    "set": recipe(Regrow("random", frequency=3)),
    "movement": recipe(Regrow(frequency=5, start="random"), criterion=Movement()),
    "2:4": recipe(Regrow(frequency=4), pattern=NM(2, 4)),
    "gradual": recipe(Regrow(frequency=3), schedule=Polynomial(0, 20, 4)),
    "topkast": recipe(TopKast(0.2, 3)),
    "acdc": Recipe(target=Target("sparsity", 0.8), schedule=Alternating(0, 20, 4)),
}


@pytest.mark.parametrize("stop", [1, 2, 3, 6, 11, 17])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_run(name: str, stop: int) -> None:
    whole, pruner = start(RESUMED[name], "adamw")
    train(whole, pruner, 40)
    expected = pruner.finalize().masks
    model, pruner = start(RESUMED[name], "adamw")
    train(model, pruner, stop)
    saved = copy.deepcopy((model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()))
    model, pruner = start(RESUMED[name], "adamw")
    model.load_state_dict(saved[0])
    pruner.optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    train(model, pruner, 40 - stop, stop)
    assert pruner.finalize().masks == expected
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_length_is_refused() -> None:
    _, pruner = start(recipe())
    _, other = start(recipe(), steps=50)
    with pytest.raises(UsageError, match=r"training of 50 steps.*one of 40"):
        other.load_state_dict(pruner.state_dict())


# -- recipes --------------------------------------------------------------------------------------

NEW = ("rigl", "set", "static_sparse", "topkast", "acdc")


@pytest.mark.parametrize("name", NEW)
def test_aliases_prune(name: str) -> None:
    alias: Any = recipes.ALIASES[name]
    made = alias(0.75, epochs=20)
    pruned = prune(net(), made, BATCHES)
    assert pruned.masks.kept == TOTAL // 4
    assert prune(net(), made, BATCHES).masks == pruned.masks
    events = [r for r in pruned.facts.history if "dropped" in r]
    assert len(events) == 1 if name == "static_sparse" else len(events) > 5
    losses = [r["loss"] for r in pruned.facts.history if "loss" in r]
    assert losses[-1] < losses[0]


def test_recipes_with_regrowth_are_plain_data() -> None:
    for made in (
        recipe(Regrow("random", 0.2, 50, skip_step=True)),
        recipe(TopKast(0.2)),
        *RESUMED.values(),
    ):
        assert from_plain(to_plain(made)) == made
        assert hash(from_plain(to_plain(made))) == hash(made)
    made = from_plain({"method": "rigl", "regrow": {"exchange": {"grow": "random"}}})
    assert made.regrow == Regrow("random")
    assert from_plain({"method": {"rigl": {"pattern": "2:4"}}}).target == Target("sparsity", 0.5)
    assert Recipe(regrow=Regrow()).schedule == OneShot(unit="steps")
    assert Recipe(regrow=Regrow()).fingerprint() != Recipe(regrow=TopKast()).fingerprint()


def test_fingerprints_of_before_are_unchanged() -> None:
    """Runs and files are named by them. These were written down before recipes could regrow."""
    before = {"magnitude": "9b2deebfa0d7", "gmp": "2acc1e864057", "wanda": "5ac47dc5e108",
              "sparsegpt": "537dd5fd126f", "movement": "237a9b676fb1"}  # fmt: skip
    assert {name: recipes.ALIASES[name]().fingerprint() for name in before} == before


def test_rigl_with_a_given_scope_and_uniform_densities() -> None:
    wanted = recipe(Regrow(frequency=3), scope=Scope(include=("2",)), allocation=Uniform())
    model, pruner = start(wanted)
    train(model, pruner, 40)
    assert kept(pruner.finalize().masks) == {"2.weight": 96}
