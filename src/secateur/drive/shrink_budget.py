"""How many groups every width keeps, for a target in any unit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.allocate.widths import WidthItem
from secateur.core.batches import Batch
from secateur.core.facts import Facts
from secateur.core.select import keep_top
from secateur.core.widths import Width
from secateur.drive.finetune import Progress
from secateur.drive.latency_budget import LatencySearch
from secateur.drive.latency_clock import clock_for
from secateur.drive.money import uses
from secateur.drive.shrink_recipe import ShrinkRecipe
from secateur.drive.width_cost import WidthCost, limit_of, width_cost
from secateur.drive.width_latency import LayerTiming, latency_cost, steps
from secateur.frontends import discover
from secateur.runtime.layer_times import LayerTimes
from secateur.structure import Structure, apply_, cuts_for


@dataclass(frozen=True)
class ShrinkBudget:
    """The budget of one run.

    Args:
        model: Uncut; it is left alone.
        structure: Its structure.
        recipe: With the target and the allocation.
        facts: Told what was reached, and why if it is not the target.
        progress: Called with a stage, the work done and the whole.
    """

    model: nn.Module
    structure: Structure
    recipe: ShrinkRecipe
    facts: Facts
    progress: Progress

    def keep(
        self, widths: Sequence[Width], scores: Mapping[str, Tensor], example: Any
    ) -> dict[str, Tensor]:
        """The best groups of every width, as many as the target allows.

        Args:
            widths: Those that take part.
            scores: Of their groups, larger = keep.
            example: What the network was traced with.

        Raises:
            BudgetError: What cannot be cut costs more than the target; the floor is named.
        """
        batch = example if isinstance(example, (Tensor, Mapping)) else (*example, None)
        if self.recipe.target.unit == "latency":
            counts = self._by_latency(widths, scores, batch)
        else:
            counts = self._by_cost(_items(widths, scores, {}, self.recipe.align), batch)
        return self._groups(scores, counts)

    def _groups(self, scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
        return {
            name: keep_top(scores[name][None].float(), count)[0] for name, count in counts.items()
        }

    def _by_cost(self, items: Sequence[WidthItem], batch: Batch) -> dict[str, int]:
        unit = self.recipe.target.unit
        used = uses(self.model, discover(self.model), batch) if unit == "macs" else {}
        cost = width_cost(self.model, self.structure, unit, used)
        limit = limit_of(self.recipe.target, cost.dense)
        counts = self.recipe.allocation(items, cost, limit)
        self._note_cost(cost, counts, limit)
        return counts

    def _note_cost(self, cost: WidthCost, counts: Mapping[str, int], limit: float) -> None:
        spent, unit = cost(counts), self.recipe.target.unit
        self.facts.measures["target"] = {
            "unit": unit,
            "dense": cost.dense,
            "limit": limit,
            "reached": spent,
        }
        if abs(spent - limit) > 0.02 * limit:
            text = (
                f"asked for {limit:,.4g} {unit}, reached {spent:,.4g}: groups are whole heads or "
                "channels, and the next one would have gone beyond"
            )
            self.facts.note("target", "", text)

    def _by_latency(
        self, widths: Sequence[Width], scores: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, int]:
        recipe = self.recipe
        self.progress("timing layers", 0, 1)
        clock = clock_for(self.model, batch, recipe.engine, self.facts)
        dense = clock.dense()
        limit_of(recipe.target, dense)  # raises before the long part
        how = LayerTiming(
            LayerTimes(clock.layers),
            recipe.align,
            lambda done, total: self.progress("timing layers", done, total),
        )
        cost, step = latency_cost(self.model, self.structure, batch, dense=dense, how=how)
        grain = {} if recipe.align else steps(widths, cost.uses, step)

        def cut(counts: Mapping[str, int]) -> nn.Module:
            self.progress("measuring", len(search.attempts), 1 + len(search.attempts))
            small = copy.deepcopy(self.model)
            apply_(small, cuts_for(small, self.structure, self._groups(scores, counts)))
            return small

        search = LatencySearch(recipe.target, recipe.allocation, cut, clock, self.facts)
        counts = search.run(_items(widths, scores, grain, recipe.align), cost)
        self.facts.measures["target"]["align"] = step
        return counts


def _items(
    widths: Sequence[Width], scores: Mapping[str, Tensor], grain: Mapping[str, int], align: int
) -> list[WidthItem]:
    return [
        WidthItem(w.name, scores[w.name], step=grain.get(w.name, max(1, min(align, w.groups))))
        for w in widths
    ]
