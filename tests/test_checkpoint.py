"""Checkpoint files: every value comes back, every altered byte is refused, nothing is run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import FormatError, UsageError
from secateur.core.masks import Masks
from secateur.formats import write_tensors
from secateur.formats.checkpoint import (
    CHECKPOINT_VERSION,
    TEXT,
    Stamp,
    names_hash,
    read_checkpoint,
    require_stamp,
    write_checkpoint,
)

STAMP = Stamp("model", "recipe", step=7, rank=1, world=2, library="0")
STATE: dict[str, Any] = {
    "weights": {"a.b": torch.randn(3, 2), "bits": torch.tensor([True, False]), "0": torch.ones(())},
    "slots": [{"step": 3, "exp": torch.randn(2).bfloat16()}, (), None],
    "rate": {"betas": (0.9, 0.999), "lr": 1e-17 + 0.1, "on": True, "name": "é ü"},
    "ends": [float("inf"), float("-inf"), -0.0],
    "by number": {3: "x", 1.5: "y", True: "z"},
    "counter": Counter({3: 2, 1: 1}),
    "raw": b"\x00\xff",
    "empty": {"list": [], "mapping": {}, "tensor": torch.empty(0, 4)},
    "big": 2**80,
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (
            a == b or (math.isnan(a) and math.isnan(b))
        )
    return bool(a == b)


def altered(path: Path, **changes: Any) -> None:
    """A whole, hashed file whose JSON was changed before it was written."""
    tensors = {"weights/a": torch.ones(2)}
    head = {
        "version": CHECKPOINT_VERSION,
        "stamp": dataclasses.asdict(STAMP),
        "state": {"mapping": {"a": {"tensor": "weights/a"}}},
    }
    text = json.dumps({**head, **changes}).encode()
    tensors[TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_tensors(path, tensors, Masks({}))


def test_every_value_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_checkpoint(file, STATE, STAMP)
    state, stamp = read_checkpoint(file)
    assert stamp == STAMP
    assert same(state, STATE)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_comparison_of_these_tests_sees_differences() -> None:
    assert not same({"a": torch.ones(2)}, {"a": torch.ones(2).double()})
    assert not same([1, 2], (1, 2))
    assert not same({"a": 1}, {"a": True})
    assert not same([0.0], [-0.0])
    assert not same(Counter({1: 1}), {1: 1})


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", STATE, STAMP)
    write_checkpoint(tmp_path / "b", STATE, STAMP)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# JSON knows one NaN; which of the many a float holds is not kept.
FLOATS = st.floats(allow_nan=False) | st.just(float("nan"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text() | st.binary(),
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(st.text() | st.integers(), x),
    max_leaves=12,
)


@given(value=st.dictionaries(st.text(), PLAIN))
def test_any_plain_value_comes_back(
    value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_checkpoint(file, value, STAMP)
    assert same(read_checkpoint(file)[0], value)


def test_an_altered_byte_anywhere_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_checkpoint(file, STATE, STAMP)
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        file.write_bytes(broken)
        with pytest.raises(FormatError):
            read_checkpoint(file)
    for size in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_checkpoint(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(FormatError):
        read_checkpoint(file)
    file.write_bytes(data)
    read_checkpoint(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": CHECKPOINT_VERSION + 1}, "reads version"),
        ({"version": True}, "reads version"),
        ({"version": None}, "reads version"),
        ({"stamp": {}}, "stamp"),
        ({"stamp": {**dataclasses.asdict(STAMP), "step": "3"}}, "stamp"),
        ({"state": {"mapping": {}}}, "belong to nothing"),
        ({"state": {"mapping": {"a": {"tensor": "other"}}}}, "right form"),
        ({"state": {"mapping": {"a": {"run": "rm"}, "b": {"tensor": "weights/a"}}}}, "'run'"),
        ({"state": {"mapping": {"a": {"float": "nine"}}}}, "right form"),
        ({"state": [{"tensor": "weights/a"}]}, "belong to nothing"),
        ({"state": {"a": 1, "b": 2}}, "right form"),
    ],
)
def test_a_file_that_does_not_make_sense_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    altered(file, **changes)
    with pytest.raises(FormatError, match=words):
        read_checkpoint(file)
    altered(file)
    assert same(read_checkpoint(file)[0], {"a": torch.ones(2)})


def test_a_tensor_file_is_no_checkpoint(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"w": torch.ones(2)}, Masks({}))
    with pytest.raises(FormatError, match="no checkpoint"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, print, {(1, 2): 3}, 1j, torch.ones(2, dtype=torch.complex128)],
)
def test_what_cannot_be_stored_is_refused_and_the_old_file_stays(
    value: Any, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    write_checkpoint(file, STATE, STAMP)
    with pytest.raises(UsageError):
        write_checkpoint(file, {"inside": [1, {"here": value}]}, STAMP)
    assert same(read_checkpoint(file)[0], STATE)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_message_says_where(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'inside/1/here'.*a set"):
        write_checkpoint(tmp_path / "a", {"inside": [1, {"here": {1}}]}, STAMP)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    deep.append(deep)
    with pytest.raises(UsageError, match="nested deeper"):
        write_checkpoint(tmp_path / "a", {"a": deep}, STAMP)


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, TEXT: torch.full((1,), 2.0)}
    write_checkpoint(tmp_path / "a", state, STAMP)
    assert same(read_checkpoint(tmp_path / "a")[0], state)


@pytest.mark.parametrize("name", ["model", "recipe", "world", "rank"])
def test_a_foreign_stamp_is_refused(name: str) -> None:
    other = dataclasses.replace(STAMP, **{name: 9 if name in ("world", "rank") else "other"})
    with pytest.raises(UsageError, match=f"its {name} is"):
        require_stamp("a", other, STAMP)
    require_stamp("a", dataclasses.replace(STAMP, step=99, library="9"), STAMP)


def test_the_hash_of_names_sees_names_shapes_and_types() -> None:
    base = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    assert names_hash(base) == names_hash(dict(reversed(base.items())))
    for other in (
        {"v": torch.ones(2, 3), "b": torch.ones(2)},
        {"w": torch.ones(3, 2), "b": torch.ones(2)},
        {"w": torch.ones(2, 3).half(), "b": torch.ones(2)},
        {"w": torch.ones(2, 3)},
    ):
        assert names_hash(base) != names_hash(other)
