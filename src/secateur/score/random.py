"""Random scores: the baseline that every criterion must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import NOTHING, Needs
from secateur.stats import Stats


@dataclass(frozen=True)
class Random:
    r"""Uniform random scores, fixed by the seed and the weight's name.

    **formula** :math:`s_i \sim U(0, 1)`
    **Shapes** that of the weight
    **Units** none
    **Needs** nothing
    **Source** baseline

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("fc.weight", torch.ones(2, 2), LINEAR)
        >>> bool((Random(1)(w, Stats()) == Random(1)(w, Stats())).all())
        True
    """

    seed: int = 0

    @property
    def needs(self) -> Needs:
        return NOTHING

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        seed = (self.seed + stats.seed) * 1_000_003 + zlib.crc32(weight.name.encode())
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        drawn = torch.rand(weight.value.shape, generator=generator, dtype=torch.float32)
        return drawn.to(weight.value.device)
