"""``secateur plot``: what it reads, writes, leaves out and refuses."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plot_cases import ALL, CURVES, FACTS, MATRIX
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur.allocate import Ranked
from secateur.cli.main import app
from secateur.cli.plot_sources import read_source
from secateur.experiments import TicketPlan, Training, find_ticket
from secateur.report.plots_style import write_plot

pytest.importorskip("matplotlib")


def command(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plot", *map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ticket runs of two levels, and their facts as the command writes them."""
    folder = tmp_path_factory.mktemp("tickets")
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    data = secateur.Data(train=[(x, x[:, :2].argmax(1))], test=[(x, x[:, :2].argmax(1))])
    recipe = secateur.Recipe(allocation=Ranked())
    for rewind in ("rate", "reinit"):
        plan = TicketPlan(levels=(0.4, 0.7), rewind=rewind, training=Training(epochs=2))
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        for part, seed in zip((network[0], network[2]), (1, 2), strict=True):
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(part.weight, std=0.3, generator=generator)
            nn.init.zeros_(part.bias)
        found = find_ticket(network, recipe, data, folder=folder / "runs", plan=plan)
        text = json.dumps({"secateur": "0", "ok": True, **found.to_dict()})
        (folder / f"{rewind}.json").write_text(text, "utf-8")
    return folder


def test_a_bundle(tmp_path: Path) -> None:
    secateur.prune(build(), secateur.recipes.magnitude(0.5)).save(tmp_path / "pruned")
    found = command(tmp_path / "pruned", "-o", tmp_path / "plots")
    assert [plot["name"] for plot in found["plots"]] == ["layers"]
    assert [row["plot"] for row in found["left_out"]] == ["training", "widths"]
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"layers.svg", "layers.csv"}
    facts = json.loads((tmp_path / "pruned" / "facts.json").read_text("utf-8"))
    text = (tmp_path / "plots" / "layers.csv").read_text("utf-8").splitlines()
    expected = [f"{x['name']},{x['total']},{x['kept']}" for x in facts["layers"]]
    assert [line.rpartition(",")[0] for line in text[1:]] == expected
    again = command(tmp_path / "pruned", "-o", tmp_path / "plots", code=4)
    assert again["error"]["type"] == "OutputExists"
    command(tmp_path / "pruned", "-o", tmp_path / "plots", "--overwrite", "--format", "png")
    ends = {path.suffix for path in (tmp_path / "plots").iterdir()}
    assert ends == {".svg", ".png", ".csv"}


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    content = {
        **FACTS.to_dict(),
        "robustness": CURVES.to_dict(),
        "similarity": {"names": ["x", "y", "z"], "corrected": MATRIX, "values": MATRIX},
    }
    path.write_text(json.dumps({"secateur": "0", "ok": True, **content}), "utf-8")
    found = command(path, "-o", tmp_path / "plots", "--steps-per-epoch", 10)
    names = [plot["name"] for plot in found["plots"]]
    assert names == ["training", "layers", "widths", "similarity", "robustness"]
    for name in names:  # the same as from Python
        _, numbers = write_plot(ALL[name](), tmp_path / f"{name}.svg")
        assert (tmp_path / "plots" / f"{name}.csv").read_bytes() == numbers.read_bytes()
        made = (tmp_path / "plots" / f"{name}.svg").read_bytes()
        assert made == (tmp_path / f"{name}.svg").read_bytes()


def test_ticket_runs(runs: Path, tmp_path: Path) -> None:
    found = command(runs / "runs", "-o", tmp_path / "all")
    assert [(p["name"], p["rows"]) for p in found["plots"]] == [("tickets", 6), ("similarity", 4)]
    assert "bundle" in found["left_out"][0]["why"]
    one = next((runs / "runs").glob("rate*"))
    found = command(one, "-o", tmp_path / "one")
    assert [(p["name"], p["rows"]) for p in found["plots"]] == [("tickets", 3), ("similarity", 4)]
    document = command(runs / "rate.json", "-o", tmp_path / "document")
    assert [row["plot"] for row in document["left_out"]] == ["similarity"]
    told = [read_source(place).tickets[0]["split"] for place in (one, runs / "rate.json")]
    assert told == ["test", "test"]
    texts = [(tmp_path / n / "tickets.csv").read_text("utf-8") for n in ("one", "document")]
    assert texts[0] == texts[1]
    facts = json.loads((runs / "rate.json").read_text("utf-8"))
    accuracies = [float(line.split(",")[3]) for line in texts[0].splitlines()[1:]]
    assert accuracies == [stage["accuracy"] for stage in (facts["dense"], *facts["levels"])]


