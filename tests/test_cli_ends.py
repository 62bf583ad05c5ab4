"""How a command ends when code that it runs wants to end the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.report import error_document

LEAVES = """
import sys

def build():
    sys.exit(3)

def ends():
    raise SystemExit

"""
SCRIPT = """
import sys
sys.exit(0)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(LEAVES)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "said", "line"),
    [("net.py:build", "exit(3)", 5), ("net.py:ends", "exit()", 8), ("script.py:build", "exit(0)", 3)],
)  # fmt: skip
def test_a_model_that_ends_the_program(place: Path, spec: str, said: str, line: int) -> None:
    found = CliRunner().invoke(app, ["evaluate", f"{place}/{spec}", "--json"])
    assert found.exit_code == 2
    error = json.loads(found.stdout)["error"]
    assert said in error["found"]
    assert f"{spec.partition(':')[0]}, line {line}" in error["why"]
    assert "__main__" in error["do"]
    text = CliRunner().invoke(app, ["evaluate", f"{place}/{spec}"])
    assert text.exit_code == 2
    assert said in text.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("by 0"), RuntimeError()])
def test_every_document_of_an_error_has_four_parts(error: BaseException) -> None:
    told = json.loads(error_document("0.1.0", "prune", error, 1))["error"]
    assert told["type"] == type(error).__name__
    assert all(told[key] for key in ("asked", "found", "why", "do"))
