"""Weights as the native library takes them: values and index, in a layout of the bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import UnknownName, UsageError
from secateur.formats import layouts

#: Names and numbers of the C interface.
LAYOUTS = {"dense": 0, "bitmask": 1, "csr": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The parts that make up the index of a layout, in order.
_INDEX: dict[str, tuple[str, ...]] = {
    "dense": (),
    "bitmask": ("bitmask",),
    "csr": ("row_counts", "columns"),
}


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as ``values`` and ``index``.

    Args:
        layout: ``"dense"``, ``"bitmask"`` or ``"csr"``.
        values: The weights: all for dense, else those that are not zero; flat.
        index: Where they belong, as bytes: nothing, one bit an entry, or one count a row and then
            one column a value.
    """

    layout: str
    values: Tensor
    index: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values.numel() * self.values.element_size() + self.index.numel()


def store(weight: np.ndarray[Any, Any] | Tensor, layout: str = "auto") -> Stored:
    """Split a weight into values and index.

    Args:
        weight: Float32, bfloat16 or float16. Its first axis gives the rows.
        layout: ``"dense"``, ``"bitmask"``, ``"csr"``, or ``"auto"`` for the smallest.

    Raises:
        UnknownName: There is no such layout.
        UsageError: The type is another, or so few weights are kept that csr is never written.

    Example:
        >>> stored = store(np.array([[0, 5, 0], [0, 0, 7]], np.float32), "csr")
        >>> stored.values.tolist(), stored.index.tolist()
        ([5.0, 7.0], [1, 1, 1, 2])
        >>> store(np.eye(100, dtype=np.float32)).layout
        'csr'
    """
    value = _tensor(weight)
    if value.dtype not in DTYPES:
        raise UsageError(
            f"a sparse layer with a weight of type {value.dtype}",
            "it is none of float32, bfloat16 and float16",
            "the kernels read these and no other",
            "convert it to one of these",
        )
    mask = value != 0
    if layout == "auto":
        layout = layouts.smallest(tuple(value.shape), value.dtype, int(mask.sum())).name
    if layout not in LAYOUTS:
        raise UnknownName("layout", layout, LAYOUTS)
    if layout == "dense":
        return Stored(layout, value.flatten(), torch.empty(0, dtype=torch.uint8))
    parts = layouts.LAYOUTS[layout].pack(value, mask)
    index = [parts[name].contiguous().view(torch.uint8) for name in _INDEX[layout]]
    return Stored(layout, parts["values"], torch.cat(index))


def fill(kept: np.ndarray[Any, Any]) -> float:
    """Share of kept weights in blocks of four rows that have any: 1 for a pattern of such blocks.

    Two weights of one shape that agree in this and in their sparsity are about equally fast.

    Args:
        kept: A matrix of flags.

    Example:
        >>> fill(np.eye(4, dtype=bool)), fill(np.ones((4, 2), bool)), fill(np.zeros((4, 2), bool))
        (0.25, 1.0, 1.0)
    """
    whole = kept[: len(kept) // 4 * 4]
    if not whole.any():
        return 1.0
    blocks = whole.reshape(-1, 4, whole.shape[1]).any(axis=1)
    return float(whole.sum() / (4 * blocks.sum()))


def _tensor(weight: np.ndarray[Any, Any] | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.detach().cpu().contiguous()
    if weight.dtype.name == "bfloat16":  # of ml_dtypes, as ONNX has it; torch does not know it
        return torch.tensor(weight.view(np.uint16)).view(torch.bfloat16)
    # A copy: torch warns about sharing an array that cannot be written.
    return torch.tensor(weight)
