"""The laws of layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.formats import Layout
from secateur.testing.law import require, same


def check_layout(layout: Layout, value: Tensor, mask: Tensor) -> None:
    """Check that a layout gives a weight back bit for bit, in the bytes it announces.

    Args:
        layout: What to check.
        value: A weight; NaN, infinities and negative zeros are welcome.
        mask: What is kept; the layout must fit it.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.formats import Bitmask
        >>> check_layout(Bitmask(), torch.randn(4, 9), torch.rand(4, 9) > 0.5)
    """
    shape, dtype, kept = tuple(value.shape), value.dtype, int(mask.sum())
    before = (value.clone(), mask.clone())
    parts = layout.pack(value, mask)
    law = "packing does not write"
    require(same(value, before[0]) and same(mask, before[1]), law, layout, "the input changed")
    announced = layout.parts(shape, dtype, kept)
    found = {name: (part.dtype, part.numel()) for name, part in parts.items()}
    require(found == announced, "parts are as announced", layout, f"{found}, not {announced}")
    real = sum(part.numel() * part.element_size() for part in parts.values())
    said = layout.nbytes(shape, dtype, kept)
    require(real == said, "nbytes is the size of the parts", layout, f"{real} against {said}")
    back, flags = layout.unpack(parts, shape, dtype)
    require(torch.equal(flags, mask), "unpack(pack) gives the mask back", layout, "it does not")
    expected = torch.where(mask, value, torch.zeros((), dtype=dtype))
    require(same(back, expected), "unpack(pack) is bit-exact", layout, "bits differ")
