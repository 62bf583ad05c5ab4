"""How many groups every width keeps: budgets of structural pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, UsageError
from secateur.core.selectors import matches, require_hits

#: name of a width -> groups kept -> what the whole model then costs, in the target's unit.
Spend = Callable[[Mapping[str, int]], float]
# A budget of which so much is spent is kept well.
_FULL = 0.98


@dataclass(frozen=True)
class WidthItem:
    """One width as an allocation sees it.

    Args:
        name: Of the width.
        scores: ``(groups,)``, larger = keep.
        least: Groups that stay at least.
        step: Kept groups come in multiples of this (or all stay).
    """

    name: str
    scores: Tensor
    least: int = 1
    step: int = 1

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.scores)

    def allowed(self, keep: float) -> int:
        """The largest allowed count of at most ``keep`` groups, or the least that is allowed.

        Example:
            >>> item = WidthItem("conv", torch.zeros(20), least=3, step=8)
            >>> [item.allowed(k) for k in (20, 19, 15, 7, 1)]
            [20, 16, 8, 8, 8]
        """
        if keep >= self.groups:
            return self.groups
        aligned = int(keep + 1e-9) // self.step * self.step
        floor = min(self.groups, -(-max(1, self.least) // self.step) * self.step)
        return max(floor, aligned)

    def blocks(self) -> list[int]:
        """How many groups go at once, from the first time to the last.

        Example:
            >>> WidthItem("conv", torch.zeros(20), step=8).blocks()
            [4, 8, 8]
        """
        odd = self.groups % self.step
        return [odd] * bool(odd) + [self.step] * (self.groups // self.step)


class WidthAllocation(Protocol):
    """Spreads a budget over widths. Implementations are frozen dataclasses.

    Laws: at least one group of every width stays; the budget is kept; one more step of groups in
    the width that the rule would widen next does not fit; a cut width is a multiple of its step
    (unless the caller gives the widths).
    """

    @property
    def needs_scores(self) -> bool:
        """Whether scores of different widths are compared."""
        ...

    def __call__(self, items: Sequence[WidthItem], spend: Spend, limit: float) -> dict[str, int]:
        """Name of each width -> how many groups it keeps."""
        ...


def floor_of(items: Sequence[WidthItem], spend: Spend, limit: float) -> dict[str, int]:
    """The narrowest allowed network; raises if even that is beyond the limit."""
    narrow = {item.name: item.allowed(0) for item in items}
    if spend(narrow) > limit:
        raise BudgetError(
            f"a limit of {_amount(limit)}",
            f"with every width at its least, {_amount(spend(narrow))} remain",
            "what is pinned, or kept by ignore= and by the floor, costs that much",
            "ask for more than that, lower the floor, or see secateur inspect MODEL --structure for "
            "what is pinned",
        )
    return narrow


def _amount(cost: float) -> str:
    """Parameters, multiply-adds and bytes are whole and many; milliseconds are few."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}"


@dataclass(frozen=True)
class UniformWidths:
    r"""The same share of every width.

    **formula** :math:`k_w = \lfloor (1 - s) G_w \rceil` with the smallest *s* that fits the limit;
    what is then left of the budget goes to the widths that were rounded down most
    **Shapes** a count for each width
    **Units** groups
    **Needs** nothing
    **Source** Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710

    Args:
        floor: Share of every width that stays in any case.

    Example:
        >>> items = [WidthItem("a", torch.zeros(10)), WidthItem("b", torch.zeros(20))]
        >>> UniformWidths()(items, lambda kept: kept["a"] + kept["b"], 15)
        {'a': 5, 'b': 10}
    """

    floor: float = 0.0

    @property
    def needs_scores(self) -> bool:
        """No: widths are not compared."""
        return False

    def __call__(self, items: Sequence[WidthItem], spend: Spend, limit: float) -> dict[str, int]:
        """Bisect on the share, then hand out what is left."""
        items = with_floor(items, self.floor)
        kept = floor_of(items, spend, limit)
        low, high = 0.0, 1.0  # shares that stay: fits, and may not fit
        if spend({item.name: item.groups for item in items}) <= limit:
            return {item.name: item.groups for item in items}
        for _ in range(40):
            share = (low + high) / 2
            tried = {item.name: item.allowed(share * item.groups) for item in items}
            if spend(tried) <= limit:
                low, kept = share, tried
            else:
                high = share
        order = sorted(items, key=lambda i: kept[i.name] / i.groups - high)
        return _handed_out(order, kept, spend, limit, most=high)


def _handed_out(
    items: Sequence[WidthItem], kept: dict[str, int], spend: Spend, limit: float, *, most: float
) -> dict[str, int]:
    """One step more for each width that was rounded down, while it fits."""
    for item in items:
        wider = min(item.groups, kept[item.name] + item.step)
        if wider <= most * item.groups + item.step and spend({**kept, item.name: wider}) <= limit:
            kept = {**kept, item.name: wider}
    return kept


