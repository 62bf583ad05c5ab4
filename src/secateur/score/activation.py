"""Criteria from the layer's inputs: Wanda and RIA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import InputNorm, Stats


@dataclass(frozen=True)
class Wanda:
    r"""Weight magnitude times the norm of its input feature.

    Meant to be compared within output rows: the alias ``wanda`` uses the pattern ``per_row``.

    **formula** :math:`s_{ij} = |w_{ij}|\ \sqrt{E[x_j^2]}`
    **Shapes** that of the weight
    **Units** those of the output
    **Needs** input norms
    **Source** Wanda, arXiv 2306.11695
    **Differs** experts that no token reached are ranked by magnitude

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, -1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(InputNorm(), w, torch.tensor([[[1.0, 3.0]]]), 1)
        >>> Wanda()(w, stats)
        tensor([[2., 3.]])
    """

    @property
    def needs(self) -> Needs:
        return frozenset({InputNorm()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        norms = weight.per_row(_norms(weight, stats))
        return weight.like(weight.matrix().float().abs() * norms)


@dataclass(frozen=True)
class Ria:
    r"""Relative importance and activations: a weight's share of its row and column.

    **formula** :math:`s_{ij} = \left(\dfrac{|w_{ij}|}{\sum_k |w_{kj}|} +
    \dfrac{|w_{ij}|}{\sum_k |w_{ik}|}\right) \left(\sqrt{E[x_j^2]}\right)^{a}`
    **Shapes** that of the weight
    **Units** activations to the power ``a``
    **Needs** input norms
    **Source** RIA (Zhang et al., ICLR 2024), without its channel permutation
    **Differs** experts that no token reached are ranked by the relative size alone

    Args:
        a: Weight of the activations.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, -1.0], [2.0, 3.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(InputNorm(), w, torch.tensor([[[1.0, 1.0]]]), 1)
        >>> Ria()(w, stats)
        tensor([[1.1667, 0.5833],
                [0.9000, 1.3500]])
    """

    a: float = 0.5

    @property
    def needs(self) -> Needs:
        return frozenset({InputNorm()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        # Columns are summed within a convolution group: other groups have other inputs.
        size = weight.matrix().float().abs().reshape(weight.axes.groups, -1, weight.fan_in)
        columns = size.sum(1, keepdim=True).clamp(min=1e-30)
        rows = size.sum(2, keepdim=True).clamp(min=1e-30)
        share = (size / columns + size / rows).flatten(0, 1)
        return weight.like(share * weight.per_row(_norms(weight, stats)) ** self.a)


def _norms(weight: Weight, stats: Stats) -> Tensor:
    """Norms of the inputs; ones for an expert that no token reached, which has none to rank by."""
    norms = stats(InputNorm(), weight)
    if weight.axes.stacked:
        norms = norms.where(norms.any(1, keepdim=True), 1.0)
    return norms
