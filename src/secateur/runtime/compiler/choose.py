"""Which kernel each layer gets: the one that was fastest on its own weights.

A layer is timed alone, in ONNX Runtime: once as the nodes that stand in the model now, and once for
each kernel that may suit it. Layers of the same shape, sparsity and structure share a timing. What
a layer cannot show alone (ONNX Runtime keeps dense convolutions in a layout of its own between
them) is decided afterwards, with the whole model, among a few plans.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.errors import UsageError
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.lone import Lone
from secateur.runtime.compiler.rewrite import HALF, spec
from secateur.runtime.compiler.site import CONV, Site
from secateur.runtime.native import Variant, candidates
from secateur.runtime.race import open_session, race, runner
from secateur.runtime.stored import fill

# A run of less than this many milliseconds is mostly the cost of starting it. Small layers are
# repeated within one model, with an input each.
_SHORT = 0.25
_MOST_COPIES = 8
# Dense multiply-adds a millisecond, for the first guess of how long a layer takes.
_GUESS = 5e7
_SECONDS_A_LAYER = 2.5

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Timing:
    """One kernel of one layer; no variant means dense in ONNX Runtime.

    Args:
        variant: The kernel.
        ms: The lower quartile of its runs: a run that nothing disturbed.
        ratio: Its time over the dense one.
        finished: Whether it was timed to the end, and not given up as hopeless.
    """

    variant: Variant | None
    ms: float
    ratio: float
    finished: bool = True


@dataclass(frozen=True)
class Timed:
    """A layer with what its candidates took.

    Args:
        site: The layer.
        positions: Positions of its output in one image, or tokens.
        macs: Multiply-adds if it were dense.
        timings: Dense first, then kernels. Empty if nothing was timed.
        best: The fastest kernel; None if the native library has none for this layer.
    """

    site: Site
    positions: int
    macs: int
    timings: tuple[Timing, ...]
    best: Variant | None

    @property
    def ratio(self) -> float:
        """Time of the best kernel over that of the dense layer; NaN if it was not measured."""
        own = [t.ratio for t in self.timings if t.variant is not None and t.variant == self.best]
        return own[0] if own else math.nan


def first(sites: Sequence[Site], shapes: Shapes, *, half: bool = False) -> tuple[Timed, ...]:
    """The first candidate of every layer, without timing: for tests, and for other machines.

    Args:
        sites: The layers.
        shapes: Of their inputs and residuals.
        half: Whether kernels of half precision come first.
    """
    found = []
    for site in sites:
        positions, macs = _work(site, shapes)
        variants = _candidates(site, positions, half)
        found.append(Timed(site, positions, macs, (), variants[0] if variants else None))
    return tuple(found)


def measure(  # noqa: PLR0913 - what, and how
    graph: Graph,
    sites: Sequence[Site],
    shapes: Shapes,
    *,
    threads: int | None,
    seconds: float,
    half: bool = False,
    progress: Callable[[str, float, float], None] | None = None,
) -> tuple[Timed, ...]:
    """Time every distinct layer.

    Args:
        graph: Where the layers are.
        sites: The layers.
        shapes: Of their inputs and residuals.
        threads: Of ONNX Runtime.
        seconds: For all of them together, about.
        half: Whether kernels of half precision are candidates, too.
        progress: Called with a stage, what is done, and how much there is.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        groups.setdefault(_key(site, shapes), []).append(site)
    timings: dict[int, tuple[Timing, ...]] = {}
    start = time.perf_counter()
    for done, group in enumerate(groups.values()):
        if progress is not None:
            progress("timing layers", done, len(groups))
        left = seconds - (time.perf_counter() - start)
        share = min(_SECONDS_A_LAYER, max(0.05, left / (len(groups) - done)))
        positions, _ = _work(group[0], shapes)
        variants = _candidates(group[0], positions, half)
        found = _time(graph, group[0], shapes, variants, threads=threads, seconds=share)
        timings.update({id(site): found for site in group})
    return tuple(_timed(site, shapes, timings[id(site)]) for site in sites)


def _timed(site: Site, shapes: Shapes, timings: tuple[Timing, ...]) -> Timed:
    positions, macs = _work(site, shapes)
    kernels = [t for t in timings if t.variant is not None and t.finished]
    kernels = kernels or [t for t in timings if t.variant is not None]
    best = min(kernels, key=lambda t: t.ratio).variant if kernels else None
    return Timed(site, positions, macs, timings, best)


def _work(site: Site, shapes: Shapes) -> tuple[int, int]:
    out = site.output_shape(shapes[site.x])
    positions = math.prod(out[2:]) if site.kind == CONV else math.prod(out[:-1])
    return positions, site.multiply_adds(shapes[site.x])


def _candidates(site: Site, positions: int, half: bool) -> list[Variant]:
    try:
        found = list(candidates(spec(site), positions, 1.0 - site.sparsity))
    except UsageError:  # no kernel for such a layer: it stays dense
        return []
    if not half or site.depthwise:
        return found
    # Kernels of half precision need an even number of vectors.
    lists = [v for v in found if v.family == "list"]
    even = [Variant(HALF, 1, max(2, v.vectors // 2 * 2), v.columns) for v in lists]
    return [*dict.fromkeys(even), *found]


def _key(site: Site, shapes: Shapes) -> tuple[object, ...]:
    """What two layers must share to be timed together."""
    return (
        spec(site),
        shapes[site.x],
        site.bias is None,
        site.residual is None,
        site.residual == site.x,
        site.norm is None,
        round(site.sparsity, 2),
        round(fill(site.weight.reshape(len(site.weight), -1) != 0), 1),
        len(site.nodes),
    )


def _time(
    graph: Graph,
    site: Site,
    shapes: Shapes,
    variants: Sequence[Variant],
    *,
    threads: int | None,
    seconds: float,
) -> tuple[Timing, ...]:
    positions, macs = _work(site, shapes)
    if not variants or not macs:  # a layer may be given no rows on the sample
        return ()
    copies = max(1, min(_MOST_COPIES, math.ceil(_SHORT * _GUESS / macs)))
    inputs = {name: shapes[name] for name in (site.x, site.residual) if name is not None}
    lone = Lone(graph, site, inputs, copies)
    models = [lone.dense(), *(lone.sparse(v, positions) for v in variants)]
    # One set of inputs: in the whole model they were just written, so they are in some cache.
    feeds = lone.feeds()
    runners = [runner(open_session(model, threads), feeds) for model in models]
    raced = race(runners, seconds=seconds)
    times = [raced.undisturbed(i) for i in range(len(models))]
    dense_ms = times[0]
    return tuple(
        Timing(v, ms / copies, ms / dense_ms, raced.finished(i))
        for i, (v, ms) in enumerate(zip([None, *variants], times, strict=True))
    )
