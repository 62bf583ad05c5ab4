"""In which multiples widths come: runtimes compute channels in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from secateur.allocate.widths import Spend
from secateur.core.errors import BudgetError
from secateur.core.widths import Width
from secateur.drive.structural.latency_budget import TOLERANCE

#: Runtimes compute channels in blocks of this many, or of a half or a quarter of it.
BLOCK = 16


def step_of(groups: int, units: int = 1, most: int = BLOCK) -> int:
    """Groups by which a width changes: a power of two, at most a quarter of the width.

    Args:
        groups: Of the uncut width.
        units: Neurons or channels in one group: those of an attention head, 2 of a rotary pair.
        most: Units by which a width changes at most.

    Example:
        >>> [step_of(groups) for groups in (2048, 64, 48, 32, 24, 16, 8, 7, 1)]
        [16, 16, 8, 8, 4, 4, 2, 1, 1]
        >>> step_of(12, units=64), step_of(256, units=2), step_of(64, most=8)
        (1, 8, 8)
    """
    limit = min(most // units, groups // 4)
    return 1 << max(0, limit.bit_length() - 1)


def units_of(width: Width) -> int:
    """Neurons or channels in one group of a width.

    A group is several only if it is so in every slice, or if the trace says that several are one.
    Tables with one entry for each head do not count then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2))
        >>> [units_of(width) for width in couple(net, torch.zeros(1, 3, 8, 8)).widths]
        [1]
    """
    members = [part.index.shape[1] for part in width.slices]
    several = [count for count in members if count > 1]
    return min(several if width.why and several else members, default=1)


def counted(align: int) -> str:
    """Steps in words.

    Example:
        >>> counted(8), counted(1)
        ('widths come in multiples of 8', 'widths come in any number')
    """
    return f"widths come in multiples of {align}" if align > 1 else "widths come in any number"


@dataclass(frozen=True)
class Stepped:
    """Widths that were chosen, and the steps that they come in.

    Args:
        kept: Name of a width -> groups kept.
        align: Units by which widths changed at most.
        missed: Coarser steps -> by which share of it they missed the target; ``None`` if no choice
            of such widths fits.
    """

    kept: dict[str, int]
    align: int
    missed: Mapping[int, float | None] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """Why widths come in finer steps than usual; empty if they do not.

        Example:
            >>> print(Stepped({}, 4, {16: None, 8: 0.051}).why)
            widths come in multiples of 4, to meet the target: with multiples of 16 nothing fits the \
target, with multiples of 8 it is missed by 5.1 %. Runtimes are fastest with multiples of 16
        """
        if not self.missed:
            return ""
        tried = [
            f"with multiples of {step} "
            + ("nothing fits the target" if by is None else f"it is missed by {100 * by:.1f} %")
            for step, by in self.missed.items()
        ]
        return (
            f"{counted(self.align)}, to meet the target: {', '.join(tried)}. Runtimes are fastest "
            f"with multiples of {BLOCK}"
        )


@dataclass(frozen=True)
class WidthSteps:
    """The steps that widths come in.

    Args:
        align: Of the recipe; 0 = automatic.
        origin: Name of a width -> groups of the uncut network; by default those of now.
    """

    align: int
    origin: Mapping[str, int] = field(default_factory=dict)

    def of(self, widths: Sequence[Width], most: int = BLOCK) -> dict[str, int]:
        """Name of each width -> groups by which it changes.

        Example:
            >>> import torch
            >>> widths = [Width("a", (), torch.arange(32)), Width("b", (), torch.arange(6))]
            >>> WidthSteps(0).of(widths), WidthSteps(0).of(widths, 4), WidthSteps(12).of(widths)
            ({'a': 8, 'b': 1}, {'a': 4, 'b': 1}, {'a': 12, 'b': 6})
        """
        if self.align:
            return {w.name: min(self.align, w.groups) for w in widths}
        whole = {w.name: self.origin.get(w.name, w.groups) for w in widths}
        return {w.name: step_of(whole[w.name], units_of(w), most) for w in widths}

    def least(self, widths: Sequence[Width], floor: float) -> dict[str, int]:
        """Name of each width -> groups that stay at least: a floor is a share of the uncut width.

        Example:
            >>> import torch
            >>> widths = [Width("a", (), torch.arange(8)), Width("b", (), torch.arange(6))]
            >>> WidthSteps(0, {"a": 20}).least(widths, 0.25)
            {'a': 5, 'b': 2}
        """
        whole = {w.name: self.origin.get(w.name, w.groups) for w in widths}
        return {w.name: min(w.groups, max(1, round(floor * whole[w.name]))) for w in widths}

    def choose(
        self,
        widths: Sequence[Width],
        allocate: Callable[[Mapping[str, int]], Mapping[str, int]],
        *,
        cost: Spend,
        goal: float,
    ) -> Stepped:
        """The coarsest steps that meet a target within 2 %, each half of the last.

        If none does, the nearest. A step that the recipe gives is kept.

        Args:
            widths: Those that take part.
            allocate: Steps -> groups that each width keeps.
            cost: What they cost.
            goal: What they may cost when all is done.

        Raises:
            BudgetError: Even the finest widths do not fit.

        Example:
            >>> import torch
            >>> widths = [Width("a", (), torch.arange(64))]
            >>> whole = lambda steps: {"a": 45 // steps["a"] * steps["a"]}
            >>> WidthSteps(0).choose(widths, whole, cost=lambda kept: kept["a"], goal=45)
            Stepped(kept={'a': 45}, align=1, missed={16: 0.288..., 8: 0.111..., 4: 0.022..., 2: 0.022...})
        """
        found: dict[int, tuple[float, dict[str, int]]] = {}
        missed: dict[int, float | None] = {}
        known: list[dict[str, int]] = []
        for most in (self.align,) if self.align else _halves(BLOCK):
            steps = self.of(widths, most)
            if steps in known:  # all widths are narrow
                continue
            known.append(steps)
            try:
                kept = dict(allocate(steps))
            except BudgetError:
                if self.align or set(steps.values()) <= {1}:
                    raise
                missed[most] = None
                continue
            by = max(0.0, 1 - cost(kept) / goal) if goal else 0.0
            found[most], missed[most] = (by, kept), by
            if by <= TOLERANCE:
                break
        align = min(found, key=lambda most: (found[most][0], -most))
        kept = found[align][1]
        coarser = {most: by for most, by in missed.items() if most > align}
        if not self.align and not _multiples(kept, widths, self.of(widths, align)):
            align, coarser = 1, {}  # the caller gave the widths
        return Stepped(kept, align, coarser)


def _halves(most: int) -> list[int]:
    return [most >> k for k in range(most.bit_length())]


def _multiples(kept: Mapping[str, int], widths: Sequence[Width], steps: Mapping[str, int]) -> bool:
    counts = [(kept.get(w.name, w.groups), w.groups, steps[w.name]) for w in widths]
    return all(count == groups or count % step == 0 for count, groups, step in counts)
