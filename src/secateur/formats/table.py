"""The JSON table in a file's header: which weights are sparse, how, and which are tied."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from secateur.core.errors import FormatError, kind_of
from secateur.formats.layouts import LAYOUTS, SPARSE_DTYPES, Shape, require_shape

#: Version of the format that this package writes and reads.
VERSION = 1

_AGAIN = "copy the file again from where it came, or write it again"


@dataclass(frozen=True)
class Entry:
    """One weight that has a mask.

    Args:
        layout: Name of its layout.
        shape: Shape of the dense weight.
        dtype: Its type.
        kept: Number of kept entries.

    Example:
        >>> Entry("bitmask", (2, 3), torch.float32, 1).keys("w")
        {'bitmask': 'w.bitmask', 'values': 'w.values'}
    """

    layout: str
    shape: Shape
    dtype: torch.dtype
    kept: int

    def keys(self, name: str) -> dict[str, str]:
        """Part name -> key in the file."""
        if self.layout == "dense":
            return {"values": name}
        parts = LAYOUTS[self.layout].parts(self.shape, self.dtype, self.kept)
        return {part: f"{name}.{part}" for part in parts}


@dataclass(frozen=True)
class Alias:
    """Another name of a stored tensor.

    Args:
        of: The name under which the tensor is stored.
        masked: Whether the mask is listed under this name too.

    Example:
        >>> Alias("embedding.weight", masked=False).of
        'embedding.weight'
    """

    of: str
    masked: bool


@dataclass(frozen=True)
class Table:
    """What the header says about weights with masks and tied tensors.

    Example:
        >>> table = Table({"w": Entry("csr", (2, 3), torch.float32, 1)}, {"v": Alias("w", False)})
        >>> table.to_json()[:38]
        '{"version":1,"sparse":{"w":{"layout":"'
        >>> parse_table(table.to_json()) == table
        True
    """

    sparse: Mapping[str, Entry]
    aliases: Mapping[str, Alias]

    def to_json(self) -> str:
        """The table as one line of JSON."""
        sparse = {
            name: {
                "layout": entry.layout,
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "kept": entry.kept,
            }
            for name, entry in self.sparse.items()
        }
        aliases = {name: {"of": a.of, "masked": a.masked} for name, a in self.aliases.items()}
        data = {"version": VERSION, "sparse": sparse, "aliases": aliases}
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False)


def parse_table(text: str) -> Table:
    """Inverse of :meth:`Table.to_json`; believes nothing.

    Raises:
        FormatError: The text is no such table, or one of another version.
    """
    data = read_json(text, "the table in the header")
    require_version(data)
    _require_keys(data, {"version", "sparse", "aliases"}, "the table")
    sparse = {name: _entry(name, entry) for name, entry in _mapping(data["sparse"]).items()}
    aliases = {name: _alias(name, alias) for name, alias in _mapping(data["aliases"]).items()}
    return Table(sparse, aliases)


def require_version(data: Mapping[str, Any]) -> None:
    """Refuse files of another format version, and say what to do.

    Raises:
        FormatError: The version is not the one that this package reads.

    Example:
        >>> require_version({"version": 1})
    """
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise FormatError(
            "the format version",
            f"it is {str(version)[:40]}",
            f"this secateur reads version {VERSION}",
            "install the secateur version that wrote the file, or write it again with this one",
        )


def read_json(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object; refuse repeated keys, deep nesting and anything else unusual.

    Raises:
        FormatError: It is not one JSON object.

    Example:
        >>> read_json('{"a": 1}', "an example")
        {'a': 1}
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        found = f"it is not JSON ({str(error)[:120]})"
        raise FormatError(what, found, "it must be one JSON object", _AGAIN) from error
    if not isinstance(data, dict):
        raise FormatError(what, f"it is {kind_of(data)}", "it must be an object", _AGAIN)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is repeated")
    return data


def _entry(name: str, data: Any) -> Entry:
    where = f"weight {name[:80]!r}"
    _require_keys(data, {"layout", "shape", "dtype", "kept"}, where)
    layout, shape, dtype, kept = (data[key] for key in ("layout", "shape", "dtype", "kept"))
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise _lie(where, f"its layout is {str(layout)[:40]!r}", f"known: {list(LAYOUTS)}")
    if not isinstance(dtype, str) or dtype not in SPARSE_DTYPES:
        raise _lie(where, f"its type is {str(dtype)[:40]!r}", f"known: {list(SPARSE_DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int for size in [*shape, kept]):
        raise _lie(where, "its shape or kept count is not made of integers", "sizes are counted")
    require_shape(tuple(shape))
    entry = Entry(layout, tuple(shape), SPARSE_DTYPES[dtype], kept)
    total = math.prod(shape)
    if not 0 <= kept <= total or not LAYOUTS[layout].fits(entry.shape, entry.dtype, kept):
        found = f"it keeps {kept} of {total} entries as {layout}"
        raise _lie(where, found, "this layout is never written for such a weight")
    return entry


def _alias(name: str, data: Any) -> Alias:
    where = f"alias {name[:80]!r}"
    _require_keys(data, {"of", "masked"}, where)
    if not isinstance(data["of"], str) or not isinstance(data["masked"], bool):
        raise _lie(where, "its fields have the wrong types", "'of' is a name, 'masked' a flag")
    return Alias(data["of"], data["masked"])


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _lie("the table", f"a field is {kind_of(data)}", "it must be an object")
    return data


def _require_keys(data: Any, keys: set[str], where: str) -> None:
    if not isinstance(data, dict) or set(data) != keys:
        found = str(sorted(data))[:120] if isinstance(data, dict) else type(data).__name__
        raise _lie(where, f"its fields are {found}", f"they must be {sorted(keys)}")


def _lie(where: str, found: str, why: str) -> FormatError:
    return FormatError(where, found, why, _AGAIN)
