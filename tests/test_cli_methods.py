"""Published methods on the command line: what is trained is the method that was named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from secateur import recipes
from secateur.cli.flags import Flags, describe, recipe_from
from secateur.core.errors import UsageError

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
