"""Second-order criteria from the empirical Fisher matrix: OBD and WoodFisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import BlockFisher, SquaredGradient, Stats


@dataclass(frozen=True)
class Obd:
    r"""Optimal brain damage with a diagonal empirical Fisher matrix as the Hessian.

    **formula** :math:`s = \tfrac12 w^2 F_{ii},\quad F_{ii} = E[g_i^2]` over single samples
    **Shapes** that of the weight
    **Units** loss
    **Needs** mean of squared gradients
    **Source** LeCun et al. 1989
    **Differs** the paper propagates exact second derivatives; the empirical Fisher replaces them

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(SquaredGradient(1), w, torch.tensor([[1.0, 3.0]]), 1)
        >>> Obd()(w, stats)
        tensor([[2.0000, 4.5000]])
    """

    samples: int = 1

    @property
    def needs(self) -> Needs:
        return frozenset({SquaredGradient(self.samples)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return 0.5 * weight.value.float().square() * stats(SquaredGradient(self.samples), weight)


@dataclass(frozen=True)
class WoodFisher:
    r"""Optimal brain surgeon with a block-diagonal empirical Fisher matrix.

    **formula** :math:`s_i = \dfrac{w_i^2}{2\,[(F_B + \lambda I)^{-1}]_{ii}}` with blocks ``B`` of
    ``block`` consecutive weights
    **Shapes** that of the weight
    **Units** loss
    **Needs** block Fisher matrix
    **Source** WoodFisher (arXiv 2004.14340), oBERT (arXiv 2203.07259)
    **Differs** one Cholesky factorization per block in place of the rank-one recursion (equal up to
    rounding); only the score is used, no update of the survivors

    Args:
        block: Weights per block.
        damp: λ, relative to the mean diagonal of the weight's Fisher matrix; at least 1e-6.
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
    damp: float = 1e-2
    samples: int = 1

    @property
    def needs(self) -> Needs:
        return frozenset({BlockFisher(self.block, self.samples)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        stat = BlockFisher(self.block, self.samples)
        fisher = stats(stat, weight).double()
        diagonal = fisher.diagonal(dim1=1, dim2=2)
        # A weight without any gradient (a dead unit) has Fisher zero, and float32 sums are exact to
        # about 1e-7 of the scale: the floor keeps every block invertible.
        scale = max(float(diagonal.mean()), 1e-30)
        damp = max(self.damp, 1e-6) * scale
        parts = []
        for chunk in fisher.split(max(1, (1 << 24) // self.block**2)):
            eye = torch.eye(self.block, dtype=torch.float64, device=chunk.device)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(chunk + damp * eye))
            parts.append(inverse.diagonal(dim1=1, dim2=2))
        pivots = torch.cat(parts).flatten()[: weight.value.numel()].reshape(weight.value.shape)
        return (weight.value.double().square() / (2 * pivots)).float()
