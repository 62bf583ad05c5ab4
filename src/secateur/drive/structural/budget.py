"""How many groups every width keeps, for a target in any unit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.allocate.widths import GivenWidths, WidthItem
from secateur.core.batches import Batch
from secateur.core.budget import Target
from secateur.core.facts import Facts
from secateur.core.widths import Width
from secateur.drive.money import uses
from secateur.drive.structural.cutting import as_batch
from secateur.drive.structural.latency_budget import TOLERANCE, LatencySearch
from secateur.drive.structural.latency_clock import clock_for
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.uniform import best_groups
from secateur.drive.structural.width_cost import WidthCost, width_cost
from secateur.drive.structural.width_latency import LayerTiming, latency_cost, steps
from secateur.drive.structural.width_steps import Stepped, WidthSteps
from secateur.drive.training.finetune import Progress
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
        last: The target of the last round, if this is one of several.
    """

    model: nn.Module
    structure: Structure
    recipe: ShrinkRecipe
    facts: Facts
    progress: Progress
    last: Target | None = None

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
        batch = as_batch(example)
        if self.recipe.target.unit == "latency":
            counts = self._by_latency(widths, scores, batch)
        else:
            counts = self._by_cost(widths, scores, batch)
        return self._groups(scores, counts)

    def targets(self, example: Any) -> list[Target]:
        """The target of every round: counts, at equal ratios from dense to the last."""
        rounds, target = self.recipe.rounds, self.recipe.target
        if rounds == 1:
            return [target]
        dense = self._cost(as_batch(example)).dense
        ratio = target.limit(dense) / dense
        return [Target(target.unit, dense * ratio ** ((r + 1) / rounds)) for r in range(rounds)]

    def _groups(
        self,
        scores: Mapping[str, Tensor],
        counts: Mapping[str, int],
        steps: Mapping[str, int] | None = None,
    ) -> dict[str, Tensor]:
        uniform = self.recipe.uniform
        return best_groups(self.structure, scores, counts, uniform=uniform, steps=steps)

    def _cost(self, batch: Batch) -> WidthCost:
        unit = self.recipe.target.unit
        used = uses(self.model, discover(self.model), batch) if unit == "macs" else {}
        return width_cost(self.model, self.structure, unit, used)

    def _by_cost(
        self, widths: Sequence[Width], scores: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, int]:
        cost = self._cost(batch)
        target, last = self.recipe.target, self.last or self.recipe.target
        # Coarse steps may have taken a round beyond the next one's target already.
        ahead = self.last is not None and cost.dense <= target.value
        limit = target.value if ahead else target.limit(cost.dense)
        goal = limit if last == target else last.value
        whole = {width.name: width.groups for width in self.facts.widths}
        how = WidthSteps(self.recipe.align, whole)
        least = how.least(widths, getattr(self.recipe.allocation, "floor", 0.0))

        def allocate(steps: Mapping[str, int]) -> dict[str, int]:
            names = [width.name for width in widths]
            items = [WidthItem(n, scores[n], least[n], steps[n]) for n in names]
            asked = limit
            while True:
                counts = self.recipe.allocation(items, cost, asked)
                groups = self._groups(scores, counts, steps)
                evened = {name: int(flags.sum()) for name, flags in groups.items()}
                # Widths that are made alike may cost more than what was chosen.
                if cost(evened) <= limit or asked < limit / 2:
                    return evened
                asked *= 0.98

        chosen = how.choose(widths, allocate, cost=cost, goal=goal)
        self._note_cost(cost, chosen, limit, between=last != target)
        return chosen.kept

    def _note_cost(self, cost: WidthCost, chosen: Stepped, limit: float, *, between: bool) -> None:
        spent, unit = cost(chosen.kept), self.recipe.target.unit
        before = self.facts.measures.get("target", {})
        self.facts.measures["target"] = {
            "unit": unit,
            "dense": before.get("dense", cost.dense),
            "limit": limit,
            "reached": spent,
            "align": min(before.get("align", chosen.align), chosen.align),
        }
        if chosen.why:
            self.facts.note("widths", "", chosen.why)
        if abs(spent - limit) > TOLERANCE * limit and not between:
            why = "groups are whole heads or channels, and the next one would have gone beyond"
            if isinstance(self.recipe.allocation, GivenWidths):
                why = "the allocation gives the widths"
            text = f"asked for {limit:,.4g} {unit}, reached {spent:,.4g}: {why}"
            self.facts.note("target", "", text)

    def _by_latency(
        self, widths: Sequence[Width], scores: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, int]:
        recipe = self.recipe
        self.progress("timing layers", 0, 1)
        clock = clock_for(self.model, batch, recipe.engine, self.facts)
        dense = clock.dense()
        recipe.target.limit(dense)  # raises before the long part
        how = LayerTiming(
            LayerTimes(clock.layers),
            recipe.align,
            lambda done, total: self.progress("timing layers", done, total),
        )
        cost, step = latency_cost(self.model, self.structure, batch, dense=dense, how=how)
        aligned = WidthSteps(recipe.align).of(widths)
        grain = aligned if recipe.align else steps(widths, cost.uses, step)

        def cut(counts: Mapping[str, int]) -> nn.Module:
            self.progress("measuring", len(search.attempts), 1 + len(search.attempts))
            small = copy.deepcopy(self.model)
            apply_(small, cuts_for(small, self.structure, self._groups(scores, counts, grain)))
            return small

        search = LatencySearch(recipe.target, recipe.allocation, cut, clock, self.facts)
        items = [WidthItem(w.name, scores[w.name], step=grain[w.name]) for w in widths]
        groups = self._groups(scores, search.run(items, cost), grain)
        self.facts.measures["target"]["align"] = step
        return {name: int(flags.sum()) for name, flags in groups.items()}


def recount(model: nn.Module, example: Any, facts: Facts) -> None:
    """Tell the multiply-adds that are counted in a cut network, if other ones were reckoned.

    A choice is reckoned from the widths, as if layers ran as often as before. They run less often where
    they lie along what was cut, as layers that mix the tokens of each feature do, and experts may get
    more or fewer tokens.

    Args:
        model: After the cut.
        example: What it was traced with.
        facts: With the target and what was reached; other units than multiply-adds are left alone.
    """
    told = facts.measures.get("target", {})
    if told.get("unit") != "macs":
        return
    used = uses(model, discover(model), as_batch(example))
    found = sum(times * model.get_parameter(name).numel() for name, times in used.items())
    if abs(found - told["reached"]) > TOLERANCE * told["limit"]:
        text = (
            f"the widths were chosen for {told['reached']:,.4g} macs, and the cut network has "
            f"{found:,.4g}: some layers do not run as often in it as before"
        )
        facts.note("target", "", text)
    told["reached"] = found
