"""Published methods of structural pruning, by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from secateur import ShrinkRecipe, Target, shrink
from secateur.allocate.widths import RankedWidths, UniformWidths
from secateur.cli.main import app
from secateur.drive.structural.methods import SHRINK_ALIASES
from secateur.drive.structural.recipe_file import from_plain, to_plain
from secateur.score import BatchNormScale, GeometricMedian

GIVEN = torch.Generator().manual_seed(0)
IMAGES = torch.randn(32, 1, 8, 8, generator=GIVEN)
BATCHES = [(IMAGES, (IMAGES.mean((1, 2, 3)) > 0).long())]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


FILE = "import torch\nfrom torch import nn\n\n" + inspect.getsource(build)


def network() -> nn.Module:
    net = build()
    with torch.no_grad():  # scales that differ
        for norm in (net[1], net[4]):
            norm.weight.copy_(torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.1)
    return net


@pytest.mark.parametrize("name", SHRINK_ALIASES)
def test_a_method_cuts_by_its_name_what_its_function_cuts(name: str) -> None:
    recipe = SHRINK_ALIASES[name](Target("macs", 0.6))
    plain = {"method": name, "target": "macs=60%"}
    assert from_plain(plain) == recipe
    assert from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe
    small = shrink(network(), recipe, data=BATCHES)
    assert small.facts.measures["proof"] < 1e-5
    assert any(width.kept < width.groups for width in small.facts.widths)


def test_methods_are_made_of_what_their_sources_say() -> None:
    assert SHRINK_ALIASES["fpgm"]() == ShrinkRecipe(GeometricMedian(), allocation=UniformWidths())
    ranked = RankedWidths(normalise="none")  # one threshold for the scales of the whole network
    assert SHRINK_ALIASES["slimming"]() == ShrinkRecipe(BatchNormScale(), allocation=ranked)
    kept = {
        w.name: w.kept
        for w in shrink(network(), SHRINK_ALIASES["slimming"](), data=BATCHES).facts.widths
    }
    assert sum(kept.values()) < 32


def test_a_method_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FILE)
    words = ["shrink", "net.py:build", "--input", "1x1x8x8", "--json"]
    told = json.loads(CliRunner().invoke(app, [*words, "-o", "a", "--method", "fpgm"]).stdout)
    assert told["recipe"] == to_plain(SHRINK_ALIASES["fpgm"]())
    changed = [*words, "-o", "b", "--method", "fpgm", "--allocation", "ranked"]
    told = json.loads(CliRunner().invoke(app, changed).stdout)
    assert told["recipe"]["criterion"] == to_plain(SHRINK_ALIASES["fpgm"]())["criterion"]
    assert from_plain(told["recipe"]).allocation == RankedWidths()
    wrong = CliRunner().invoke(app, [*words, "-o", "c", "--method", "fpmg"])
    assert wrong.exit_code == 2
    assert "fpgm" in json.loads(wrong.stdout)["error"]["do"]
    listed = json.loads(CliRunner().invoke(app, ["inspect", "--shrink-methods", "--json"]).stdout)
    assert [entry["name"] for entry in listed["shrink-methods"]] == list(SHRINK_ALIASES)


def test_filters_go_by_their_own_l1_norm() -> None:
    net = network()
    norms = net[0].weight.detach().abs().sum((1, 2, 3))
    with torch.no_grad():  # those who read them say the opposite
        net[3].weight.div_(norms.square()[None, :, None, None])
    cut = shrink(net, SHRINK_ALIASES["filters"](Target("macs", 0.6)), data=BATCHES)
    assert cut.surgery is not None
    kept = cut.surgery.cuts["0.weight"][0].positions()
    assert sorted(kept) == sorted(norms.topk(len(kept)).indices.tolist())