@dataclass(frozen=True)
class RankedWidths:
    r"""All groups of all widths in one ranking; the lowest go first.

    **formula** the largest number of groups, in order of :math:`s_g / \overline{|s_w|}` (the score over
    the mean size of those of its width), divided by what the group costs if ``per_cost``, that fits the
    limit; a block of groups that go at once has the mean of their scores. Where blocks are several groups, or
    more than 2 % of the limit is left, what fits after all comes back, the last that went first; if
    2 % are left still, the width that went last stays wider, and the next in the ranking go instead
    **Shapes** a count for each width
    **Units** groups
    **Needs** scores
    **Source** Molchanov et al., arXiv 1906.10771; the cost in HALP, arXiv 2110.10811

    Args:
        normalise: ``"mean"`` divides the scores of a width by the mean of their absolute values (of
            z-scores the mean itself is 0), ``"none"`` compares them as they are (right for Taylor
            scores, whose unit is the loss).
        per_cost: Divide by the cost that one group of the width adds to the uncut network.
        floor: Share of every width that stays in any case. A ranking without a floor can close a
            layer almost entirely.

    Example:
        >>> items = [WidthItem("a", torch.tensor([1.0, 2.0])), WidthItem("b", torch.tensor([9.0, 0.1]))]
        >>> RankedWidths(normalise="none")(items, lambda kept: kept["a"] + kept["b"], 3)
        {'a': 2, 'b': 1}
    """

    normalise: str = "mean"
    per_cost: bool = False
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.normalise not in ("mean", "none"):
            raise UsageError(
                f"RankedWidths(normalise={self.normalise!r})",
                "there is no such normalisation",
                "they are 'mean' and 'none'",
                "choose one",
            )

    @property
    def needs_scores(self) -> bool:
        """Yes: groups of different widths are compared."""
        return True

    def __call__(self, items: Sequence[WidthItem], spend: Spend, limit: float) -> dict[str, int]:
        """Find the longest prefix of the ranking that must go."""
        items = with_floor(items, self.floor)
        floor_of(items, spend, limit)
        order, sizes = self._order(items, spend)
        coarse = any(item.step > 1 for item in items)
        best: dict[str, int] = {}
        while spend(_without(items, order, sizes)) <= limit:
            low, high = 0, len(order)  # removals: too few or just enough, enough
            while low < high:
                middle = (low + high) // 2
                if spend(_without(items, order[:middle], sizes)) <= limit:
                    high = middle
                else:
                    low = middle + 1
            kept = _without(items, order[:high], sizes)
            if coarse or spend(kept) < _FULL * limit:
                kept = _filled(items, order[:high], kept, lambda tried: spend(tried) <= limit)
            best = kept if not best or spend(kept) > spend(best) else best
            if high == 0 or spend(best) >= _FULL * limit:
                break
            # The block that went last was too large: this width stays, and others go instead.
            last = (order == order[high - 1]) & (torch.arange(len(order)) >= high - 1)
            order, sizes = order[~last], sizes[~last]
        return best

    def _order(self, items: Sequence[WidthItem], spend: Spend) -> tuple[Tensor, Tensor]:
        """Width numbers, in the order in which their lowest blocks go, and the sizes of these."""
        dense = {item.name: item.groups for item in items}
        whole = spend(dense)
        ranks, widths, sizes = [], [], []
        for number, item in enumerate(items):
            scores = item.scores.double().sort().values
            if self.normalise == "mean":
                scores = scores / scores.abs().mean().clamp(min=1e-300)
            if self.per_cost:
                saved = whole - spend({**dense, item.name: item.groups - 1})
                scores = scores / max(saved, 1e-12)
            blocks = item.blocks()
            ranks.append(torch.stack([block.mean() for block in scores.split(blocks)]))
            widths.append(torch.full((len(blocks),), number))
            sizes.append(torch.tensor(blocks, dtype=torch.float64))
        ranking = torch.cat(ranks).argsort(stable=True).cpu()
        return torch.cat(widths)[ranking], torch.cat(sizes)[ranking]


def _without(items: Sequence[WidthItem], gone: Tensor, sizes: Tensor) -> dict[str, int]:
    removed = torch.bincount(gone, sizes[: len(gone)], minlength=len(items)).tolist()
    return {
        item.name: item.allowed(item.groups - count)
        for item, count in zip(items, removed, strict=True)
    }


def _filled(
    items: Sequence[WidthItem],
    gone: Tensor,
    kept: dict[str, int],
    fits: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """What a coarse block left of the budget goes to narrower widths, or to those with fine steps."""
    done: set[int] = set()
    for number in reversed(gone.tolist()):
        item = items[number]
        wider = min(item.groups, (kept[item.name] // item.step + 1) * item.step)
        if number not in done and fits({**kept, item.name: wider}):
            kept = {**kept, item.name: wider}
        else:
            done.add(number)
        if len(done) == len(items):
            break
    return kept


@dataclass(frozen=True)
class GivenWidths:
    r"""Shares that the caller gives; the target is not used.

    **formula** :math:`k_w = \mathrm{round}(share_w G_w)`, at least 1
    **Shapes** a count for each width
    **Units** groups
    **Needs** nothing
    **Source** every tool has it

    Args:
        shares: Selector of width names -> share that stays. What is not named stays whole.

    Example:
        >>> items = [WidthItem("a", torch.zeros(10)), WidthItem("b", torch.zeros(20))]
        >>> GivenWidths({"a": 0.3})(items, lambda kept: 0.0, 0.0)
        {'a': 3, 'b': 20}
    """

    shares: Mapping[str, float]

    @property
    def needs_scores(self) -> bool:
        """No: widths are not compared."""
        return False

    def __call__(self, items: Sequence[WidthItem], spend: Spend, limit: float) -> dict[str, int]:
        """The given shares."""
        require_hits(tuple(self.shares), [(item.name, "") for item in items], "the width selector")
        kept = {}
        for item in items:
            shares = [v for k, v in self.shares.items() if matches(k, item.name, "")]
            share = shares[-1] if shares else 1.0
            kept[item.name] = max(1, min(item.groups, round(share * item.groups)))
        return kept


def with_floor(items: Sequence[WidthItem], share: float) -> list[WidthItem]:
    """Items that keep at least ``share`` of their groups."""
    return [
        WidthItem(i.name, i.scores, max(i.least, round(share * i.groups)), i.step) for i in items
    ]


WIDTH_ALLOCATIONS: dict[str, type] = {
    "uniform": UniformWidths,
    "ranked": RankedWidths,
    "given": GivenWidths,
}
