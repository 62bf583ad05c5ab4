"""Allocations that try the network out: a sensitivity scan and loss-tolerance bisection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate.allocation import meet
from secateur.core.arguments import require_count
from secateur.core.budget import Budget, Item, Probe
from secateur.core.errors import NeedsData, UsageError


@dataclass(frozen=True)
class Sensitivity:
    r"""Prune each weight alone at several levels, then give all the same loss increase.

    For each weight the loss at each of ``levels`` is measured with all others dense. One tolerance,
    found by bisection, then gives every weight the highest sparsity whose (monotone, linearly
    interpolated) loss increase stays below it.

    **formula** :math:`\max s_l` with :math:`\Delta L_l(s_l) \le \varepsilon`, one :math:`\varepsilon` for all
    **Shapes** one number per weight
    **Units** loss
    **Needs** scores, and a forward pass per weight and level
    **Source** Li et al., arXiv 1608.08710 (the scan)

    Args:
        levels: Sparsities to try, rising.

    Example:
        >>> import torch
        >>> def item(name): return Item(name, "Linear", (10, 10), torch.empty(0), 1, 100, 1, float)
        >>> def loss(levels): return levels.get("soft", 0) + 9 * levels.get("hard", 0)
        >>> found = Sensitivity()([item("soft"), item("hard")], Budget(100.0, loss))
        >>> {name: round(level, 2) for name, level in found.items()}
        {'soft': 0.9, 'hard': 0.1}
    """

    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)

    needs_scores: ClassVar[bool] = True
    needs_probe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rising = list(self.levels) == sorted(self.levels) and all(0 < s < 1 for s in self.levels)
        if not self.levels or not rising:
            raise UsageError(
                f"Sensitivity(levels={self.levels})",
                "they do not rise from 0 to 1" if self.levels else "there are none",
                "levels are sparsities to try",
                "write e.g. (0.5, 0.7, 0.9)",
            )

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        curves = scan(items, budget.probe, self.levels)
        worst = max(max(curve) for curve in curves.values()) or 1.0

        def family(t: float) -> dict[str, float]:
            # Flat curves allow their highest level at no loss at all: the first hundredth of t grows
            # to there. The last hundredth goes beyond the measured levels, for tight budgets.
            grown, tolerance = min(1.0, t * 100), max(0.0, t - 0.01) * worst * 1.02
            return {
                n: max(grown * _level(c, self.levels, tolerance), (t - 0.99) * 100)
                for n, c in curves.items()
            }

        return meet(items, budget, family)


def scan(
    items: Sequence[Item], probe: Probe | None, levels: Sequence[float]
) -> dict[str, list[float]]:
    """Loss increase of each item alone at each level, made monotone.

    Example:
        >>> import torch
        >>> item = Item("w", "Linear", (1, 2), torch.empty(0), 1, 2, 1, float)
        >>> scan([item], lambda levels: levels.get("w", 0) ** 2, [0.5, 0.9])
        {'w': [0.25, 0.81]}
    """
    if probe is None:
        raise NeedsData(
            "an allocation that measures",
            "no data was given",
            "it runs the network at several sparsities",
            "pass data= (with targets, or a loss)",
        )
    dense = probe({})
    curves: dict[str, list[float]] = {}
    for item in items:
        curve: list[float] = []
        for level in levels:
            rise = probe({item.name: level}) - dense
            # Measured losses are noisy; more zeros never count as better than fewer.
            curve.append(max(rise, curve[-1] if curve else 0.0, 0.0))
        curves[item.name] = curve
    return curves


def _level(curve: Sequence[float], levels: Sequence[float], tolerance: float) -> float:
    before_level, before_rise = 0.0, 0.0
    for level, rise in zip(levels, curve, strict=True):
        if rise > tolerance:
            share = (tolerance - before_rise) / (rise - before_rise)
            return before_level + max(0.0, share) * (level - before_level)
        before_level, before_rise = level, rise
    return before_level


@dataclass(frozen=True)
class Tolerance:
    r"""Loss-tolerance bisection: layer by layer, the highest sparsity within a loss tolerance.

    Inner search: for each weight in turn, with those before it already pruned, bisect the highest
    sparsity whose loss stays within the tolerance. Outer search: bisect the tolerance until the
    budget is met. With ``step="each"`` every weight may add the tolerance to the loss (balanced
    filter pruning, arXiv 2010.06821); with ``step="total"`` the loss after weight l of L may have
    risen by ``tolerance * l / L`` in all (structural search of CaP, arXiv 2108.13728).

    **formula** :math:`\max s_l` with :math:`L(s_1..s_l) - L(s_1..s_{l-1}) \le \varepsilon`
    **Shapes** one number per weight
    **Units** loss
    **Needs** scores, and ``outer * inner`` forward passes per weight
    **Source** arXiv 2010.06821, arXiv 2108.13728

    Args:
        inner: Bisection steps per weight.
        outer: Bisection steps on the tolerance.
        step: ``"each"`` or ``"total"``.

    **Differs** the outer search of 2010.06821 is not published; this one is ours

    Example:
        >>> import torch
        >>> def item(name): return Item(name, "Linear", (10, 10), torch.empty(0), 1, 100, 1, float)
        >>> def loss(levels): return levels.get("soft", 0) + 9 * levels.get("hard", 0)
        >>> found = Tolerance()([item("soft"), item("hard")], Budget(100.0, loss))
        >>> found["soft"] > 0.85, found["hard"] < 0.15
        (True, True)
    """

    inner: int = 7
    outer: int = 10
    step: str = "each"

    needs_scores: ClassVar[bool] = True
    needs_probe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.step not in ("each", "total"):
            raise UsageError(
                f"Tolerance(step={self.step!r})", "unknown", "it is 'each' or 'total'", "choose one"
            )
        what, write = "how often a range is halved", "inner=7, outer=10"
        require_count("Tolerance(inner=...)", self.inner, what=what, write=write)
        require_count("Tolerance(outer=...)", self.outer, what=what, write=write)

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        if budget.probe is None:
            scan(items, None, ())  # raises with the reason
        assert budget.probe is not None
        tried: dict[tuple[tuple[str, float], ...], float] = {}

        def loss(levels: Mapping[str, float]) -> float:
            assert budget.probe is not None
            key = tuple(sorted(levels.items()))
            if key not in tried:
                tried[key] = budget.probe(levels)
            return tried[key]

        dense = loss({})
        low = 0.0
        high = max(loss({i.name: 0.99 for i in items}) - dense, 1e-6)
        within = self._sparsest(items)
        over: dict[str, float] = {i.name: 0.0 for i in items}
        for _ in range(self.outer):
            tolerance = (low + high) / 2
            levels = self._search(items, loss, dense, tolerance)
            if budget.spent(items, levels) <= budget.limit:
                within, high = levels, tolerance
            else:
                over, low = levels, tolerance

        # The tolerance's steps are coarse: close the gap on the line between its two neighbours.
        def family(t: float) -> dict[str, float]:
            return {n: over[n] + t * (max(within[n], over[n]) - over[n]) for n in over}

        if budget.spent(items, family(1.0)) > budget.limit:
            sparsest = self._sparsest(items)
            return meet(
                items, budget, lambda t: {n: over[n] + t * (sparsest[n] - over[n]) for n in over}
            )
        return meet(items, budget, family)

    def _search(
        self, items: Sequence[Item], loss: Probe, dense: float, tolerance: float
    ) -> dict[str, float]:
        levels: dict[str, float] = {}
        before = dense
        for index, item in enumerate(items):
            allowed = before + tolerance
            if self.step == "total":
                allowed = dense + tolerance * (index + 1) / len(items)
            low, high = 0.0, 1.0
            for _ in range(self.inner):
                middle = (low + high) / 2
                if loss({**levels, item.name: middle}) <= allowed:
                    low = middle
                else:
                    high = middle
            levels[item.name] = low
            before = loss(levels)
        return levels

    def _sparsest(self, items: Sequence[Item]) -> dict[str, float]:
        return {item.name: 1 - 1 / (2 * item.groups) for item in items}
