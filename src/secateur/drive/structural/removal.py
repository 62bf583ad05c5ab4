"""One removal of groups from a network in training: decide, cut, and carry the optimizer along."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.widths import WidthItem
from secateur.core.batches import Data
from secateur.core.errors import DataError, UsageError, kind_of
from secateur.core.facts import WidthFacts
from secateur.core.widths import Width
from secateur.drive.structural.cutting import proved, widths_in
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.scores import group_scores
from secateur.drive.structural.trial import unproved, unrunnable
from secateur.drive.structural.uniform import best_groups, held_back
from secateur.drive.structural.width_cost import WidthCost, width_cost
from secateur.drive.structural.width_steps import Stepped, WidthSteps
from secateur.formats import Surgery
from secateur.frontends.surgery import surgery_for
from secateur.structure import Structure, apply_, couple, cuts_for
from secateur.structure.cut import alike


@dataclass(frozen=True)
class Removal:
    """What stays the same from one removal to the next.

    Args:
        recipe: Criterion, allocation, scope and so on.
        example: Inputs on which the network is traced.
        uses: Name of a weight -> how often a sample uses each of its elements. Narrower widths do
            not change it.
        origin: Name of a width -> its groups before the first removal. Floors are shares of it.
        data: For criteria that measure.
        prove_each: Compare every cut network with the masked one.
    """

    recipe: ShrinkRecipe
    example: Any
    uses: Mapping[str, float]
    origin: Mapping[str, int]
    data: Data | None = None
    prove_each: bool = False

    def macs(self, model: nn.Module) -> float:
        """Multiply-adds of one sample in a forward pass."""
        return sum(p.numel() * self.uses.get(name, 0.0) for name, p in model.named_parameters())

    def cost(self, model: nn.Module, structure: Structure) -> WidthCost:
        """The cost of ``model`` in the unit of the target."""
        unit = self.recipe.target.unit
        return width_cost(model, structure, unit, self.uses if unit == "macs" else {})

    def taking(self, structure: Structure, stuck: Collection[str] = ()) -> list[Width]:
        """The widths that may be cut: in scope, of several groups, and not among those named."""
        widths = widths_in(structure, self.recipe.scope)
        found = [w for w in widths if w.groups > 1 and w.name not in stuck]
        held = held_back(structure, [w.name for w in found]) if self.recipe.uniform else {}
        return [w for w in found if w.name not in held]

    def choose(
        self,
        structure: Structure,
        scores: Mapping[str, Tensor],
        cost: WidthCost,
        limits: tuple[float, float],
    ) -> Stepped:
        """Groups that stay, with floors and steps of the uncut network.

        Args:
            structure: Of the network as it is.
            scores: Of the widths that take part.
            cost: What they cost.
            limits: What they may cost now, and at the end.
        """
        widths = [structure.by_name[name] for name in scores]
        uniform = self.recipe.uniform
        how = WidthSteps(self.recipe.align, self.origin)
        least = how.least(widths, getattr(self.recipe.allocation, "floor", 0.0))

        def allocate(steps: Mapping[str, int]) -> dict[str, int]:
            items = [WidthItem(n, scores[n], least[n], steps[n]) for n in scores]
            counts = self.recipe.allocation(items, cost, limits[0])
            groups = best_groups(structure, scores, counts, uniform=uniform, steps=steps)
            return {name: int(flags.sum()) for name, flags in groups.items()}

        return how.choose(widths, allocate, cost=cost, goal=limits[1])

    def remove_(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        limits: tuple[float, float],
        stuck: Collection[str] = (),
    ) -> Removed:
        """Cut ``model`` and the state of ``optimizer`` down to a cost.

        Args:
            model: Changed in place, once the choice has been tried on copies.
            optimizer: Its optimizer.
            limits: What the model may cost now, and at the end. Where widths come in steps a removal
                may take a block too much, but not beyond the second.
            stuck: Names of widths that stay as they are.

        Raises:
            BudgetError: Without the widths that are stuck, the limit cannot be met.
            DataError: The cut network computes something else, and no width alone is at fault.
        """
        structure = couple(model, self.example)
        every = group_scores(model, self.taking(structure, stuck), self.recipe, self.data)
        cost = self.cost(model, structure)
        limits = limits[0], min(limits)
        found: dict[str, str] = {}
        while True:
            free = self.taking(structure, {*stuck, *found})
            scores = {width.name: every[width.name] for width in free}
            chosen = self.choose(structure, scores, cost, limits)
            keep = best_groups(structure, scores, chosen.kept, uniform=self.recipe.uniform)
            keep = {name: flags for name, flags in keep.items() if not bool(flags.all())}
            breaks, error = self._tried(model, structure, keep)
            if not breaks:
                break
            found |= breaks
        removed = {name: int((~flags).sum()) for name, flags in keep.items()}
        counts = {name: int(flags.sum()) for name, flags in keep.items()}
        event: dict[str, Any] = {
            "limit": limits[0],
            "cost": [cost.dense, cost(counts)],
            "macs": [self.macs(model)] * 2,
            "removed": removed,
            "align": chosen.align,
        }
        if not removed:
            return Removed(None, event, found)
        cuts = cuts_for(model, structure, keep)
        require_slots_alike(model, optimizer, cuts.kept)
        surgery = surgery_for(model, cuts, weights=False)  # what it was made from is trained on
        if error is not None:
            event["proof"] = error
        apply_(model, cuts, optimizer)
        event["macs"][1] = self.macs(model)
        return Removed(surgery, event, found)

    def _tried(
        self, model: nn.Module, structure: Structure, keep: Mapping[str, Tensor]
    ) -> tuple[dict[str, str], float | None]:
        """Widths that break the network -> how they do, and the error of the proof if one is asked."""
        if not keep:
            return {}, None
        breaks = {
            n: f"raises {w}" for n, w in unrunnable(model, structure, keep, self.example).items()
        }
        error = None
        if not breaks and self.prove_each:
            try:
                cuts = cuts_for(model, structure, keep)
                error = proved(model, cuts, structure, keep, self.example).error
            except DataError:
                breaks = unproved(model, structure, keep, self.example)
        told = {n: f"cut to {int(keep[n].sum())} of {len(keep[n])}" for n in breaks}
        return {n: f"{told[n]} the network {why}" for n, why in breaks.items()}, error


@dataclass(frozen=True)
class Removed:
    """What one removal did.

    Args:
        surgery: What was cut, ``None`` if it was nothing.
        event: A record of it.
        stuck: Widths that were found to break the network -> how they do. They were left alone.
    """

    surgery: Surgery | None
    event: dict[str, Any]
    stuck: Mapping[str, str]


def require_slots_alike(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Mapping[str, Any] | None = None
) -> None:
    """Refuse an optimizer whose state cannot be cut along with the weights.

    Args:
        model: The network.
        optimizer: Its optimizer.
        names: Only these parameters; by default all.

    Raises:
        UsageError: A slot is neither a number nor has it the axes of its parameter.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 2)).sum().backward(); adam.step()
        >>> require_slots_alike(net, adam)
        >>> adam.state[net.weight]["row"] = torch.zeros(2)
        >>> require_slots_alike(net, adam)
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: cutting the state of Adam: its slot 'row' of 'weight' ...
    """
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        for key, slot in optimizer.state.get(parameter, {}).items():
            odd = slot if isinstance(slot, (Tensor, list, tuple)) else ()
            if isinstance(odd, Tensor) and (odd.numel() <= 1 or alike(odd, parameter)):
                continue
            if len(odd):
                shape = tuple(odd.shape) if isinstance(odd, Tensor) else kind_of(odd)
                raise UsageError(
                    f"cutting the state of {type(optimizer).__name__}",
                    f"its slot {key!r} of {name!r} is {shape}, the parameter is "
                    f"{tuple(parameter.shape)}",
                    "what belongs to a removed filter cannot be found in it",
                    "use an optimizer that keeps one number a weight (SGD, Adam, AdamW, RMSprop), or "
                    "a new one after the cut",
                )


def width_facts(structure: Structure, surgery: Surgery | None) -> list[WidthFacts]:
    """What is left of every width of the uncut network that lost something.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> structure = couple(net, torch.zeros(1, 4))
        >>> cuts = cuts_for(net, structure, {"0": torch.tensor([True, False, True])})
        >>> found, = width_facts(structure, surgery_for(net, cuts))
        >>> found.name, found.groups, found.kept
        ('0', 3, 2)
    """
    found = []
    for width in structure.widths:
        part = width.slices[0]
        kept = {} if surgery is None else surgery.cuts.get(part.parameter, {})
        if part.axis not in kept:
            continue
        left = torch.tensor(kept[part.axis].positions())
        count = int(torch.isin(part.index.cpu(), left).all(1).sum())
        if count < width.groups:
            names = tuple(width.parameters())
            found.append(WidthFacts(width.name, width.groups, count, names, width.why))
    return found
