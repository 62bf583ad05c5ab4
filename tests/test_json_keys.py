"""The keys of JSON documents are those that the reference lists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.report import jsonreport

NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
"""
DATA = """
import torch
def load():
    return {"test": [(torch.ones(4, 4), torch.zeros(4, dtype=torch.long))]}
"""
HEAD = {"secateur", "schema", "command", "ok"}


def listed(command: str) -> set[str]:
    """What the docstring says that a command writes."""
    doc = jsonreport.__doc__ or ""
    found = re.search(rf"``{command}``: (.*?)(?=\. ``|\.\n)", doc, re.DOTALL)
    assert found is not None, command
    return set(re.findall(r"``(\w+)``", found[1]))


def test_documents_have_the_keys_that_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("data.py").write_text(DATA)
    model, data, example = "net.py:build", ("--data", "data.py:load"), ("--input", "1x4")
    prune = listed("prune")
    shrink = listed("shrink") | prune - {"sparsity", "layers"}
    cases = {
        ("inspect", model): {"slots", "totals"},
        ("inspect", model, "--structure", *example): {"widths", "parameters", "removable"},
        ("prune", model, "-o", "out", *data): prune,
        ("shrink", model, "-o", "small", *example): shrink - {"sparsity", "layers"},
        ("evaluate", "out", *data): listed("evaluate"),
        ("compare", model, "out", *data): listed("compare"),
    }
    for words, keys in cases.items():
        found = CliRunner().invoke(app, [*words, "--json"])
        assert set(json.loads(found.stdout)) == keys | HEAD, words
    assert {"slots", "totals", "widths", "parameters", "removable"} <= listed("inspect")
