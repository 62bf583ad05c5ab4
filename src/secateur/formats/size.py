"""How many bytes of a file a tensor will take, before anything is written.

Every tensor has a line in the header of the file, and a weight with a mask one for each part of its
layout, and an entry in the table: in a file of small weights that is more than the weights take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.formats.container import DTYPES
from secateur.formats.layouts import Shape, smallest
from secateur.formats.table import Alias, Entry, Table

_NAMES = {kind: name for name, kind in DTYPES.items()}
_DIGEST = 64


def sparse_bytes(name: str, shape: Shape, dtype: torch.dtype, kept: int, *, total: int) -> int:
    """What a weight with a mask takes, in the layout that is chosen for it.

    Args:
        name: Of the weight.
        shape: Of the weight.
        dtype: Of the weight.
        kept: How many entries its mask keeps.
        total: Bytes that the file has at most: the header says where each part lies.

    Example:
        >>> sparse_bytes("0.weight", (64, 64), torch.float32, 400, total=20_000)
        2384
    """
    layout = smallest(shape, dtype, kept)
    entry = Entry(layout.name, shape, dtype, kept)
    sizes = layout.parts(shape, dtype, kept)
    lines = sum(
        _line(key, sizes[part][0], shape if layout.name == "dense" else (sizes[part][1],), total)
        for part, key in entry.keys(name).items()
    )
    table = _escaped(Table({name: entry}, {})) - _escaped(Table({}, {})) + 1  # a comma
    return layout.nbytes(shape, dtype, kept) + lines + table


def plain_bytes(name: str, tensor: Tensor, *, total: int) -> int:
    """What a tensor without a mask takes.

    Example:
        >>> plain_bytes("0.bias", torch.zeros(64), total=20_000)
        323
    """
    line = _line(name, tensor.dtype, tuple(tensor.shape), total)
    return tensor.numel() * tensor.element_size() + line


def bare_bytes(aliases: Mapping[str, Alias]) -> int:
    """What a file without tensors takes, tied names included.

    Example:
        >>> bare_bytes({})
        190
    """
    metadata = {"format": "pt", "secateur": "", "secateur_sha256": _DIGEST * "0"}
    header = json.dumps({"__metadata__": metadata}, separators=(",", ":"))
    return 8 + len(header) + _escaped(Table({}, aliases)) + 7  # its length, and padding to 8


def _line(name: str, dtype: torch.dtype, shape: Shape, total: int) -> int:
    about = {
        "dtype": _NAMES.get(dtype, "BF16"),
        "shape": list(shape),
        "data_offsets": [total, total],
    }
    return len(json.dumps({name: about}, separators=(",", ":"), ensure_ascii=False).encode()) - 1


def _escaped(table: Table) -> int:
    """Length of a table as a text within JSON."""
    return len(json.dumps(table.to_json(), ensure_ascii=False).encode()) - 2