def test_an_altered_level_is_refused(runs: Path, tmp_path: Path) -> None:
    file = next((runs / "runs").glob("rate*/level-01*/facts.json"))
    text = file.read_text("utf-8")
    file.write_text(text.replace("0", "1", 1), "utf-8")
    try:
        error = command(file.parent.parent, "-o", tmp_path / "plots", code=4)["error"]
    finally:
        file.write_text(text, "utf-8")
    assert error["type"] == "FormatError"
    assert "facts.json" in error["found"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", 4),
        ("[]", 4),
        ("\udcff", 4),
        ('{"a": 1, "a": 2}', 4),
        ('{"layers": [{"name": "a"}]}', 4),
        ('{"layers": 5}', 4),
        ('{"layers": [{"name": "a", "shape": [2], "total": 2, "kept": "1"}]}', 3),
        ('{"history": [1]}', 4),
        ('{"history": [{"step": 1, "sparsity": "0.5"}]}', 3),
        ('{"history": [{"step": NaN, "sparsity": 0.5}]}', 3),
        ('{"widths": [{"name": "a", "groups": 0, "kept": 0}]}', 3),
        ('{"dense": {}, "levels": []}', 4),
        ('{"dense": 1, "levels": 2}', 4),
        ('{"curves": [{"model": "a"}], "units": 1}', 4),
        ('{"curves": 1}', 4),
        ('{"corrected": [1], "names": ["a"]}', 4),
        ('{"ok": false, "command": "prune"}', 2),
        ('{"ok": true, "command": "evaluate"}', 2),
        ('{"widths": [{"name": "a", "groups": 2}]}', 2),
    ],
)
def test_damaged_documents(text: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    error = command(path, "-o", tmp_path / "plots", code=code)["error"]
    assert all(error[part] for part in ("asked", "found", "why", "do"))
    assert not (tmp_path / "plots").exists()


def test_other_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(tmp_path / "none", "-o", tmp_path / "p", code=4)["error"]["type"] == "FileError"
    assert "facts.json" in command(tmp_path, "-o", tmp_path / "p", code=2)["error"]["found"]
    command(tmp_path, "-o", tmp_path / "p", "--format", "pdf", code=2)
    (tmp_path / "facts.json").write_text('{"history": [3]}', "utf-8")
    assert command(tmp_path, "-o", tmp_path / "p", code=4)["error"]["type"] == "FormatError"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command(tmp_path, "-o", tmp_path / "p", code=5)["error"]["type"] == "MissingExtra"


def test_ways_of_one_run_are_lines_of_their_own(tmp_path: Path) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    data = secateur.Data(train=[(x, x[:, :2].argmax(1))])
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    levels = {}
    for name, these, one_shot in (
        ("rate rewound, through 70.0 %", (0.4, 0.7), False),
        ("rate rewound, through 60.0 %", (0.4, 0.6), False),
        ("rate rewound, one shot", (0.4, 0.7), True),
    ):
        plan = TicketPlan(these, "rate", one_shot=one_shot, training=Training(epochs=1))
        found = find_ticket(network, None, data, folder=tmp_path / "runs", plan=plan)
        levels[name] = [(s.asked, s.accuracy, 1) for s in (found.dense, *found.levels)]
    command(tmp_path / "runs", "-o", tmp_path / "plots")
    drawn: dict[str, list[tuple[float, float, int]]] = {}
    with (tmp_path / "plots" / "tickets.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["asked"]), float(row["accuracy"]), int(row["runs"])
            drawn.setdefault(row["method"], []).append(point)
    assert drawn == levels
