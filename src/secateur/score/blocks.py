"""Criteria of whole residual blocks, for removing depth. Larger = keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.score.criterion import Needs
from secateur.score.groups import one_of
from secateur.stats import Stats
from secateur.stats.blocks import BlockCosine


@dataclass(frozen=True)
class BlockInfluence:
    r"""How much each block turns what passes through it; the lowest can go.

    With ``span`` the score at a block is that of removing it and the next ``span - 1`` at once.

    **formula** :math:`1 - E[\cos(x_{\text{in}}, x_{\text{out}})]`, or with ``measure="angle"``
    :math:`\arccos(E[\cos])/\pi`
    **Shapes** ``(blocks - span + 1,)``
    **Units** none
    **Needs** mean cosines of blocks
    **Source** ShortGPT, arXiv 2403.03853; angle and span: Gromov et al., arXiv 2403.17887
    **Differs** the angle is that of the mean cosine, over all positions; the source takes the mean of
    the angles at the last token

    Args:
        paths: Module paths of the blocks, in the order in which they run.
        span: Neighbouring blocks that go together.
        measure: ``"cosine"`` or ``"angle"``.

    Example:
        >>> from torch import nn
        >>> from secateur.stats import collect
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
        >>> criterion = BlockInfluence(("0", "1"))
        >>> stats = collect(net, [], criterion.needs, [torch.ones(3, 2)])
        >>> abs(float(criterion(stats)[1])) < 1e-12
        True
    """

    paths: tuple[str, ...]
    span: int = 1
    measure: Literal["cosine", "angle"] = "cosine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(self.paths))
        one_of("BlockInfluence", "measure", self.measure, ("cosine", "angle"))

    @property
    def needs(self) -> Needs:
        return frozenset({BlockCosine(self.paths, self.span)})

    def __call__(self, stats: Stats) -> Tensor:
        need = BlockCosine(self.paths, self.span)
        starts = self.paths[: len(self.paths) - self.span + 1]
        cosines = torch.stack([stats.at(need, path) for path in starts])
        if self.measure == "angle":
            return (cosines.clamp(-1, 1).arccos() / math.pi).float()
        return (1 - cosines).float()
