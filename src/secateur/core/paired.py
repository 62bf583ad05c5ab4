"""Timings that were taken side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence


def median_range(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % range of the median, by order statistics: no distribution is assumed.

    Example:
        >>> median_range([1.0, 2.0, 3.0])
        (1.0, 3.0)
        >>> median_range(range(100))
        (40, 60)
    """
    ordered = sorted(ratios)
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a Binomial(n, 1/2)
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return ordered[max(0, low)], ordered[min(n - 1, high)]
