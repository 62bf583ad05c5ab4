"""What an allocation is: how much of the budget each weight pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from secateur.core.budget import Budget, Item
from secateur.core.errors import BudgetError


class Allocation(Protocol):
    """Spreads a budget over weights.

    Laws: meets the budget within one group per weight; every sparsity in [0, 1); only the given
    weights; scaling all scores changes nothing.
    """

    @property
    def needs_scores(self) -> bool:
        """Whether it compares scores of different weights, or prunes to try a level out."""
        ...

    @property
    def needs_probe(self) -> bool:
        """Whether it measures the loss at several levels."""
        ...

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        """Name -> sparsity."""
        ...


#: t in [0, 1] -> sparsity of each item; a larger t must never make an item denser.
Family = Callable[[float], Mapping[str, float]]


def meet(items: Sequence[Item], budget: Budget, family: Family) -> dict[str, float]:
    """The densest member of a one-parameter family within the budget, topped up group by group.

    Args:
        items: The weights.
        budget: What may be spent.
        family: ``0`` is the densest assignment, ``1`` the sparsest.

    Raises:
        BudgetError: Even the sparsest member costs too much; the message names the floor.
    """
    require_reachable(items, budget)
    if budget.spent(items, family(0.0)) <= budget.limit:
        return dict(family(0.0))
    low, high = 0.0, 1.0  # family(low) is over the limit
    for _ in range(60):
        middle = (low + high) / 2
        if budget.spent(items, family(middle)) <= budget.limit:
            high = middle
        else:
            low = middle
    return top_up(items, budget, family(high), family(low))


def top_up(
    items: Sequence[Item], budget: Budget, within: Mapping[str, float], over: Mapping[str, float]
) -> dict[str, float]:
    """Add single groups to ``within`` (up to ``over``) while the budget lasts, in item order."""
    keeps = {i.name: i.quota(i.groups, within[i.name]) for i in items}
    spent = sum(i.cost(keeps[i.name] * i.step) for i in items)
    for item in items:
        most = item.quota(item.groups, over[item.name])
        while keeps[item.name] < most:
            keep = keeps[item.name]
            more = item.cost((keep + 1) * item.step) - item.cost(keep * item.step)
            if spent + more > budget.limit * (1 + 1e-12):
                break
            keeps[item.name] += 1
            spent += more
    return {i.name: i.sparsity_of(keeps[i.name]) for i in items}


def require_reachable(items: Sequence[Item], budget: Budget) -> None:
    """Raise if even one group per pool of every item is over the limit."""
    floor = sum(item.cost(item.quota(item.groups, 1.0) * item.step) for item in items)
    if floor > budget.limit + sum(item.cost(item.step) for item in items):
        raise BudgetError(
            f"a budget of {budget.limit:,.0f}",
            f"the smallest network these choices allow costs {floor:,.0f}",
            "at least one group stays in every pool of every weight",
            "raise the budget, prune more weights, or choose a finer pattern",
        )
