"""The laws of statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats import Stat, Stats
from secateur.testing.evidence import sample_pairs, sample_rows
from secateur.testing.law import require, same
from secateur.testing.samples import sample_weight


def check_stat(stat: Stat, weight: Weight | None = None, *, seed: int = 0) -> None:
    """Check that a statistic may be split over data and merged, and does not write what it sees.

    Args:
        stat: What to check; estimates that draw random numbers cannot keep this law to the bit.
        weight: On what; by default a linear weight.
        seed: Of the made-up rows and gradients.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.stats import Gram
        >>> check_stat(Gram())
    """
    weight = weight or sample_weight()
    seen = _seen(stat, weight, seed)
    copies = [s.clone() for s in seen]
    whole, left, right = Stats(), Stats(), Stats()
    for index, piece in enumerate(seen):
        samples = 3 if stat.source == "gradients" else piece.shape[1]
        whole.update(stat, weight, piece, samples)
        (left if index < 2 else right).update(stat, weight, piece, samples)
    one, halves = (
        whole(stat, weight),
        (left.merge(right)(stat, weight), right.merge(left)(stat, weight)),
    )
    scale = float(one.abs().max()) or 1.0
    for value in halves:
        off = float((value - one).abs().max()) / scale
        law = "parts of the data merge to the whole"
        require(off < 1e-5, law, stat, f"relative difference {off:.2g}")
    require(bool(torch.isfinite(one).all()), "values are finite", stat, "some are not")
    for piece, copy in zip(seen, copies, strict=True):
        require(same(piece, copy), "does not write what it sees", stat, "it does")


def _seen(stat: Stat, weight: Weight, seed: int) -> list[Tensor]:
    if stat.source != "gradients":
        rows = sample_rows(weight, seed)
        whole = rows if stat.source == "inputs" else sample_pairs(weight, rows, gap=0.5)
        return list(whole.split([7, 20, 33], dim=1))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(weight.value.shape, generator=generator) for _ in range(4)]
