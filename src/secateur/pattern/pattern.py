"""What a pattern is: which weights go together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from secateur.core.weight import Axes


class Pattern(Protocol):
    """A bijection between a weight and ``(pools, groups, members)``.

    A *group* is kept or pruned whole; a *pool* is a set of groups among which a fixed number stay.
    Laws: ``unfold(fold(x)) == x``; exactly ``quota`` groups stay in each pool; sparser is nested in
    denser; a shape that does not fit is refused with the numbers.
    """

    def span(self, taps: int) -> int:
        """Columns of the matrix that must be decided together; 0 if only the whole weight can."""
        ...

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        """``x`` as ``(pools, groups, members)``."""
        ...

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        """Inverse of :meth:`fold` for a weight of ``shape``."""
        ...

    def quota(self, groups: int, sparsity: float) -> int:
        """How many groups of a pool stay."""
        ...
