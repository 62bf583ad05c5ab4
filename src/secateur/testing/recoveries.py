"""The laws of recoveries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.core.weight import Weight
from secateur.recover import BatchNorm, FixedMask, Recovery, Repaired, row_errors
from secateur.stats import Gram, Moments, Stats
from secateur.testing.evidence import sample_pairs, sample_rows
from secateur.testing.law import require, same
from secateur.testing.samples import sample_weight


def check_recovery(
    recovery: Recovery,
    weight: Weight | None = None,
    *,
    rows: Tensor | None = None,
    least_squares: bool = False,
    levels: Sequence[float] = (0.3, 0.6, 0.9),
) -> None:
    """Check that a recovery keeps its laws on one weight.

    Masked entries are exactly 0; the mask is the one that was chosen; identity at sparsity 0;
    deterministic; does not write; for ``least_squares`` the output error is never above that of
    plain masking.

    Args:
        recovery: What to check.
        weight: On what; by default a linear weight.
        rows: Its inputs ``(groups, rows, fan_in)``; a singular Gram matrix is welcome.
        least_squares: Whether it promises a smaller error.
        levels: Sparsities of random masks.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.recover import LeastSquares
        >>> check_recovery(LeastSquares(), least_squares=True)
    """
    weight = weight or sample_weight()
    rows = sample_rows(weight) if rows is None else rows
    stats = Stats()
    for need in {*recovery.needs, Gram(), Moments()}:
        if need.source == "inputs":
            stats.update(need, weight, rows, rows.shape[1])
            continue
        if need.source == "pairs":  # both networks are the same up to here
            stats.update(need, weight, sample_pairs(weight, rows), rows.shape[1])
            continue
        for gradient in _gradients(weight, rows):
            stats.update(need, weight, gradient, 1)
    dense, before = weight.matrix(), weight.value.clone()
    kept = torch.ones_like(dense, dtype=torch.bool)
    whole = _run(recovery, weight, stats, kept)
    law = "identity at sparsity 0"
    require(same(whole.values, dense), law, recovery, "values changed")
    require(bool(whole.mask.all()), law, recovery, "something was pruned")
    if whole.shift is not None:
        moved = float(whole.shift.abs().max())
        require(moved == 0, law, recovery, f"the bias moved by {moved:g}")
    for seed, level in enumerate(levels):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(dense.shape, generator=generator) >= level
        done = _run(recovery, weight, stats, mask)
        law = "the mask is the one that was chosen"
        require(torch.equal(done.mask, mask), law, recovery, f"at sparsity {level:g}")
        wrong = int((done.values[~mask] != 0).sum())
        require(wrong == 0, "masked entries are exactly 0", recovery, f"{wrong} are not")
        require(
            bool(torch.isfinite(done.values).all()), "values are finite", recovery, "some are not"
        )
        law = "does not write the weight"
        require(same(weight.value, before), law, recovery, "values changed")
        again = _run(recovery, weight, stats, mask)
        require(same(again.values, done.values), "is deterministic", recovery, "two calls differ")
        if least_squares:
            _check_error(recovery, weight, stats, done)


def _gradients(weight: Weight, rows: Tensor) -> list[Tensor]:
    """What each input row gives a linear layer: it times a random signal from above."""
    generator = torch.Generator().manual_seed(len(rows))
    signal = torch.randn(rows.shape[1], weight.out, generator=generator)
    found = []
    for at, upper in enumerate(signal):
        found.append(weight.like(upper[:, None] * weight.per_row(rows[:, at].float())))
    return found


def _run(recovery: Recovery, weight: Weight, stats: Stats, mask: Tensor) -> Repaired:
    return recovery(weight, stats, FixedMask(weight.matrix().clone(), mask))


def _check_error(recovery: Recovery, weight: Weight, stats: Stats, done: Repaired) -> None:
    gram = stats(Gram(), weight).double()
    exact = Weight(weight.name, weight.value.double(), weight.axes)
    plain = float(row_errors(exact, gram, exact.matrix() * done.mask).sum())
    error = float(row_errors(exact, gram, done.values.double()).sum())
    require(
        error <= plain * (1 + 1e-6) + 1e-12,
        "the output error is never above that of plain masking",
        recovery,
        f"{error:.6g} against {plain:.6g}",
    )


def check_reestimation(batchnorm: BatchNorm, seed: int = 0) -> None:
    """Check that re-estimated statistics are those of the data, and that nothing else changes.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> check_reestimation(BatchNorm())
    """
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    # Of unlike sizes and means: what is stored is of all values, however they come.
    batches = [torch.randn(n, 3, generator=generator) * 2 + n for n in (6, 2, 5)]
    others = {n: p.detach().clone() for n, p in net.named_parameters()}
    batchnorm.reestimate_(net, batches)
    mean, variance = torch.cat(batches).mean(0), torch.cat(batches).var(0)
    layer = net[0]
    assert isinstance(layer, nn.BatchNorm1d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    off = max(
        float((layer.running_mean - mean).abs().max()),
        float((layer.running_var - variance).abs().max()),
    )
    require(off < 1e-5, "statistics are those of all values", batchnorm, f"off by {off:g}")
    law = "parameters, modes and momenta stay"
    kept = all(same(p.detach(), others[n]) for n, p in net.named_parameters())
    require(kept and not layer.training and layer.momentum == 0.1, law, batchnorm, "changed")
