"""Optimal-brain saliency: what removing a weight costs when the others may make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.cholesky import cholesky
from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import Gram, Stats


@dataclass(frozen=True)
class ObsSaliency:
    r"""The saliency of optimal brain surgeon for the squared error of the layer's output.

    **formula** :math:`s_{iq} = \dfrac{w_{iq}^2}{[H^{-1}]_{qq}},\quad H = E[x x^\top] + \lambda I`
    **Shapes** that of the weight
    **Units** output squared
    **Needs** Gram matrix
    **Source** OBS (Hassibi and Stork 1993), OBC (arXiv 2208.11580), SparseGPT (arXiv 2301.00774)

    Inside the column sweep it scores the *updated* weights with the pivots of the inputs that are
    still free (:meth:`rescore`), which is SparseGPT's rule.

    Args:
        damp: λ, relative to the mean of the Gram matrix's diagonal; at least 1e-6, and more where
            rounding has left the matrix indefinite.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(Gram(), w, torch.eye(2)[None] * 2.0, 2)
        >>> ObsSaliency(damp=0.0)(w, stats)
        tensor([[8.0000, 2.0000]])
    """

    damp: float = 0.01

    @property
    def needs(self) -> Needs:
        return frozenset({Gram()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        gram = stats(Gram(), weight).double()
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # A feature that is always zero would make H singular at damp=0; 1e-6 keeps it invertible
        # and leaves its saliency at w² * 1e-6 * size: last to be kept, as it should be.
        inverse = torch.cholesky_inverse(cholesky(gram + max(self.damp, 1e-6) * size * eye))
        pivots = inverse.diagonal(dim1=1, dim2=2)
        return weight.like(self.rescore(weight.matrix().double(), weight.per_row(pivots))).float()

    def rescore(self, values: Tensor, pivots: Tensor) -> Tensor:
        """Saliency of current values with pivots ``[H^-1]_qq`` that broadcast against them."""
        return values.square() / pivots
