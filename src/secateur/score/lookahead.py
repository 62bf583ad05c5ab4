"""Lookahead: weigh what a weight does together with the layers around it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import Criterion, Needs
from secateur.score.magnitude import Magnitude
from secateur.stats import Stats
from secateur.stats.neighbours import Neighbours


@dataclass(frozen=True)
class Lookahead:
    r"""A weight's score times the energies of the layers in front of it and behind it.

    With :class:`Magnitude` it is the squared distortion that removing the weight makes in the
    product of three consecutive layers. On groups: ``Grouped(Lookahead(), "sum", "none", "out")``.
    A weight between dead neighbours scores 0.

    **formula** :math:`s_{ji} = w_{ji}^2\ \lVert W_{l-1}[i,:] \rVert^2\ \lVert W_{l+1}[:,j]
    \rVert^2`
    **Shapes** that of the weight
    **Units** those of the inner criterion times weights to the fourth power
    **Needs** neighbours, which are collected with the widths of the network
    **Source** LAP, arXiv 2002.04809
    **Differs** see :class:`~secateur.stats.neighbours.Neighbours` for residual streams, attention
    and gated layers

    Args:
        inner: ``Magnitude(2)``, or e.g. OBD for the paper's LAP-OBD.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w, stats = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR), Stats()
        >>> stats.put(Neighbours(), "w", torch.tensor([[1.0, 9.0]]))
        >>> Lookahead()(w, stats)
        tensor([[4., 9.]])
    """

    inner: Criterion = Magnitude(2)

    @property
    def needs(self) -> Needs:
        return frozenset({Neighbours(), *self.inner.needs})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        scores = self.inner(weight, stats)
        return (scores.double() * stats(Neighbours(), weight)).to(scores.dtype)
