"""One removal of groups from a network in training: decide, cut, and carry the optimizer along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate.widths import WidthItem
from secateur.core.batches import Data
from secateur.core.errors import UsageError
from secateur.core.facts import WidthFacts
from secateur.drive.structural.cutting import proved, widths_in
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.scores import group_scores
from secateur.drive.structural.uniform import best_groups
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
        floor = float(getattr(self.recipe.allocation, "floor", 0.0))
        least = {w.name: max(1, round(floor * self.origin.get(w.name, 1))) for w in widths}

        def allocate(steps: Mapping[str, int]) -> dict[str, int]:
            items = [WidthItem(n, scores[n], least[n], steps[n]) for n in scores]
            counts = self.recipe.allocation(items, cost, limits[0])
            groups = best_groups(structure, scores, counts, uniform=uniform, steps=steps)
            return {name: int(flags.sum()) for name, flags in groups.items()}

        how = WidthSteps(self.recipe.align, self.origin)
        return how.choose(widths, allocate, cost=cost, goal=limits[1])

    def remove_(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        limit: float,
        last: float | None = None,
    ) -> tuple[Surgery | None, dict[str, Any]]:
        """Cut ``model`` and the state of ``optimizer`` down to a cost of ``limit``.

        Where widths come in steps a removal may take a block too much, but not beyond ``last``.

        Returns:
            What was cut, ``None`` if it was nothing, and a record of it.
        """
        structure = couple(model, self.example)
        widths = [w for w in widths_in(structure, self.recipe.scope) if w.groups > 1]
        scores = group_scores(model, widths, self.recipe, self.data)
        cost = self.cost(model, structure)
        limits = limit, limit if last is None else min(last, limit)
        chosen = self.choose(structure, scores, cost, limits)
        keep = best_groups(structure, scores, chosen.kept, uniform=self.recipe.uniform)
        keep = {name: flags for name, flags in keep.items() if not bool(flags.all())}
        removed = {name: int((~flags).sum()) for name, flags in keep.items()}
        counts = {name: int(flags.sum()) for name, flags in keep.items()}
        event: dict[str, Any] = {
            "limit": limit,
            "cost": [cost.dense, cost(counts)],
            "macs": [self.macs(model)] * 2,
            "removed": removed,
            "align": chosen.align,
        }
        if not removed:
            return None, event
        cuts = cuts_for(model, structure, keep)
        require_slots_alike(model, optimizer, cuts.kept)
        surgery = surgery_for(model, cuts, weights=False)  # what it was made from is trained on
        if self.prove_each:
            event["proof"] = proved(model, cuts, structure, keep, self.example).error
        apply_(model, cuts, optimizer)
        event["macs"][1] = self.macs(model)
        return surgery, event


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
                shape = tuple(odd.shape) if isinstance(odd, Tensor) else f"a {type(odd).__name__}"
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
