"""Filters whose output is expected to be small behind their BatchNorm matter little."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import Stats
from secateur.stats.expected import ExpectedOutput


@dataclass(frozen=True)
class ExpectedBatchNorm:
    r"""What a filter is expected to give behind its BatchNorm and a ReLU.

    Every weight of a filter has the same score, so it goes with the pattern ``rows``.

    **formula** :math:`s = \beta\,\Phi(\beta/|\gamma|) + |\gamma|\,\varphi(\beta/|\gamma|)`
    **Shapes** that of the weight
    **Units** activations
    **Needs** scale and shift of the BatchNorm that follows; one batch, to see which it is
    **Source** Bartoldson et al., arXiv 1906.03728 (there "E[BN]")

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w, stats = Weight("w", torch.ones(1, 2), LINEAR), Stats()
        >>> stats.put(ExpectedOutput(), "w", torch.tensor([[0.4, 0.4]]))
        >>> ExpectedBatchNorm()(w, stats)
        tensor([[0.4000, 0.4000]])
    """

    @property
    def needs(self) -> Needs:
        return frozenset({ExpectedOutput()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return stats(ExpectedOutput(), weight)
