"""Compiled sparse models against ONNX Runtime's dense float32, and OpenVINO where it is installed.

Both forms of a case run in turn in one process, on the same inputs, and OpenVINO after them. In a turn
a model runs up to eight times, as it does in use, after once that does not count. A case
is a network, a uniform sparsity by magnitude of every convolution and linear layer but the first
(depthwise ones stay dense), a number of threads, a batch and an instruction set. Every case runs in
a process of its own, and is kept when it is done, so that the study can be cut off and taken up.

    python -m bench speed
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import cifar, networks, record

# The final race of a case is run so many times, for so many seconds, with such pauses. A shared
# machine has states that last for seconds, in which waking a thread takes several times longer. So the
# race that counts is the one in which the dense model was fastest; the file has all of them.
RACES, SECONDS, PAUSE = 4, 2.5, 2.0
NEVER_BELOW = 0.97
# A case is measured again, so many times at most, if its dense model took so many times as long as
# that of another case of the same network, threads and batch.
DISTURBED, AGAIN = 1.05, 3


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the study.

    Attributes:
        network: Its name in :mod:`bench.networks`.
        sparsity: Of every layer that is pruned.
        threads: Of every rival.
        batch: Images, or sequences.
        isa: Instruction set that our kernels are held to; empty: the best.
    """

    network: str
    sparsity: float
    threads: int = 2
    batch: int = 1
    isa: str = ""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.network}-{self.sparsity}-t{self.threads}-b{self.batch}-{self.isa or 'best'}"


def cases(*, quick: bool = False) -> list[Case]:
    """All rows: the goals first, then what else users ask for."""
    nets = networks.QUICK if quick else networks.NETWORKS
    rows = [Case(n.name, s) for n in nets for s in n.goals]
    if quick:
        return rows
    for name in ("resnet50", "minilm-l6"):
        rows.append(Case(name, 0.9, threads=1))
        rows.append(Case(name, 0.9, isa="avx2"))
        rows.append(Case(name, 0.9, batch=8))
    return [
        *rows,
        Case("resnet50", 0.0),
        Case("mobilenetv2", 0.0),
        Case("minilm-l6", 0.9, batch=32),
    ]


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Measure every case that is not yet measured, and judge the goals."""
    watch = record.Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        runs = record.ignored(Path(scratch) if quick else record.RUNS / "speed")
        rows = []
        for case in cases(quick=quick):
            try:
                rows.append(_measured(case, runs))
            except cifar.DataMissing as missing:
                print(f"skipped {case.name}: {missing}")
        for _ in range(AGAIN):
            for i in disturbed(rows):
                case = Case(**rows[i]["case"])
                (runs / f"{case.name}.json").unlink()
                rows[i] = min(rows[i], _measured(case, runs), key=_dense)
                _keep(rows[i], runs)
    record.write(
        "speed", {"rows": rows}, goals=goals(rows), seeds=[seed], watch=watch, folder=folder
    )


def disturbed(rows: list[dict[str, Any]]) -> list[int]:
    """Rows whose dense model took longer than that of another row of the same kind.

    How sparse the other model of a row is cannot slow down the dense one; a busy machine can.

    Example:
        >>> kind = {"network": "a", "threads": 2, "batch": 1, "sparsity": 0.8, "isa": ""}
        >>> times = [10.0, 10.4, 12.0]
        >>> rows = [{"case": kind, "milliseconds": {"dense": {"median": t}}} for t in times]
        >>> disturbed(rows)
        [2]
    """
    best: dict[tuple[Any, ...], float] = {}
    kinds = [tuple(row["case"][k] for k in ("network", "threads", "batch")) for row in rows]
    for kind, row in zip(kinds, rows, strict=True):
        best[kind] = min(best.get(kind, math.inf), _dense(row))
    pairs = enumerate(zip(kinds, rows, strict=True))
    return [i for i, (kind, row) in pairs if _dense(row) > DISTURBED * best[kind]]


def _dense(row: dict[str, Any]) -> float:
    return float(row["milliseconds"]["dense"]["median"])


def _keep(row: dict[str, Any], runs: Path) -> None:
    text = json.dumps(row)
    (runs / f"{Case(**row['case']).name}.json").write_text(text, encoding="utf-8")


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge the speed-ups of batch 1 and two threads, and that nothing is slower than dense."""
    limits = {(n.name, s): limit for n in networks.NETWORKS for s, limit in n.goals.items()}
    found = []
    for row in rows:
        case = Case(**row["case"])
        limit = limits.get((case.network, case.sparsity))
        if limit is not None and case == Case(case.network, case.sparsity):
            words = f"{case.network} at {case.sparsity:.0%}, times faster than dense"
            found.append(record.goal(words, row["speedup"], "at least", limit))
    if rows:
        slowest = min(row["speedup"] for row in rows)
        found.append(record.goal("slowest of all cases", slowest, "at least", NEVER_BELOW))
    return found


