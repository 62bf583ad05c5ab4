"""Targets in user units: what each weight costs, what all else costs, and the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.core.batches import Batch
from secateur.core.budget import Budget, Cost, Probe, Target
from secateur.core.errors import BudgetError
from secateur.core.masks import Masks
from secateur.core.slots import Slot
from secateur.core.weight import Weight
from secateur.drive.recipe import Recipe
from secateur.drive.training.held import SUFFIX, masks_of
from secateur.formats.sharing import find_aliases
from secateur.formats.size import bare_bytes, plain_bytes, sparse_bytes
from secateur.stats import Positions, collect, product_uses, projection_uses


@dataclass(frozen=True)
class Money:
    """The target in its unit: the cost of each weight, what all else costs, and the limit."""

    costs: Mapping[str, Cost]
    fixed: float
    dense: float
    limit: float

    @property
    def sparsity(self) -> float:
        """The target as a share of the dense cost that goes away."""
        return 1 - self.limit / self.dense if self.dense else 0.0

    def at(self, share: float, probe: Probe | None) -> Budget:
        """The budget when ``share`` of the way from dense to the target is due."""
        return Budget(self.dense - share * (self.dense - self.limit), probe, share)

    def told(self, target: Target, spent: float, digits: int = 4) -> str:
        """What is spent on the pruned weights, in the unit and the form of a target."""
        if target.unit == "sparsity":
            return f"{100 * (1 - spent / self.dense):.{digits}g} % sparsity"
        whole = self.fixed + spent
        if target.value < 1:
            return f"{100 * whole / (self.fixed + self.dense):.{digits}g} % of the {target.unit}"
        return f"{whole:,.0f} {target.unit}"

    def missed(self, target: Target, spent: float) -> str:
        """What is to be told if more than the target was spent in the end; empty if not."""
        if spent <= 1.02 * self.limit:
            return ""
        for digits in range(4, 16):  # 99.99 % and 99.98 % of zeros are twice as many weights
            asked, reached = (self.told(target, x, digits) for x in (self.limit, spent))
            if asked != reached:
                break
        return (
            f"asked for {asked}, reached {reached}: levels were given, or each pool of the pattern "
            "keeps a whole number of groups, and at least one"
        )


def uses(model: nn.Module, slots: Sequence[Slot], batch: Batch) -> dict[str, float]:
    """Multiply-adds per weight and sample, for every weight of the model that ``batch`` reaches."""
    seen = [slot for slot in slots if slot.rows is not None]
    stats = collect(model, seen, [Positions()], [batch])
    reached = set(stats.names())
    found = [slot.weight(model) for slot in seen if slot.name in reached]
    counted = {weight.name: float(stats(Positions(), weight)) for weight in found}
    counted |= projection_uses(model, batch)
    hidden = {n for n, x in model.named_parameters() if x.ndim > 1 and n not in counted}
    return counted | product_uses(model, batch, hidden)


def money(
    model: nn.Module, weights: Sequence[Weight], recipe: Recipe, used: Mapping[str, float]
) -> Money:
    """Translate the recipe's target into costs for ``weights``.

    Args:
        model: The whole model; what is not in ``weights`` is a fixed cost.
        weights: What is pruned.
        recipe: With the target.
        used: From :func:`uses`, for a target in multiply-adds.

    Raises:
        BudgetError: What is not pruned costs more than the target (the floor is named), or the
            dense network costs less than it.
    """
    target = recipe.target
    assert target is not None
    sizes = {w.name: w.value.numel() for w in weights}
    unmasked = 0.0
    if target.unit == "sparsity":
        total = float(sum(sizes.values()))
        return Money(dict.fromkeys(sizes, float), 0.0, total, (1 - target.value) * total)
    if target.unit == "params":
        fixed = float(sum(p.numel() for n, p in model.named_parameters() if n not in sizes))
        costs: dict[str, Cost] = dict.fromkeys(sizes, float)
    elif target.unit == "macs":
        others = {name: n for name, n in used.items() if name not in sizes}
        fixed = sum(n * model.get_parameter(name).numel() for name, n in others.items())
        costs = {name: _times(used.get(name, 0.0)) for name in sizes}
    else:
        total = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        fixed = float(_other_bytes(model, sizes, total))
        costs = {w.name: _stored(w, total) for w in weights}
        unmasked = fixed + sum(plain_bytes(w.name, w.value, total=total) for w in weights)
    dense = sum(costs[name](size) for name, size in sizes.items())
    # A mask that keeps everything costs some bytes that the dense file does not have.
    limit = target.limit(unmasked or dense + fixed)
    if limit < fixed:
        raise BudgetError(
            f"{target.unit}={target.value:g}",
            f"what is not pruned costs {fixed:,.0f} alone, of {dense + fixed:,.0f} in all",
            "the target counts the whole model",
            f"ask for more than {fixed:,.0f}, or let more weights take part",
        )
    return Money(costs, fixed, dense, min(limit - fixed, dense))


def _times(factor: float) -> Cost:
    return lambda kept: kept * factor


def _stored(weight: Weight, total: int) -> Cost:
    shape, dtype = tuple(weight.value.shape), weight.value.dtype
    return lambda kept: float(sparse_bytes(weight.name, shape, dtype, kept, total=total))


def _other_bytes(model: nn.Module, sizes: Mapping[str, int], total: int) -> int:
    carried = {name + SUFFIX for name in masks_of(model)}  # stored with their weights
    tensors = {name: x for name, x in model.state_dict().items() if name not in carried}
    # A tensor under two names is stored once, as the one that is pruned.
    masks = {n: torch.ones_like(tensors[n], dtype=torch.bool) for n in sizes}
    aliases = find_aliases(tensors, Masks(masks))
    plain = {n: x for n, x in tensors.items() if n not in aliases and n not in sizes}
    return bare_bytes(aliases) + sum(plain_bytes(n, x, total=total) for n, x in plain.items())
