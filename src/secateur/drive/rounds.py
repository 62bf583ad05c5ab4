"""Pruning without training, in rounds: measure, score, allocate, select, repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from secateur.core.batches import Watched
from secateur.core.budget import Item
from secateur.core.facts import Facts, LayerFacts
from secateur.core.masks import Masks
from secateur.core.slots import Slot, weights
from secateur.core.weight import Weight
from secateur.drive.calibration import Calibration
from secateur.drive.decide import allocate, group_scores, items, probe_for, remarks, score
from secateur.drive.gather import gather
from secateur.drive.layerwise import MaskChoice, repair_
from secateur.drive.money import money, uses
from secateur.drive.plan import Plan, require_something
from secateur.drive.recipe import Recipe
from secateur.drive.training.deciding import mean_loss
from secateur.drive.training.finetune import Progress
from secateur.drive.training.held import attach_, detach_, masks_of
from secateur.schedule import events, share_at
from secateur.stats import Beside, Positions, Replay, Sketch, Stats, collect, in_order

_UNSEEN = "its inputs could not be seen on the data"
_LOST = "with earlier weights pruned, the data do not reach it"


class Rounds:
    """The rounds of one run: one for a one-shot schedule, several where it prunes step by step.

    Args:
        model: Changed in place.
        recipe: With a schedule in rounds.
        plan: Which weights take part.
        sample: The calibration data, if there are any.
        facts: Where layers and notes are recorded.
        progress: Told of every weight.

    Example:
        >>> from secateur.drive.plan import plan
        >>> net, recipe = nn.Linear(4, 2), Recipe()
        >>> parts = plan(net, recipe), Calibration(None), Facts(), lambda *_: None
        >>> Rounds(net, recipe, *parts).run()
        Masks(1 weights, 4 of 8 kept)
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: Plan,
        sample: Calibration,
        facts: Facts,
        progress: Progress,
    ) -> None:
        self.model, self.recipe, self.plan, self.sample = model, recipe, plan, sample
        self.facts, self.progress = facts, progress
        self._step = (0, 1)
        self._pruned = Masks({})  # by the rounds before

    def run(self) -> Masks:
        """All rounds of the schedule; the weights are zero where the masks say so."""
        recipe = self.recipe
        # Whether a round does anything does not depend on the target; at share 0 nothing does.
        times = [t for t in events(recipe.schedule) if share_at(recipe.schedule, t, 0.5) > 0]
        before = masks = masks_of(self.model)
        memory = Stats(recipe.seed)
        for index, moment in enumerate(times):
            self.progress("pruning", index, len(times))
            self._step = (index, len(times))
            masks = self._round(moment, masks, memory, last=index == len(times) - 1)
        self.progress("pruning", len(times), len(times))
        detach_(self.model)
        return before & masks  # what was pruned earlier and takes no part now stays pruned

    def _round(self, moment: float, prior: Masks, memory: Stats, *, last: bool) -> Masks:
        recipe = self.recipe
        score_needs, repair_needs = set(recipe.criterion.needs), self._repair_needs(last)
        repairs = set() if recipe.sequential else repair_needs
        ranked, in_turn = recipe.allocation.needs_scores, recipe.sequential
        # Scores of data may be no numbers: that is found before any weight has changed.
        first = ranked or (bool(score_needs) and not in_turn)
        stats = self._collect(self.plan.chosen, (score_needs if first else set()) | repairs)
        stats.memory, stats.seed = memory.memory, memory.seed
        slots = self._reached(self.plan.chosen, stats)
        groups: dict[str, torch.Tensor] = {}
        if first:
            groups = self._all_ranks(slots, stats, prior, score_needs - repairs)
        levels = self._levels(slots, groups, moment, last)
        layers: dict[str, LayerFacts] = {}
        masks: dict[str, torch.Tensor] = {}
        replay = self._replay(slots) if in_turn else None
        for slot in self._order(slots) if in_turn else slots:
            self.progress("pruning", self._step[0] + len(masks) / len(slots), self._step[1])
            weight, local = slot.weight(self.model), stats
            if replay is not None:
                needs = repair_needs | set(recipe.criterion.needs)
                local = replay.trying(partial(self._collect, [slot], needs, replay))
                local.memory, local.seed = memory.memory, memory.seed
                if not all((need, slot.name) in local for need in self._input_needs):
                    self.facts.note("left-out", slot.name, _LOST)
                    replay.finish(slot)
                    continue
            if replay is not None or not first:
                groups[slot.name] = self._ranks(weight, local, prior)
            picked = MaskChoice(
                weight, recipe, groups.pop(slot.name), levels[slot.name], prior.get(slot.name)
            )
            masks[slot.name], layers[slot.name] = repair_(
                self.model, slot, picked, recipe=recipe, stats=local, facts=self.facts
            )
            local.drop(slot.name, score_needs | repair_needs)
            if replay is not None:
                replay.finish(slot)
        for name in set(self._pruned) - set(masks):  # no data reach it any more
            mask = masks[name] = self._pruned[name]
            layers[name] = LayerFacts.of(name, mask)
        done_with = [slot.name for slot in self.plan.chosen if slot.name in masks]
        self.facts.layers = [layers[name] for name in done_with]
        done = Masks({name: masks[name] for name in done_with})
        if not last:
            attach_(self.model, done)
        self._pruned = done
        return done

    def _all_ranks(
        self, slots: Sequence[Slot], stats: Stats, prior: Masks, done_with: set[Any]
    ) -> dict[str, torch.Tensor]:
        """Scores of all weights at once; of each, what nobody else reads of the data goes then."""
        groups = {}
        for index, weight in enumerate(weights(self.model, slots)):
            self.progress("scoring", index, len(slots))
            # In sequence each weight is scored once more, which is what moves averages.
            moving = not self.recipe.sequential
            groups[weight.name] = self._ranks(weight, stats, prior, moving=moving)
            stats.drop(weight.name, done_with)
        self.progress("scoring", len(slots), len(slots))
        return groups

    def _ranks(
        self, weight: Weight, stats: Stats, prior: Masks, *, moving: bool = True
    ) -> torch.Tensor:
        scores = score(weight, self.recipe, stats, moving=moving)
        ranks = group_scores(scores, weight, self.recipe, prior.get(weight.name))
        for note in remarks(weight, self.recipe, stats, ranks):
            self.facts.note(note.topic, note.where, note.text)
        return ranks

    def _levels(
        self, slots: list[Slot], groups: Mapping[str, torch.Tensor], moment: float, last: bool
    ) -> dict[str, float]:
        """The sparsity of every weight at this moment of the schedule."""
        recipe, found = self.recipe, weights(self.model, slots)
        assert recipe.target is not None
        used = {}
        if recipe.target.unit == "macs":
            used = uses(self.model, self.plan.slots, self.sample.batches[0])
        purse = money(self.model, found, recipe, used)
        probe = None
        if recipe.allocation.needs_probe:
            assert self.sample.data is not None
            measure = mean_loss(self.model, self.sample.data, self.sample.batches)
            probe = probe_for(self.model, found, recipe, groups, measure)
        budget = purse.at(share_at(recipe.schedule, moment, purse.sparsity), probe)
        choice = items(found, slots, recipe, groups, purse.costs)
        choice = [self._without_dead(i, w) for i, w in zip(choice, found, strict=True)]
        levels = allocate(choice, recipe, budget)
        missed = purse.missed(recipe.target, budget.spent(choice, levels))
        if last and missed:
            self.facts.note("target", "", missed)
        return levels

    def _without_dead(self, item: Item, weight: Weight) -> Item:
        """An item that keeps no more groups than the rounds before have left: the others are zero."""
        mask = self._pruned.get(weight.name)
        if mask is None:
            return item
        alive = self.recipe.pattern.fold(mask, weight.axes).any(2)
        most = int(alive.sum(1).max())
        return replace(item, quota=lambda groups, level: min(most, item.quota(groups, level)))

    def _reached(self, slots: list[Slot], stats: Stats) -> list[Slot]:
        """Leave out weights whose inputs the recipe needs and no data reached; never silently."""
        if not self._input_needs:
            return slots
        seen = set(stats.names())
        if self.recipe.sequential:
            seen = self._seen(slots)
        for slot in slots:
            if slot.name not in seen:
                self.facts.note("left-out", slot.name, _UNSEEN)
        reached = [slot for slot in slots if slot.name in seen]
        if not reached:
            hidden = tuple(replace(slot, reason=_UNSEEN) for slot in slots)
            require_something(Plan(hidden), self.recipe)
        return reached

    def _seen(self, slots: list[Slot]) -> set[str]:
        """Names of the weights whose inputs can be seen: batches reach experts by their tokens."""
        seen: set[str] = set()
        for batch in self.sample.batches:
            left = [slot for slot in slots if slot.name not in seen]
            if not left:
                break
            seen.update(collect(self.model, left, [Positions()], [batch]).names())
        return seen

    @property
    def _input_needs(self) -> list[Any]:
        """What criterion and repairs read of the inputs of a weight."""
        needed = {*self.recipe.criterion.needs, *self._repair_needs(last=False)}
        return [need for need in needed if getattr(need, "source", "") == "inputs"]

    def _repair_needs(self, last: bool) -> set[Any]:
        if not self.sample.given:
            return set()
        needs: set[Any] = set().union(*(step.needs for step in self.recipe.repairs))
        return needs | ({Sketch()} if last else set())

    def _replay(self, slots: Sequence[Slot]) -> Replay:
        """What a sequential run need not compute twice; without data it runs nothing at all."""
        if not self.sample.given:
            return Replay(self.model, slots, ())
        batches = (*self.sample.few, *self.sample.batches)
        if self.recipe.asymmetric:
            assert self.sample.dense is not None
            return Beside(self.model, slots, batches, dense=self.sample.dense)
        return Replay(self.model, slots, batches)

    def _collect(
        self, slots: Sequence[Slot], needs: set[Any], replay: Replay | None = None
    ) -> Stats:
        """Gather statistics; what only serves the diagnosis is read from a few samples."""
        loss = self.sample.data.loss if self.sample.data is not None else None
        diagnosis = needs & {Sketch()}
        if diagnosis and all(a is b for a, b in zip_longest(self.sample.few, self.sample.batches)):
            diagnosis = set()  # the few are all: one pass
        stats = Stats()
        if needs - diagnosis:
            wanted = needs - diagnosis
            batches: Sequence[Any] = self.sample.batches
            if replay is None:  # in sequence it is done for every weight, which is told by itself
                batches = Watched(batches, "calibrating", self.progress)
            stats = gather(self.model, slots, wanted, batches, loss=loss, replay=replay)
        if diagnosis:
            few = collect(self.model, slots, diagnosis, self.sample.few, replay=replay)
            stats = few.take(stats)
        return stats

    def _order(self, slots: Sequence[Slot]) -> list[Slot]:
        """Slots in the order in which data reaches them; those it never reaches come last."""
        if not self.sample.given:
            return list(slots)
        reached = in_order(self.model, slots, self.sample.batches)
        names = {slot.name for slot in reached}
        return [*reached, *(slot for slot in slots if slot.name not in names)]
