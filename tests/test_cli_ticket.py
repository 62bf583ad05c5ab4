"""The command line of ticket searches."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tickets_cases import RECIPE, plan, search
from typer.testing import CliRunner, Result

from secateur.cli.main import app
from secateur.experiments import Training

FILES = """
import sys
sys.path.insert(0, {tests!r})
import tickets_cases as here

build = here.build
load = here.data

def numbers():
    x = here.data().train.x
    return dict(train=[(x, x[:, :3])])

def seeded():
    import torch
    torch.manual_seed(0)
    return build()
"""


def command(place: Path, *words: str, network: str = "build") -> Result:
    place.mkdir(exist_ok=True)
    file = place / "parts.py"
    file.write_text(FILES.format(tests=str(Path(__file__).parent)))
    fixed = ["ticket", f"{file}:{network}", "--data", f"{file}:load", "-o", str(place / "runs")]
    return CliRunner().invoke(app, [*fixed, "--epochs", "1", *words])


def test_command_finds_what_python_finds(tmp_path: Path) -> None:
    words = ["--levels", "36%,0.79", "--rewind", "rate", "--rewind-to", "2steps"]
    words += ["--allocation", "global", "--lr", "0.05", "--seed", "3"]
    told = json.loads(command(tmp_path, "--json", *words).stdout)
    assert told["ok"] is True
    how = plan(rewind="rate", rewind_to=2, unit="steps", training=Training(1.0, 0.05, seed=3))
    found = search(tmp_path / "runs", how, recipe=replace(RECIPE, seed=3))
    assert all(level.done for level in found.levels)
    assert [level["mask"] for level in told["levels"]] == [level.mask for level in found.levels]
    assert set(told["structure"]) == {"filters", "channels"}  # no convolutions
    again = json.loads(command(tmp_path, "--json", *words).stdout)
    assert [level["done"] for level in again["levels"]] == [True, True]
    shown = command(tmp_path, *words).stdout
    assert "level 2" in shown
    assert shown.count("done before") == 3
    assert "entirely zero" in shown


def test_command_measures_lines_between_levels(tmp_path: Path) -> None:
    words = ["--levels", "36%,0.79", "--allocation", "global", "--lr", "0.05"]
    told = json.loads(command(tmp_path, "--json", "--connectivity", *words).stdout)
    lines, stages = told["connectivity"], [told["dense"], *told["levels"]]
    assert [len(line["errors"]) for line in lines] == [5, 5]
    for line, (a, b) in zip(lines, itertools.pairwise(stages), strict=True):
        ends = line["errors"][0], line["errors"][-1]
        assert ends == pytest.approx((1 - a["accuracy"], 1 - b["accuracy"]))
        assert line["barrier"] == pytest.approx(max(0.0, max(line["errors"]) - sum(ends) / 2))
    shown = command(tmp_path, "--connectivity", *words).stdout
    assert "barrier" in shown
    assert f"+{100 * lines[1]['barrier']:.2f} points" in shown
    assert "barrier" not in command(tmp_path, *words).stdout


def test_command_refuses_in_its_own_words(tmp_path: Path) -> None:
    for words, network, match in (
        (["--rewind", "back"], "build", "rewind is one of"),
        (["--levels", "0.5,0.2"], "build", "rising"),
        (["--rewind-to", "soon"], "build", "cannot be read"),
        (["--rewind", "reinit"], "seeded", "gives the same weights again"),
        (["--connectivity", "--data", f"{tmp_path / 'parts.py'}:numbers"], "build", "no classes"),
    ):
        ended = command(tmp_path, "--json", *words, network=network)
        assert ended.exit_code == 2
        error = json.loads(ended.stdout)["error"]
        assert match in " ".join(str(value) for value in error.values())
    assert not (tmp_path / "runs").exists()


def test_a_recipe_says_the_seed_and_the_last_level(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("target: 36%\nallocation: global\nseed: 3\n")
    words = ["--recipe", str(file), "--lr", "0.05", "--json"]
    told = json.loads(command(tmp_path / "file", *words).stdout)
    flags = ["--sparsity", "36%", "--allocation", "global", "--lr", "0.05", "--json", "--seed"]
    same = json.loads(command(tmp_path / "flags", *flags, "3").stdout)
    masks = [level["mask"] for level in same["levels"]]
    assert [level["mask"] for level in told["levels"]] == masks
    assert told["levels"][-1]["sparsity"] == pytest.approx(0.36, abs=0.01)
    other = json.loads(command(tmp_path / "other", *words, "--seed", "4").stdout)
    assert [level["mask"] for level in other["levels"]] != masks


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("target: 80%", True),
        ("method: {magnitude: {sparsity: 0.8}}", True),
        ("allocation: global", False),
        ("method: magnitude", False),
    ],
)
def test_levels_and_a_recipe_with_a_target(tmp_path: Path, text: str, refused: bool) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    words = ["--recipe", str(file), "--levels", "0.36", "--lr", "0.05", "--json"]
    ended = command(tmp_path, *words)
    told = json.loads(ended.stdout)
    assert ended.exit_code == (2 if refused else 0)
    if refused:
        assert "the recipe has a target" in told["error"]["found"]
        assert not (tmp_path / "runs").exists()
