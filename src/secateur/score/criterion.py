"""What a criterion is: how much each weight matters. Larger = keep."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats import Probe, Stat, Stats

Needs = frozenset[Stat | Probe]
NOTHING: Needs = frozenset()


class Criterion(Protocol):
    """Scores a weight. Implementations are frozen dataclasses.

    Laws: same shape as the weight; finite; does not write; same result for the same seed;
    permuting inputs permutes scores; uses only the statistics it declares.
    """

    @property
    def needs(self) -> Needs:
        """The statistics it reads."""
        ...

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        """A score for every element, in the shape of ``weight.value``."""
        ...
