"""Damaged and forged files: always a FormatError with the file name, never anything else."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from secateur.core.errors import FormatError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import CSR, LAYOUTS, Bitmask, Dense, read_bundle, read_tensors, write_bundle

STATE = {
    "a": torch.arange(1.0, 25.0).reshape(4, 6),
    "b": torch.arange(1.0, 3001.0).reshape(10, 300),
    "c": torch.arange(1.0, 7.0).reshape(2, 3),
    "bias": torch.ones(4),
    "steps": torch.tensor(3),
}
STATE["tied"] = STATE["a"]
MASKS = {
    "a": STATE["a"] % 3 == 0,
    "b": STATE["b"] % 50 == 0,
    "c": torch.ones(2, 3, dtype=torch.bool),
}


def refused(folder: Path, name: str = "model.safetensors") -> FormatError:
    """Reading must fail with a whole message that names the file."""
    with pytest.raises(FormatError) as caught:
        read_bundle(folder)
    assert name in str(caught.value)
    assert all(caught.value.parts().values()), caught.value.parts()
    return caught.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with all three layouts and an alias. Tests change it and put it back."""
    folder = tmp_path_factory.mktemp("damage") / "b"
    write_bundle(folder, STATE, Masks(MASKS), recipe={"pattern": "2:4"}, facts=Facts())
    text = (folder / "model.safetensors").read_bytes()[:2000]
    assert all(f'\\"layout\\":\\"{name}\\"'.encode() in text for name in LAYOUTS)
    return folder


