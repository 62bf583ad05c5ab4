"""Which layers to replace, decided with the whole model.

A dense convolution alone pays for ONNX Runtime's change of layout, before and after; among dense
neighbours it does not. So what layers took alone only gives a few plans to start from. The fastest
is then improved layer by layer, as long as the whole model gets faster by more than its noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.runtime.chains import takes_bands
from secateur.runtime.compiler import attention
from secateur.runtime.compiler.attention import Attention, attentions
from secateur.runtime.compiler.banded import banded
from secateur.runtime.compiler.choose import Timed
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.rewrite import sparse_model, spec
from secateur.runtime.race import TURN, Raced, open_session, race, runner

#: What is not faster by more than this is a tie; ties go to dense.
NEAR_TIE = 0.03
# Of the careful plan.
_CLEAR = 0.15
# Of the eager plan: what a layer may lose alone, because dense neighbours would cost it a change of
# layout. The same bounds, widened, say for which layers another try is worth its time.
_EAGER = -0.25
_DOUBTFUL = (0.5, 2.5)
# Shares of the time for deciding about attention and about chains.
_ATTENTION, _CHAINS = 0.1, 0.2
# More than the smaller second caches hold, in bytes.
_LARGE = 1 << 19
DENSE = "dense"

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Plan:
    """A way to replace layers, and how long the whole model takes so.

    Args:
        name: What the layers have in common; ``"dense"`` if there are none.
        layers: Those that are replaced.
        model: The ONNX model.
        dense_ms: Median of the dense model; None if nothing was timed.
        sparse_ms: Median of this one.
        speedup: Median ratio of paired turns.
        blocks: Attention that became one operator each.
        chains: How many operators hold several layers, which run band by band.
    """

    name: str
    layers: tuple[Timed, ...]
    model: Any
    dense_ms: float | None = None
    sparse_ms: float | None = None
    speedup: float | None = None
    blocks: tuple[Attention, ...] = ()
    chains: int = 0

    @staticmethod
    def of(
        graph: Graph, name: str, layers: Sequence[Timed], blocks: Sequence[Attention] = ()
    ) -> Plan:
        """A plan that was not timed."""
        chosen = [(t.site, t.best, t.positions) for t in layers if t.best is not None]
        model = sparse_model(graph, chosen, blocks)
        return Plan(name, tuple(layers), model, blocks=tuple(blocks))


@dataclass(frozen=True)
class Clock:
    """How whole models are timed.

    Args:
        feeds: Their inputs.
        threads: Of ONNX Runtime.
        seconds: For all of it, about.
        progress: Called with a stage, what is done, and how much there is.
    """

    feeds: Mapping[str, np.ndarray]
    threads: int | None
    seconds: float
    progress: Progress | None = None

    def runner(self, model: Any) -> Callable[[], None]:
        """Runs a model once."""
        return runner(open_session(model, self.threads), self.feeds)

    def race(self, runners: Sequence[Callable[[], None]], share: float, drop: bool = True) -> Raced:
        """Time runners for a share of the seconds."""
        return race(runners, seconds=share * self.seconds, drop=drop, turn=TURN)

    def say(self, stage: str, done: float, total: float) -> None:
        """Report how far it is."""
        if self.progress is not None:
            self.progress(stage, done, total)


def fastest(graph: Graph, timed: Sequence[Timed], clock: Clock) -> Plan:
    """The fastest whole model; the dense one unless another is faster by more than a tie."""
    clock.say("timing the model", 0, 3)
    dense = clock.runner(graph.model)
    tried = [Plan(DENSE, (), graph.model)]
    tried += [Plan.of(graph, name, layers) for name, layers in plans(timed).items()]
    runners = [dense, *(clock.runner(plan.model) for plan in tried[1:])]
    raced = clock.race(runners, 0.3)
    best = min(range(len(tried)), key=raced.ratio)
    clock.say("timing the model", 1, 3)
    plan = _climbed(graph, timed, tried[best], runners[best], clock)
    clock.say("timing the model", 2, 3)
    plan = _with_attention(graph, plan, clock)
    plan = _chained(graph, timed, plan, clock)
    if not plan.layers:
        both = raced.median(0)
        return Plan(DENSE, (), sparse_model(graph, ()), both, both, 1.0)
    # Once more, by itself: the best of many is partly luck.
    raced = clock.race([dense, clock.runner(plan.model)], 0.2, drop=False)
    clock.say("timing the model", 3, 3)
    if raced.ratio(1) > 1 - NEAR_TIE:
        return Plan(DENSE, (), sparse_model(graph, ()), raced.median(0), raced.median(0), 1.0)
    return replace(
        plan, dense_ms=raced.median(0), sparse_ms=raced.median(1), speedup=1 / raced.ratio(1)
    )


def _with_attention(graph: Graph, plan: Plan, clock: Clock) -> Plan:
    """The plan with its attention in single operators, ours or ONNX Runtime's, if that is surely faster."""
    blocks = attentions(graph) if plan.layers else ()
    if not blocks:
        return plan
    tried, runners = [plan], [clock.runner(plan.model)]
    for domain in (attention.OURS, attention.THEIRS):
        own = [replace(block, domain=domain) for block in blocks]
        other = Plan.of(graph, plan.name, plan.layers, own)
        # There are builds of ONNX Runtime without its own operators.
        with suppress(Exception):
            runners.append(clock.runner(other.model))
            tried.append(other)
    raced = clock.race(runners, _ATTENTION, drop=False)
    best = min(range(len(tried)), key=raced.ratio)
    return tried[best] if raced.ratio_range(best)[1] < 1.0 else plan


