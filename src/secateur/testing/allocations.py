"""The laws of allocations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from secateur.allocate import Allocation
from secateur.core.budget import Budget, Cost, Item, Probe
from secateur.testing.law import require, same

_POWERS = (-40, -3, 5, 40)


def sample_items(
    sizes: Sequence[tuple[int, int, int]] = ((1, 40, 1), (1, 300, 1), (8, 12, 1), (1, 16, 4)),
    seed: int = 0,
    *,
    cost: Cost = float,
) -> list[Item]:
    """Weights of the given ``(pools, groups, members)`` with random scores.

    Example:
        >>> [item.size for item in sample_items()]
        [40, 300, 96, 64]
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        Item(
            name=f"layer{index}.weight",
            kind="Linear",
            fans=(pools * members, groups),
            scores=torch.rand(pools, groups, generator=generator) + 0.01,
            pools=pools,
            groups=groups,
            members=members,
            cost=cost,
        )
        for index, (pools, groups, members) in enumerate(sizes)
    ]


def check_allocation(
    allocation: Allocation,
    items: Sequence[Item] | None = None,
    *,
    probe: Probe | None = None,
    shares: Sequence[float] = (1.0, 0.7, 0.5, 0.2, 0.1),
) -> None:
    """Check that an allocation keeps its laws at several budgets.

    Names exactly the given weights; every sparsity in [0, 1); meets the budget within one group per
    weight and pool; scaling all scores (by a power of two) changes nothing; does not write scores.

    Args:
        allocation: What to check.
        items: The weights; by default four of different make.
        probe: For allocations that measure; by default the sum of the pruned scores.
        shares: Budgets as shares of the dense cost.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.allocate import Ranked
        >>> check_allocation(Ranked())
    """
    items = list(items or sample_items())
    dense = sum(item.cost(item.size) for item in items)
    measure = probe or pruned_score(items)
    before = [item.scores.clone() for item in items]
    for share in shares:
        budget = Budget(share * dense, measure)
        levels = allocation(items, budget)
        _check_levels(allocation, items, levels)
        spent = budget.spent(items, levels)
        slack = sum(_largest_step(item, levels[item.name]) for item in items)
        require(
            abs(spent - budget.limit) <= slack + 1e-6 * dense,
            "meets the budget within one group per weight",
            allocation,
            f"spent {spent:,.1f} of {budget.limit:,.1f}, one group each is {slack:,.1f}",
        )
        for power in _POWERS:
            scaled = [dataclasses.replace(i, scores=i.scores * 2.0**power) for i in items]
            other = allocation(scaled, budget)
            require(
                dict(other) == dict(levels),
                "scaling all scores changes nothing",
                allocation,
                f"times 2**{power} gives {dict(other)} instead of {dict(levels)}",
            )
    for item, scores in zip(items, before, strict=True):
        require(same(item.scores, scores), "does not write the scores", allocation, item.name)


def _check_levels(
    allocation: Allocation, items: Sequence[Item], levels: Mapping[str, float]
) -> None:
    names = {item.name for item in items}
    require(
        set(levels) == names,
        "names exactly the given weights",
        allocation,
        f"missing {sorted(names - set(levels))}, unknown {sorted(set(levels) - names)}",
    )
    for name, level in levels.items():
        require(0 <= level < 1, "every sparsity lies in [0, 1)", allocation, f"{name}: {level}")


def _largest_step(item: Item, sparsity: float) -> float:
    """What one group more or less per pool costs around the chosen level."""
    keep = item.keep(sparsity)
    up = item.cost(min(item.size, keep + item.step)) - item.cost(keep)
    down = item.cost(keep) - item.cost(max(0, keep - item.step))
    return max(up, down)


def pruned_score(items: Sequence[Item]) -> Probe:
    """A loss for allocations that measure: the share of its score that each weight loses."""
    curves = {
        i.name: torch.cat([torch.zeros(1), i.scores.flatten().sort().values.double().cumsum(0)])
        for i in items
    }

    def loss(levels: Mapping[str, float]) -> float:
        total = 0.0
        for name, level in levels.items():
            curve = curves[name]
            total += float(curve[round(level * (len(curve) - 1))] / curve[-1])
        return total

    return loss
