"""What a run of a network showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from secateur.structure.sizes import Site, SizeUse
from secateur.structure.units import Ledger


@dataclass(frozen=True)
class Quotient:
    """Two attributes of which the code divides one by the other.

    Args:
        above: Where the dividend is, and its value.
        below: The divisor, likewise.
    """

    above: tuple[Site, int]
    below: tuple[Site, int]


@dataclass(frozen=True)
class Trace:
    """What a run of the network showed.

    Args:
        ledger: Joins, pins and open choices.
        axes: The units of every axis of every parameter and buffer.
        sizes: Where the code states a size that shrinks with units.
        reached: Parameters that an operator used.
        reductions: Operators that reduce over units, so that they see only the kept ones: module, what
            it does, and the units.
        ratios: Pairs of attributes whose quotient the code computes.
        names: Modules and attributes that were seen in a statement of a size.
        valued: Modules and attributes with whose values the code computes.
        doubts: Units, and what may be wrong with a cut of them, though nothing forbids it.
        meta: Whether it ran without arithmetic.
        operators: How many operators ran.
    """

    ledger: Ledger
    axes: Mapping[tuple[str, int], Tensor]
    sizes: list[SizeUse]
    reached: frozenset[str]
    reductions: list[tuple[str, str, Tensor]]
    ratios: list[Quotient]
    names: set[tuple[str, str]]
    valued: set[tuple[str, str]]
    doubts: list[tuple[Tensor, str]]
    meta: bool
    operators: int


@dataclass
class Seen:
    """What the tracer gathers while the network runs."""

    sizes: list[SizeUse] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    reductions: list[tuple[str, str, Tensor]] = field(default_factory=list)
    ratios: list[Quotient] = field(default_factory=list)
    names: set[tuple[str, str]] = field(default_factory=set)
    valued: set[tuple[str, str]] = field(default_factory=set)
    doubts: list[tuple[Tensor, str]] = field(default_factory=list)
    operators: int = 0
