"""Surgery is refused by other models, other weights and altered files, and nothing is changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_cases import Other, build, cut_net, same, saved
from torch import nn

import secateur
from secateur.core.errors import FormatError, SecateurError, UsageError
from secateur.formats import BlockEdit, Surgery, parse_surgery, surgery_text
from secateur.formats.surgery_file import _sealed
from secateur.frontends.surgery import replay_


def refused(model: nn.Module, surgery: Surgery, match: str, **options: Any) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(UsageError, match=match) as caught:
        replay_(model, surgery, **options)
    assert all(caught.value.parts().values()), caught.value.parts()
    assert "nothing was changed" in str(caught.value)
    assert same(model, before)


def test_other_models_are_refused() -> None:
    _, surgery = cut_net()
    refused(Other(), surgery, "Classes must be the same")
    refused(build(width=5), surgery, "had 6 entries")
    cut, _ = cut_net()
    refused(cut, surgery, "entries")
    deeper = build()
    deeper.blocks.append(nn.Linear(1, 1))
    refused(deeper, surgery, "names and shapes")
    untied = build()
    untied.again.weight = nn.Parameter(untied.head.weight.detach().clone())
    refused(untied, surgery, "tied differently")
    resized = build()
    resized.blocks[0].width = 7
    refused(resized, surgery, "'width' of 'blocks.0' is 7 here")
    del resized.blocks[0].width
    refused(resized, surgery, "no such attribute")


def test_other_weights_are_refused_if_asked() -> None:
    _, surgery = cut_net()
    refused(build(seed=1), surgery, "SHA-256 of its weights", check_weights=True)
    nudged = build()
    with torch.no_grad():
        nudged.blocks[1].norm.running_mean[2] += 1e-7
    refused(nudged, surgery, "SHA-256 of its weights", check_weights=True)
    unknown = replace(surgery, weights="")
    refused(build(), unknown, "does not say which weights", check_weights=True)
    replay_(build(seed=1), surgery)


def test_unknown_blocks_are_refused() -> None:
    _, surgery = cut_net()
    refused(build(), replace(surgery, blocks=(BlockEdit("blocks.0", "magic"),)), "'magic'")
    refused(build(), replace(surgery, blocks=(BlockEdit("blocks.9", "removed"),)), "no module")
    details = BlockEdit("blocks.0", "removed", {"returns": "nonsense"})
    refused(build(), replace(surgery, blocks=(details,)), "details")


def test_a_wrong_result_is_undone() -> None:
    """Everything fits and the last check fails: tensors, gradients, sizes and blocks come back."""
    _, surgery = cut_net(blocks=(BlockEdit("blocks.1", "removed"),))
    model = build()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    gradient = model.stem.weight.grad
    refused(model, replace(surgery, result="0" * 64), "shapes that it leaves")
    assert model.stem.weight.grad is gradient


def test_files_of_two_bundles_do_not_mix(tmp_path: Path) -> None:
    _, one = saved(tmp_path / "one", seed=0)
    _, two = saved(tmp_path / "two", seed=1)
    (two / "surgery.json").write_bytes((one / "surgery.json").read_bytes())
    fresh = build()
    before = copy.deepcopy(fresh)
    with pytest.raises(FormatError, match="not those that surgery"):
        secateur.load(fresh, two)
    assert same(fresh, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("surgery") / "b")[1]


@pytest.mark.parametrize("name", ["surgery.json", "model.safetensors"])
@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_altered_bytes_change_nothing(folder: Path, name: str, place: float, value: int) -> None:
    file = folder / name
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= value
    fresh = build(seed=5)
    before = copy.deepcopy(fresh)
    try:
        file.write_bytes(bad)
        with pytest.raises(FormatError) as caught:
            secateur.load(fresh, folder)
    finally:
        file.write_bytes(good)
    assert name in str(caught.value)
    assert same(fresh, before)


@settings(max_examples=30)
@given(st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(folder: Path, share: float) -> None:
    data = (folder / "surgery.json").read_bytes()
    with pytest.raises(FormatError):
        parse_surgery(data[: int(share * len(data))])


FORGED: list[Any] = [
    lambda d: d.update(version=2),
    lambda d: d.update(version=True),
    lambda d: d.update(extra=1),
    lambda d: d.pop("library"),
    lambda d: d["original"].update(shapes="ABC"),
    lambda d: d["original"].update(weights="0" * 63),
    lambda d: d["result"].update(shapes=""),
    lambda d: d["selections"][0].update(size=2**60),
    lambda d: d["selections"][0].update(runs=[]),
    lambda d: d["selections"][0].update(runs=[[0, 1], [1, 2]]),
    lambda d: d["selections"][0].update(runs=[[2, 3], [0, 1]]),
    lambda d: d["selections"][0].update(runs=[[0, 0]]),
    lambda d: d["selections"][0].update(runs=[[-1, 1]]),
    lambda d: d["selections"][0].update(runs=[[0, 99]]),
    lambda d: d["selections"][0].update(runs=[[0.0, 1]]),
    lambda d: d["cuts"][0].update(selection=99),
    lambda d: d["cuts"][0].update(selection=-1),
    lambda d: d["cuts"][0].update(axis=-1),
    lambda d: d["cuts"].append(d["cuts"][0]),
    lambda d: d["attributes"].append(d["attributes"][0]),
    lambda d: d["attributes"][0].update(name="__class__"),
    lambda d: d["attributes"][0].update(name="a.b"),
    lambda d: d["attributes"][0].update(after=-1),
    lambda d: d["attributes"][0].update(after=1.5),
    lambda d: d["blocks"].append({"module": "", "kind": "removed", "details": {}}),
    lambda d: d["blocks"].extend([{"module": "a", "kind": "removed", "details": {}}] * 2),
    lambda d: d["blocks"].append({"module": "a", "kind": "removed", "details": nested(20)}),
    lambda d: d.update(blocks={}),
]


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("number", range(len(FORGED)))
def test_forged_files_are_refused(folder: Path, number: int) -> None:
    """The hash is right, and something else is wrong."""
    data = json.loads((folder / "surgery.json").read_text())
    data["sha256"] = "0" * 64
    assert parse_surgery(_sealed(json.dumps(data, separators=(",", ":"))).encode())
    FORGED[number](data)
    with pytest.raises(FormatError) as caught:
        parse_surgery(_sealed(json.dumps(data, separators=(",", ":"))).encode())
    assert all(caught.value.parts().values()), caught.value.parts()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"version":1}', "[" * 100_000, "\xff"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_surgery(text.encode("latin-1"))


def test_unwritable_surgery_is_refused() -> None:
    hashes = {"shapes": "0" * 64, "result": "0" * 64}
    with pytest.raises(SecateurError, match="plain values"):
        surgery_text(Surgery("N", blocks=(BlockEdit("a", "b", {"c": object()}),), **hashes))
    with pytest.raises(SecateurError, match="plain values"):
        surgery_text(Surgery("N", attributes={"": {"__dict__": (1, 1)}}, **hashes))
