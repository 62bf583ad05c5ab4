"""Small mistakes on the command line and in recipe files, answered in the user's own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.flags import Flags, recipe_from, with_training
from secateur.cli.main import app
from secateur.core.errors import FileError, FormatError, UsageError
from secateur.core.facts import Facts, LayerFacts
from secateur.drive.diagnosis import _hints
from secateur.drive.recipe_file import read_recipe
from secateur.drive.structural.recipe import ShrinkRecipe


@pytest.mark.parametrize("method", [None, "acdc", "snip"])
@pytest.mark.parametrize("epochs", [0.0, -1.0, float("nan"), float("inf")])
def test_epochs_that_are_none(method: str | None, epochs: float) -> None:
    with pytest.raises(UsageError, match=f"--epochs {epochs:g}: {epochs:g} is not a finite"):
        recipe_from(Flags(method=method, epochs=epochs))


def test_rates_that_are_none() -> None:
    with pytest.raises(UsageError, match="--lr nan: nan is not a finite number above 0"):
        recipe_from(Flags(epochs=1.0, lr=float("nan")))
    with pytest.raises(UsageError, match="--lr 0: 0 is not"):
        with_training(ShrinkRecipe(), {"epochs": 1.0, "lr": 0.0})


@pytest.mark.parametrize("text", ["2:4", "4x1"])
def test_a_pattern_is_no_sparsity(text: str) -> None:
    with pytest.raises(UsageError, match=f"Write --pattern {text}"):
        recipe_from(Flags(sparsity=text))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("method: wanda\ntarget: 60%\ntarget: 70%", "target"),
        ("recovery: [{finetune: {epochs: 1, lr: 0.1, epochs: 3}}]", "epochs"),
    ],
)
def test_keys_that_stand_twice(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FormatError, match=f"the key '{key}' is written twice"):
        read_recipe(tmp_path / "r.yaml")


def test_thousands_of_brackets(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(5_000 * "[")
    with pytest.raises(FormatError, match="It must be a YAML file"):
        read_recipe(tmp_path / "r.yaml")


def test_a_key_may_stand_in_two_mappings(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("target: {sparsity: 0.5}\nmethod: {gmp: {sparsity: 0.5}}")
    assert read_recipe(tmp_path / "r.yaml").target.value == 0.5  # type: ignore[union-attr]


def test_nearly_all_is_not_all() -> None:
    facts = Facts(layers=[LayerFacts("w", (100, 100), 10_000, 4)])
    _hints(facts)
    assert facts.notes[0].text.startswith("99.9% without fine-tuning")


def test_a_folder_is_exported_first(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from secateur.runtime.compiler.graph import read_model

    with pytest.raises(FileError, match=r"Export it first: secateur export .* --output"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("words", "pair"),
    [
        (["net.py:build", "--structure", "--ignore", "nosuch"], "--structure --ignore"),
        (["net.py:build", "--structure", "--include", "0"], "--structure --include"),
        (["net.py:build", "--structure", "--pattern", "2:4"], "--structure --pattern"),
        (["net.py:build", "--structure", "--input", "1x8", "--data", "d.py:f"], "--input --data"),
        (["net.py:build", "--input", "1x8"], "MODEL net.py:build --input"),
        (["net.py:build", "--data", "d.py:f"], "MODEL net.py:build --data"),
        (["--criteria", "--pattern", "2:4"], "--criteria --pattern"),
        (["--methods", "--structure"], "--methods --structure"),
        (["--patterns", "--weights", "w.safetensors"], "--patterns --weights"),
    ],
)
def test_inspect_refuses_what_would_change_nothing(words: list[str], pair: str) -> None:
    found = CliRunner().invoke(app, ["inspect", *words, "--json"])
    assert found.exit_code == 2
    error = json.loads(found.stdout)["error"]
    assert error["asked"] == f"secateur inspect {pair}"
    assert f"leave {pair.rpartition(' ')[2]} out" in error["do"]


def test_inspect_shows_a_list_and_a_model(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nbuild = lambda: nn.Linear(8, 8)\n")
    words = ["inspect", f"{tmp_path}/net.py:build", "--patterns", "--ignore", "bias", "--json"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.stderr
    assert {"patterns", "slots"} <= json.loads(found.stdout).keys()


@pytest.mark.parametrize(
    ("command", "words", "asked"),
    [
        ("prune", ["--calibration", "8", "-o", "OUT"], "--calibration 8"),
        ("shrink", ["--calibration", "8", "-o", "OUT", "--input", "1x8"], "--calibration 8"),
        ("compare", ["NET", "--model", "NET"], "--model NET"),
    ],
)
def test_flags_that_would_change_nothing(
    tmp_path: Path, command: str, words: list[str], asked: str
) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nbuild = lambda: nn.Linear(8, 8)\n")
    places = {"NET": f"{tmp_path}/net.py:build", "OUT": f"{tmp_path}/out"}
    given = [places.get(word, word) for word in (command, "NET", *words, "--json")]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 2
    error = json.loads(found.stdout)["error"]
    assert error["asked"] == asked.replace("NET", places["NET"])
    assert "leave" in error["do"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{}"),
        ("evaluate", "net.py:build", "--data", "{}.py:load"),
        ("evaluate", "net.py:build", "--weights", "{}.safetensors"),
        ("compile", "{}.onnx", "-o", "out.onnx"),
        ("bench", "{}.onnx"),
    ],
)
def test_names_that_no_file_can_have(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("from torch import nn\ndef build():\n    return nn.ReLU()\n")
    done = CliRunner().invoke(app, [*(word.format("a" * 300) for word in words), "--json"])
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == FileError.exit_code
    assert "characters" in error["found"] or "too long" in error["found"], error
    assert error["do"]
