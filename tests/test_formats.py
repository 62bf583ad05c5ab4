"""Layouts and the tensor file: what is written comes back, bit for bit."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import FormatError, UsageError
from secateur.core.masks import Masks
from secateur.formats import (
    CSR,
    LAYOUTS,
    Bitmask,
    Dense,
    Layout,
    read_tensors,
    same_bits,
    smallest,
    write_tensors,
)
from secateur.formats.layouts import SPARSE_DTYPES

DTYPES = list(SPARSE_DTYPES.values())
SPEC = Path(__file__).resolve().parent.parent / "docs" / "formats" / "bundle.md"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all, so also NaN payloads and infinities, and many zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    value = raw.to(torch.uint8).view(dtype).clone()
    pick = torch.randint(0, 6, value.shape, generator=generator)
    value[pick == 0] = 0
    if dtype.is_floating_point:
        value[pick == 1] = -0.0
    return value.reshape(shape)


def random_mask(shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density


def check_law(layout: Layout, value: Tensor, mask: Tensor) -> None:
    """unpack(pack(v, m)) is (v where kept, +0 elsewhere; m), and nbytes is the real size."""
    before = value.clone()
    kept = int(mask.sum())
    parts = layout.pack(value, mask)
    assert same_bits(value, before), "pack changed its input"
    assert all(part.ndim == 1 for part in parts.values())
    real = sum(part.numel() * part.itemsize for part in parts.values())
    assert real == layout.nbytes(tuple(value.shape), value.dtype, kept)
    got, got_mask = layout.unpack(parts, tuple(value.shape), value.dtype)
    assert torch.equal(got_mask, mask)
    integers = INTEGERS[value.dtype.itemsize]
    expected = torch.where(mask, value.contiguous().view(integers), 0).to(integers)
    assert same_bits(got, expected.view(value.dtype))


# --- the oracle itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_sees_every_single_bit(dtype: torch.dtype) -> None:
    value = random_bits((3, 2), dtype, seed=3)
    assert same_bits(value, value.clone())
    for position in (0, 5):
        for bit in range(8 * dtype.itemsize):
            flat = value.clone().flatten().view(torch.uint8)
            flat[position * dtype.itemsize + bit // 8] ^= 1 << (bit % 8)
            assert not same_bits(value, flat.view(dtype).reshape(3, 2))


def test_same_bits_sees_type_and_shape() -> None:
    zeros = torch.zeros(4)
    assert not same_bits(zeros, torch.zeros(4, dtype=torch.int32))
    assert not same_bits(zeros, zeros.reshape(2, 2))
    assert not same_bits(zeros, torch.zeros(3))
    assert same_bits(zeros[::2], torch.zeros(2))


class GuessesTheMask(Bitmask):
    """Planted error: the mask comes from the values."""

    def unpack(self, parts: Any, shape: Any, dtype: Any) -> tuple[Tensor, Tensor]:
        value, _ = Bitmask().unpack(parts, shape, dtype)
        return value, value != 0


class AddsZero(Bitmask):
    """Planted error: one kept -0.0 becomes +0.0."""

    def unpack(self, parts: Any, shape: Any, dtype: Any) -> tuple[Tensor, Tensor]:
        value, mask = Bitmask().unpack(parts, shape, dtype)
        return value + 0.0, mask


class Undercounts(CSR):
    """Planted error: the size leaves one byte out."""

    def nbytes(self, shape: Any, dtype: Any, kept: int) -> int:
        return CSR().nbytes(shape, dtype, kept) - 1


@pytest.mark.parametrize("broken", [GuessesTheMask(), AddsZero(), Undercounts()])
def test_the_law_catches_planted_errors(broken: Layout) -> None:
    value, mask = torch.tensor([[1.0, -0.0, 2.0]]), torch.tensor([[True, True, False]])
    check_law(Bitmask(), value, mask)
    with pytest.raises(AssertionError):
        check_law(broken, value, mask)


# --- layouts -------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.1]),
    seed=st.integers(0, 10**6),
)
@example(shape=(1, 4, 5, 7), dtype=torch.float64, density=0.0, seed=0)
def test_round_trip(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int) -> None:
    value, mask = random_bits(shape, dtype, seed), random_mask(shape, density, seed)
    kept = int(mask.sum())
    for layout in LAYOUTS.values():
        if layout.fits(shape, dtype, kept):
            check_law(layout, value, mask)
    check_law(smallest(shape, dtype, kept), value, mask)
    assert Bitmask().fits(shape, dtype, kept)
    # What is empty but for its counts may be more than 1024 times as large as its parts.
    assert CSR().fits(shape, dtype, kept) or not kept


@pytest.mark.parametrize("columns", [255, 256, 257, 65535, 65536, 65537])
def test_index_types_around_their_edges(columns: int) -> None:
    mask = torch.zeros(3, columns, dtype=torch.bool)
    mask[0, -1] = mask[2, -300:] = True
    mask[1] = True  # a row count as large as it gets
    check_law(CSR(), random_bits((3, columns), torch.float16, 1), mask)
    check_law(Bitmask(), random_bits((3, columns), torch.float16, 1), mask)


def test_noncontiguous_input() -> None:
    value, mask = torch.randn(6, 4, 3).permute(2, 0, 1), torch.rand(3, 4, 6).transpose(1, 2) > 0.6
    for layout in (Bitmask(), CSR()):
        check_law(layout, value, mask)


def test_no_mask_means_all_kept() -> None:
    value = torch.randn(3, 5)
    for layout in LAYOUTS.values():
        got, mask = layout.unpack(layout.pack(value, None), (3, 5), torch.float32)
        assert same_bits(got, value)
        assert bool(mask.all())


def test_pack_refuses() -> None:
    value = torch.ones(2, 3)
    holes = torch.tensor([[True, False, True]] * 2)
    for layout, bad_value, bad_mask in [
        (Dense(), value, holes),
        (CSR(), value, holes[0]),
        (Bitmask(), value, holes.int()),
        (Bitmask(), torch.tensor(1.0), None),
        (Bitmask(), value.long(), holes),
        (CSR(), torch.ones(1, 10**5), torch.zeros(1, 10**5, dtype=torch.bool)),
    ]:
        with pytest.raises(UsageError):
            layout.pack(bad_value, bad_mask)


@given(
    shape=st.lists(st.integers(1, 400), min_size=2, max_size=2).map(tuple),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0, 1),
)
def test_smallest_is_smallest(shape: tuple[int, ...], dtype: torch.dtype, share: float) -> None:
    kept = int(share * math.prod(shape))
    best = smallest(shape, dtype, kept)
    sizes = [x.nbytes(shape, dtype, kept) for x in LAYOUTS.values() if x.fits(shape, dtype, kept)]
    assert best.nbytes(shape, dtype, kept) == min(sizes)
    assert (best.name == "dense") == (kept == math.prod(shape))


@given(seed=st.integers(0, 10**6), layout=st.sampled_from([Bitmask(), CSR()]))
def test_whatever_unpack_accepts_is_what_pack_writes(seed: int, layout: Layout) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3)
    kept = int(torch.randint(0, 4, (1,), generator=generator))
    parts = {
        name: torch.randint(0, 4, (length,), generator=generator).to(dtype)
        for name, (dtype, length) in layout.parts(shape, torch.float32, kept).items()
    }
    try:
        value, mask = layout.unpack(parts, shape, torch.float32)
    except FormatError:
        return
    again = layout.pack(value, mask)
    assert all(same_bits(again[name], parts[name]) for name in parts)


# --- the file ------------------------------------------------------------------------------------


def odd_state() -> tuple[dict[str, Tensor], Masks]:
    """Everything that a state_dict can hold, with three kinds of sparse weights."""
    base = torch.randn(40)
    tied = torch.randn(6, 5)
    tied_mask = random_mask((6, 5), 0.5, 1)
    tensors = {
        "conv.weight": random_bits((8, 4, 3, 3), torch.float16, 1),
        "fc.weight": torch.randn(20, 300),
        "whole": torch.randn(3, 3),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "empty.masked": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "turned": torch.randn(4, 3).t(),
        "spread": torch.ones(1).expand(5),
        "first": base[:30],
        "second": base[10:],
        "in": tied,
        "out": tied,
        "plain.a": base,
        "plain.b": base,
        'a "quoted" ü\n\x01 name/values': torch.tensor([1.5 + 2j, 0j]).conj(),
        "secateur_sha256": torch.ones(2),
    }
    masks = {
        "fc.weight": random_mask((20, 300), 0.02, 2),
        "conv.weight": random_mask((8, 4, 3, 3), 0.4, 3),
        "whole": torch.ones(3, 3, dtype=torch.bool),
        "empty.masked": torch.ones(0, 4, dtype=torch.bool),
        "out": tied_mask,
        "in": tied_mask.clone(),
    }
    return tensors, Masks(masks)


def check_read(got: tuple[Any, Any], tensors: dict[str, Tensor], masks: Masks) -> None:
    got_tensors, got_masks = got
    assert set(got_tensors) == set(tensors)
    assert Masks(got_masks) == masks
    for name, tensor in tensors.items():
        expected = tensor.resolve_conj().contiguous()
        if name in masks:
            integers = INTEGERS[tensor.dtype.itemsize]
            bits = expected.view(integers) * masks[name].to(integers)
            expected = bits.view(tensor.dtype)
        assert same_bits(got_tensors[name], expected), name


def test_file_round_trip(tmp_path: Path) -> None:
    tensors, masks = odd_state()
    write_tensors(tmp_path / "a", tensors, masks)
    got = read_tensors(tmp_path / "a")
    check_read(got, tensors, masks)
    assert got[0]["in"] is got[0]["out"]
    assert got[0]["plain.a"] is got[0]["plain.b"]
    write_tensors(tmp_path / "b", tensors, masks)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_tensors(tmp_path / "c", *got)  # a third trip changes nothing
    check_read(read_tensors(tmp_path / "c"), tensors, masks)
    got[0]["first"][3] += 1
    with pytest.raises(AssertionError):  # the check itself sees one changed entry
        check_read(got, tensors, masks)


def test_nothing_to_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {}, Masks({}))
    assert read_tensors(tmp_path / "a") == ({}, Masks({}))


@pytest.mark.parametrize(
    ("density", "layout", "most"), [(0.1, "bitmask", 0.16), (0.02, "csr", 0.04)]
)
def test_file_shrinks(tmp_path: Path, density: float, layout: str, most: float) -> None:
    value, mask = torch.randn(1000, 1000), random_mask((1000, 1000), density, 1)
    write_tensors(tmp_path / "dense", {"w": value}, Masks({}))
    write_tensors(tmp_path / "sparse", {"w": value}, Masks({"w": mask}))
    sizes = [(tmp_path / name).stat().st_size for name in ("dense", "sparse")]
    assert sizes[1] < most * sizes[0]
    assert f'"layout\\":\\"{layout}\\"'.encode() in (tmp_path / "sparse").read_bytes()[:1000]
    exact = LAYOUTS[layout].nbytes((1000, 1000), torch.float32, int(mask.sum()))
    assert 0 < sizes[1] - exact < 600  # the rest is the header


def test_write_refuses(tmp_path: Path) -> None:
    ones, mask = torch.ones(4, 4), torch.eye(4, dtype=torch.bool)
    wrong: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"w": ones, "w.bitmask": ones}, {"w": mask}, "already named"),
        ({"w": ones}, {"v": mask}, "no such tensor"),
        ({"w": ones}, {"w": mask[0]}, "the mask is"),
        ({"w": torch.ones(4, 4, dtype=torch.int64)}, {"w": mask}, "int64"),
        ({"w": torch.tensor(1.0)}, {"w": torch.tensor(True)}, "the mask is"),
        ({"w": ones.to_sparse()}, {}, "torch.sparse"),
        ({"w": torch.ones(2, device="meta")}, {}, "meta"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, {}, "complex128"),
        ({"w": "text"}, {}, "str"),
        ({"__metadata__": ones}, {}, "that name"),
        ({"\ud800": ones}, {}, "that name"),
        ({"w": ones, "v": ones}, {"w": mask, "v": ~mask}, "two different masks"),
        ({"w": ones, "v": ones[:2]}, {"w": mask}, "shares memory"),
    ]
    for tensors, masks, found in wrong:
        with pytest.raises(UsageError, match=found) as caught:
            write_tensors(tmp_path / "x", tensors, Masks(masks))
        assert all(caught.value.parts().values())
    assert list(tmp_path.iterdir()) == []
    pruned = ones * mask  # consistent: the overlapping part has the same zeros
    write_tensors(tmp_path / "x", {"w": pruned, "v": pruned[:2]}, Masks({"w": mask}))


def test_reader_of_the_page_gives_the_same(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", SPEC.read_text(encoding="utf-8"), re.S)[-1]
    assert len(code.splitlines()) < 60
    space: dict[str, Any] = {}
    exec(compile(code, str(SPEC), "exec"), space)  # noqa: S102  the page is ours
    tensors, masks = odd_state()
    write_tensors(tmp_path / "a", tensors, masks)
    check_read(space["read"](tmp_path / "a"), tensors, masks)
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError, match="altered"):
        space["read"](tmp_path / "a")
