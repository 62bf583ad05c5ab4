"""Latency targets: choose widths by prediction, cut, measure, correct, and choose again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from torch import nn

from secateur.allocate.widths import WidthAllocation, WidthItem
from secateur.core.budget import Target
from secateur.core.errors import BudgetError
from secateur.core.facts import Facts
from secateur.drive.structural.latency_clock import Clock, Paired
from secateur.drive.structural.width_latency import LatencyCost, widened

#: A target is met within this share of it.
TOLERANCE = 0.02
# A latency is sought on the fast side of the target, so that it still holds when it is measured anew.
_AIM = 1 - TOLERANCE / 2
_TRIES = 6
# Halvings of the way from the target to the uncut network, on the search for the narrowest one.
_HALVINGS = 14


@dataclass(frozen=True)
class Attempt:
    """One network that was cut and measured.

    Args:
        kept: Groups of each width.
        predicted: Milliseconds by the tables.
        wanted: Milliseconds that were asked for.
        reached: Milliseconds that it takes, beside an uncut network of ``dense``.
        span: The 95 % range of ``reached``.
        dense: Milliseconds of the uncut network in this race.
        narrowest: Whether it cannot be narrower.
        busy: Whether the machine was; see :class:`~secateur.drive.structural.latency_clock.Paired`.
    """

    kept: Mapping[str, int]
    predicted: float
    wanted: float
    reached: float
    span: tuple[float, float]
    dense: float
    narrowest: bool = False
    busy: bool = False

    @property
    def over(self) -> float:
        """What it takes, over what was asked for."""
        return self.reached / self.wanted

    @property
    def meets(self) -> bool:
        """Whether it is fast enough, if need be by too much."""
        return self.over <= 1

    @property
    def exact(self) -> bool:
        """Whether it is fast enough, and as wide as that allows."""
        return 1 - TOLERANCE <= self.over <= 1


@dataclass
class LatencySearch:
    """The search for the widest network that meets a latency target.

    Args:
        target: A share of the uncut network's time, or milliseconds.
        allocation: Chooses widths under a predicted limit.
        cut: Makes the network that keeps so many groups.
        clock: Measures it.
        facts: Told what was reached, and why if it is not the target.
        attempts: All networks that were measured.
    """

    target: Target
    allocation: WidthAllocation
    cut: Callable[[Mapping[str, int]], nn.Module]
    clock: Clock
    facts: Facts
    attempts: list[Attempt] = field(default_factory=list)

    def run(self, items: Sequence[WidthItem], cost: LatencyCost) -> dict[str, int]:
        """Groups that each width keeps.

        Raises:
            BudgetError: Even the narrowest network takes longer; its time is named.
        """
        limit = self.target.limit(cost.dense)
        low, high = 0.0, math.inf  # predictions that met the target, and that missed it
        for _ in range(_TRIES):
            kept, narrowest = self._chosen(items, cost, limit)
            if any(kept == known.kept for known in self.attempts):
                break
            tried = self._measured(kept, cost(kept), narrowest=narrowest)
            self.attempts.append(tried)
            if tried.exact or (narrowest and not tried.meets):
                break
            cost = cost.corrected(kept, tried.reached)
            at = cost(kept)
            low, high = (max(low, at), high) if tried.meets else (low, min(high, at))
            limit = _AIM * at / tried.over
            if not low < limit < high:
                limit = (low + high) / 2 if high < math.inf else (low + cost.dense) / 2
        return dict(self._told().kept)

    @property
    def best(self) -> Attempt:
        """The widest that is fast enough; one that is too slow by a little before one too narrow."""
        near = [t for t in self.attempts if t.over <= 1 + TOLERANCE]
        for good in ([t for t in near if t.exact], near):
            if good:
                return max(good, key=lambda t: t.over)
        return min(self.attempts, key=lambda t: t.over)

    def _chosen(
        self, items: Sequence[WidthItem], cost: LatencyCost, limit: float
    ) -> tuple[dict[str, int], bool]:
        """Widths under a predicted limit; if it cannot be kept, the narrowest, and True."""
        try:
            return widened(items, self.allocation(items, cost, limit), cost), False
        except BudgetError:
            fits, fails = cost.dense, limit
        kept = self.allocation(items, cost, fits)
        for _ in range(_HALVINGS):
            middle = (fits + fails) / 2
            try:
                kept, fits = self.allocation(items, cost, middle), middle
            except BudgetError:
                fails = middle
        return kept, True

    def _measured(self, kept: dict[str, int], predicted: float, *, narrowest: bool) -> Attempt:
        pair = self.clock.pair(self.cut(kept))
        wanted, reached, span = self._in_milliseconds(pair)
        return Attempt(kept, predicted, wanted, reached, span, pair.dense, narrowest, pair.busy)

    def _in_milliseconds(self, pair: Paired) -> tuple[float, float, tuple[float, float]]:
        """A share is judged by paired runs, milliseconds by those of the cut network alone."""
        if self.target.value >= 1:
            return self.target.value, pair.small, pair.small_range
        low, high = pair.ratio_range
        wanted = self.target.value * pair.dense
        return wanted, pair.ratio * pair.dense, (low * pair.dense, high * pair.dense)

    def _told(self) -> Attempt:
        """The best attempt; facts and notes say how good it is."""
        best = self.best
        if best.narrowest and best.over > 1 + TOLERANCE:
            raise BudgetError(
                f"latency={best.wanted:.4g} ms",
                f"with every width at its least, {best.reached:.4g} of {best.dense:.4g} ms remain, "
                "measured",
                "what is pinned, kept by ignore= or the floor, or no layer at all, takes that long",
                "ask for more than that, lower the floor, or see secateur inspect MODEL --structure "
                "for what is pinned",
            )
        self.facts.measures["target"] = {
            "unit": "latency",
            "dense": best.dense,
            "limit": best.wanted,
            "reached": best.reached,
            "range": list(best.span),
            "engine": self.clock.engine,
            "threads": self.clock.threads,
            "tries": [{k: v for k, v in asdict(t).items() if k != "kept"} for t in self.attempts],
        }
        if abs(best.over - 1) > TOLERANCE:
            text = f"asked for {best.wanted:.4g} ms, reached {best.reached:.4g}: {self._why(best)}"
            self.facts.note("target", "", text)
        if best.busy:
            text = (
                f"the 95 % range of the median, {best.span[0]:.4g} to {best.span[1]:.4g} ms, is wide: "
                "other processes ran. Judged by lower quartiles, which they disturb least"
            )
            self.facts.note("latency", "", text)
        return best

    def _why(self, best: Attempt) -> str:
        if len(self.attempts) == _TRIES:
            return f"the nearest of {_TRIES} networks that were measured"
        if best.over > 1:
            return "the allocation gives no narrower widths"
        wider = [t.over for t in self.attempts if not t.meets]
        if wider:
            return f"the next wider choice takes {min(wider) - 1:.0%} more than was asked for"
        return "widths come in steps, and the next would have been predicted to go beyond"
