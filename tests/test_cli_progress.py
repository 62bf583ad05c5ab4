"""Bars on a terminal for what takes long, and nothing of them elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from secateur.cli import compare as compare_command
from secateur.cli import evaluate, screen
from secateur.cli.screen import Screen
from secateur.core.batches import Data
from secateur.core.errors import UsageError
from secateur.evaluate import compare

BATCHES = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))] * 3


def opened(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> tuple[Screen, io.StringIO]:
    monkeypatch.setattr(screen, "PATIENCE", -1.0)  # everything takes long
    found, written = Screen("evaluate", False, io.StringIO()), io.StringIO()
    found.errors = Console(file=written, force_terminal=terminal, width=80, color_system=None)
    return found, written


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("terminal", [True, False])
def test_measuring_draws_a_bar_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, split: str, terminal: bool
) -> None:
    out, written = opened(monkeypatch, terminal=terminal)
    with out.watching(Data(**{split: BATCHES})) as data:
        net = torch.nn.Linear(4, 2)
        assert compare(net, net, data, latency=False).a.samples == 6
    assert ("measuring" in written.getvalue() and "100 %" in written.getvalue()) == terminal


def test_batches_without_a_length_are_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(BATCHES)

    out, written = opened(monkeypatch, terminal=True)
    with out.watching(Data(test=Stream())) as data:
        assert data is not None
        assert data.test is not None
        assert len(list(data.test)) == 3
    assert "measuring" in written.getvalue()


def test_a_step_without_a_measure_shows_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        out, written = opened(monkeypatch, terminal=terminal)
        with out.working("exporting"):
            pass
        assert ("exporting ..." in written.getvalue()) == terminal


def test_no_data_and_none_to_measure_on_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = opened(monkeypatch, terminal=True)
    for data in (None, Data()):
        with out.watching(data) as watched:
            assert watched is data


@pytest.mark.parametrize("command", [evaluate.evaluate, compare_command.compare])
def test_commands_that_measure_watch_their_batches(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def measured(*given: Any, **_: Any) -> None:
        seen.extend(type(x.test).__name__ for x in given if isinstance(x, Data))
        raise UsageError("measuring", "no further")

    monkeypatch.setattr(evaluate, "measure", measured)
    monkeypatch.setattr(compare_command, "compare_networks", measured)
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 2)\n")
    (tmp_path / "data.py").write_text("def load(): return {'test': [1, 2]}\n")
    models = [f"{tmp_path / 'net.py'}:build"] * (2 if command is compare_command.compare else 1)
    with pytest.raises(typer.Exit):
        command(*models, data=f"{tmp_path / 'data.py'}:load")
    assert seen == ["Watched"]
