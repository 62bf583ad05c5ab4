"""Steps of widths and the engine of a latency target, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app

_NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 128, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 3),
    )
"""


def _shrunk(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    (folder / "net.py").write_text(_NET)
    monkeypatch.chdir(folder)
    run = ["shrink", "net.py:build", "-o", "out", "--overwrite", "--input", "1x3x8x8", *words]
    done = CliRunner().invoke(app, run)
    return done.exit_code, done.stdout


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = _shrunk(tmp_path, monkeypatch)
    assert code == 0
    assert "Widths come in multiples of 16" in text
    assert "align=16" not in text
    code, text = _shrunk(tmp_path, monkeypatch, "--json")
    found = json.loads(text)
    assert (found["recipe"]["align"], found["target"]["align"]) == (0, 16)
    assert all(w["kept"] % 16 == 0 for w in found["widths"])
    code, text = _shrunk(tmp_path, monkeypatch, "--align", "1", "--json")
    found = json.loads(text)
    assert (found["recipe"]["align"], found["target"]["align"]) == (1, 1)
    assert any(w["kept"] % 16 for w in found["widths"])


def test_engine_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--target", "latency=80%", "--engine", "torch", "--align", "16", "--json"]
    code, text = _shrunk(tmp_path, monkeypatch, *words)
    found = json.loads(text)
    if code == 0:  # how fast it gets is the machine's business
        assert found["recipe"]["engine"] == "torch"
        assert found["target"]["engine"] == "torch"
    else:
        assert "remain" in found["error"]["found"]
    code, text = _shrunk(tmp_path, monkeypatch, "--engine", "tensorrt", "--json")
    assert code == 2
    assert "onnxruntime" in text
