"""Exact optimal brain surgeon, one weight at a time: OBC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.cholesky import cholesky
from secateur.core.weight import Weight
from secateur.recover.least_squares import LeastSquares
from secateur.recover.recovery import Choose, FixedMask, Repaired, Rounding
from secateur.stats import Gram, Stat, Stats

_CELLS = 1 << 24  # entries of inverse Hessians held at once


@dataclass(frozen=True)
class ExactObs:
    r"""Remove the cheapest weight of each row again and again, updating the others after each removal.

    The loss increases of the removals rank all weights; the pattern takes from that ranking what it
    needs, and the survivors are refitted by least squares on the final mask.

    **formula** per row and step: :math:`q = \arg\min w_q^2/[H^{-1}]_{qq}`, then
    :math:`w \mathrel{-}= \frac{w_q}{[H^{-1}]_{qq}} H^{-1}_{:,q}` and eliminate ``q`` from
    :math:`H^{-1}`
    **Shapes** matrix ``(out, fan_in)``
    **Units** output squared
    **Needs** Gram matrix; time ``out * fan_in**3``: small layers, and an oracle for tests
    **Source** OBC / ExactOBS, arXiv 2208.11580
    **Differs** all rows are traced to the end and the increases made monotone, so that one ranking
    serves every pattern; for N:M the paper restricts the removals while it goes

    Args:
        damp: λ, relative to the mean of the Gram matrix's diagonal; at least 1e-6, and more where
            rounding has left the matrix indefinite.

    Example:
        >>> ExactObs().needs
        frozenset({Gram()})
    """

    damp: float = 0.01

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Gram()})

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        gram = stats(Gram(), weight).double()
        rows = weight.matrix().double().reshape(len(gram), -1, weight.fan_in)
        scores = torch.cat([self.trace(w, g) for w, g in zip(rows, gram, strict=True)])
        fixed = FixedMask(choose.values, choose.ranked(scores))
        return LeastSquares()(weight, stats, fixed, rounding)

    def trace(self, rows: Tensor, gram: Tensor) -> Tensor:
        """Loss increase at the removal of each weight, monotone in the order of removal.

        Args:
            rows: ``(out, fan_in)`` in float64.
            gram: ``(fan_in, fan_in)``.
        """
        size = len(gram)
        damp = max(self.damp, 1e-6) * float(gram.diagonal().mean().clamp(min=1e-30))
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        inverse = torch.cholesky_inverse(cholesky(gram + damp * eye))
        step = max(1, _CELLS // size**2)
        return torch.cat([self._trace(part.clone(), inverse) for part in rows.split(step)])

    def _trace(self, w: Tensor, inverse: Tensor) -> Tensor:
        out, size = w.shape
        h = inverse.expand(out, size, size).clone()
        scores = torch.empty_like(w)
        gone = torch.zeros_like(w, dtype=torch.bool)
        highest = torch.zeros(out, dtype=w.dtype, device=w.device)
        every = torch.arange(out, device=w.device)
        for _ in range(size):
            pivots = h.diagonal(dim1=1, dim2=2)
            cost = torch.where(gone, torch.inf, w.square() / pivots)
            q = cost.argmin(1)
            column = h[every, :, q]
            pivot = column[every, q]
            highest = torch.maximum(highest, cost[every, q])
            scores[every, q] = highest
            w -= (w[every, q] / pivot)[:, None] * column
            h -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
            gone[every, q] = True
            w[gone] = 0.0
            h.diagonal(dim1=1, dim2=2)[gone] = 1.0  # never chosen again; keeps the division finite
        return scores
