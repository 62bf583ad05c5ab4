"""What was cut before is known wherever a cut model comes from, so it can be saved after more cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.drive.pruned import Pruned
from secateur.drive.structural.heads import prune_heads
from secateur.formats import read_surgery
from secateur.frontends.surgery import replay_
from secateur.frontends.transformers_save import load_transformers, save_transformers
from secateur.structure.masked import call

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
IDS = {"input_ids": torch.arange(14).reshape(2, 7) % 50}


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        intermediate_size=48,
    )
    return transformers.BertModel(config).eval()


def to(share: str) -> secateur.ShrinkRecipe:
    return secateur.ShrinkRecipe(target=secateur.Target.parse(f"params={share}"), recovery=())


def reloaded(pruned: Pruned, fresh: nn.Module, folder: Path) -> nn.Module:
    return secateur.load(fresh, pruned.save(folder)).model


def output(model: nn.Module, example: object) -> Tensor:
    with torch.no_grad():
        found = call(model, example)
    return found if isinstance(found, Tensor) else found[0]


def test_a_loaded_model_is_cut_further_and_saved(tmp_path: Path) -> None:
    first = secateur.shrink(perceptron(), to("60%"), X)
    loaded = reloaded(first, perceptron(), tmp_path / "a")
    second = secateur.shrink(loaded, to("60%"), X)
    again = reloaded(second, perceptron(), tmp_path / "b")
    assert torch.equal(output(again, X), output(second.model, X))
    # And so on: the model that comes back knows all of it.
    third = secateur.shrink_(again, to("80%"), X)
    last = reloaded(third, perceptron(), tmp_path / "c")
    assert torch.equal(output(last, X), output(third.model, X))


def test_a_replayed_model_is_cut_further_and_saved(tmp_path: Path) -> None:
    first = secateur.shrink(perceptron(), to("60%"), X)
    assert first.surgery is not None
    model = perceptron()
    replay_(model, first.surgery)
    second = secateur.shrink(model, to("60%"), X)
    again = reloaded(second, perceptron(), tmp_path / "a")
    assert torch.equal(output(again, X), output(second.model, X))


def test_a_failed_load_leaves_no_history(tmp_path: Path) -> None:
    folder = secateur.shrink(perceptron(), to("60%"), X).save(tmp_path / "a")
    other = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    with pytest.raises(secateur.core.errors.UsageError):
        secateur.load(other, folder)
    pruned = secateur.shrink(other, to("60%"), X)
    fresh = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    again = reloaded(pruned, fresh, tmp_path / "b")
    assert torch.equal(output(again, X), output(pruned.model, X))


def test_heads_are_removed_twice_and_saved(tmp_path: Path) -> None:
    model = bert()
    prune_heads(model, {0: [1]})
    pruned = prune_heads(model, {0: [0], 1: [2]})
    again = reloaded(pruned, bert(), tmp_path / "a")
    assert torch.equal(output(again, IDS), output(model, IDS))


def test_heads_are_removed_before_and_after_a_cut(tmp_path: Path) -> None:
    model = bert()
    prune_heads(model, {0: [1]})
    pruned = secateur.shrink_(model, to("80%"), IDS)
    again = reloaded(pruned, bert(), tmp_path / "a")
    assert torch.equal(output(again, IDS), output(model, IDS))

    other = secateur.shrink(bert(), to("80%"), IDS).model
    pruned = prune_heads(other, {1: [0]})
    again = reloaded(pruned, bert(), tmp_path / "b")
    assert torch.equal(output(again, IDS), output(other, IDS))


def test_a_loaded_transformers_model_is_cut_further_and_saved(tmp_path: Path) -> None:
    first = secateur.shrink(bert(), to("80%"), IDS)
    assert first.surgery is not None
    saved = save_transformers(first.model, tmp_path / "a", first.surgery)
    assert not saved.uniform
    second = secateur.shrink(load_transformers(saved.folder), to("90%"), IDS)
    assert second.surgery is not None
    saved = save_transformers(second.model, tmp_path / "b", second.surgery)
    assert torch.equal(output(load_transformers(saved.folder), IDS), output(second.model, IDS))
    assert read_surgery(saved.folder) == second.surgery
