"""Flags of the command line become recipes."""

from __future__ import annotations

import pytest

from secateur.cli.flags import Flags, part, recipe_from
from secateur.core.errors import UsageError
from secateur.drive.recipe import Recipe
from secateur.schedule import OneShot


def test_parts_as_flags() -> None:
    assert part("pattern", "blocks:rows=2,cols=8") == {"blocks": {"rows": 2, "cols": 8}}
    assert part("allocation", "given:levels={a: 0.5, b: 0.1}") == {
        "given": {"levels": {"a": 0.5, "b": 0.1}}
    }
    with pytest.raises(UsageError, match="cannot be read"):
        part("criterion", "magnitude:p={")


def test_epochs_follow_methods_that_prune_at_once() -> None:
    at_once = recipe_from(Flags(method="sparsegpt", sparsity="0.5", epochs=3))
    assert at_once.schedule == OneShot()
    assert [type(step).__name__ for step in at_once.recovery] == ["ColumnSweep", "FineTune"]
    gradual = recipe_from(Flags(method="gmp", sparsity="0.5", epochs=3, lr=0.5))
    assert (gradual.schedule.unit, gradual.schedule.end) == ("epochs", 1.5)
    assert gradual.finetune is not None
    assert (gradual.finetune.epochs, gradual.finetune.lr) == (3, 0.5)
    own = recipe_from(Flags(schedule="linear:end=2,unit=epochs,frequency=1", epochs=4))
    assert own.schedule.end == 2
    assert recipe_from(Flags()) == Recipe()
