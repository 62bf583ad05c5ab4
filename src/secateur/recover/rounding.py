"""Roundings: symmetric integer grids, so that zero stays zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError


@dataclass(frozen=True)
class Integer:
    r"""Symmetric integers with one scale per row, or per ``group`` inputs of a row.

    **formula** :math:`q = \mathrm{clip}(\mathrm{round}(w / \Delta), -Q, Q)\,\Delta`, with
    :math:`Q = 2^{bits-1} - 1` and :math:`\Delta = \max|w| / Q`
    **Shapes** matrix ``(out, fan_in)``
    **Units** those of the weight
    **Needs** nothing
    **Source** standard; GPTQ's column-wise use, arXiv 2210.17323

    Args:
        bits: 8 or 4 usually.
        group: Inputs that share a scale; 0 for the whole row.

    Example:
        >>> w = torch.tensor([[0.9, -0.4, 0.0, 1.27]])
        >>> Integer(8).fit(w)(w, slice(None))
        tensor([[ 0.9000, -0.4000,  0.0000,  1.2700]])
    """

    bits: int = 8
    group: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16 or self.group < 0:
            raise UsageError(
                f"Integer(bits={self.bits}, group={self.group})",
                "bits must lie from 2 to 16 and group not be negative",
                "a row, or a group of its inputs, shares one scale of so many bits",
                "write e.g. bits=8, group=0",
            )

    def fit(self, matrix: Tensor) -> IntegerGrid:
        """Scales from the dense matrix."""
        top = 2 ** (self.bits - 1) - 1
        rows, columns = matrix.shape
        group = self.group or columns
        padded = torch.nn.functional.pad(matrix.abs().float(), (0, -columns % group))
        peak = padded.reshape(rows, -1, group).amax(2)
        scale = (peak / top).clamp(min=torch.finfo(torch.float32).tiny)
        return IntegerGrid(scale.repeat_interleave(group, 1)[:, :columns], top)


@dataclass(frozen=True)
class IntegerGrid:
    """A fitted :class:`Integer` rounding."""

    scale: Tensor
    top: int

    def __call__(self, values: Tensor, columns: slice) -> Tensor:
        # In float32 at least: float16 has no number as small as the scale of an empty row.
        scale = self.scale[:, columns]
        return ((values / scale).round().clamp(-self.top, self.top) * scale).to(values.dtype)


ROUNDINGS: dict[str, type[Integer]] = {"integer": Integer}
