"""Recoveries run in the order in which they are written, or the recipe is refused."""

from typing import Any

import pytest
import torch
from oneshot_cases import IMAGES, convnet

from secateur import FineTune, Recipe, ShrinkRecipe, prune
from secateur.cli.flags import Flags, recipe_from, with_training
from secateur.core.errors import UsageError
from secateur.recover import (
    BatchNorm,
    BiasCorrection,
    Compensation,
    Integer,
    LeastSquares,
    NoRecovery,
)
from secateur.schedule import Exponential, OneShot, Polynomial

EPOCHS = Polynomial(0, 1, 0.5, unit="epochs")


def names(recipe: Recipe | ShrinkRecipe) -> list[str]:
    return [type(step).__name__ for step in recipe.recovery]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((FineTune(1), LeastSquares()), "LeastSquares comes after FineTune"),
        ((BatchNorm(), LeastSquares()), "LeastSquares comes after BatchNorm"),
        ((LeastSquares(), FineTune(1), BiasCorrection()), "BiasCorrection comes after FineTune"),
    ],
)
@pytest.mark.parametrize("schedule", [Exponential(end=2), EPOCHS])
def test_what_cannot_be_done_in_order_is_refused(steps: Any, said: str, schedule: Any) -> None:
    with pytest.raises(UsageError, match="recovery=") as error:
        Recipe(schedule=schedule, recovery=steps)
    assert said in error.value.found
    assert error.value.why
    assert error.value.do


def test_one_training_prunes_and_several_may_follow_a_cut_at_once() -> None:
    stages = (FineTune(1), FineTune(2, distill=0.5))
    with pytest.raises(UsageError, match="2 FineTune steps"):
        Recipe(schedule=EPOCHS, recovery=stages)
    recipe = Recipe(recovery=stages)
    assert recipe.distills
    history = prune(convnet(), recipe, IMAGES).facts.history
    assert len([event for event in history if "loss" in event]) == 3


def test_nothing_comes_before_the_training_that_prunes() -> None:
    with pytest.raises(UsageError, match="BatchNorm comes before FineTune"):
        Recipe(schedule=EPOCHS, recovery=(BatchNorm(), FineTune(1)))
    assert names(Recipe(schedule=EPOCHS, recovery=(FineTune(1), BatchNorm()))) == [
        "FineTune",
        "BatchNorm",
    ]


@pytest.mark.parametrize(
    "steps",
    [
        (LeastSquares(), BatchNorm(), FineTune(1)),
        (BiasCorrection(), LeastSquares(), FineTune(1), BatchNorm()),
        (BatchNorm(), NoRecovery()),
        [LeastSquares()],
    ],
)
def test_what_a_run_follows_is_accepted(steps: Any) -> None:
    assert Recipe(recovery=steps).recovery == tuple(steps)


def test_batchnorm_before_and_after_training_differ() -> None:
    orders = ((BatchNorm(), FineTune(1, lr=0.1)), (FineTune(1, lr=0.1), BatchNorm()))
    first, last = (prune(convnet(), Recipe(recovery=order), IMAGES).model for order in orders)
    assert not torch.equal(first[1].running_mean, last[1].running_mean)


@pytest.mark.parametrize(
    "steps",
    [
        (BatchNorm(), Compensation()),
        (FineTune(1), BatchNorm()),
        (Compensation(), Compensation()),
        (FineTune(1), FineTune(2)),
    ],
)
def test_cuts_are_repaired_in_one_order(steps: Any) -> None:
    with pytest.raises(UsageError, match="recovery="):
        ShrinkRecipe(recovery=steps)
    assert names(ShrinkRecipe(recovery=(Compensation(), BatchNorm(), FineTune(1))))


def test_flags_of_training_keep_the_order() -> None:
    gradual = recipe_from(Flags(recovery=["batchnorm"], epochs=4))
    assert (names(gradual), gradual.schedule.unit) == (["FineTune", "BatchNorm"], "epochs")
    at_once = recipe_from(Flags(recovery=["least_squares", "batchnorm"], epochs=4))
    assert (names(at_once), at_once.schedule.unit) == (
        ["LeastSquares", "BatchNorm", "FineTune"],
        "rounds",
    )
    asked = {"epochs": 3.0, "lr": None}
    own = with_training(Recipe(recovery=(FineTune(1, lr=0.5), BatchNorm())), asked)
    assert own.recovery == (FineTune(3.0, lr=0.5), BatchNorm())
    cut = with_training(ShrinkRecipe(), asked)
    assert names(cut) == ["Compensation", "BatchNorm", "FineTune"]


@pytest.mark.parametrize("schedule", [OneShot(), Exponential(end=2), EPOCHS], ids=repr)
def test_training_that_would_undo_a_rounding_is_refused(schedule: Any) -> None:
    with pytest.raises(UsageError, match="would undo the rounding"):
        Recipe(schedule=schedule, rounding=Integer(8), recovery=(LeastSquares(), FineTune(1)))
