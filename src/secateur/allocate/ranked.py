"""Global ranking: all groups of all weights compete, whatever the unit of the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate.allocation import require_reachable, top_up
from secateur.core.budget import Budget, Item
from secateur.core.select import RADIX, at_least, digit_counts, digits_of


@dataclass(frozen=True)
class Ranked:
    """Keep the highest-scoring groups over all weights ("global pruning").

    The exact threshold is found by counting the digits of the scores, so nothing is concatenated
    or sorted. At the threshold, earlier weights and lower indices win.

    **formula** one threshold for the scores of all weights
    **Shapes** one number per weight
    **Units** none
    **Needs** scores
    **Source** Han et al., arXiv 1506.02626; radix selection is ours

    Example:
        >>> def item(name, scores): return Item(
        ...     name, "Linear", (1, len(scores)), torch.tensor([scores]), 1, len(scores), 1, float)
        >>> Ranked()([item("a", [1.0, 5.0, 6.0]), item("b", [2.0, 3.0, 4.0])], Budget(limit=3.0))
        {'a': 0.33333333333333337, 'b': 0.6666666666666667}
    """

    needs_scores: ClassVar[bool] = True
    needs_probe: ClassVar[bool] = False

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        require_reachable(items, budget)
        counts = _counts_above(items, budget)
        # With several pools each keeps equally many, and the ranking asks for something in between.
        within, over = (
            {
                i.name: i.sparsity_of(max(1, round_(n / i.pools)))
                for i, n in zip(items, counts, strict=True)
            }
            for round_ in (math.floor, math.ceil)
        )
        return top_up(items, budget, within, over)


def _counts_above(items: Sequence[Item], budget: Budget) -> list[int]:
    """How many groups of each item rank above the one threshold that the budget allows."""
    dtype = torch.float64 if any(i.scores.dtype == torch.float64 for i in items) else torch.float32
    flat = [item.scores.flatten().to(dtype) for item in items]
    base = torch.zeros(len(items), dtype=torch.int64)
    most = budget.limit * (1 + 1e-12)

    def within(counts: Tensor) -> bool:
        return _spent(items, counts.tolist()) <= most

    prefix: int | None = None
    ties = torch.tensor([f.numel() for f in flat])
    if within(ties):
        return [int(t) for t in ties]
    for level in range(digits_of(dtype)):
        above = _table(flat, prefix, level)
        low, high = 0, 1 << RADIX  # over the limit at low, within at high
        while high - low > 1:
            middle = (low + high) // 2
            if within(base + above[:, middle]):
                high = middle
            else:
                low = middle
        ties = above[:, low] - above[:, high]
        base = base + above[:, high]
        value = low - (1 << (RADIX - 1)) if level == 0 else low
        prefix = value if prefix is None else (prefix << RADIX) | value
    return _with_ties(items, base.tolist(), ties.tolist(), most)


def _spent(items: Sequence[Item], counts: Sequence[int]) -> float:
    return sum(i.cost(c * i.members) for i, c in zip(items, counts, strict=True))


def _with_ties(
    items: Sequence[Item], base: Sequence[int], ties: Sequence[int], most: float
) -> list[int]:
    """Of the groups with exactly the threshold's score as many as may be paid for, in item order."""
    found: list[int] = []
    spent = _spent(items, base)
    for item, count, tied in zip(items, base, ties, strict=True):
        others = spent - item.cost(count * item.members)
        more, step = 0, tied
        while step:  # the largest affordable number, by halving steps
            trial = more + step
            if trial <= tied and others + item.cost((count + trial) * item.members) <= most:
                more = trial
            else:
                step //= 2
        found.append(count + more)
        spent = others + item.cost(found[-1] * item.members)
    return found


def _table(flat: Sequence[Tensor], prefix: int | None, level: int) -> Tensor:
    """For each item, how many scores have this digit or a larger one: ``(items, 2049)``."""
    return torch.stack([at_least(digit_counts(f, prefix, level).cpu()) for f in flat])
