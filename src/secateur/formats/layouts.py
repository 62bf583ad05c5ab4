"""How one sparse weight lies in a file: as it is, under a bitmask, or as compressed rows.

The law: ``unpack(pack(value, mask))`` gives the mask back, kept entries bit for bit (also
``-0.0``, a kept ``0.0`` and NaN payloads) and ``+0`` where the weight was pruned. The mask is
therefore stored, never derived from the values. All work is done on the bits, seen as integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.core.errors import FormatError, UsageError
from secateur.core.masks import pack_bits, unpack_bits

Shape = tuple[int, ...]
#: part name -> (type, length): what a layout stores for one weight.
PartSizes = dict[str, tuple[torch.dtype, int]]

#: The types of weights that can be stored sparse.
SPARSE_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
    )
}
#: A reader makes at most this many dense bytes out of one stored byte. A bitmask needs up to 64.
#: Compressed rows that are emptier than this are stored under a bitmask instead, so a forged
#: header of a few bytes can never ask for gigabytes.
EXPANSION = 1024

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AGAIN = "copy the file again from where it came, or write it again"


class Layout(Protocol):
    """How a sparse weight is turned into a few one-axis tensors and back.

    Example:
        >>> LAYOUTS["csr"].nbytes((10, 200), torch.float16, kept=5)
        25
    """

    @property
    def name(self) -> str:
        """The name in the catalogue and in files."""
        ...

    def parts(self, shape: Shape, dtype: torch.dtype, kept: int) -> PartSizes:
        """Type and length of every part; they follow from shape, type and kept count alone."""
        ...

    def fits(self, shape: Shape, dtype: torch.dtype, kept: int) -> bool:
        """Whether this layout can hold such a weight."""
        ...

    def nbytes(self, shape: Shape, dtype: torch.dtype, kept: int) -> int:
        """Exact size of the parts in bytes."""
        ...

    def pack(self, value: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The parts of a weight; no mask means that all of it is kept."""
        ...

    def unpack(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """``(value, mask)``, after checking every number that the parts contain."""
        ...


@dataclass(frozen=True)
class Dense:
    """The value as it is. Only for weights that are kept whole: then the mask needs no bytes.

    Example:
        >>> Dense().nbytes((2, 3), torch.float32, kept=6)
        24
    """

    name: str = "dense"

    def parts(self, shape: Shape, dtype: torch.dtype, kept: int) -> PartSizes:
        """One part, ``values``."""
        return {"values": (dtype, kept)}

    def fits(self, shape: Shape, dtype: torch.dtype, kept: int) -> bool:
        """Only where nothing is pruned."""
        return kept == math.prod(shape)

    def nbytes(self, shape: Shape, dtype: torch.dtype, kept: int) -> int:
        """Size of the parts."""
        return _nbytes(self.parts(shape, dtype, kept))

    def pack(self, value: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The flat value."""
        bits, flags = _flat(self, value, mask)
        if not bool(flags.all()):
            raise UsageError(
                f"packing a weight of shape {tuple(value.shape)} dense",
                f"its mask prunes {int((~flags).sum())} entries",
                "the dense layout stores no mask",
                "use Bitmask() or smallest()",
            )
        return {"values": bits.clone().view(value.dtype)}

    def unpack(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The value, and a mask that is True everywhere."""
        _require_parts(self, parts, shape, dtype)
        value = parts["values"].clone().reshape(shape)
        return value, torch.ones(shape, dtype=torch.bool, device=value.device)


@dataclass(frozen=True)
class Bitmask:
    """One bit per entry and the kept values in row-major order.

    Example:
        >>> value, mask = torch.tensor([5.0, 6.0, 7.0]), torch.tensor([True, False, True])
        >>> parts = Bitmask().pack(value, mask)
        >>> parts["bitmask"].tolist(), parts["values"].tolist()
        ([5], [5.0, 7.0])
        >>> Bitmask().unpack(parts, (3,), torch.float32)[0].tolist()
        [5.0, 0.0, 7.0]
    """

    name: str = "bitmask"

    def parts(self, shape: Shape, dtype: torch.dtype, kept: int) -> PartSizes:
        """``bitmask``, 8 entries a byte, and ``values``."""
        return {"bitmask": (torch.uint8, -(-math.prod(shape) // 8)), "values": (dtype, kept)}

    def fits(self, shape: Shape, dtype: torch.dtype, kept: int) -> bool:
        """Always."""
        return 0 <= kept <= math.prod(shape)

    def nbytes(self, shape: Shape, dtype: torch.dtype, kept: int) -> int:
        """Size of the parts."""
        return _nbytes(self.parts(shape, dtype, kept))

    def pack(self, value: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Flags and kept values."""
        bits, flags = _flat(self, value, mask)
        return {"bitmask": pack_bits(flags), "values": bits[flags].view(value.dtype)}

    def unpack(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Checks padding and population count."""
        kept = _require_parts(self, parts, shape, dtype)
        total, packed = math.prod(shape), parts["bitmask"]
        if total % 8 and int(packed[-1]) >> (total % 8):
            raise _damaged(
                self, shape, "padding bits of the last byte are set", "they are always 0"
            )
        mask = unpack_bits(packed, (total,))
        count = int(mask.sum())
        if count != kept:
            raise _damaged(
                self, shape, f"{count} bits are set and {kept} values are stored", "they must agree"
            )
        out = torch.zeros(total, dtype=_BITS[dtype.itemsize], device=packed.device)
        out.masked_scatter_(mask, parts["values"].view(out.dtype))
        return out.view(dtype).reshape(shape), mask.reshape(shape)


@dataclass(frozen=True)
class CSR:
    """Compressed rows: the first axis gives the rows, all other axes together the columns.

    Counts and column numbers use uint8, uint16 or int32, the smallest that holds the number of
    columns (for counts) or the last column (for column numbers).

    Example:
        >>> value = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
        >>> parts = CSR().pack(value, value != 0)
        >>> parts["row_counts"].tolist(), parts["columns"].tolist(), parts["values"].tolist()
        ([1, 0], [1], [5.0])
    """

    name: str = "csr"

    def parts(self, shape: Shape, dtype: torch.dtype, kept: int) -> PartSizes:
        """``row_counts``, ``columns`` and ``values``."""
        rows, columns = _matrix(shape)
        return {
            "row_counts": (_index_dtype(columns), rows),
            "columns": (_index_dtype(columns - 1), kept),
            "values": (dtype, kept),
        }

    def fits(self, shape: Shape, dtype: torch.dtype, kept: int) -> bool:
        """Column numbers fit in 31 bits, and one stored byte stands for at most 1024."""
        total = math.prod(shape)
        if not 0 <= kept <= total or _matrix(shape)[1] > 2**31 - 1:
            return False
        return total * dtype.itemsize <= EXPANSION * self.nbytes(shape, dtype, kept)

    def nbytes(self, shape: Shape, dtype: torch.dtype, kept: int) -> int:
        """Size of the parts."""
        return _nbytes(self.parts(shape, dtype, kept))

    def pack(self, value: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Counts, column numbers and kept values."""
        bits, flags = _flat(self, value, mask)
        sizes = self.parts(tuple(value.shape), value.dtype, int(flags.sum()))
        table = flags.reshape(_matrix(tuple(value.shape)))
        return {
            "row_counts": table.sum(1).to(sizes["row_counts"][0]),
            "columns": table.nonzero()[:, 1].to(sizes["columns"][0]),
            "values": bits[flags].view(value.dtype),
        }

    def unpack(
        self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Checks counts, range and order before anything is written anywhere."""
        kept = _require_parts(self, parts, shape, dtype)
        rows, width = _matrix(shape)
        counts, columns = parts["row_counts"].to(torch.int64), parts["columns"].to(torch.int64)
        if not _within(counts, width + 1):
            raise _damaged(self, shape, f"a row count is not in [0, {width}]", "rows have no room")
        if int(counts.sum()) != kept:
            found = f"the row counts sum to {int(counts.sum())}, {kept} values are stored"
            raise _damaged(self, shape, found, "they must agree")
        if not _within(columns, width):
            raise _damaged(
                self, shape, f"a column is not in [0, {width})", "there is no such place"
            )
        first = torch.arange(rows, device=counts.device) * width
        place = first.repeat_interleave(counts) + columns
        if not bool((place[1:] > place[:-1]).all()):
            raise _damaged(self, shape, "columns of a row do not increase", "each is stored once")
        out = torch.zeros(rows * width, dtype=_BITS[dtype.itemsize], device=counts.device)
        mask = torch.zeros(rows * width, dtype=torch.bool, device=counts.device)
        out[place] = parts["values"].view(out.dtype)
        mask[place] = True
        return out.view(dtype).reshape(shape), mask.reshape(shape)


#: Every layout by name. Earlier ones win ties in :func:`smallest`.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Dense(), Bitmask(), CSR())}


def smallest(value_shape: Shape, dtype: torch.dtype, kept: int) -> Layout:
    """The layout with the fewest bytes for a weight and its mask.

    Dense values plus a stored bitmask never win: a bitmask with kept values alone is at most as
    large. Dense is chosen only when all entries are kept, because the mask then needs no bytes.

    Args:
        value_shape: Shape of the weight.
        dtype: Its type.
        kept: How many entries the mask keeps.

    Example:
        >>> [smallest((1000, 1000), torch.float32, kept).name for kept in (10**6, 10**5, 10**4)]
        ['dense', 'bitmask', 'csr']
    """
    able = [layout for layout in LAYOUTS.values() if layout.fits(value_shape, dtype, kept)]
    return min(able, key=lambda layout: layout.nbytes(value_shape, dtype, kept))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits (unlike ``==``, NaN and -0.0 count).

    Example:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
        >>> same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
        True
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (x.detach().cpu().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)


def require_shape(shape: Shape) -> None:
    """Refuse a shape that no tensor can have.

    Raises:
        FormatError: No axis, a negative axis, or more than 2**63 - 1 bytes.

    Example:
        >>> require_shape((2, 3))
    """
    nonzero = math.prod(max(size, 1) for size in shape[:64])
    if not 1 <= len(shape) <= 64 or min(shape) < 0 or nonzero * 8 >= 2**63:
        raise FormatError(
            f"a weight of {len(shape)} axes",
            f"its shape is {str(shape)[:80]}",
            "weights have 1 to 64 axes, none negative, and fit in memory",
            _AGAIN,
        )


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _index_dtype(largest: int) -> torch.dtype:
    if largest <= 0xFF:
        return torch.uint8
    return torch.uint16 if largest <= 0xFFFF else torch.int32


def _nbytes(parts: PartSizes) -> int:
    return sum(dtype.itemsize * length for dtype, length in parts.values())


def _within(x: Tensor, end: int) -> bool:
    return bool(((x >= 0) & (x < end)).all())


def _flat(layout: Layout, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bits of ``value`` as integers and the mask, both flat; refuses what cannot be packed."""
    asked = f"packing a {value.dtype} weight of shape {tuple(value.shape)} as {layout.name}"
    if value.ndim == 0 or value.dtype not in SPARSE_DTYPES.values():
        why = f"weights have an axis and a type among {', '.join(SPARSE_DTYPES)}"
        raise UsageError(asked, "it cannot be stored sparse", why, "store it without a mask")
    if mask is None:
        mask = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    if mask.dtype != torch.bool or mask.shape != value.shape:
        found = f"its mask is {mask.dtype} of shape {tuple(mask.shape)}"
        raise UsageError(asked, found, "a mask has one flag per entry", "make a mask of that shape")
    flags = mask.to(value.device).flatten()
    kept = int(flags.sum())
    if layout.name != "dense" and not layout.fits(tuple(value.shape), value.dtype, kept):
        why = f"more than {EXPANSION} bytes per stored byte, or rows of over 2**31 - 1 entries"
        raise UsageError(asked, f"only {kept} entries are kept", why, "use Bitmask() or smallest()")
    bits = value.detach().contiguous().flatten().view(_BITS[value.dtype.itemsize])
    return bits, flags


def _require_parts(
    layout: Layout, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype
) -> int:
    """Check names, types and lengths of ``parts`` against the shape; return the kept count."""
    require_shape(shape)
    if dtype not in SPARSE_DTYPES.values():
        raise _damaged(layout, shape, f"its type is {dtype}", f"it is one of {list(SPARSE_DTYPES)}")
    values = parts.get("values")
    kept = values.numel() if values is not None else 0
    expected = layout.parts(shape, dtype, kept)
    if set(parts) != set(expected):
        raise _damaged(layout, shape, f"the parts are {sorted(parts)}", f"not {sorted(expected)}")
    for name, (part_dtype, length) in expected.items():
        part = parts[name]
        if part.dtype != part_dtype or tuple(part.shape) != (length,):
            found = f"{name!r} is {part.dtype} of shape {str(tuple(part.shape))[:80]}"
            raise _damaged(layout, shape, found, f"it is {part_dtype} of length {length}")
    if not layout.fits(shape, dtype, kept):
        found = f"{kept} values are stored for {math.prod(shape)} entries"
        raise _damaged(layout, shape, found, "this layout is never written for such a weight")
    return kept


def _damaged(layout: Layout, shape: Shape, found: str, why: str) -> FormatError:
    return FormatError(f"a {layout.name} weight of shape {str(shape)[:80]}", found, why, _AGAIN)
