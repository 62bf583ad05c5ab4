"""Least-squares refit of the survivors on a fixed mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.arguments import require_amounts, require_count, require_numbers
from secateur.core.weight import Weight
from secateur.recover.recovery import Choose, Repaired, Rounding
from secateur.stats import Gram, OutputGap, Stat, Stats, gap_of

_OTHER_ROWS = "fitted to its own outputs: its inputs are not the same rows in the dense network"


@dataclass(frozen=True)
class LeastSquares:
    r"""Fit the surviving weights so that the layer's output changes least.

    Solved for all rows at once by conjugate gradients with a diagonal preconditioner, started at
    the masked weights. Each iteration can only lower the error, so the result is never worse than
    plain masking, and a singular Gram matrix (few samples, dead inputs) needs no damping: directions
    that the data never shows stay as they are.

    Asymmetric, it makes good what the layers before have lost, too: from the inputs of the pruned
    network it fits the outputs of the dense one. That wants ``sequential=True`` in the recipe, and the
    dense network beside the pruned one. A fit to other inputs is a regression, which is damped.

    **formula** :math:`\min_{W'} \lVert (W - W') X \rVert_F^2` with :math:`W'` zero off the mask;
    asymmetric :math:`\min_{W'} \lVert \hat W \hat X - W' X \rVert_F^2 + λ \lVert W - W' \rVert_F^2`, the
    second norm over survivors, λ being ``damp`` times the mean square of an input
    **Shapes** matrix ``(out, fan_in)``
    **Units** output squared
    **Needs** Gram matrix; asymmetric the gap of outputs, too
    **Source** OBC (arXiv 2208.11580), AdaPrune (arXiv 2102.08124); solver as in ALPS' last step;
    asymmetric as in He et al. (arXiv 1707.06168)

    Args:
        iterations: At most this many conjugate-gradient steps.
        tolerance: Stop when the preconditioned residual has fallen to this fraction.
        asymmetric: Fit the outputs of the dense network's layer, which had other inputs.
        damp: Of the asymmetric fit.

    Example:
        >>> LeastSquares().needs
        frozenset({Gram()})
    """

    iterations: int = 300
    tolerance: float = 1e-6
    asymmetric: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        what, write = "how many steps are made at most", "e.g. iterations=300"
        require_count("LeastSquares(iterations=...)", self.iterations, what=what, write=write)
        require_numbers(self, ("tolerance", "damp"))
        require_amounts(self, ("tolerance", "damp"))

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Gram(), OutputGap()} if self.asymmetric else {Gram()})

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        mask = choose()
        gram = stats(Gram(), weight)
        dense = weight.matrix().to(gram.dtype)
        start = dense.masked_fill(~mask, 0)
        gap = gap_of(weight, stats) if self.asymmetric else None
        parts = []
        rows = weight.out // weight.axes.groups
        for group in range(weight.axes.groups):
            part = slice(group * rows, (group + 1) * rows)
            g = gram[group]
            missing = (dense[part] - start[part]) @ g
            if gap is not None:
                missing += gap[part, : weight.fan_in].to(g.dtype)
                g = g.clone()
                g.diagonal().add_(self.damp * g.diagonal().mean())
            parts.append(self._solve(g, start[part], missing, mask[part]))
        # Rounding back to the weight's own precision is the last thing that happens.
        values = torch.cat(parts).to(weight.value.dtype).masked_fill(~mask, 0)
        if rounding is not None:
            values = rounding.fit(weight.matrix())(values, slice(None)).masked_fill(~mask, 0)
        return Repaired(
            values, mask, notes=(_OTHER_ROWS,) if self.asymmetric and gap is None else ()
        )

    def _solve(self, gram: Tensor, start: Tensor, missing: Tensor, mask: Tensor) -> Tensor:
        """Conjugate gradients from ``start``, where ``missing`` is the right side less what it makes."""
        diagonal = gram.diagonal()
        scale = torch.where(diagonal > 0, 1 / diagonal.clamp(min=torch.finfo(gram.dtype).tiny), 0.0)
        w = start.clone()
        residual = missing.masked_fill(~mask, 0)
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
