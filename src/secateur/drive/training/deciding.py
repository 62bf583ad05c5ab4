"""What masks are to be at a moment of a training: statistics, scores, budget and allocation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Data, evaluating, lack, size_of, to_device
from secateur.core.errors import NeedsData, UsageError
from secateur.core.facts import Note
from secateur.core.losses import default_loss
from secateur.core.masks import Masks
from secateur.core.slots import Slot, device_of, weights
from secateur.core.weight import Weight
from secateur.drive.decide import (
    allocate,
    group_scores,
    items,
    probe_for,
    remarks,
    score,
    select,
    smoothed_parts,
)
from secateur.drive.gather import gather
from secateur.drive.money import money, uses
from secateur.drive.plan import Plan
from secateur.drive.recipe import Recipe
from secateur.drive.training import ranks
from secateur.schedule import share_at
from secateur.score import Random
from secateur.stats import Stat, Stats


@dataclass(frozen=True)
class Decision:
    """Masks, and what led to them.

    Args:
        masks: Of the weights that are pruned, but for those whose inputs were not seen.
        share: How much of the target they reach.
        groups: Name of a weight -> scores of its groups.
        levels: Name of a weight -> its sparsity.
        notes: Of scores that say little.
        missed: What is to be told if these are the last masks; empty if the target is met.
    """

    masks: Masks
    share: float
    groups: Mapping[str, Tensor]
    levels: Mapping[str, float]
    notes: Sequence[Note]
    missed: str = ""


class Deciding:
    """Decides masks in a training loop, from what was seen of it so far.

    Args:
        model: In training.
        found: Its parameters under the recipe.
        recipe: Criterion, pattern, allocation and target.
        data: For criteria and allocations that measure.

    Raises:
        NeedsData: They measure, and there are no training batches.
    """

    def __init__(self, model: nn.Module, found: Plan, recipe: Recipe, data: Data | None) -> None:
        self.model, self.recipe, self._data = model, recipe, data
        self.slots: list[Slot] = found.chosen
        self.stats = Stats(recipe.seed)
        self.streamed, self._measured = self._split_needs()
        assert recipe.target is not None
        count = recipe.target.unit == "macs" and data is not None
        self._uses = (
            uses(model, found.slots, data.sample()[0]) if count and data is not None else {}
        )

    def require_reachable(self) -> None:
        """Raise if the target cannot be reached.

        Raises:
            BudgetError: What is not pruned costs more than the target.
        """
        money(self.model, weights(self.model, self.slots), self.recipe, self._uses)

    def _split_needs(self) -> tuple[list[Stat], list[Any]]:
        recipe = self.recipe
        needs: list[Any] = list(recipe.criterion.needs)
        streamed = [
            n for n in needs if getattr(n, "source", "") == "gradients" and n.samples is None
        ]
        measured = [n for n in needs if n not in streamed]
        assert recipe.target is not None
        probing = recipe.allocation.needs_probe or recipe.target.unit == "macs"
        if (measured or probing) and (self._data is None or self._data.train is None):
            raise NeedsData(
                f"Gradual with {type(recipe.criterion).__name__} and "
                f"{type(recipe.allocation).__name__}",
                lack(self._data),
                "they measure the network at every mask update",
                "pass data=, the training batches",
            )
        return streamed, measured

    def masks(
        self,
        found: Sequence[Weight],
        time: float,
        prior: Masks | None,
        *,
        steps: int,
        at_random: bool = False,
    ) -> Decision:
        """The best groups at the sparsity of a moment.

        Args:
            found: The weights with their values.
            time: In the schedule's unit.
            prior: What was pruned before ranks lowest; ``None`` where it may come back.
            steps: Of the optimizer so far.
            at_random: Keep random groups, whatever the criterion.
        """
        recipe, groups, stats = self.recipe, {}, self.stats
        if at_random:
            recipe = dataclasses.replace(recipe, criterion=Random())
        else:
            stats = self.measure(steps)
            # If inputs of none were seen, the criterion says what it lacks.
            found = self.scorable(found, stats) or found
        for weight in found:
            old = prior[weight.name] if prior is not None else None
            groups[weight.name] = group_scores(score(weight, recipe, stats), weight, recipe, old)
        purse = money(self.model, found, recipe, self._uses)
        share = share_at(recipe.schedule, time, purse.sparsity)
        probe = None
        if recipe.allocation.needs_probe:
            assert self._data is not None
            loss = mean_loss(self.model, self._data)
            probe = probe_for(self.model, found, recipe, groups, loss)
        slots = [slot for slot in self.slots if slot.name in groups]
        choice = items(found, slots, recipe, groups, purse.costs)
        budget = purse.at(share, probe)
        levels = allocate(choice, recipe, budget)
        assert recipe.target is not None
        missed = purse.missed(recipe.target, budget.spent(choice, levels))
        masks = {w.name: select(w, recipe, groups[w.name], levels[w.name]) for w in found}
        told = [note for w in found for note in remarks(w, recipe, stats, groups[w.name])]
        self.stats.begin_anew(s for s in self.streamed if not getattr(s, "whole", False))
        return Decision(Masks(masks), share, groups, levels, told, missed)

    def scorable(self, found: Sequence[Weight], stats: Stats) -> list[Weight]:
        """Those whose inputs were seen, if the criterion reads inputs; an expert may have had none."""
        inputs = [need for need in self._measured if getattr(need, "source", "") == "inputs"]
        return [w for w in found if all((need, w.name) in stats for need in inputs)]

    def measure(self, steps: int) -> Stats:
        """Statistics of the training so far, and those that are measured on the data now.

        Raises:
            NeedsData: The criterion reads gradients of the training, and none was seen.
        """
        if self.streamed and not self.stats.names():
            raise NeedsData(
                f"Gradual with {type(self.recipe.criterion).__name__}",
                f"no gradient was seen in {steps} steps",
                "the criterion reads parameter.grad just before every optimizer step",
                "call loss.backward() before optimizer.step(), and train the pruned weights",
            )
        if not self._measured:
            return self.stats
        assert self._data is not None
        fresh = gather(
            self.model, self.slots, self._measured, self._data.sample(), loss=self._data.loss
        )
        fresh = ranks.merged(fresh, self._measured, self.slots, self.model)
        fresh.memory, fresh.seed = self.stats.memory, self.stats.seed
        return fresh.take(self.stats)

    def state_dict(self) -> dict[str, Any]:
        """The sums and averages over the steps so far."""
        return self.stats.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        parts = [*self.streamed, *smoothed_parts(self.recipe.criterion)]
        keys = [(part, slot.name) for part in parts for slot in self.slots]
        self.stats.load_state_dict(dict(state), keys)


def require_no_repairs(recipe: Recipe) -> None:
    """Refuse what a training would undo.

    Raises:
        UsageError: The recipe repairs weights one by one, or rounds them.

    Example:
        >>> require_no_repairs(Recipe())
    """
    if recipe.repairs or recipe.rounding is not None:
        parts = [part for part in (*recipe.repairs, recipe.rounding) if part]
        raise UsageError(
            "Gradual(...) with weight-wise repairs or a rounding",
            ", ".join(type(part).__name__ for part in parts),
            "training itself repairs the weights, and would undo a rounding at the next step",
            "leave them out, or use prune() with a schedule in rounds",
        )


def mean_loss(model: nn.Module, data: Data, batches: list[Batch] | None = None) -> Any:
    """A function that measures the mean calibration loss of ``model`` as it is."""
    sample = batches if batches is not None else data.sample()[:64]
    moved = [to_device(b, device_of(model)) for b in sample]
    loss = data.loss or default_loss
    sizes = [size_of(b) for b in moved]  # the last batch may be a smaller one
    total = max(1, sum(sizes))

    def measure() -> float:
        with evaluating(model), torch.no_grad():
            return sum(float(loss(model, b)) * n for b, n in zip(moved, sizes, strict=True)) / total

    return measure