def _chained(graph: Graph, timed: Sequence[Timed], plan: Plan, clock: Clock) -> Plan:
    """The plan with layers that run band by band, if that is surely faster."""
    tried = [plan, *with_chains(graph, timed, plan)]
    if len(tried) == 1:
        return plan
    raced = clock.race([clock.runner(each.model) for each in tried], _CHAINS)
    best = min(range(len(tried)), key=raced.ratio)
    return tried[best] if raced.ratio_range(best)[1] < 1.0 else plan


def with_chains(graph: Graph, timed: Sequence[Timed], plan: Plan) -> list[Plan]:
    """A plan with its layers in chains: all, or those alone that hand on much.

    Layers that lose alone may win in a chain, so both are tried with all that could be in one, too.
    """
    chosen = {layer.site.nodes[0] for layer in plan.layers}
    more = [t for t in timed if t.site.nodes[0] in chosen or _may_chain(t)]
    found: dict[tuple[int, tuple[str, ...]], Plan] = {}
    for start in (plan, Plan.of(graph, plan.name, more, plan.blocks)):
        for least in (_LARGE, 0):
            model, names = banded(start.model, least)
            other = replace(start, name="chained", model=model, chains=len(names))
            found.setdefault((len(start.layers), names), other)
    return [other for other in found.values() if other.chains]


def _may_chain(timed: Timed) -> bool:
    return timed.best is not None and takes_bands(spec(timed.site), timed.best)


def plans(timed: Sequence[Timed]) -> dict[str, tuple[Timed, ...]]:
    """Sets of layers worth trying together, by name; equal sets once, and never the empty one."""
    wins = [t for t in timed if t.best is not None and t.ratio < 1 - NEAR_TIE]
    tried = {
        "all that win": wins,
        "all that win, depthwise dense": [t for t in wins if not t.site.depthwise],
        "clear wins": [t for t in wins if t.ratio < 1 - _CLEAR],
        "near losses, too": [t for t in timed if t.best is not None and t.ratio < 1 - _EAGER],
    }
    seen: set[tuple[int, ...]] = {()}
    kept = {}
    for name, layers in tried.items():
        numbers = tuple(layer.site.nodes[0] for layer in layers)
        if numbers not in seen:
            kept[name] = tuple(layers)
        seen.add(numbers)
    return kept


def _climbed(
    graph: Graph, timed: Sequence[Timed], plan: Plan, run: Callable[[], None], clock: Clock
) -> Plan:
    """Try the other choice for each kind of layer in doubt, and keep what is surely faster."""
    groups: dict[int, list[Timed]] = {}
    for layer in timed:
        if layer.best is not None and _DOUBTFUL[0] < layer.ratio < _DOUBTFUL[1]:
            groups.setdefault(id(layer.timings), []).append(layer)
    # The most time first.
    order = sorted(groups.values(), key=lambda g: -len(g) * g[0].timings[0].ms)
    start = time.perf_counter()
    for group in order:
        if time.perf_counter() - start > 0.5 * clock.seconds:
            break
        numbers = {layer.site.nodes[0] for layer in group}
        rest = [layer for layer in plan.layers if layer.site.nodes[0] not in numbers]
        flipped = rest if len(rest) < len(plan.layers) else [*plan.layers, *group]
        other = Plan.of(graph, "tuned", sorted(flipped, key=lambda t: t.site.nodes[0]))
        other_run = clock.runner(other.model)
        if clock.race([run, other_run], 0.02, drop=False).ratio_range(1)[1] < 1.0:
            plan, run = other, other_run
    return plan
