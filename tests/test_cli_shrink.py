"""Structural pruning on the command line."""

import json
import subprocess
import sys
from pathlib import Path

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


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "secateur", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NET)
    done = _run(tmp_path, "shrink", "net.py:build", "-o", "out", "--data", "net.py:data",
                "--target", "params=50%", "--criterion", "geometric_median", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["proof"] < 1e-5
    assert told["target"]["reached"] <= told["target"]["limit"]
    assert told["recipe"]["criterion"] == "geometric_median"
    again = _run(tmp_path, "evaluate", "out", "--data", "net.py:data", "--json")
    assert again.returncode == 0, again.stderr
    refused = _run(tmp_path, "shrink", "net.py:build", "-o", "more", "--input", "1x1x8x8",
                   "--target", "params=10", "--json")  # fmt: skip
    assert refused.returncode == 2
    assert "remain" in json.loads(refused.stdout)["error"]["found"]
    assert not (tmp_path / "more").exists()


def test_inspect_structure(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NET)
    done = _run(tmp_path, "inspect", "net.py:build", "--structure", "--input", "1x1x8x8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
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
def test_a_recipe_file_says_everything(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "net.py").write_text(_NET)
    (tmp_path / "r.yaml").write_text("rounds: 2\nseed: 5\nrecovery: [{finetune: {epochs: 1}}]")
    words = ["shrink", f"{tmp_path}/net.py:build", "-o", f"{tmp_path}/out", "--json"]
    words += ["--data", f"{tmp_path}/net.py:data", "--recipe", f"{tmp_path}/r.yaml", *flags]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["found"] == f"{flags[0]} was given too"
