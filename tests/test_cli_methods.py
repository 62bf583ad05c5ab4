"""Published methods on the command line: what is trained is the method that was named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import recipes
from secateur.cli.flags import Flags, describe, recipe_from
from secateur.cli.main import app
from secateur.core.budget import Target
from secateur.core.errors import UsageError
from secateur.drive.recipe import Recipe
from secateur.drive.recipe_file import from_plain
from secateur.pattern import NM
from secateur.recover import LeastSquares

COUNTING = sorted(
    name for name, f in recipes.ALIASES.items() if "epochs" in inspect.signature(f).parameters
)


def test_the_methods_that_count_epochs() -> None:
    assert COUNTING == ["acdc", "gmp", "movement", "rigl", "set", "static_sparse", "topkast"]


@pytest.mark.parametrize("name", COUNTING)
def test_epochs_are_those_of_the_method(name: str) -> None:
    found = recipe_from(Flags(method=name, sparsity="90%", epochs=2.0))
    assert found == recipes.ALIASES[name](0.9, epochs=2)


@pytest.mark.parametrize("name", sorted(set(recipes.ALIASES) - set(COUNTING)))
def test_other_methods_are_trained_as_they_are(name: str) -> None:
    found = recipe_from(Flags(method=name, sparsity="90%", epochs=2.0))
    plain = recipes.ALIASES[name](0.9)
    for part in ("criterion", "pattern", "target", "allocation", "regrow", "repairs", "sequential"):
        assert getattr(found, part) == getattr(plain, part)
    assert found.finetune is not None
    assert found.finetune.epochs == 2


def test_arguments_and_a_schedule_of_the_user_hold() -> None:
    found = recipe_from(Flags(method="topkast:extra=0.3", sparsity="80%", epochs=3.0, lr=0.01))
    assert found.regrow == recipes.topkast(0.8, epochs=3, extra=0.3).regrow
    assert found.finetune is not None
    assert (found.finetune.epochs, found.finetune.lr) == (3, 0.01)
    own = Flags(method="gmp", epochs=3.0, schedule="linear:end=1,unit=epochs,frequency=1")
    assert recipe_from(own).schedule.end == 1


def test_one_weight_after_another_or_all_at_once() -> None:
    repair = ("least_squares:asymmetric=true",)
    found = recipe_from(Flags(recovery=repair, sequential=True))
    assert found == Recipe(recovery=LeastSquares(asymmetric=True), sequential=True)
    assert "sequential" in dict(describe(found))
    with pytest.raises(UsageError, match="sequential=True"):
        recipe_from(Flags(recovery=repair))
    assert recipe_from(Flags(method="wanda")).sequential
    assert not recipe_from(Flags(method="wanda", sequential=False)).sequential
    with pytest.raises(UsageError, match="--sequential was given too"):
        recipe_from(Flags(recipe="r.yaml", sequential=True))


def test_epochs_given_twice() -> None:
    with pytest.raises(UsageError, match="4 epochs, and the run 2"):
        recipe_from(Flags(method="gmp:epochs=4", epochs=2.0))
    recipe_from(Flags(method="gmp:epochs=2", epochs=2.0))


def announced(method: str) -> Any:
    return dict(describe(recipe_from(Flags(method=method, sparsity="90%", epochs=2.0))))


def test_what_is_announced_tells_methods_apart() -> None:
    shown = [announced(name) for name in ("rigl", "set", "static_sparse", "topkast")]
    assert all(a != b for i, a in enumerate(shown) for b in shown[:i])
    assert "gradient" in shown[0]["regrow"]
    assert "random" in shown[1]["regrow"]
    assert "regrow" not in shown[2]
    assert "topkast" in shown[3]["regrow"]


# --- values given twice --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(epochs=1.0, recovery=("finetune:epochs=3",)), "epochs is 1 in one and 3"),
        (Flags(lr=0.1, recovery=("finetune:epochs=3,lr=0.2",)), "lr is 0.1 in one and 0.2"),
        (Flags(sparsity="70%", method="gmp:sparsity=0.8"), "two targets"),
        (Flags(target="macs=50%", method="gmp:sparsity=0.8"), "two targets"),
        (Flags(sparsity="70%", method="gmp:sparsity=80%"), "two targets"),
    ],
)
def test_contradicting_values_are_refused(flags: Flags, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_from(flags)


def test_values_that_agree_are_taken() -> None:
    found = recipe_from(Flags(epochs=3.0, lr=0.2, recovery=("finetune:epochs=3",)))
    assert found.finetune is not None
    assert (found.finetune.epochs, found.finetune.lr) == (3, 0.2)
    twice = Flags(sparsity="80%", method="gmp:sparsity=0.8")
    assert recipe_from(twice) == recipe_from(Flags(method="gmp:sparsity=80%"))
    assert recipe_from(twice).target == Target("sparsity", 0.8)


def test_a_shrinking_run_trains_once_too() -> None:
    words = ["--epochs", "1", "--recovery", "finetune:epochs=3", "--target", "macs=50%"]
    found = CliRunner().invoke(app, ["shrink", "net.py:build", "-o", "out", *words])
    assert found.exit_code == 2
    assert "epochs is 1 in one and 3 in the other" in " ".join(found.stderr.split())


def test_levels_and_a_sparsity_are_two_targets() -> None:
    words = ["--data", "data.py:load", "--levels", "0.5", "--sparsity", "0.9"]
    found = CliRunner().invoke(app, ["ticket", "net.py:build", "-o", "out", *words])
    assert found.exit_code == 2
    assert "both say where the levels end" in " ".join(found.stderr.split())


@pytest.mark.parametrize("name", ["rigl", "set", "sparsegpt"])
def test_a_method_is_told_the_pattern_that_its_other_parts_depend_on(name: str) -> None:
    made = recipe_from(Flags(method=name, pattern="2:4"))
    assert made == recipes.ALIASES[name](pattern=NM(2, 4))
    assert from_plain({"method": name, "pattern": "2:4"}) == made


@pytest.mark.parametrize("text", ["sparsegpt:pattern=2:4", 'sparsegpt:pattern="2:4"'])
def test_a_pattern_in_a_method_is_no_number_to_base_60(text: str) -> None:
    assert recipe_from(Flags(method=text)).pattern == NM(2, 4)
