"""The survivors' share of WoodFisher: an update inside each block of the Fisher matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.cholesky import cholesky
from secateur.core.weight import Weight
from secateur.recover.recovery import Choose, Repaired, Rounding
from secateur.stats import BlockFisher, Stat, Stats
from secateur.stats.gradients import require_block, require_samples


@dataclass(frozen=True)
class FisherUpdate:
    r"""Move the surviving weights to where the loss, as the Fisher matrix sees it, grows least.

    What :class:`~secateur.score.WoodFisher` presumes about the survivors. With the same ``block``,
    ``damp`` and ``samples`` both read one statistic.

    **formula** :math:`\min_{v} (v - w)^\top (F_B + \lambda I)\,(v - w)` with :math:`v` zero off the
    mask: :math:`v_K = w_K + A_{KK}^{-1} A_{KQ} w_Q` with :math:`A = F_B + \lambda I`, the kept
    weights ``K`` and the pruned ``Q`` of each block
    **Shapes** that of the weight
    **Units** those of the weight
    **Needs** block Fisher matrix
    **Source** optimal brain surgeon (Hassibi and Stork 1993), WoodFisher (arXiv 2004.14340)
    **Differs** all pruned weights of a block together, which is the minimum; the paper adds up the
    updates that belong to single removals

    Args:
        block: Weights per block.
        damp: λ, in the units of the Fisher matrix; holds survivors that no gradient has seen.
        samples: Samples per gradient.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.recover import FixedMask
        >>> w, stats = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR), Stats()
        >>> stats.update(BlockFisher(2, 1), w, torch.tensor([[1.0, 1.0]]), 1)
        >>> choose = FixedMask(w.matrix(), torch.tensor([[True, False]]))
        >>> FisherUpdate(block=2, damp=0.0)(w, stats, choose).values.round(decimals=3)
        tensor([[3., 0.]])
    """

    block: int = 50
    damp: float = 1e-4
    samples: int = 1

    def __post_init__(self) -> None:
        require_block("FisherUpdate(block=...)", self.block)
        require_samples("FisherUpdate(samples=...)", self.samples)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({BlockFisher(self.block, self.samples)})

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        stat = BlockFisher(self.block, self.samples)
        mask = choose()
        fisher = stats(stat, weight)
        kept, dense = (stat.blocks(weight, x.double()) for x in (weight.like(mask), weight.value))
        step = max(1, (1 << 24) // self.block**2)
        parts = [
            self._solve(stat.damped(f, self.damp), w, k)
            for f, w, k in zip(fisher.split(step), dense.split(step), kept.split(step), strict=True)
        ]
        new = Weight(weight.name, stat.whole(weight, torch.cat(parts)), weight.axes)
        values = new.matrix().to(weight.value.dtype).masked_fill(~mask, 0)
        if rounding is not None:
            values = rounding.fit(weight.matrix())(values, slice(None)).masked_fill(~mask, 0)
        return Repaired(values, mask)

    def _solve(self, blocks: Tensor, dense: Tensor, kept: Tensor) -> Tensor:
        pull = kept * (blocks @ (dense * (1 - kept))[:, :, None]).squeeze(2)
        both = kept[:, :, None] * kept[:, None, :]
        system = blocks * both + torch.diag_embed(1 - kept)
        factor = cholesky(system)
        return dense + torch.cholesky_solve(pull[:, :, None], factor).squeeze(2)
