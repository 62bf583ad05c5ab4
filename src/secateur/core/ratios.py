"""Ratios in words: one rule for tables and for sentences."""

from __future__ import annotations


def times(ratio: float, better: str, worse: str) -> str:
    """A ratio in words.

    Example:
        >>> times(7.93, "smaller", "larger"), times(0.5, "faster", "slower")
        ('7.9x smaller', '2.0x slower')
    """
    if 0.995 < ratio < 1.005:
        return "same"
    above = ratio > 1
    value = ratio if above else 1 / ratio
    return f"{value:.{1 if value >= 1.05 else 2}f}x {better if above else worse}"
