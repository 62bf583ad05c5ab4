"""The optimal-brain column sweep: SparseGPT, OBC in one order, and GPTQ, from one loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.arguments import require_count
from secateur.core.weight import Weight
from secateur.recover.recovery import Choose, Grid, Repaired, Rounding
from secateur.stats import Gram, Stat, Stats


@dataclass(frozen=True)
class ColumnSweep:
    r"""Prune (and round) the inputs from left to right; each error is made good by those further right.

    With ``H = E[x x^T] + λ I`` and ``U`` the upper Cholesky factor of ``H^{-1}``, column ``q``
    is set to its new value ``w'`` and all later columns move by
    :math:`-\frac{w_q - w'_q}{U_{qq}} U_{q,>q}`. The mask of a block of columns, or with N:M of every M
    inputs, is asked for when the sweep reaches it, with the updated weights and the pivots
    :math:`U_{qq}^2`. A rounding function without a mask is GPTQ; with both it is joint sparsity and
    quantization.

    **formula** see above
    **Shapes** matrix ``(out, fan_in)``
    **Units** output squared
    **Needs** Gram matrix
    **Source** SparseGPT (arXiv 2301.00774), GPTQ (arXiv 2210.17323)
    **Differs** for unstructured patterns every column block keeps its exact share (cumulative
    rounding) of the weights that an earlier pruning left, so the weight's count is met to the unit; λ
    is raised tenfold up to three times when the factorization fails, then rows fall back to plain
    masking; rows that the sweep made worse than plain masking are masked plainly; the facts say both.
    Inputs that are always zero lose their weights as the cheapest, up to the sparsity asked for;
    SparseGPT zeroes all of them

    Args:
        block: Columns between two updates of all that are further right, and, but for N:M, between two
            mask decisions (rounded up to what the pattern needs).
        damp: λ, relative to the mean of the Gram matrix's diagonal; at least 1e-6.

    Example:
        >>> ColumnSweep().needs
        frozenset({Gram()})
    """

    block: int = 128
    damp: float = 0.01

    def __post_init__(self) -> None:
        what, write = "how many columns are swept at a time", "e.g. block=128"
        require_count("ColumnSweep(block=...)", self.block, what=what, write=write)

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset({Gram()})

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        gram = stats(Gram(), weight)
        grid = rounding.fit(weight.matrix()) if rounding is not None else None
        notes: list[str] = []
        factors = [self._factor(g, notes) for g in gram]
        if any(f is None for f in factors):
            mask = choose()
            notes.append("the Gram matrix could not be factorized: masked without repair")
            values = choose.values.masked_fill(~mask, 0)
            return Repaired(grid(values, slice(None)) if grid else values, mask, None, tuple(notes))
        upper = torch.stack([f for f in factors if f is not None])
        values, mask = self._sweep(weight, upper, choose, grid)
        # The sweep's greedy updates can lose against plain masking on a row (few samples, heavy
        # damping). Such rows are masked plainly, so a repair never makes a layer worse.
        if grid is None:
            values = _keep_better(weight, gram, values, mask, notes)
        return Repaired(values, mask, None, tuple(notes))

    def _factor(self, gram: Tensor, notes: list[str]) -> Tensor | None:
        # An input that is always zero gets λ alone: its weights have nearly no saliency and go first.
        # (SparseGPT sets such a diagonal to 1 and must then zero the weights, or it keeps them all.)
        dead = int((gram.diagonal() <= 0).sum())
        if dead:
            notes.append(f"{dead} inputs are always zero in the calibration data")
        relative = max(self.damp, 1e-6)
        damp = relative * max(float(gram.diagonal().mean()), 1e-30)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        upper: Tensor
        for attempt in range(4):
            lower, failed = torch.linalg.cholesky_ex(gram + damp * 10**attempt * eye)
            if int(failed):
                continue
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                if attempt:
                    notes.append(f"damping was raised to {relative * 10**attempt:g}")
                return upper
        return None

    def _sweep(
        self, weight: Weight, upper: Tensor, choose: Choose, grid: Grid | None
    ) -> tuple[Tensor, Tensor]:
        groups, columns = weight.axes.groups, weight.fan_in
        w = choose.values.to(upper.dtype).reshape(groups, -1, columns).clone()
        mask = torch.ones(w.shape, dtype=torch.bool, device=w.device)
        step = -(-self.block // choose.unit) * choose.unit
        together = choose.unit if choose.alone else step
        for start in range(0, columns, step):
            part = slice(start, min(start + step, columns))
            inner = upper[:, part, part]
            pivots = inner.diagonal(dim1=1, dim2=2).square()
            block = w[..., part]
            errors = torch.zeros_like(block)
            for j in range(block.shape[-1]):
                if j % together == 0:
                    here = slice(j, min(j + together, block.shape[-1]))
                    now = block[..., here].flatten(0, 1), weight.per_row(pivots[:, here])
                    chosen = choose(slice(start + here.start, start + here.stop), *now)
                    mask[..., start + here.start : start + here.stop] = chosen.reshape(
                        block[..., here].shape
                    )
                column = block[..., j]
                new = column * mask[..., start + j]
                if grid is not None:
                    at = slice(start + j, start + j + 1)
                    new = grid(new.reshape(-1, 1), at).reshape(new.shape)
                error = (column - new) / inner[:, j, j, None]
                block[..., j + 1 :] -= error[..., None] * inner[:, None, j, j + 1 :]
                block[..., j] = new
                errors[..., j] = error
            w[..., part] = block
            w[..., part.stop :] -= errors @ upper[:, part, part.stop :]
        flat = mask.flatten(0, 1)
        return w.flatten(0, 1).to(weight.value.dtype).masked_fill(~flat, 0), flat


def _keep_better(
    weight: Weight, gram: Tensor, values: Tensor, mask: Tensor, notes: list[str]
) -> Tensor:
    dense = weight.matrix()
    plain = dense.masked_fill(~mask, 0)
    worse = row_errors(weight, gram, values) > row_errors(weight, gram, plain)
    if bool(worse.any()):
        notes.append(f"{int(worse.sum())} of {len(worse)} rows were better off with plain masking")
        values = torch.where(worse[:, None], plain, values)
    return values


def row_errors(weight: Weight, gram: Tensor, values: Tensor) -> Tensor:
    """Squared output error of each row, ``(w - w')^T G (w - w')``, shape ``(out,)``.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[1.0, 2.0]]), LINEAR)
        >>> row_errors(w, torch.eye(2)[None], torch.tensor([[1.0, 0.0]]))
        tensor([4.])
    """
    difference = (weight.matrix() - values).to(gram.dtype).reshape(gram.shape[0], -1, gram.shape[1])
    return ((difference @ gram) * difference).sum(-1).flatten()
