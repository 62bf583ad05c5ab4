"""Second-order criteria from the empirical Fisher matrix: OBD and WoodFisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.cholesky import cholesky
from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import BlockFisher, SquaredGradient, Stats
from secateur.stats.gradients import require_block, require_samples


@dataclass(frozen=True)
class Obd:
    r"""Optimal brain damage with a diagonal empirical Fisher matrix as the Hessian.

    The expansion holds for small changes. When half of a network goes at once, a ranking without
    damping drops large weights whose gradients happened to be small at the dense network, and is
    far below magnitude; λ keeps them. It is the same for all weights.

    **formula** :math:`s = \tfrac12 w^2 (F_{ii} + \lambda),\quad F_{ii} = E[g_i^2]` over single
    samples
    **Shapes** that of the weight
    **Units** loss
    **Needs** mean of squared gradients
    **Source** LeCun et al. 1989
    **Differs** the paper propagates exact second derivatives; the empirical Fisher replaces them;
    the paper has no λ (``damp=0``)

    Args:
        samples: Samples per gradient.
        damp: λ, in the units of the Fisher matrix.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(SquaredGradient(1), w, torch.tensor([[1.0, 3.0]]), 1)
        >>> Obd(damp=0.5)(w, stats)
        tensor([[3.0000, 4.7500]])
    """

    samples: int = 1
    damp: float = 1e-3

    def __post_init__(self) -> None:
        require_samples("Obd(samples=...)", self.samples)

    @property
    def needs(self) -> Needs:
        return frozenset({SquaredGradient(self.samples)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        fisher = stats(SquaredGradient(self.samples), weight)
        return 0.5 * weight.value.float().square() * (fisher + self.damp)


@dataclass(frozen=True)
class WoodFisher:
    r"""Optimal brain surgeon with a block-diagonal empirical Fisher matrix.

    Damping decides whether this works. A trained network has gradients on few of its training
    images, so the blocks are far from full rank, and without damping most weights look as if others
    could make up for them. λ is the same for all weights: a λ that follows each layer's own scale
    empties the layer with the least gradients. With much damping the ranking is that of magnitude.

    The score presumes that the survivors are updated (:class:`~secateur.recover.FisherUpdate`).
    A weight that is zero already was pruned before: it makes up for nothing.

    **formula** :math:`s_i = \dfrac{w_i^2}{2\,[(F_B + \lambda I)^{-1}]_{ii}}` with blocks ``B`` of
    ``block`` consecutive weights
    **Shapes** that of the weight
    **Units** loss
    **Needs** block Fisher matrix
    **Source** WoodFisher (arXiv 2004.14340), oBERT (arXiv 2203.07259)
    **Differs** one Cholesky factorization per block in place of the rank-one recursion (equal up to
    rounding); λ is 1e-4 by default (the papers: 1e-5 for ResNet-20, 1e-7 for BERT). The lead of the
    score over magnitude is not reproduced: on a trained ResNet-20 both are level where both are
    followed by the update (``bench/oneshot.py``)

    Args:
        block: Weights per block.
        damp: λ, in the units of the Fisher matrix: squared gradients of the loss of one sample. At
            least 1e-6 of the mean diagonal, and more for a block that rounding has left indefinite.
        samples: Samples per gradient.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(BlockFisher(2, 1), w, torch.tensor([[1.0, 0.0]]), 1)
        >>> stats.update(BlockFisher(2, 1), w, torch.tensor([[0.0, 3.0]]), 1)
        >>> WoodFisher(block=2, damp=0.0)(w, stats)
        tensor([[1.0000, 2.2500]])
    """

    block: int = 50
    damp: float = 1e-4
    samples: int = 1

    def __post_init__(self) -> None:
        require_block("WoodFisher(block=...)", self.block)
        require_samples("WoodFisher(samples=...)", self.samples)

    @property
    def needs(self) -> Needs:
        return frozenset({BlockFisher(self.block, self.samples)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        stat = BlockFisher(self.block, self.samples)
        fisher, alive = stats(stat, weight), stat.blocks(weight, (weight.value != 0).float())
        parts = []
        step = max(1, (1 << 24) // self.block**2)
        for some, live in zip(fisher.split(step), alive.split(step), strict=True):
            damped = stat.damped(some * live[:, :, None] * live[:, None, :], self.damp)
            inverse = torch.cholesky_inverse(cholesky(damped))
            parts.append(inverse.diagonal(dim1=1, dim2=2))
        pivots = stat.whole(weight, torch.cat(parts))
        return (weight.value.double().square() / (2 * pivots)).float()
