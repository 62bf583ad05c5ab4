"""Targets in user units: what each weight costs, what all else costs, and the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.core.budget import Budget, Cost, Probe
from secateur.core.errors import BudgetError
from secateur.core.weight import Weight
from secateur.drive.recipe import Recipe
from secateur.formats import smallest
from secateur.frontends import discover
from secateur.stats import Positions, Stats

# What a tensor's entry in the file's header takes, beside its name: type, shape, offsets, layout.
_ENTRY = 110


@dataclass(frozen=True)
class Money:
    """The target in its unit: the cost of each weight, what all else costs, and the limit."""

    costs: Mapping[str, Cost]
    fixed: float
    dense: float
    limit: float

    def at(self, share: float, probe: Probe | None) -> Budget:
        """The budget when ``share`` of the way from dense to the target is due."""
        return Budget(self.dense - share * (self.dense - self.limit), probe)


def money(model: nn.Module, weights: Sequence[Weight], recipe: Recipe, stats: Stats) -> Money:
    """Translate the recipe's target into costs for ``weights``.

    Raises:
        BudgetError: What is not pruned costs more than the target; the floor is named.
    """
    target = recipe.target
    assert target is not None
    sizes = {w.name: w.value.numel() for w in weights}
    if target.unit == "sparsity":
        total = float(sum(sizes.values()))
        return Money(dict.fromkeys(sizes, float), 0.0, total, (1 - target.value) * total)
    if target.unit == "params":
        fixed = float(sum(p.numel() for n, p in model.named_parameters() if n not in sizes))
        costs: dict[str, Cost] = dict.fromkeys(sizes, float)
    elif target.unit == "macs":
        used = {
            s.name: _positions(s.weight(model), stats)
            for s in discover(model)
            if s.rows is not None
        }
        tensors = dict(model.named_parameters())
        fixed = sum(n * tensors[name].numel() for name, n in used.items() if name not in sizes)
        costs = {name: _times(used[name]) for name in sizes}
    else:
        fixed = float(_other_bytes(model, sizes))
        costs = {w.name: _stored(w) for w in weights}
    dense = sum(costs[name](size) for name, size in sizes.items())
    limit = target.value if target.value >= 1 else target.value * (dense + fixed)
    if limit < fixed:
        raise BudgetError(
            f"{target.unit}={target.value:g}",
            f"what is not pruned costs {fixed:,.0f} alone, of {dense + fixed:,.0f} in all",
            "the target counts the whole model",
            f"ask for more than {fixed:,.0f}, or let more weights take part",
        )
    return Money(costs, fixed, dense, min(limit - fixed, dense))


def _positions(weight: Weight, stats: Stats) -> float:
    return float(stats(Positions(), weight)) if (Positions(), weight.name) in stats else 0.0


def _times(factor: float) -> Cost:
    return lambda kept: kept * factor


def _stored(weight: Weight) -> Cost:
    shape, dtype = tuple(weight.value.shape), weight.value.dtype
    entry = 2 * (_ENTRY + len(weight.name))
    return lambda kept: float(smallest(shape, dtype, kept).nbytes(shape, dtype, kept) + entry)


def _other_bytes(model: nn.Module, sizes: Mapping[str, int]) -> int:
    stored = {n: t for n, t in model.state_dict().items() if n not in sizes}
    return sum(t.numel() * t.element_size() + _ENTRY + len(n) for n, t in stored.items())
