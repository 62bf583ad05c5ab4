"""What a pipe or a file gets: a row stays one line, since lines are searched; a document is alone."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app

NAMES = [f"a_layer_with_a_name_that_is_long_{i}" for i in range(3)]
NETWORK = f"""
from collections import OrderedDict
from torch import nn

def build():
    return nn.Sequential(OrderedDict((name, nn.LayerNorm(4)) for name in {NAMES}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


@pytest.mark.usefixtures("place")
def test_every_parameter_is_one_line() -> None:
    found = CliRunner().invoke(app, ["inspect", "net.py:build"])
    assert found.exit_code == 0, found.stderr
    for name in NAMES:
        (line,) = [line for line in found.stdout.splitlines() if f"{name}.weight" in line]
        assert line.endswith("not prunable: a normalisation")


@pytest.mark.usefixtures("place")
def test_every_part_of_an_error_is_one_line() -> None:
    found = CliRunner().invoke(app, ["inspect", f"{'x' * 90}.py:build"])
    assert found.exit_code != 0
    first = [line.split()[0] for line in found.stderr.splitlines() if line.strip()]
    assert first == ["error", "asked", "found", "why", "do"]


@pytest.mark.usefixtures("place")
def test_columns_break_lines_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = CliRunner().invoke(app, ["inspect", "net.py:build"])
    assert all(len(line) <= 60 for line in found.stdout.splitlines())
    assert not any("not prunable: a normalisation" in line for line in found.stdout.splitlines())


def test_what_is_indented_is_not_filled_up_with_spaces(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "net.py").write_text(
        "from torch import nn\nbuild = lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))\n"
    )
    words = ["prune", "net.py:build", "--sparsity", "99%", "--output", "out"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.stderr
    assert "\nHints\n  " in found.stdout
    lines = found.stdout.splitlines()
    assert not any(line.endswith(" ") for line in lines)
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "net.py:build"],
        ["inspect", "net.py:build", "--json"],
        ["inspect", "nothing.py:build", "--json"],
        ["inspect", "net.py:build", "--wrong", "--json"],
        ["prune", "--help"],
    ],
)
def test_a_reader_that_goes_away_is_no_mistake(place: Path, words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "secateur", *words],
            stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=place, check=False,
        )  # fmt: skip
    assert done.returncode == 141
    for word in ("Traceback", "BrokenPipe", "error", "sys.exit"):
        assert word not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_loses_nothing_but_what_goes_to_it(place: Path, closed: str) -> None:
    words = [sys.executable, "-m", "secateur", "inspect", "net.py:build", "--json"]
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(words)} {closed}"],
        capture_output=True, text=True, cwd=place, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    if " >&-" not in f" {closed}":
        assert json.loads(done.stdout)["command"] == "inspect"


LOUD = """
import ctypes, os, subprocess, sys
import torch

def loud():
    print("by Python")
    sys.__stdout__.write("by the first stdout\\n")
    os.write(1, b"by the system\\n")
    subprocess.run([sys.executable, "-c", "print('by a program')"], check=True)
    ctypes.CDLL(None).printf(b"by a library\\n")

def load():
    loud()
    return {"test": [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))]}

def fails():
    loud()
    raise RuntimeError("out of luck")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="looks into its own C library")
@pytest.mark.parametrize(("data", "code"), [("load", 0), ("fails", 2)])
def test_nothing_is_written_beside_a_document(place: Path, data: str, code: int) -> None:
    (place / "loud.py").write_text(LOUD)
    words = ["evaluate", "net.py:build", "--data", f"loud.py:{data}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "secateur", *words],
        capture_output=True, text=True, cwd=place, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert ("error" in found) == bool(code)
    for by in ("Python", "the first stdout", "the system", "a program", "a library"):
        assert f"by {by}\n" in done.stderr
