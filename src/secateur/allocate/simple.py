"""Allocations that look at shapes only: uniform, Erdős-Rényi, given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from secateur.allocate.allocation import Allocation, meet
from secateur.core.budget import Budget, Item
from secateur.core.errors import BudgetError
from secateur.core.selectors import pick, require_hits


@dataclass(frozen=True)
class Uniform:
    """The same sparsity everywhere.

    **formula** density = limit / dense cost
    **Shapes** one number per weight
    **Units** none
    **Needs** nothing
    **Source** Zhu and Gupta, arXiv 1710.01878

    Example:
        >>> import torch
        >>> item = Item("w", "Linear", (2, 5), torch.empty(0), 1, 10, 1, float)
        >>> Uniform()([item], Budget(limit=3.0))
        {'w': 0.7}
    """

    needs_scores: ClassVar[bool] = False
    needs_probe: ClassVar[bool] = False

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        # The share of cost is the sparsity when cost is linear; rounding then follows the quota of
        # every weight, so that 50 % of each layer is 50 % of each layer.
        dense = sum(item.cost(item.size) for item in items)
        sparsity = 1 - budget.limit / dense if dense else 0.0
        linear = all(
            math.isclose(i.cost(i.size // 2) * i.size, i.cost(i.size) * (i.size // 2))
            for i in items
        )
        if linear and 0 <= sparsity < 1:
            return {item.name: round(sparsity, 12) for item in items}
        return meet(items, budget, lambda t: {item.name: t for item in items})


@dataclass(frozen=True)
class ErdosRenyi:
    r"""Sparsity from layer shapes: large layers pay more.

    **formula** density :math:`\propto \dfrac{n_{in} + n_{out} + k_h + k_w}{n_{in}\, n_{out}\, k_h k_w}`,
    clipped at 1; with ``kernel=False`` the kernel sizes are left out (ER)
    **Shapes** one number per weight
    **Units** none
    **Needs** nothing
    **Source** SET (arXiv 1707.04780) for ER, RigL (arXiv 1911.11134) for ERK

    Example:
        >>> import torch
        >>> def item(name, fans):
        ...     return Item(name, "Linear", fans, torch.empty(0), 1, math.prod(fans), 1, float)
        >>> levels = ErdosRenyi()([item("small", (4, 4)), item("large", (40, 40))], Budget(limit=200.0))
        >>> {name: round(s, 3) for name, s in levels.items()}
        {'small': 0.0, 'large': 0.885}
    """

    kernel: bool = True

    needs_scores: ClassVar[bool] = False
    needs_probe: ClassVar[bool] = False

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        raw = {item.name: self._raw(item) for item in items}
        # Density min(1, eps * raw) with eps falling from "all dense" to zero. One bisection over
        # eps replaces the paper's loop that moves over-full layers to a dense set.
        largest = 1 / min(raw.values())

        def family(t: float) -> dict[str, float]:
            return {name: 1 - min(1.0, (1 - t) * largest * r) for name, r in raw.items()}

        return meet(items, budget, family)

    def _raw(self, item: Item) -> float:
        out, inn, *kernel = item.fans
        if not self.kernel:
            return (out + inn) / (out * inn)
        return (out + inn + sum(kernel)) / (out * inn * math.prod(kernel))


@dataclass(frozen=True)
class Given:
    """Sparsities given per selector; the most specific one wins, ``rest`` spreads what remains.

    If the levels cover every weight they decide alone and the target has no say.

    Raises:
        BudgetError: A level is not in [0, 1), or the weights with given levels cost too much alone.

    **formula** given
    **Shapes** one number per weight
    **Units** none
    **Needs** nothing
    **Source** definition

    Example:
        >>> import torch
        >>> def item(name): return Item(name, "Linear", (2, 5), torch.empty(0), 1, 10, 1, float)
        >>> Given({"a": 0.2})([item("a.weight"), item("b.weight")], Budget(limit=10.0))
        {'a.weight': 0.2, 'b.weight': 0.8}
    """

    levels: Mapping[str, float] = field(default_factory=dict, hash=False)
    rest: Allocation = Uniform()

    @property
    def needs_scores(self) -> bool:
        """What ``rest`` needs."""
        return self.rest.needs_scores

    @property
    def needs_probe(self) -> bool:
        """What ``rest`` needs."""
        return self.rest.needs_probe

    def __post_init__(self) -> None:
        for selector, level in self.levels.items():
            if not 0 <= level < 1:
                raise BudgetError(
                    f"sparsity {level:g} for {selector!r}",
                    f"{level:g} is not in [0, 1)",
                    "sparsity is the fraction of zeros",
                    "write 0.9 for 90 %",
                )

    def __call__(self, items: Sequence[Item], budget: Budget) -> Mapping[str, float]:
        require_hits(self.levels, [(i.name, i.kind) for i in items], "the given level for")
        found = {i.name: pick(self.levels, i.name, i.kind) for i in items}
        # On the way of a gradual run the given levels are approached like the target.
        fixed = {n: level * budget.share for n, level in found.items() if level is not None}
        free = [item for item in items if item.name not in fixed]
        if not free:
            return fixed
        spent = sum(i.cost(i.keep(fixed[i.name])) for i in items if i.name in fixed)
        if spent > budget.limit:
            raise BudgetError(
                f"a budget of {budget.limit:,.0f}",
                f"the weights with given levels cost {spent:,.0f} alone, beside {len(free)} more",
                "given levels are not changed to meet a target",
                "raise the budget, or give higher levels",
            )
        chosen = {
            **fixed,
            **self.rest(free, Budget(budget.limit - spent, budget.probe, budget.share)),
        }
        return {item.name: chosen[item.name] for item in items}
