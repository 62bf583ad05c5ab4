"""Structural pruning on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app

_NET = """
import torch
from torch import Tensor, nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
        nn.Linear(96, 3),
    )

def data():
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = (x, (x.mean((1, 2, 3)) > 0).long())
    return {"train": [batch], "test": [batch]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(_NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_command_line(here: Path) -> None:
    told = _run("shrink", "net.py:build", "-o", "out", "--data", "net.py:data",
                "--target", "params=50%", "--criterion", "geometric_median")  # fmt: skip
    assert told["proof"] < 1e-5
    assert told["target"]["reached"] <= told["target"]["limit"]
    assert told["recipe"]["criterion"] == "geometric_median"
    _run("evaluate", "out", "--data", "net.py:data")
    refused = _run("shrink", "net.py:build", "-o", "more", "--input", "1x1x8x8",
                   "--target", "params=10", code=2)  # fmt: skip
    assert "remain" in refused["error"]["found"]
    assert not (here / "more").exists()


@pytest.mark.usefixtures("here")
def test_inspect_structure() -> None:
    told = _run("inspect", "net.py:build", "--structure", "--input", "1x1x8x8")
    assert [w["name"] for w in told["widths"]] == ["0", "3"]
    assert all(row["width"] or row["pinned"] for row in told["parameters"])
    assert 0.5 < told["removable"] < 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--rounds", "1"), ("--seed", "0"), ("--align", "0"), ("--epochs", "2"), ("--lr", "0.1"),
        ("--distill", "0.5"), ("--uniform",), ("--ignore", "0"), ("--target", "macs=40%"),
    ],
)  # fmt: skip
def test_a_recipe_file_says_everything(here: Path, flags: tuple[str, ...]) -> None:
    (here / "r.yaml").write_text("rounds: 2\nseed: 5\nrecovery: [{finetune: {epochs: 1}}]")
    words = ["shrink", "net.py:build", "-o", "out", "--data", "net.py:data", "--recipe", "r.yaml"]
    found = _run(*words, *flags, code=2)["error"]["found"]
    assert found == f"{flags[0]} was given too"
