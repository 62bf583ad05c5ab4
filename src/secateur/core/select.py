"""The one selection rule: keep exactly k groups per pool, ties go to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor


def quota(groups: int, sparsity: float) -> int:
    """How many of ``groups`` stay at ``sparsity``: the nearest count, halves rounded up.

    At least one group stays, because a fully pruned pool is a different network (removing a
    whole layer is structural pruning).

    Example:
        >>> quota(7, 0.5), quota(10, 0.9), quota(4, 0.99)
        (4, 1, 1)
    """
    return max(1, min(groups, int(groups * (1.0 - sparsity) + 0.5 + 1e-9)))


def keep_top(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Mark the ``keep`` largest scores of each row.

    Args:
        scores: ``(pools, groups)``; ``-inf`` marks groups that may only be kept last.
        keep: One count for all pools, or one per pool, ``(pools,)``.

    Returns:
        Boolean ``(pools, groups)``, True = kept, with exactly ``keep`` True per row. Among
        equal scores the lower index is kept.

    Example:
        >>> keep_top(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).int().tolist()
        [[0, 1, 1, 0]]
    """
    pools, groups = scores.shape
    if isinstance(keep, Tensor):
        return _keep_ragged(scores, keep)
    if keep >= groups:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if pools == 1 and groups > 1 << 16:
        threshold = _kth_largest(scores[0], keep).view(1, 1)
    else:
        threshold = scores.kthvalue(groups - keep + 1, dim=1, keepdim=True).values
    above = scores > threshold
    missing = keep - above.sum(1, keepdim=True)
    equal = scores == threshold
    if int(equal.sum()) == pools:  # no ties: the one equal score of each row completes it
        return above | equal
    return above | (equal & (equal.cumsum(1) <= missing))


def _keep_ragged(scores: Tensor, keep: Tensor) -> Tensor:
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    steps = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank.scatter_(1, order, steps)
    return rank < keep.to(scores.device)[:, None]


# Exact order statistics of long vectors by radix: three or six counting passes over 11 bits each, whose
# counts stay in the first cache; those of 16 bits do not, and cost more than they save.
# torch.kthvalue on 25 M values copies them twice (values and int64 indices); this keeps one
# chunk at a time, which is what lets global pruning stay below twice the weights in memory.
RADIX = 11
_CHUNK = 1 << 18


def digits_of(dtype: torch.dtype) -> int:
    """How many digits scores have.

    Example:
        >>> digits_of(torch.float32), digits_of(torch.float64)
        (3, 6)
    """
    return -(-(64 if dtype == torch.float64 else 32) // RADIX)


def ordered_bits(x: Tensor) -> Tensor:
    """Floats as integers of the same order (so radix counting works on negative scores too).

    Example:
        >>> bits = ordered_bits(torch.tensor([-2.0, -0.5, 0.0, 3.0]))
        >>> bool((bits[1:] > bits[:-1]).all())
        True
    """
    x = x.contiguous() + 0.0  # -0.0 and 0.0 are equal scores, and their sum is 0.0
    if x.dtype == torch.float64:
        bits = x.view(torch.int64)
        return (bits >> 63).bitwise_and_(0x7FFFFFFFFFFFFFFF).bitwise_xor_(bits)
    bits = x.float().view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def digit_counts(x: Tensor, prefix: int | None, level: int) -> Tensor:
    """Counts ``(2048,)`` of the digit at ``level`` (0 = most significant) over the flat ``x``.

    Args:
        x: Scores, float32 or float64, flat.
        prefix: Count only values whose higher digits equal this; ``None`` at level 0.
        level: Which digit.
    """
    shift = RADIX * (digits_of(x.dtype) - 1 - level)
    half = 1 << (RADIX - 1) if level == 0 else 0
    counts: Tensor | None = None
    for chunk in x.split(_CHUNK):
        bits = ordered_bits(chunk)
        high = bits >> shift if shift else bits
        if prefix is not None:
            high = high[(high >> RADIX) == prefix]
        digit = high + half if level == 0 else high & ((1 << RADIX) - 1)
        found = torch.bincount(digit, minlength=1 << RADIX)
        counts = found if counts is None else counts.add_(found)
    assert counts is not None  # an empty tensor is one empty chunk
    return counts


def at_least(counts: Tensor) -> Tensor:
    """How many values have each digit or a larger one, from how many have each; 0 behind the last.

    Example:
        >>> at_least(torch.tensor([2, 0, 1])).tolist()
        [3, 1, 1, 0]
    """
    below = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=below[1:])
    return below[-1] - below


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """The ``k``-th largest value of a flat tensor, exactly."""
    prefix: int | None = None
    for level in range(digits_of(x.dtype)):
        above = at_least(digit_counts(x, prefix, level))
        digit = int((above >= k).nonzero()[-1])
        k -= int(above[digit + 1])
        value = digit - (1 << (RADIX - 1)) if level == 0 else digit
        prefix = value if prefix is None else (prefix << RADIX) | value
    assert prefix is not None
    return from_ordered_bits(prefix, x.dtype, x.device)


def from_ordered_bits(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Inverse of :func:`ordered_bits` for one value; half precisions were widened to float32."""
    if dtype == torch.float64:
        whole = torch.tensor(bits, dtype=torch.int64, device=device)
        return (whole ^ ((whole >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    whole = torch.tensor(bits, dtype=torch.int32, device=device)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).view(torch.float32)
