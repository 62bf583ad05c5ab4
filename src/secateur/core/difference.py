"""How far two runs of one model are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Two numbers that differ by rounding may fall on either side of a decision (the largest class, a
# threshold), so of whole numbers a few may differ.
_DECISIONS = 0.01


def largest_error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Largest difference of any output, relative to its largest number.

    Another number of outputs, shapes or types that differ, an infinity or NaN on one side only, or
    more than 1 % of whole numbers that differ, are an infinite error.

    Example:
        >>> largest_error([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -4.25])])
        0.0625
        >>> nan = torch.tensor([float("nan"), 1.0])
        >>> largest_error([nan], [nan]), largest_error([nan], [torch.ones(2)])
        (0.0, inf)
    """
    if len(expected) != len(got):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.is_floating_point():
            if a.numel() and float((a != b).double().mean()) > _DECISIONS:
                return float("inf")
            continue
        worst = max(worst, _relative(a.double(), b.double()))
    return round(worst, 12)


def _relative(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite()
    alike = torch.allclose(a[~finite], b[~finite], rtol=0.0, atol=0.0, equal_nan=True)
    a, b = a[finite], b[finite]
    if not alike or not b.isfinite().all():
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
