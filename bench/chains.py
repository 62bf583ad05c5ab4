"""Layers around depthwise convolutions: band by band in one operator, against one operator each.

Every way of replacing layers that ``secateur compile`` starts from, with chains and without, runs in one
race, on the same inputs. The fastest of both kinds then race once more with the dense model, which is what
is told: the best of many is partly luck. Chains need not pay; ``compile`` keeps what is faster. Networks
and sparsity are those of the study ``speed``.

    python -m bench chains
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import cifar, networks, record

# Seconds for timing layers alone, for the race of all plans, and for each of the last races, of which the
# one counts in which the dense model was fastest.
LAYERS, ALL, LAST = 50.0, 20.0, 4.0
RACES = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the study.

    Attributes:
        network: Its name in :mod:`bench.networks`.
        sparsity: Of every layer that is pruned.
        threads: Of all rivals.
    """

    network: str
    sparsity: float
    threads: int


CASES = (
    *(Case("mobilenetv2", sparsity, threads) for sparsity in (0.8, 0.9) for threads in (1, 2)),
    *(Case("mobilenetv1", 0.9, threads) for threads in (1, 2)),
)
QUICK = (Case(networks.SMALL_MOBILENET.name, 0.9, 1),)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Measure every case."""
    from secateur.runtime.native import isa

    watch = record.Stopwatch()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in QUICK if quick else CASES:
            try:
                rows.append(_measured(Path(scratch), case, 0.01 if quick else 1.0))
            except cifar.DataMissing as missing:
                print(f"skipped {case.network}: {missing}")
                continue
            print(f"chains {case}: {rows[-1]['ratio']:.2f}x", flush=True)
    result = {"isa": isa(), "rows": rows}
    record.write("chains", result, seeds=[seed], watch=watch, folder=folder)


def _measured(folder: Path, case: Case, share: float) -> dict[str, Any]:
    from secateur.runtime.compiler.choose import measure
    from secateur.runtime.compiler.compile import read_graph
    from secateur.runtime.compiler.fuse import sites
    from secateur.runtime.compiler.masked import prune_onnx
    from secateur.runtime.compiler.sample import Sample, concrete_shapes
    from secateur.runtime.compiler.verify import compiled_error
    from secateur.runtime.compiler.whole import DENSE, Clock, Plan, plans, with_chains

    network = next(
        n for n in (*networks.NETWORKS, networks.SMALL_MOBILENET) if n.name == case.network
    )
    pruned = folder / "pruned.onnx"
    prune_onnx(networks.dense(network, folder=folder), pruned, case.sparsity)
    graph, sample = read_graph(pruned), Sample()
    feeds, found = sample.feeds(graph), sites(graph)
    names = {value for site in found for value in (site.x, site.y, site.residual) if value}
    shapes = concrete_shapes(graph, names, feeds)
    seconds = share * LAYERS
    timed = measure(graph, found, shapes, threads=case.threads, seconds=seconds, half=False)
    alone = [Plan.of(graph, name, layers) for name, layers in plans(timed).items()]
    alone = alone or [Plan(DENSE, (), graph.model)]
    chained = [other for plan in alone for other in with_chains(graph, timed, plan)]
    clock = Clock(feeds, case.threads, share)
    plain, banded = _fastest(clock, alone, chained)
    models = {"dense": graph.model, "alone": plain.model, "chained": banded.model}
    runners = [clock.runner(model) for model in models.values()]
    last = [clock.race(runners, LAST, drop=False) for _ in range(RACES)]
    raced = min(last, key=lambda each: each.median(0))
    error, _ = compiled_error(graph, banded.model, sample, threads=case.threads)
    return {
        "case": asdict(case),
        "plans": [len(alone), len(chained)],
        "chains": banded.chains,
        "milliseconds": {
            name: {"median": raced.median(i), "spread": list(raced.spread(i))}
            for i, name in enumerate(models)
        },
        "speedups": {name: 1 / raced.ratio(i) for i, name in enumerate(models) if i},
        "ratio": raced.ratio(1) / raced.ratio(2),
        "error": error,
    }


def _fastest(clock: Any, *kinds: Sequence[Any]) -> list[Any]:
    """Of each kind of plans the one that was fastest when all raced in turn."""
    raced = clock.race([clock.runner(p.model) for plans in kinds for p in plans], ALL, drop=False)
    best, first = [], 0
    for plans in kinds:
        best.append(plans[min(range(len(plans)), key=lambda i: raced.ratio(first + i))])
        first += len(plans)
    return best
