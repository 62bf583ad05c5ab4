"""Targets in user units: what each weight costs, what all else costs, and the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.core.batches import Batch
from secateur.core.budget import Budget, Cost, Probe, Target
from secateur.core.errors import BudgetError
from secateur.core.slots import Slot
from secateur.core.weight import Weight
from secateur.drive.recipe import Recipe
from secateur.drive.training.held import SUFFIX, masks_of
from secateur.formats import smallest
from secateur.stats import Positions, collect, projection_uses

# What a tensor's entry in the file's header takes, beside its name: type, shape, offsets, layout.
_ENTRY = 110


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

    def told(self, target: Target, spent: float) -> str:
        """What is spent on the pruned weights, in the unit and the form of a target."""
        if target.unit == "sparsity":
            return f"{100 * (1 - spent / self.dense):.4g} % sparsity"
        whole = self.fixed + spent
        if target.value < 1:
            return f"{100 * whole / (self.fixed + self.dense):.4g} % of the {target.unit}"
        return f"{whole:,.0f} {target.unit}"


def uses(model: nn.Module, slots: Sequence[Slot], batch: Batch) -> dict[str, float]:
    """Multiply-adds per weight and sample, for every weight of the model that ``batch`` reaches."""
    seen = [slot for slot in slots if slot.rows is not None]
    stats = collect(model, seen, [Positions()], [batch])
    reached = set(stats.names())
    found = [slot.weight(model) for slot in seen if slot.name in reached]
    counted = {weight.name: float(stats(Positions(), weight)) for weight in found}
    return counted | projection_uses(model, batch)


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
            target is in latency.
    """
    target = recipe.target
    assert target is not None
    if target.unit == "latency":
        raise BudgetError(
            f"latency={target.value:g}",
            "pruning with masks was asked",
            "zeros are as slow as other numbers, but for a sparse runtime, and no time can be "
            "promised before its kernels are chosen",
            "use shrink, which removes whole channels; or prune to macs=50%, say, and measure with "
            "bench",
        )
    sizes = {w.name: w.value.numel() for w in weights}
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


def _times(factor: float) -> Cost:
    return lambda kept: kept * factor


def _stored(weight: Weight) -> Cost:
    shape, dtype = tuple(weight.value.shape), weight.value.dtype
    entry = 2 * (_ENTRY + len(weight.name))
    return lambda kept: float(smallest(shape, dtype, kept).nbytes(shape, dtype, kept) + entry)


def _other_bytes(model: nn.Module, sizes: Mapping[str, int]) -> int:
    # Masks are stored with their weights; a tensor under two names is stored once.
    skip = {*sizes, *(name + SUFFIX for name in masks_of(model))}
    tensors = model.state_dict()
    seen = {tensors[name].data_ptr() for name in sizes}
    total = 0
    for name, tensor in tensors.items():
        if name in skip or (tensor.numel() and tensor.data_ptr() in seen):
            continue
        seen.add(tensor.data_ptr())
        total += tensor.numel() * tensor.element_size() + _ENTRY + len(name)
    return total