def _measured(case: Case, runs: Path) -> dict[str, Any]:
    path = runs / f"{case.name}.json"
    if not path.exists():
        env = os.environ | ({"SECATEUR_ISA": case.isa} if case.isa else {})
        words = [sys.executable, "-m", "bench.speed", json.dumps(asdict(case)), str(runs)]
        done = subprocess.run(words, env=env, check=False)
        if done.returncode == _NO_DATA:
            raise cifar.DataMissing(f"the data of {case.network} is not there; see SECATEUR_DATA")
        if done.returncode:
            raise RuntimeError(f"measuring {case.name} failed; its own message is above")
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row


_NO_DATA = 77


def measure(case: Case, runs: Path) -> dict[str, Any]:
    """Make the network, prune, compile, and let all rivals run in turn."""
    from secateur.runtime import compile_onnx
    from secateur.runtime.compiler.graph import Graph, read_model
    from secateur.runtime.compiler.masked import prune_onnx
    from secateur.runtime.compiler.sample import Sample
    from secateur.runtime.race import TURN, open_session, race, runner

    network = next(n for n in (*networks.NETWORKS, *networks.QUICK) if n.name == case.network)
    pruned, compiled = runs / f"{case.name}.onnx", runs / f"{case.name}.sparse.onnx"
    prune_onnx(networks.dense(network, folder=runs), pruned, case.sparsity)
    sample = Sample(batch=case.batch)
    facts = compile_onnx(pruned, compiled, threads=case.threads, sample=sample)
    feeds = sample.feeds(Graph.of(read_model(pruned)))
    models = {"dense": pruned, "sparse": compiled}
    rivals = {
        name: runner(open_session(read_model(path), case.threads), feeds)
        for name, path in models.items()
    }
    races = []
    for number in range(RACES):
        time.sleep(PAUSE if number else 0)
        races.append(race(list(rivals.values()), seconds=SECONDS, drop=False, turn=TURN))
    raced = min(races, key=lambda each: each.median(0))
    milliseconds = _times(raced, list(rivals))
    # Only then: OpenVINO's threads go on for some milliseconds after a run, and would take them
    # from whoever runs next.
    others = _openvino(pruned, feeds, case.threads)
    if others:
        milliseconds |= _times(
            race(list(others.values()), seconds=SECONDS, drop=False, turn=TURN), list(others)
        )
    row = {
        "case": asdict(case),
        "isa": facts.isa,
        "plan": facts.plan,
        "replaced": sum(layer.kernel is not None for layer in facts.layers),
        "layers": len(facts.layers),
        "error": facts.error,
        "dense_bytes": pruned.stat().st_size,
        "sparse_bytes": compiled.stat().st_size,
        "speedup": round(1 / raced.ratio(1), 4),
        "races": [[round(each.median(i), 4) for i in (0, 1)] for each in races],
        "milliseconds": milliseconds,
    }
    for path in (pruned, compiled):
        path.unlink()
    return row


def _times(raced: Any, names: list[str]) -> dict[str, Any]:
    return {
        name: {
            "median": round(raced.median(i), 4),
            "spread": [round(x, 4) for x in raced.spread(i)],
            "runs": len(raced.times[i]),
        }
        for i, name in enumerate(names)
    }


def _openvino(
    path: Path, feeds: dict[str, np.ndarray], threads: int
) -> dict[str, Callable[[], None]]:
    """OpenVINO's dense float32 and bfloat16, if it is installed: it is no dependency."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    made: dict[str, Callable[[], None]] = {}
    for precision in ("f32", "bf16"):
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
                   "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
        model = core.read_model(path)
        model.reshape({name: list(value.shape) for name, value in feeds.items()})
        request = core.compile_model(model, "CPU", options).create_infer_request()
        made[f"openvino {precision}"] = lambda r=request: r.infer(feeds, share_inputs=True)
    return made


if __name__ == "__main__":
    asked, place = Case(**json.loads(sys.argv[1])), Path(sys.argv[2])
    print(f"speed {asked.name}", flush=True)
    try:
        found = measure(asked, place)
    except cifar.DataMissing:
        sys.exit(_NO_DATA)
    print(f"  {found['speedup']:.2f}x, {found['plan']}", flush=True)
    _keep(found, place)
