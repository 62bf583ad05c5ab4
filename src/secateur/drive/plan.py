"""Which parameters take part in a run, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.core.errors import NonFinite, UsageError
from secateur.core.facts import Facts
from secateur.core.plain import is_wrapper
from secateur.core.selectors import matches, require_hits
from secateur.core.slots import Slot
from secateur.core.weight import Weight
from secateur.drive.contract import require_folded
from secateur.drive.network import network_of
from secateur.drive.recipe import Recipe, require_recipe
from secateur.frontends import discover
from secateur.frontends.packed import packed_layers

_PACKED = "its weight is quantized or packed, and no parameter; prune before that"


@dataclass(frozen=True)
class Plan:
    """Which parameters take part, and every other one with its reason.

    Args:
        slots: The parameters.
        packed: Layers whose weight is no parameter.
    """

    slots: tuple[Slot, ...]
    packed: tuple[str, ...] = ()

    @property
    def chosen(self) -> list[Slot]:
        """The weights that will be pruned."""
        return [slot for slot in self.slots if slot.prunable]


def plan(model: nn.Module, recipe: Recipe | None = None) -> Plan:
    """Every parameter of ``model`` with its role under the recipe's scope and pattern.

    Raises:
        SelectorError: A selector matches nothing.

    Example:
        >>> slots = plan(nn.Linear(4, 2), Recipe()).slots
        >>> [(s.name, s.prunable) for s in slots]
        [('weight', True), ('bias', False)]
    """
    require_recipe(recipe)
    recipe = recipe or Recipe()
    scope = recipe.scope
    network = network_of(model)
    slots = discover(network)
    pairs = [(s.name, s.kind) for s in slots] + [(a, s.kind) for s in slots for a in s.aliases]
    require_hits((*scope.include, *scope.ignore), pairs, "the selector")
    return Plan(tuple(_scoped(slot, recipe) for slot in slots), packed_layers(network))


def _scoped(slot: Slot, recipe: Recipe) -> Slot:
    scope = recipe.scope

    def hit(selectors: Sequence[str]) -> str | None:
        names = (slot.name, *slot.aliases)
        return next((s for s in selectors if any(matches(s, n, slot.kind) for n in names)), None)

    if slot.axes is None:
        return slot
    reason = slot.reason
    if slot.sensitive and (scope.sensitive or hit(scope.include)):
        reason = ""
    if scope.include and not hit(scope.include):
        reason = reason or "not matched by include"
    ignored = hit(scope.ignore)
    if ignored is not None:
        reason = f"ignored by {ignored!r}"
    if not reason:
        weight = Weight(slot.name, torch.empty(slot.shape, device="meta"), slot.axes)
        try:
            folded = recipe.pattern.fold(weight.value, weight.axes)
        except UsageError as error:
            reason = f"does not fit the pattern: {error.found}; {error.why}"
        else:
            require_folded(recipe.pattern, weight, folded)
    return replace(slot, reason=reason)


def without_frozen(found: Plan, model: nn.Module, recipe: Recipe) -> Plan:
    """Leave frozen weights out where the criterion reads the gradients of the training itself.

    Example:
        >>> from secateur.score import Movement
        >>> net = nn.Linear(4, 2).requires_grad_(False)
        >>> without_frozen(plan(net), net, Recipe(Movement())).chosen
        []
    """
    needs: list[Any] = list(recipe.criterion.needs)
    if not any(getattr(n, "source", "") == "gradients" and n.samples is None for n in needs):
        return found
    reason = f"it is frozen, and {type(recipe.criterion).__name__} reads the gradients of training"
    slots = (
        replace(slot, reason=reason)
        if slot.prunable and not slot.tensor(model).requires_grad
        else slot
        for slot in found.slots
    )
    return replace(found, slots=tuple(slots))


def require_something(plan: Plan, recipe: Recipe) -> None:
    """Raise if nothing is left to prune, with the reasons."""
    if plan.chosen:
        return
    reasons: dict[str, int] = {}
    for slot in plan.slots:
        reasons[slot.reason] = reasons.get(slot.reason, 0) + 1
    if plan.packed:
        reasons[_PACKED] = len(plan.packed)
    listed = (
        "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
        or "it has no parameters"
    )
    raise UsageError(
        f"pruning with {type(recipe.pattern).__name__}",
        f"no parameter takes part ({listed})",
        "there is nothing to prune",
        "widen the scope (include=, sensitive=True; --include) or choose a pattern that fits",
    )


def require_finite(model: nn.Module) -> None:
    """Raise if any parameter holds NaN or infinity; the first is named."""
    for name, parameter in model.named_parameters():
        plain = parameter.dtype.is_floating_point and not is_wrapper(parameter)
        # One number first: a flag for each entry takes more memory than the weight has.
        if not plain or bool(torch.isfinite(parameter.detach().sum())):
            continue
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise NonFinite(
                f"pruning {name!r}",
                f"{bad} of its {parameter.numel()} entries are NaN or infinite",
                "such weights have no order and spoil every statistic",
                "load the weights again, or repair the training run they come from",
            )


def note_left_out(facts: Facts, plan: Plan) -> None:
    """Record every weight that might have been expected to take part and does not."""
    for slot in plan.slots:
        if slot.reason and (slot.axes is not None or len(slot.shape) > 1):
            facts.note("left-out", slot.name, slot.reason)
        if slot.aliases and slot.prunable:
            facts.note(
                "tied", slot.name, f"the same tensor as {', '.join(slot.aliases)}: scored once"
            )
    for path in plan.packed:
        facts.note("left-out", path, _PACKED)
