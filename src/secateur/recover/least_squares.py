"""Least-squares refit of the survivors on a fixed mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.arguments import require_count
from secateur.core.weight import Weight
from secateur.recover.recovery import Choose, Repaired, Rounding
from secateur.stats import Gram, Stat, Stats


@dataclass(frozen=True)
class LeastSquares:
    r"""Fit the surviving weights so that the layer's output changes least.

    Solved for all rows at once by conjugate gradients with a diagonal preconditioner, started at
    the masked weights. Each iteration can only lower the error, so the result is never worse than
    plain masking, and a singular Gram matrix (few samples, dead inputs) needs no damping: directions
    that the data never shows stay as they are.

    **formula** :math:`\min_{W'} \lVert (W - W') X \rVert_F^2` with :math:`W'` zero off the mask
    **Shapes** matrix ``(out, fan_in)``
    **Units** output squared
    **Needs** Gram matrix
    **Source** OBC (arXiv 2208.11580), AdaPrune (arXiv 2102.08124); solver as in ALPS' last step

    Args:
        iterations: At most this many conjugate-gradient steps.
        tolerance: Stop when the preconditioned residual has fallen to this fraction.

    Example:
        >>> LeastSquares().needs
        frozenset({Gram()})
    """

    iterations: int = 300
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        what, write = "how many steps are made at most", "e.g. iterations=300"
        require_count("LeastSquares(iterations=...)", self.iterations, what=what, write=write)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Gram()})

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        mask = choose()
        gram = stats(Gram(), weight)
        dense = weight.matrix().to(gram.dtype)
        start = dense.masked_fill(~mask, 0)
        parts = []
        rows = weight.out // weight.axes.groups
        for group in range(weight.axes.groups):
            part = slice(group * rows, (group + 1) * rows)
            parts.append(self._solve(gram[group], dense[part], start[part], mask[part]))
        # Rounding back to the weight's own precision is the last thing that happens.
        values = torch.cat(parts).to(weight.value.dtype).masked_fill(~mask, 0)
        if rounding is not None:
            values = rounding.fit(weight.matrix())(values, slice(None)).masked_fill(~mask, 0)
        return Repaired(values, mask)

    def _solve(self, gram: Tensor, dense: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        diagonal = gram.diagonal()
        scale = torch.where(diagonal > 0, 1 / diagonal.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
        w = start.clone()
        residual = ((dense - w) @ gram).masked_fill(~mask, 0)
        z = residual * scale
        p = z.clone()
        rz = (residual * z).sum(1, keepdim=True)
        first = rz.clamp(min=torch.finfo(gram.dtype).tiny)
        for _ in range(min(self.iterations, 2 * gram.shape[0])):
            active = rz > first * self.tolerance**2
            if not bool(active.any()):
                break
            hp = (p @ gram).masked_fill(~mask, 0)
            curvature = (p * hp).sum(1, keepdim=True)
            alpha = torch.where(active & (curvature > 0), rz / curvature, 0.0)
            w += alpha * p
            residual -= alpha * hp
            z = residual * scale
            new = (residual * z).sum(1, keepdim=True)
            p = z + torch.where(active, new / rz, 0.0) * p
            rz = torch.where(active, new, rz)
        return w
