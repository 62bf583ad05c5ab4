"""What a recovery is: what happens to the survivors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats import Stat, Stats


class Choose(Protocol):
    """How a recovery asks for the mask, when it is ready: once, or once per column block.

    ``values`` are the current values (the dense weight at first, afterwards the result of the
    recovery before).
    """

    @property
    def values(self) -> Tensor:
        """Current values as a matrix ``(out, fan_in)``."""
        ...

    @property
    def unit(self) -> int:
        """Column blocks must start and end at multiples of this many columns."""
        ...

    @property
    def alone(self) -> bool:
        """Whether every unit of columns has a count of its own, whatever the others keep (N:M)."""
        ...

    def __call__(
        self,
        columns: slice | None = None,
        current: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> Tensor:
        """The mask of some columns, ``(out, columns)``, True = kept.

        Args:
            columns: Which columns of the matrix; all by default.
            current: Their values right now.
            pivots: ``[H^-1]_qq`` of their inputs, with inputs further left eliminated.
        """
        ...

    def ranked(self, scores: Tensor) -> Tensor:
        """The mask by these element scores ``(out, fan_in)``, unless the mask is already fixed."""
        ...


@dataclass(frozen=True)
class FixedMask:
    """Answers a recovery's questions with a mask that is already decided.

    Args:
        values: Current values ``(out, fan_in)``.
        mask: The mask, of the same shape.
        unit: Column blocks are multiples of this.
        alone: Whether each has its own count.

    Example:
        >>> import torch
        >>> FixedMask(torch.ones(1, 2), torch.tensor([[True, False]]))(slice(1, 2)).tolist()
        [[False]]
    """

    values: Tensor
    mask: Tensor
    unit: int = 1
    alone: bool = False

    def __call__(
        self,
        columns: slice | None = None,
        current: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> Tensor:
        """The mask of some columns."""
        return self.mask if columns is None else self.mask[:, columns]

    def ranked(self, scores: Tensor) -> Tensor:
        """The mask, whatever the scores."""
        return self.mask


class Rounding(Protocol):
    """Values that a format can hold, e.g. int8 with a scale per row. Zero must stay zero."""

    def fit(self, matrix: Tensor) -> Grid:
        """Choose scales for a dense matrix."""
        ...


class Grid(Protocol):
    """A fitted rounding."""

    def __call__(self, values: Tensor, columns: slice) -> Tensor:
        """Round some columns to the nearest representable values."""
        ...


class Repaired(NamedTuple):
    """A recovery's result.

    Attributes:
        values: Matrix ``(out, fan_in)``; exactly zero where the mask is False.
        mask: Boolean matrix, True = kept.
        shift: What to add to the layer's bias, ``(out,)``, or ``None``.
        notes: What was damped, replaced or skipped.
    """

    values: Tensor
    mask: Tensor
    shift: Tensor | None = None
    notes: tuple[str, ...] = ()


class Recovery(Protocol):
    """Repairs one weight. Implementations are frozen dataclasses.

    Laws: masked entries are exactly 0; least-squares kinds never have a larger output error than
    plain masking; identity at sparsity 0.
    """

    @property
    def needs(self) -> frozenset[Stat]:
        """The statistics it reads."""
        ...

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        """New values and the mask. ``weight`` holds the dense values."""
        ...


@dataclass(frozen=True)
class NoRecovery:
    """Set pruned weights to zero and leave the rest alone.

    Example:
        >>> NoRecovery().needs
        frozenset()
    """

    @property
    def needs(self) -> frozenset[Stat]:
        return frozenset()

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        mask = choose()
        values = choose.values.masked_fill(~mask, 0)
        if rounding is not None:
            values = rounding.fit(weight.matrix())(values, slice(None))
        return Repaired(values, mask)
