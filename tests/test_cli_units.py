"""Units on the command line: what is asked for and what is shown say what they count."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app


@pytest.mark.parametrize("value", ["50%", "2x", "nan", "much", ""])
def test_a_required_accuracy_is_in_points(value: str) -> None:
    words = ["compare", "a.py:a", "b.py:b", "--data", "c.py:c", "--require", f"accuracy={value}"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert f"{value!r} is no plain number" in " ".join(found.stderr.split())


ONLY_TRAINING = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

def load():
    x = torch.randn(32, 8)
    batch = [(x, x[:, :3].argmax(1))]
    return {"train": batch, "test": batch if TEST else None}
"""


@pytest.mark.parametrize("test", [True, False])
def test_tickets_say_what_they_were_measured_on(tmp_path: Path, test: bool) -> None:
    file = tmp_path / "parts.py"
    file.write_text(ONLY_TRAINING.replace("TEST", str(test)))
    words = ["ticket", f"{file}:build", "--data", f"{file}:load", "-o", str(tmp_path / "runs")]
    shown = CliRunner().invoke(app, [*words, "--levels", "0.5", "--epochs", "1"]).stdout
    assert "accuracy" in shown
    assert ("accuracy (training)" in " ".join(shown.split())) is not test
