"""Units on the command line: what is asked for and what is shown say what they count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur
from secateur.cli.compare import _holds
from secateur.cli.main import app
from secateur.core.batches import Data


@pytest.mark.parametrize("value", ["50%", "2x", "nan", "much", ""])
def test_a_required_accuracy_is_in_points(value: str) -> None:
    words = ["compare", "a.py:a", "b.py:b", "--data", "c.py:c", "--require", f"accuracy={value}"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert f"{value!r} is no plain number" in " ".join(found.stderr.split())


class Answers(nn.Module):
    """Right on the first of ``range(of)``, and wrong on the rest."""

    def __init__(self, right: int) -> None:
        super().__init__()
        self.right = right
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        wrong = (x >= self.right).float()
        return torch.stack([wrong, 1 - wrong], 1)


@pytest.mark.parametrize("of", [200, 1000])
@pytest.mark.parametrize("points", [0.5, 1.0, 2.0])
def test_a_loss_of_just_what_is_allowed_is_allowed(of: int, points: float) -> None:
    batch = torch.arange(of), torch.ones(of, dtype=torch.long)
    lost = round(of * points / 100)
    for right in range(of - of // 10, of + 1, of // 200):
        one, more = (
            secateur.compare(Answers(right), Answers(right - less), [batch], latency=False)
            for less in (lost, lost + 1)
        )
        assert _holds(one, "accuracy", points)
        assert not _holds(more, "accuracy", points)


def test_a_loss_in_the_unit_of_a_metric_of_the_users_own() -> None:
    def share(model: nn.Module, batches: object) -> float:
        return 0.9 if model is dense else 0.895

    dense, pruned = nn.Linear(2, 2), nn.Linear(2, 2)
    data = Data(test=[torch.zeros(2, 2)], metric=share)
    found = secateur.compare(dense, pruned, data, latency=False)
    assert _holds(found, "accuracy", 0.005)
    assert not _holds(found, "accuracy", 0.0049)


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