@pytest.fixture
def model(folder: Path) -> Any:
    """The tensor file of the bundle, restored afterwards."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    yield file
    file.write_bytes(whole)
    read_bundle(folder)


# --- accidents -----------------------------------------------------------------------------------


def test_truncated_at_every_length(folder: Path, model: Path) -> None:
    whole = model.read_bytes()
    for length in {*range(0, len(whole), 7), *range(40), len(whole) - 1}:
        model.write_bytes(whole[:length])
        refused(folder)


def test_longer(folder: Path, model: Path) -> None:
    whole = model.read_bytes()
    for tail in (b"\0", b" " * 8, whole):
        model.write_bytes(whole + tail)
        refused(folder)


def test_every_byte_of_the_header(folder: Path, model: Path) -> None:
    whole = model.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for place in range(length):
        raw = bytearray(whole)
        raw[place] ^= (1, 0x2A, 0x20, 0x80)[place % 4]  # 0x2A turns padding into a line feed
        model.write_bytes(raw)
        refused(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_any_changed_bytes(folder: Path, data: st.DataObject) -> None:
    model = folder / "model.safetensors"
    whole = model.read_bytes()
    try:
        raw = bytearray(whole)
        places = st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4, unique=True)
        for place in data.draw(places):
            raw[place] ^= data.draw(st.integers(1, 255))
        model.write_bytes(raw)
        refused(folder)
    finally:
        model.write_bytes(whole)


def test_swapped_bytes_of_two_tensors(folder: Path, model: Path) -> None:
    raw = bytearray(model.read_bytes())
    raw[-8:-4], raw[-4:] = raw[-4:], raw[-8:-4]
    assert bytes(raw) != model.read_bytes()
    model.write_bytes(raw)
    assert "altered" in refused(folder).found


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}" * 50,
        (100_000_001).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (40_000).to_bytes(8, "little") + b"[" * 40_000,
        (2).to_bytes(8, "little") + b"\xff\xfe",
        save({"x": torch.ones(2)}),
        save({"x": torch.ones(2)}, {"secateur": "{}"}),
        save({"x": torch.ones(2)}, {"secateur": "[" * 100_000}),
        save({"x": torch.ones(2)}, {"secateur": '{"version":1,"version":1}'}),
        save({"x": torch.ones(2)}, {"secateur": '{"version":1,"sparse":{},"aliases":{}}'}),
        b"\x80\x04\x95",
    ],
)
def test_other_files(folder: Path, model: Path, raw: bytes) -> None:
    model.write_bytes(raw)
    refused(folder)


def test_not_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        read_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError):
        read_tensors(tmp_path / "pipe")
    for name in ("model.safetensors", "recipe.yaml", "facts.json"):
        (folder / name).rename(folder / "away")
        refused(folder, name)
        (folder / name).mkdir()
        refused(folder, name)
        (folder / name).rmdir()
        (folder / "away").rename(folder / name)


# --- forgeries: the hash is right, the content lies ----------------------------------------------

Content = tuple[dict[str, Tensor], dict[str, Any]]


def content() -> Content:
    """The tensors and the table of an honest file, written down by hand."""
    a, b = STATE["a"], STATE["b"]
    tensors = {
        "a.bitmask": torch.tensor([36, 73, 146], dtype=torch.uint8),
        "a.values": a[MASKS["a"]],
        "b.row_counts": torch.full((10,), 6).to(torch.uint16),
        "b.columns": torch.arange(49, 300, 50).repeat(10).to(torch.uint16),
        "b.values": b[MASKS["b"]],
        "c": STATE["c"],
        "bias": STATE["bias"],
        "steps": STATE["steps"],
    }
    sizes = {"a": ("bitmask", [4, 6], 8), "b": ("csr", [10, 300], 60), "c": ("dense", [2, 3], 6)}
    sparse = {
        name: {"layout": layout, "shape": shape, "dtype": "float32", "kept": kept}
        for name, (layout, shape, kept) in sizes.items()
    }
    aliases = {"tied": {"of": "a", "masked": False}}
    return tensors, {"version": 1, "sparse": sparse, "aliases": aliases}


def forge(path: Path, tensors: dict[str, Tensor], table: object) -> None:
    """Write a file with a correct hash, whatever the content says."""
    text = table if isinstance(table, str) else json.dumps(table)
    raw = save(tensors, {"format": "pt", "secateur": text, "secateur_sha256": "0" * 64})
    path.write_bytes(sealed(raw))


def sealed(raw: bytes) -> bytes:
    """The bytes of a file with the hash that belongs to them."""
    place = raw.index(b'"secateur_sha256":"') + len(b'"secateur_sha256":"')
    raw = raw[:place] + b"0" * 64 + raw[place + 64 :]
    return raw[:place] + hashlib.sha256(raw).hexdigest().encode() + raw[place + 64 :]


def test_the_forger_can_write_honest_files(folder: Path, model: Path) -> None:
    forge(model, *content())
    bundle = read_bundle(folder)
    assert bundle.masks == Masks(MASKS)
    for name, tensor in STATE.items():
        mask = MASKS["a" if name == "tied" else name] if name in ("a", "b", "c", "tied") else True
        assert torch.equal(bundle.tensors[name], tensor * mask)


def tensor_lie(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Content], None]:
    def lie(content: Content) -> None:
        content[0][name] = change(content[0][name])

    return lie


def table_lie(*path: str, value: Any) -> Callable[[Content], None]:
    def lie(content: Content) -> None:
        place: Any = content[1]
        for key in path[:-1]:
            place = place[key]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return lie


def put(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        y = x.to(torch.int64)
        y[index] = value
        return y.to(x.dtype)

    return change


HUGE = 2**40
LIES = {
    "bit more": tensor_lie("a.bitmask", put(0, 37)),
    "bit less": tensor_lie("a.bitmask", put(0, 4)),
    "bitmask short": tensor_lie("a.bitmask", lambda x: x[:2].clone()),
    "bitmask long": tensor_lie("a.bitmask", lambda x: torch.cat([x, x])),
    "bitmask type": tensor_lie("a.bitmask", lambda x: x.view(torch.int8)),
    "bitmask axes": tensor_lie("a.bitmask", lambda x: x[None]),
    "values less": tensor_lie("a.values", lambda x: x[1:].clone()),
    "values type": tensor_lie("a.values", Tensor.double),
    "count more": tensor_lie("b.row_counts", put(0, 7)),
    "count over": tensor_lie("b.row_counts", put(0, 301)),
    "counts moved": tensor_lie("b.row_counts", lambda x: put(1, 4)(put(0, 8)(x))),
    "counts negative": tensor_lie("b.row_counts", lambda x: x.to(torch.int32) * -1),
    "column out": tensor_lie("b.columns", put(5, 300)),
    "column far out": tensor_lie("b.columns", put(59, 65535)),
    "column twice": tensor_lie("b.columns", put(1, 49)),
    "columns fall": tensor_lie("b.columns", lambda x: x.int().flip(0).to(x.dtype)),
    "dense shape": tensor_lie("c", lambda x: x.reshape(3, 2)),
    "dense type": tensor_lie("c", Tensor.double),
    "part gone": lambda content: content[0].__delitem__("b.columns"),
    "dense and sparse": lambda content: content[0].update(a=torch.ones(4, 6)),
    "alias stored": lambda content: content[0].update(tied=torch.ones(4, 6)),
    "shape": table_lie("sparse", "a", "shape", value=[4, 7]),
    "shape turned": table_lie("sparse", "b", "shape", value=[300, 10]),
    "shape huge": table_lie("sparse", "a", "shape", value=[HUGE, HUGE]),
    "shape overflow": table_lie("sparse", "a", "shape", value=[2**63, 2]),
    "shape empty but huge": table_lie("sparse", "a", "shape", value=[0, 2**62, 2**62]),
    "rows huge": table_lie("sparse", "b", "shape", value=[10, 2**31 - 1]),
    "rows too huge": table_lie("sparse", "b", "shape", value=[10, HUGE]),
    "shape negative": table_lie("sparse", "a", "shape", value=[-4, -6]),
    "no axis": table_lie("sparse", "a", "shape", value=[]),
    "many axes": table_lie("sparse", "a", "shape", value=[4, 6] + [1] * 1000),
    "shape of flags": table_lie("sparse", "a", "shape", value=[True, 24]),
    "shape of fractions": table_lie("sparse", "a", "shape", value=[4.0, 6]),
    "dtype": table_lie("sparse", "a", "dtype", value="float64"),
    "dtype same size": table_lie("sparse", "a", "dtype", value="int32"),
    "dtype attribute": table_lie("sparse", "a", "dtype", value="load"),
    "kept": table_lie("sparse", "a", "kept", value=9),
    "kept negative": table_lie("sparse", "a", "kept", value=-1),
    "kept huge": table_lie("sparse", "a", "kept", value=10**4000),
    "layout": table_lie("sparse", "a", "layout", value="csr"),
    "layout dense": table_lie("sparse", "a", "layout", value="dense"),
    "layout unknown": table_lie("sparse", "a", "layout", value="zip"),
    "field gone": table_lie("sparse", "a", "kept", value=KeyError),
    "field more": table_lie("sparse", "a", "seed", value=1),
    "entry text": table_lie("sparse", "a", value="bitmask"),
    "weight gone": table_lie("sparse", "a", value=KeyError),
    "weight more": table_lie("sparse", "z", value=content()[1]["sparse"]["a"]),
    "aliases gone": table_lie("aliases", value=KeyError),
    "alias of nothing": table_lie("aliases", "tied", "of", value="nothing"),
    "alias of itself": table_lie("aliases", "tied", "of", value="tied"),
    "alias of a part": table_lie("aliases", "tied", "of", value="a.values"),
    "alias of text": table_lie("aliases", "tied", value="a"),
    "alias over": table_lie("aliases", "bias", value={"of": "a", "masked": False}),
    "alias masked": table_lie("aliases", "t", value={"of": "bias", "masked": True}),
    "alias flag": table_lie("aliases", "tied", "masked", value=1),
    "version 2": table_lie("version", value=2),
    "version text": table_lie("version", value="1"),
    "version flag": table_lie("version", value=True),
    "version gone": table_lie("version", value=KeyError),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_forged(folder: Path, model: Path, lie: Callable[[Content], None]) -> None:
    forged = content()
    lie(forged)
    forge(model, *forged)
    refused(folder)


HEADERS: list[tuple[str, str, Any]] = [
    ("bias", "shape", [2**62, 2**62]),
    ("bias", "shape", [0, 2**63, 2**63]),
    ("bias", "shape", [5]),
    ("bias", "shape", [-4]),
    ("bias", "dtype", "F8_E4M3"),
    ("bias", "dtype", "X9"),
    ("bias", "data_offsets", [0, 2**62]),
    ("bias", "data_offsets", [16, 0]),
    ("a.values", "shape", [2, 4]),
    ("a.values", "dtype", "I32"),
    ("b.columns", "dtype", "I16"),
    ("new", "shape", [2**64 - 1, 0]),
    ("new", "dtype", "F4"),
]


@pytest.mark.parametrize(("key", "field", "value"), HEADERS)
def test_forged_header(folder: Path, model: Path, key: str, field: str, value: Any) -> None:
    forge(model, *content())
    raw = model.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    end = len(raw) - start
    header.setdefault(key, {"dtype": "F32", "shape": [0], "data_offsets": [end, end]})
    header[key][field] = value
    text = json.dumps(header, separators=(",", ":")).encode()
    model.write_bytes(sealed(len(text).to_bytes(8, "little") + text + raw[start:]))
    refused(folder)


def test_unknown_version_says_what_to_do(folder: Path, model: Path) -> None:
    forge(model, content()[0], {"version": 2, "other": "fields"})
    error = refused(folder)
    assert "version" in error.found
    assert "install" in error.do


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "csr", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    path=st.sampled_from(
        [("sparse",), ("aliases",), ("sparse", "b"), ("aliases", "tied"), ("version",)]
        + [
            ("sparse", name, field)
            for name in "abc"
            for field in ("layout", "shape", "kept", "dtype")
        ]
    ),
    value=JSON | st.lists(st.integers(0, 2**33), max_size=3),
)
def test_any_json_in_the_table(folder: Path, path: tuple[str, ...], value: Any) -> None:
    tensors, table = content()
    honest = copy.deepcopy(table)
    table_lie(*path, value=value)((tensors, table))
    model = folder / "model.safetensors"
    whole = model.read_bytes()
    try:
        forge(model, tensors, table)
        if table != honest and path != ("aliases",):
            refused(folder)
    finally:
        model.write_bytes(whole)


def test_unpack_alone_refuses_too() -> None:
    a = torch.ones(3)
    u8 = torch.tensor([7], dtype=torch.uint8)
    for layout, parts, shape in [
        (Dense(), {"values": a}, (4,)),
        (Dense(), {"values": a[None]}, (1, 3)),
        (Dense(), {}, (0,)),
        (Bitmask(), {"bitmask": u8 + 8, "values": a}, (3,)),
        (Bitmask(), {"bitmask": u8, "values": a, "more": a}, (3,)),
        (Bitmask(), {"bitmask": u8, "values": a.double()}, (3,)),
        (Bitmask(), {"bitmask": u8, "values": a}, (3, -1)),
        (CSR(), {"row_counts": u8, "columns": u8, "values": a[:1]}, (1, 5)),
        (CSR(), {"row_counts": u8, "columns": u8[:0], "values": a[:0]}, (1, 10**9)),
    ]:
        with pytest.raises(FormatError):
            layout.unpack(parts, shape, torch.float32)
    with pytest.raises(FormatError):
        Dense().unpack({"values": a.long()}, (3,), torch.int64)
    wide = CSR().pack(torch.ones(2, 70_000), torch.arange(140_000).reshape(2, 70_000) < 100)
    wide["row_counts"] = torch.tensor([101, -1], dtype=torch.int32)  # the sum is right
    with pytest.raises(FormatError, match="row count"):
        CSR().unpack(wide, (2, 70_000), torch.float32)
