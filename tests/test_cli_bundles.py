"""The command line on networks that were pruned or cut before: what it writes can be opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.cli.main import app
from secateur.frontends import load_model

NETWORKS = """
import torch
from torch import nn

def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 4),
    )

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )

def images():
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 3, 8, 8, generator=g), torch.randint(4, (8,), generator=g)
    return {"train": [batch], "test": [batch]}

def rows():
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 16, generator=g), torch.randint(4, (8,), generator=g)
    return {"train": [batch], "test": [batch]}
"""
IMAGES = ("--data", "net.py:images")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*words: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def nonzeros(model: torch.nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


@pytest.fixture
def small(place: Path) -> Path:
    """A network that was cut."""
    told("shrink", "net.py:conv", "-o", "small", "--input", "1x3x8x8", "--target", "params=50%")
    return place


# -- cut before --------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_", [["small"], ["net.py:conv", "--weights", "small"]])
@pytest.mark.parametrize("how", [[], [*IMAGES, "--epochs", "1"]])
def test_a_network_that_was_cut_can_be_pruned_and_opened(
    small: Path, from_: list[str], how: list[str]
) -> None:
    told("prune", *from_, "-o", "out", "--sparsity", "50%", *how)
    found = told("evaluate", "out", *IMAGES)["measurement"]
    widths = [m.weight.shape[0] for m in load_model("small").model if hasattr(m, "weight")]
    opened = load_model("out")
    assert [m.weight.shape[0] for m in opened.model if hasattr(m, "weight")] == widths
    assert opened.masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert found["nonzeros"] == nonzeros(opened.model)


def test_the_result_of_pruning_a_cut_network_knows_the_cut(small: Path) -> None:
    cut = load_model("small").model
    pruned = secateur.prune(cut, secateur.recipes.magnitude(0.5))
    assert pruned.surgery == secateur.load(load_model("net.py:conv").model, "small").surgery
    pruned.save("out")
    again = secateur.load(load_model("net.py:conv").model, "out")
    for name, tensor in pruned.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_tickets_of_a_network_that_was_cut_can_be_opened(small: Path) -> None:
    words = ["ticket", "small", "-o", "runs", *IMAGES, "--epochs", "1", "--levels", "0.5"]
    found = told(*words)
    level = found["levels"][0]["folder"]
    opened = load_model(level)
    assert opened.masks.sparsity == pytest.approx(0.5, abs=0.01)
    loaded = secateur.experiments.load_ticket(load_model("net.py:conv").model, level)
    assert loaded.surgery is not None
    assert [level["done"] for level in told(*words)["levels"]] == [True]


# -- pruned before -----------------------------------------------------------------------------------


@pytest.fixture
def sparse(place: Path) -> Path:
    """A network of which 95 % were pruned."""
    told("prune", "net.py:mlp", "-o", "sparse", "--sparsity", "95%")
    return place


@pytest.mark.parametrize("how", [[], ["--data", "net.py:rows", "--epochs", "1"]])
def test_pruning_further_counts_what_is_really_kept(sparse: Path, how: list[str]) -> None:
    kept = load_model("sparse").masks
    found = told("prune", "sparse", "-o", "more", "--sparsity", "50%", *how)
    again = load_model("more")
    assert again.masks == kept
    assert {x["name"]: x["kept"] for x in found["layers"]} == {
        n: int(m.sum()) for n, m in kept.items()
    }
    assert found["sparsity"] == pytest.approx(kept.sparsity)
    assert found["comparison"]["b"]["nonzeros"] == nonzeros(again.model)
    assert any(
        f"{100 * kept.sparsity:.4g} % were pruned before" in note["text"] for note in found["notes"]
    )


def test_pruning_further_reaches_a_target_beyond_the_first(sparse: Path) -> None:
    found = told("prune", "sparse", "-o", "more", "--sparsity", "97%")
    assert found["sparsity"] == pytest.approx(0.97, abs=0.001)
    assert not any(note["topic"] == "target" for note in found["notes"])


def test_shrinking_a_pruned_network_says_that_its_zeros_end(sparse: Path) -> None:
    words = ("--target", "params=50%", "--data", "net.py:rows")
    found = told("shrink", "sparse", "-o", "small", *words)
    first = told("evaluate", "sparse", "--data", "net.py:rows")["measurement"]
    for key in ("nonzeros", "bytes", "pruned_sparsity"):
        assert found["comparison"]["a"][key] == first[key]
    smaller = next(x for x in found["comparison"]["verdict"] if x["name"] == "smaller")
    assert not smaller["real"]
    assert any(note["topic"] == "masks" for note in found["notes"])


# -- files that are gone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["facts.json", "recipe.yaml", "model.safetensors"])
@pytest.mark.parametrize(
    "words",
    [["sparse"], ["sparse", "--model", "net.py:mlp"], ["net.py:mlp", "--weights", "sparse"]],
)
def test_a_file_that_is_missing_is_named(sparse: Path, name: str, words: list[str]) -> None:
    (sparse / "sparse" / name).unlink()
    error = told("evaluate", *words, code=4)["error"]
    assert error["type"] == "FormatError"
    assert error["found"] == f"there is no {name}"


def test_a_missing_surgery_is_named(small: Path) -> None:
    (small / "small" / "surgery.json").unlink()
    error = told("evaluate", "small", code=4)["error"]
    assert error["type"] == "FormatError"
    assert error["found"] == "surgery.json is missing"


# -- what a level was built from ---------------------------------------------------------------------


def test_a_level_of_a_ticket_search_says_what_it_was_built_from(place: Path) -> None:
    (place / "seedless.py").write_text(NETWORKS.replace("    torch.manual_seed(0)\n", ""))
    data = ("--data", "net.py:rows")
    words = ("--epochs", "1", "--levels", "0.5")
    found = told("ticket", "seedless.py:mlp", "-o", "runs", *data, *words)
    level = found["levels"][0]["folder"]
    measured = told("evaluate", level, *data)["measurement"]
    assert measured["pruned_sparsity"] == pytest.approx(0.5, abs=0.01)


# -- two bundles side by side ------------------------------------------------------------------------


def test_compare_says_how_alike_two_masks_are(place: Path) -> None:
    for name, criterion in (("a", "random:seed=1"), ("b", "random:seed=2"), ("m", "magnitude")):
        told("prune", "net.py:mlp", "-o", name, "--sparsity", "50%", "--criterion", criterion)
    same, other = (told("compare", "a", name)["masks"] for name in ("a", "b"))
    assert same["jaccard"] == 1
    # Two random halves share a third.
    assert other["chance"] == pytest.approx(1 / 3, abs=0.01)
    assert other["jaccard"] == pytest.approx(1 / 3, abs=0.03)
    printed = CliRunner().invoke(app, ["compare", "a", "m"]).stdout
    assert "of the weights that either network keeps" in " ".join(printed.split())
    assert told("compare", "net.py:mlp", "a")["masks"] is None


def test_a_network_of_another_file_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told("prune", "net.py:mlp", "--sparsity", "50%", "-o", "small")
    words = ["evaluate", str(place / "small"), "--data", "net.py:rows"]
    same = CliRunner().invoke(app, words)
    assert same.exit_code == 0
    assert "is not the file" not in same.output
    # A file of the same name, where somebody else stands.
    other = place / "other"
    other.mkdir()
    (other / "net.py").write_text(NETWORKS.replace("nn.ReLU()", "nn.Tanh()"))
    monkeypatch.chdir(other)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "Note: net.py is not the file that the bundle" in said
    assert "is not the file" in CliRunner().invoke(app, [*words, "--json"]).stderr
    # Who says what to build knows.
    named = CliRunner().invoke(app, [*words, "--model", "net.py:mlp"])
    assert "is not the file" not in named.output
    # A bundle that is made of this one says what it was built with.
    monkeypatch.chdir(other)
    told("prune", str(place / "small"), "--sparsity", "60%", "-o", "smaller")
    again = CliRunner().invoke(app, ["evaluate", "smaller", "--data", "net.py:rows"])
    assert "is not the file" not in again.output
