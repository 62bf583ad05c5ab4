"""The help says what to type, and a hint that names an option names one that exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import secateur
from secateur.cli.flags import describe
from secateur.cli.inspect import _LISTS
from secateur.cli.main import app
from secateur.cli.ticket import _network
from secateur.core.errors import UsageError
from secateur.drive.recipe_file import from_plain
from secateur.drive.structural.recipe_file import to_plain
from secateur.pattern import NM


def test_flags_take_no_value_in_the_help() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    flags = [
        (name, option)
        for name, command in commands.items()
        for option in command.params
        if getattr(option, "is_flag", False)
    ]
    assert len(flags) > len(commands)  # --json everywhere, and others
    assert [(name, option.name) for name, option in flags if option.metavar != ""] == []


@pytest.mark.parametrize("command", [[], ["prune"], ["doctor"]])
def test_the_help_of_help_shows_no_type(command: list[str]) -> None:
    (line,) = (
        line
        for line in CliRunner().invoke(app, [*command, "--help"]).stdout.splitlines()
        if "Show this message" in line
    )
    assert "--help" in line
    assert "bool" not in line.lower()


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [(NM(2, 4), "2:4"), (NM(1, 4), "1:4"), (NM(2, 8), "2:8"), (NM(2, 4, rows=4), "2:4 (rows=4)")],
)
def test_runs_are_shown_as_they_are_written(pattern: NM, shown: str) -> None:
    assert dict(describe(secateur.Recipe(pattern=pattern)))["pattern"] == shown


def test_lists_show_no_objects_of_python() -> None:
    lists = [f"--{name}" for name in _LISTS]
    shown = CliRunner().invoke(app, ["inspect", *lists]).stdout
    assert "<" not in shown
    assert "levels={}, rest=" in shown


def test_every_data_option_says_which_metrics_are_better() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    told = {
        name: option.help
        for name, command in commands.items()
        for option in command.params
        if option.name == "data"
    }
    assert {"evaluate", "compare", "prune", "shrink", "ticket"} <= told.keys()
    assert {name for name, text in told.items() if "larger is better" not in text} == set()


def test_a_recipe_of_shrink_is_told_as_such() -> None:
    with pytest.raises(UsageError, match="secateur shrink --recipe") as caught:
        from_plain(to_plain(secateur.ShrinkRecipe()))
    assert "shrink: true" in caught.value.found


def test_a_bundle_without_a_source_is_searched_for_tickets_with_model(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))\n"
    )
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.6), recovery=())
    folder = secateur.shrink(net, recipe, torch.zeros(1, 4)).save(tmp_path / "small")
    with pytest.raises(UsageError, match="--model"):
        _network(str(folder), None, None)
    found = _network(str(folder), None, f"{file}:build")
    assert isinstance(found, nn.Sequential)
    assert found[0].out_features < 16
