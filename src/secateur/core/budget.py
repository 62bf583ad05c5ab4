"""Targets in user units, and what an allocation may know of the weights it spreads them over."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from secateur.core.errors import BudgetError, UsageError, kind_of
from secateur.core.select import quota

#: kept elements -> cost in the target's unit; must not decrease.
Cost = Callable[[int], float]


@dataclass(frozen=True)
class Item:
    """One weight as an allocation sees it.

    Args:
        name: Parameter name.
        kind: Class name of its module, for selectors.
        fans: ``(out, in, *kernel)``, of stacked experts those of one.
        scores: Group scores, ``(pools, groups)``; empty (``numel() == 0``) when not needed.
        pools: Number of pools of the pattern.
        groups: Groups per pool.
        members: Elements per group.
        cost: What keeping a number of elements costs.
        quota: The pattern's rule for how many groups of a pool stay.
    """

    name: str
    kind: str
    fans: tuple[int, ...]
    scores: Tensor
    pools: int
    groups: int
    members: int
    cost: Cost
    quota: Callable[[int, float], int] = quota

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.pools * self.groups * self.members

    def keep(self, sparsity: float) -> int:
        """Elements kept at ``sparsity``: the pattern's quota in every pool."""
        return self.pools * self.quota(self.groups, sparsity) * self.members

    def sparsity_of(self, keep: int) -> float:
        """The sparsity whose quota is ``keep`` groups per pool."""
        return 1.0 - keep / self.groups

    @property
    def step(self) -> int:
        """Elements by which the kept count can change: one group in every pool."""
        return self.pools * self.members


#: loss(name -> sparsity): how good the network is at an assignment. Smaller is better.
Probe = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Budget:
    """What may be spent on the items, and optionally a way to try an assignment out.

    Args:
        limit: The most that the items may cost together.
        probe: Measures the loss of an assignment.
        share: How much of the way to the final target this is, for gradual pruning.
    """

    limit: float
    probe: Probe | None = None
    share: float = 1.0

    def spent(self, items: Sequence[Item], sparsity: Mapping[str, float]) -> float:
        """Cost of an assignment."""
        return sum(item.cost(item.keep(sparsity[item.name])) for item in items)


@dataclass(frozen=True)
class Target:
    """How much should be left, in one of five units.

    Args:
        unit: ``"sparsity"``, ``"params"``, ``"macs"``, ``"bytes"`` or, for structural pruning,
            ``"latency"`` (milliseconds on this machine).
        value: For ``sparsity`` the fraction of zeros among the pruned weights, in [0, 1). For the
            other units a count for the *whole model*, or a fraction of the dense count below 1.

    Example:
        >>> Target.parse("90%")
        Target(unit='sparsity', value=0.9)
        >>> Target("sparsity", 90)
        Traceback (most recent call last):
            ...
        secateur.core.errors.BudgetError: sparsity=90: 90 is not in [0, 1). Sparsity is the fraction
        of zeros. Write 0.9 or '90%'.
    """

    unit: str = "sparsity"
    value: float = 0.5

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(
                f"target {self.unit!r}",
                "there is no such unit",
                f"the units are {', '.join(UNITS)}",
                "write e.g. sparsity: 0.9 or macs: 50%",
            )
        given: object = self.value  # a recipe is often written by hand
        if type(given) is bool or not isinstance(given, Real):
            raise BudgetError(
                f"{self.unit}={given!r}",
                kind_of(given),
                "the value of a target is a number",
                "write 0.9, or Target.parse('90%') where it is a text",
            )
        if self.unit == "sparsity" and not 0 <= self.value < 1:
            hint = (
                f"write {self.value / 100:g} or '{self.value:g}%'" if 1 < self.value < 100 else ""
            )
            raise BudgetError(
                f"sparsity={self.value:g}",
                f"{self.value:g} is not in [0, 1)",
                "sparsity is the fraction of zeros",
                hint or "write a number from 0 up to, but not including, 1",
            )
        if self.unit != "sparsity" and not 0 < self.value < math.inf:
            raise BudgetError(
                f"{self.unit}={self.value:g}",
                f"{self.value:g} is {'not positive' if self.value <= 0 else 'no finite number'}",
                "something has to stay, and something has to go",
                "give a count, or a fraction of the dense one",
            )

    def limit(self, dense: float) -> float:
        """The most that may be spent of what the dense network costs: the count, or its share.

        Raises:
            BudgetError: The dense network costs nothing in this unit, or less than the count.

        Example:
            >>> Target("macs", 0.5).limit(1000.0), Target("params", 300.0).limit(1000.0)
            (500.0, 300.0)
        """
        limit = self.value if self.value >= 1 else self.value * dense
        if dense and limit <= dense:
            return limit
        raise BudgetError(
            f"{self.unit}={self.value:g}",
            f"the dense network costs {dense:,.4g}",
            "nothing would be removed",
            "ask for less" if dense else "ask in another unit, e.g. params=50%",
        )

    @staticmethod
    def parse(text: Any) -> Target:
        """Read ``0.9``, ``"90%"``, ``"params=20000"`` or ``{"macs": "50%"}``."""
        if isinstance(text, Target):
            return text
        if isinstance(text, Mapping):
            if len(text) != 1:
                raise UsageError(
                    f"target {dict(text)}",
                    f"{len(text)} entries",
                    "a run has one target",
                    "give one unit",
                )
            ((unit, value),) = text.items()
            return Target(str(unit), _amount(str(unit), value))
        if isinstance(text, str) and "=" in text:
            unit, _, value = text.partition("=")
            return Target(unit.strip(), _amount(unit.strip(), value))
        if isinstance(text, (str, int, float)) and not isinstance(text, bool):
            return Target("sparsity", number(text))
        raise UsageError(
            f"target {text!r}",
            kind_of(text),
            "a target is a number, or one unit with its value",
            "write 0.9, '90%' or {macs: 50%}",
        )


UNITS = ("sparsity", "params", "macs", "bytes", "latency")
_N_OF_M = re.compile(r"\d+:\d+")


def _amount(unit: str, value: str | float | int) -> float:
    """A count, or a share below 1; a share of 1 or more would be taken for a count."""
    found = number(value)
    if unit != "sparsity" and found >= 1 and str(value).strip().endswith(("%", "x")):
        raise BudgetError(
            f"{unit}={value}",
            f"that is {found:g} times what the dense network has",
            "nothing would be removed",
            "write a share below 100%, or a count without a sign",
        )
    return found


def number(value: str | float | int) -> float:
    """A number, where ``"90%"`` means 0.9 and ``"2x"`` one half (twice as fast, half as large).

    Example:
        >>> number("90%"), number("1e6"), number("2x")
        (0.9, 1000000.0, 0.5)
    """
    if isinstance(value, (int, float)):
        return float(value)
    text = str(value).strip()
    try:
        if text.endswith("%"):
            return round(float(text[:-1]) / 100, 12)
        return 1 / float(text[:-1]) if text.endswith("x") else float(text)
    except (ValueError, ZeroDivisionError):
        pattern = _N_OF_M.fullmatch(text)
        raise UsageError(
            f"the number {value!r}",
            "that is a pattern (kept:of)" if pattern else "it cannot be read",
            "numbers look like 0.9, 90% or 20000",
            f"give it as the pattern: {text} has a sparsity of its own"
            if pattern
            else "rewrite it",
        ) from None
