"""The command line: what is written, what is said, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.formats import read_bundle

NETWORK = """
import torch
from torch import nn
from parts import block            # a module beside this file

def build():
    torch.manual_seed(0)
    return nn.Sequential(block(8, 64), block(64, 64), nn.Linear(64, 3))

def wide():
    return nn.Sequential(nn.Linear(5, 5))

def number():
    return 3

def broken():
    raise RuntimeError("out of luck")

def needy(size):
    return nn.Linear(size, size)
"""
PARTS = """
from torch import nn

def block(a, b):
    return nn.Sequential(nn.Linear(a, b), nn.ReLU())
"""
DATA = """
import torch

def load():
    print("loading the data")      # must not spoil a JSON document
    x = torch.randn(192, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    return {"train": [(x[:128], y[:128])], "test": [(x[128:], y[128:])]}

def pair():
    return load()["train"], load()["test"]

def unknown():
    return {"valid": []}

def endless():
    x, y = load()["train"][0]
    return [(x, y)] * 100_000, [(x, y)]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a network and data, and the current one."""
    for name, text in {"net.py": NETWORK, "parts.py": PARTS, "data.py": DATA}.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def secateur(*arguments: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == code, f"{found.stdout}\n{found.stderr}\n{found.exception!r}"
    return found


def document(*arguments: str, code: int = 0) -> dict[str, Any]:
    found = json.loads(secateur(*arguments, "--json", code=code).stdout)
    assert found["command"] == arguments[0]
    assert found["ok"] == (code in (0, 6))
    return found  # type: ignore[no-any-return]


# --- the way of a newcomer ---------------------------------------------------------------------


def test_prune_evaluate_compare(place: Path) -> None:
    data = ("--data", "data.py:load")
    run = document("prune", "net.py:build", "-o", "out", "--sparsity", "75%", *data)
    assert run["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert run["output"] == "out"
    assert {layer["name"] for layer in run["layers"]} == {"0.0.weight", "1.0.weight"}
    assert sorted(p.name for p in (place / "out").iterdir()) == [
        "facts.json", "model.safetensors", "recipe.yaml"
    ]  # fmt: skip
    assert run["comparison"]["b"]["bytes"] == (place / "out/model.safetensors").stat().st_size

    found = document("evaluate", "out", *data)["measurement"]
    assert found["accuracy"] == run["comparison"]["b"]["accuracy"]
    assert found["pruned_sparsity"] == pytest.approx(0.75, abs=0.01)
    assert found["split"] == "test"

    both = document("compare", "net.py:build", "out", *data)["comparison"]
    assert not both["identical"]
    assert both["size_ratio"] > 1.2
    assert both["difference"] == pytest.approx(run["comparison"]["difference"])


def test_the_text_says_what_was_done(place: Path) -> None:
    text = secateur("prune", "net.py:build", "-o", "out", "--data", "data.py:pair").stdout
    for piece in ("takes part", "criterion", "0.0.weight", "x smaller", "Written to out"):
        assert piece in text
    assert max(map(len, text.split("\n"))) <= 100


def test_epochs_mean_gradual_pruning(place: Path) -> None:
    run = document(
        "prune", "net.py:build", "-o", "out", "--sparsity", "0.8", "--data", "data.py:load",
        "--epochs", "20", "--lr", "0.1", "--seed", "3",
    )  # fmt: skip
    sparsities = [record["sparsity"] for record in run["history"] if "dropped" in record]
    assert len(sparsities) > 5
    assert sparsities == sorted(sparsities)
    assert run["comparison"]["b"]["accuracy"] > run["comparison"]["a"]["accuracy"]
    assert run["recipe"]["seed"] == 3


def test_a_recipe_file_is_the_same_as_its_flags(place: Path) -> None:
    (place / "r.yaml").write_text("criterion: {magnitude: {p: 2}}\ntarget: 60%\n")
    flags = document(
        "prune", "net.py:build", "-o", "a", "--criterion", "magnitude:p=2", "--sparsity", "60%"
    )
    file = document("prune", "net.py:build", "-o", "b", "--recipe", "r.yaml")
    assert flags["fingerprint"] == file["fingerprint"]
    again = document("prune", "net.py:build", "-o", "c", "--recipe", "a/recipe.yaml")
    assert again["fingerprint"] == flags["fingerprint"]
    assert (place / "a/model.safetensors").read_bytes() == (
        place / "c/model.safetensors"
    ).read_bytes()


def test_a_bundle_can_be_pruned_further(place: Path) -> None:
    document("prune", "net.py:build", "-o", "a", "--sparsity", "50%")
    document("prune", "a", "-o", "b", "--sparsity", "75%", "--criterion", "random")
    first, second = read_bundle(place / "a").masks, read_bundle(place / "b").masks
    assert second.sparsity == pytest.approx(0.75, abs=0.01)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)


def test_a_bundle_is_built_from_what_the_user_says_if_its_source_is_gone(place: Path) -> None:
    document("prune", "net.py:build", "-o", "out")
    (place / "net.py").rename(place / "moved.py")
    error = document("evaluate", "out", code=4)["error"]
    assert "--model" in error["do"]
    document("evaluate", "out", "--model", "moved.py:build")
    assert document("evaluate", "out", "--model", "moved.py:wide", code=2)["error"]["asked"]


def test_no_code_is_run_out_of_a_bundle(place: Path) -> None:
    document("prune", "net.py:build", "-o", "out")
    evil = place / "out" / "net.py"
    evil.write_text("open('ran', 'w')\ndef build(): return None\n")
    facts = json.loads((place / "out/facts.json").read_text())
    for source in ("out/net.py:build", str(evil) + ":build"):
        facts["environment"]["source"] = {"factory": source}
        (place / "out/facts.json").write_text(json.dumps(facts))
        assert "inside the bundle" in document("evaluate", "out", code=2)["error"]["found"]
    assert not (place / "ran").exists()


def test_weights_from_a_file(place: Path) -> None:
    build = torch.nn.Sequential(torch.nn.Linear(5, 5))
    save_file(build.state_dict(), place / "w.safetensors")
    found = document("evaluate", "net.py:wide", "--weights", "w.safetensors")
    assert found["measurement"]["parameters"] == 30
    error = document("evaluate", "net.py:build", "--weights", "w.safetensors", code=2)["error"]
    assert "missing" in error["found"]
    assert "unexpected" in error["found"]
    damaged = (place / "w.safetensors").read_bytes()[:-7]
    (place / "w.safetensors").write_bytes(damaged)
    error = document("evaluate", "net.py:wide", "--weights", "w.safetensors", code=4)["error"]
    assert error["type"] == "FormatError"


def test_inspect_lists_every_parameter_once(place: Path) -> None:
    found = document("inspect", "net.py:build", "--ignore", "1.*")
    roles = {slot["name"]: slot["role"] for slot in found["slots"]}
    assert roles == {
        "0.0.weight": "prunable", "0.0.bias": "not prunable",
        "1.0.weight": "left out", "1.0.bias": "not prunable",
        "2.weight": "left out", "2.bias": "not prunable",
    }  # fmt: skip
    assert found["totals"] == {"parameters": 4931, "prunable": 512, "weights": 1}
    text = secateur("inspect", "net.py:build").stdout
    assert all(name in text for name in roles)


def test_inspect_lists_the_catalogues() -> None:
    lists = ("methods", "criteria", "patterns", "allocations", "schedules", "recoveries")
    found = document("inspect", *(f"--{name}" for name in lists))
    for name in lists:
        assert found[name]
        assert all(entry["summary"].endswith(".") for entry in found[name])
    assert {"name": "nm", "arguments": {"keep": 2, "of": 4, "rows": 1}}.items() <= next(
        entry for entry in found["patterns"] if entry["name"] == "nm"
    ).items()


# --- gains that are required -------------------------------------------------------------------


def test_required_gains(place: Path) -> None:
    document("prune", "net.py:build", "-o", "out", "--sparsity", "90%")
    data = ("--data", "data.py:load")
    document("compare", "net.py:build", "out", "--require", "smaller")
    same = document("compare", "out", "out", "--require", "smaller", code=6)
    assert same["missing"] == ["smaller"]
    document("compare", "out", "out", *data, "--require", "accuracy", "--require", "accuracy=0")
    both = ("compare", "net.py:build", "out")
    lost = -100 * document(*both, *data)["comparison"]["difference"]
    document(*both, *data, "--require", f"accuracy={lost + 0.1}")
    document(*both, *data, "--require", f"accuracy={lost - 0.1}", code=6)
    text = secateur(*both, *data, "--require", f"accuracy={lost - 0.1}", code=6)
    assert "required and missing: accuracy" in text.stderr
    assert "not measured" not in text.stderr


def test_accuracy_that_was_not_measured_is_missing_and_told_so(place: Path) -> None:
    (place / "numbers.py").write_text(
        'import torch\ndef load(): return {"test": [(torch.zeros(4, 8), torch.zeros(4, 3))]}\n'
    )
    found = ("compare", "net.py:build", "net.py:build", "--data", "numbers.py:load")
    text = secateur(*found, "--require", "accuracy=0.5", code=6)
    assert "not measured: the data have no classes" in text.stderr


def test_required_gains_are_checked_before_the_work(place: Path) -> None:
    error = document("compare", "gone.py:x", "gone.py:y", "--require", "fast", code=2)["error"]
    assert "did you mean 'faster'" in error["do"]
    document("compare", "gone.py:x", "gone.py:y", "--require", "faster", code=2)


# --- errors ------------------------------------------------------------------------------------


def test_errors_have_four_lines_and_no_traceback(place: Path) -> None:
    found = secateur("prune", "net.py:biuld", "-o", "out", code=2)
    assert found.stdout == ""
    for label in ("asked", "found", "why", "do"):
        assert f"\n  {label}" in found.stderr
    assert "did you mean 'build'" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("model", "code", "piece"),
    [
        ("gone.py:build", 4, "there is no file"),
        ("net.py:number", 2, "returned an int"),
        ("net.py:broken", 2, "out of luck"),
        ("net.py:needy", 2, "needs the arguments size"),
        ("net.py", 2, "the function is missing"),
        ("old.pt", 2, "pickles"),
        ("old.PTH", 2, "pickles"),
        ("net.onnx", 5, "cannot be read yet"),
        ("net.keras", 5, "cannot be read yet"),
        ("w.safetensors", 2, "not the architecture"),
        ("nowhere", 4, "no such file or folder"),
        (".", 4, "no config.json"),
        ("bad.py:build", 2, "SyntaxError"),
    ],
)
def test_models_that_are_none(place: Path, model: str, code: int, piece: str) -> None:
    (place / "bad.py").write_text("def build(:\n")
    error = document("prune", model, "-o", "out", code=code)["error"]
    assert piece in error["found"]
    assert all(error[key] for key in ("asked", "found", "why", "do"))
    assert error["exit_code"] == code
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("flags", "piece"),
    [
        (("--sparsity", "90"), "90 is not in [0, 1)"),
        (("--sparsity", "much"), "cannot be read"),
        (("--sparsity", "0.5", "--target", "macs=50%"), "two targets"),
        (("--criterion", "magnitud"), "no criterion of that name"),
        (("--criterion", "magnitude:q=1"), "no argument"),
        (("--criterion", "magnitude:p"), "not key=value"),
        (("--criterion", "wanda"), "no data was given"),
        (("--pattern", "2:4", "--sparsity", "0.7"), "keeps 2 of 4"),
        (("--recipe", "r.yaml", "--seed", "1"), "--seed was given too"),
        (("--lr", "0.1"), "does not train"),
        (("--ignore", "nothing"), "matches none"),
        (("--onnx", "x.onnx"), "no data was given"),
        (("--epochs", "2"), "no data was given"),
        (("--data", "data.py:unknown"), "no entry of the data"),
    ],
)
def test_flags_that_cannot_be(place: Path, flags: tuple[str, ...], piece: str) -> None:
    error = document("prune", "net.py:build", "-o", "out", *flags, code=2)["error"]
    assert piece in error["found"]
    assert not (place / "out").exists()


def test_the_output_is_checked_before_the_work(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("keep me")
    # The model does not exist either: the folder is what is complained about.
    error = document("prune", "gone.py:build", "-o", "out", code=4)["error"]
    assert error["type"] == "OutputExists"
    document("prune", "net.py:build", "-o", "out", "--overwrite", code=4)
    assert (place / "out" / "mine.txt").read_text() == "keep me"
    document("prune", "net.py:build", "-o", "new")
    document("prune", "net.py:build", "-o", "new", "--overwrite")


def test_a_failed_export_leaves_the_bundle(place: Path) -> None:
    (place / "strange.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Strange(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        y = self.a(x)\n"
        "        return self.b(y if float(y.sum()) > 0 else -y)\n"
        "def build(): return Strange()\n"
    )
    pytest.importorskip("onnxscript")
    document(
        "prune", "strange.py:build", "-o", "out", "--data", "data.py:load", "--onnx", "s.onnx",
        code=2,
    )  # fmt: skip
    assert sorted(p.name for p in place.iterdir() if p.suffix != ".py" and p.is_file()) == []
    assert "accuracy" in document("evaluate", "out", "--data", "data.py:load")["measurement"]


# --- the real program --------------------------------------------------------------------------

RUN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from secateur.cli.main import run; run()"
)


def program(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupted_runs_leave_nothing(place: Path) -> None:
    before = sorted(place.rglob("*.*"))
    process = program(
        place, "prune", "net.py:build", "-o", "out", "--data", "data.py:endless", "--epochs", "9"
    )
    assert process.stdout is not None
    for line in process.stdout:  # the plan is printed right before the work
        if line.startswith("recovery"):
            break
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip().split("\n")[-1] == "Interrupted. Nothing half-written was left."
    assert "Traceback" not in errors
    after = [p for p in sorted(place.rglob("*.*")) if "__pycache__" not in str(p)]
    assert after == before


def test_wrong_options_give_a_document_too(place: Path) -> None:
    process = program(place, "prune", "net.py:build", "--wrong", "--json")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "--wrong" in json.loads(out)["error"]["found"]


def test_version_and_help() -> None:
    assert secateur("--version").stdout.startswith("secateur 0.")
    text = secateur("--help").stdout
    for piece in ("Exit codes", "inspect", "prune", "evaluate", "compare", "export", "130"):
        assert piece in text
