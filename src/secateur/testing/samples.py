"""Sample weights of every kind of layer, from a seed. Sizes fit the patterns of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.core.weight import Axes, Weight

#: Kind of layer -> shape and axes of its weight.
KINDS: Mapping[str, tuple[tuple[int, ...], Axes]] = {
    "linear": ((8, 12), Axes(("out", "in"))),
    "gpt2_conv1d": ((12, 8), Axes(("in", "out"))),
    "conv1d": ((8, 4, 3), Axes(("out", "in", "kw"))),
    "conv2d": ((8, 4, 3, 2), Axes(("out", "in", "kh", "kw"))),
    "conv3d": ((4, 4, 2, 2, 3), Axes(("out", "in", "kd", "kh", "kw"))),
    "grouped": ((8, 4, 3, 2), Axes(("out", "in", "kh", "kw"), 2)),
    "depthwise": ((8, 1, 3, 2), Axes(("out", "in", "kh", "kw"), 8)),
    "transposed": ((4, 8, 2, 3), Axes(("in", "out", "kh", "kw"))),
    "grouped_transposed": ((8, 4, 2, 3), Axes(("in", "out", "kh", "kw"), 2)),
    "experts": ((2, 8, 4), Axes(("expert", "out", "in"), 2)),
    "experts_transposed": ((2, 4, 8), Axes(("expert", "in", "out"), 2)),
}


def sample_weight(
    kind: str = "linear", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Weight:
    """A random weight named ``"w"`` of one of the :data:`KINDS`.

    Example:
        >>> sample_weight("gpt2_conv1d").matrix().shape
        torch.Size([8, 12])
    """
    shape, axes = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    return Weight("w", torch.randn(shape, generator=generator).to(dtype), axes)
