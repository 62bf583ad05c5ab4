"""The optimal-brain column sweep on one large linear layer, 50 % and 2:4.

The inputs are made up, but correlated as those of a language model are: most of their energy lies
in some hundred directions, and a few channels are ten times larger than the others. The error is
measured on inputs that the sweep has not seen.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench import memory, record
from secateur.pattern import NM, Pattern
from secateur.recover import ColumnSweep
from secateur.score import Criterion, Magnitude, ObsSaliency, Wanda

PATTERNS = ("50%", "2:4")
BATCH = 512


@dataclass(frozen=True, slots=True)
class Size:
    """How large the problem is.

    Attributes:
        width: Inputs and outputs of the layer.
        calibration: Input rows for the sweep.
        unseen: Input rows for measuring.
        directions: In which most of the energy of the inputs lies.
    """

    width: int = 4_096
    calibration: int = 8_192
    unseen: int = 1_024
    directions: int = 512


WHOLE = Size()
QUICK = Size(width=256, calibration=1_024, unseen=256, directions=32)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Prune the layer by each method and pattern, each in a process of its own."""
    watch = record.Stopwatch()
    words = ["--seed", str(seed), *(["--quick"] if quick else [])]
    rows = []
    for pattern in PATTERNS:
        for method in METHODS:
            row = memory.in_fresh_process(
                "bench.sweep", method, pattern, *words, threads=torch.get_num_threads()
            )
            rows.append({"method": method, "pattern": pattern, **row})
            error, seconds = row["relative_output_error"], row["seconds"]
            print(f"sweep {pattern} {method}: error {error:.4f}, {seconds:.1f} s", flush=True)
    size = QUICK if quick else WHOLE
    result = {
        "width": size.width,
        "calibration_rows": size.calibration,
        "unseen_rows": size.unseen,
        "weight_bytes": 4 * size.width**2,
        "rows": rows,
    }
    goals = [
        record.goal(
            f"output error of the sweep over that of magnitude, {pattern}",
            _error(rows, "sweep", pattern) / _error(rows, "magnitude", pattern),
            "less than",
            1.0,
        )
        for pattern in PATTERNS
    ]
    record.write("sweep", result, goals=goals, seeds=[seed], watch=watch, folder=folder)


METHODS: dict[str, tuple[Criterion, tuple[ColumnSweep, ...]]] = {
    "magnitude": (Magnitude(), ()),
    "wanda": (Wanda(), ()),
    "sweep": (ObsSaliency(), (ColumnSweep(),)),
}


def recipe(method: str, pattern: str) -> secateur.Recipe:
    """Give the recipe of a method."""
    criterion, steps = METHODS[method]
    if pattern == "50%":
        return secateur.Recipe(criterion, target=secateur.Target("sparsity", 0.5), recovery=steps)
    chosen: Pattern = NM(2, 4)
    return secateur.Recipe(criterion, chosen, recovery=steps)


def inputs(size: Size, *, seed: int) -> tuple[list[Tensor], Tensor]:
    """Make calibration batches and unseen rows."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(size.directions, size.width, generator=generator)
    # Energy falls with the direction's number; a hundredth of the channels is ten times larger.
    spread *= torch.arange(1, size.directions + 1).rsqrt()[:, None]
    scale = torch.ones(size.width)
    scale[torch.randperm(size.width, generator=generator)[: size.width // 100]] = 10.0

    def rows(count: int) -> Tensor:
        found = torch.randn(count, size.directions, generator=generator) @ spread
        found += 0.3 * torch.randn(count, size.width, generator=generator)
        return found * scale

    batches = [rows(BATCH) for _ in range(size.calibration // BATCH)]
    return batches, rows(size.unseen)


def measure(method: str, pattern: str, size: Size, *, seed: int) -> dict[str, Any]:
    """Prune the layer once: seconds, memory and error."""
    torch.manual_seed(seed)
    layer = nn.Linear(size.width, size.width, bias=False)
    nn.init.normal_(layer.weight, std=size.width**-0.5)
    batches, unseen = inputs(size, seed=seed)
    data = secateur.Data(train=batches, calibration=size.calibration)
    dense = layer.weight.detach().clone()
    found: list[secateur.Pruned] = []
    start = time.process_time()
    facts: dict[str, Any] = memory.measured(
        lambda: found.append(secateur.prune_(layer, recipe(method, pattern), data))
    )
    facts["processor_seconds"] = round(time.process_time() - start, 2)
    with torch.no_grad():
        change = (unseen @ (layer.weight - dense).T).square().sum()
        whole = (unseen @ dense.T).square().sum()
    facts["relative_output_error"] = float(change / whole)
    facts["sparsity"] = found[0].masks.sparsity
    facts["peak_extra_over_weights"] = facts["peak_extra_bytes"] / (4 * size.width**2)
    return facts


def _error(rows: list[dict[str, Any]], method: str, pattern: str) -> float:
    found = [r for r in rows if (r["method"], r["pattern"]) == (method, pattern)]
    return float(found[0]["relative_output_error"])


def _main() -> None:
    """Measure one case; started by :func:`run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("pattern", choices=PATTERNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = QUICK if given.quick else WHOLE
    print(json.dumps(measure(given.method, given.pattern, size, seed=given.seed)))


if __name__ == "__main__":
    _main()
