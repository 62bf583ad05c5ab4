"""What a pruner adds to a training step: with and without it, in turn, on the same batch.

Every pair runs one step of a plain network and one of a pruned one, in alternating order, so that a
change of the machine's pace meets both. The ratio of each pair is taken before the median. Times are
those of the processor, so that what else the machine does counts little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import secateur
from bench import record, training
from secateur.allocate import ErdosRenyi, Ranked
from secateur.drive.training.regrow import Regrow
from secateur.schedule import OneShot, Polynomial

SPARSITY = 0.9
FREQUENCY = 100
# Percent that a step may become longer.
GOALS = {"between updates": 3.0, "on update steps": 15.0, "rigl, averaged": 5.0}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure.

    Attributes:
        depth: Of the residual network.
        batch: Images a step.
        pairs: Pairs of steps in each case.
        warmup: Pairs before that, not counted.
    """

    depth: int = 20
    batch: int = 128
    pairs: int = 60
    warmup: int = 4


WHOLE = Plan()
QUICK = Plan(depth=8, batch=8, pairs=6, warmup=1)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Measure the three cases and write them."""
    watch, plan = record.Stopwatch(), QUICK if quick else WHOLE
    target = secateur.Target("sparsity", SPARSITY)
    # The masks are there, and no update is due any more.
    still = secateur.Recipe(target=target, allocation=Ranked(), schedule=OneShot(unit="steps"))
    # An update at every step, at nearly the final sparsity from the first on.
    always = Polynomial(begin=0, end=10_000, frequency=1, power=10_000)
    moving = secateur.Recipe(target=target, allocation=Ranked(), schedule=always)
    rows = {
        "between updates": measure(still, plan, seed)["all"],
        "on update steps": measure(moving, plan, seed)["all"],
    }
    # Every second step is an exchange, so that enough of them are seen.
    rigl = secateur.Recipe(
        target=target, allocation=ErdosRenyi(), regrow=Regrow(frequency=2, anneal=False)
    )
    parts = measure(rigl, plan, seed)
    rows |= {"rigl, between exchanges": parts["odd"], "rigl, on an exchange": parts["even"]}
    average = averaged(parts["odd"]["percent"], parts["even"]["percent"])
    rows["rigl, averaged"] = {"percent": average, "frequency": FREQUENCY}
    result = {"plan": asdict(plan), "sparsity": SPARSITY, "rows": rows}
    result["bfloat16"] = training.bfloat16()
    record.write("overhead", result, goals=goals(rows), seeds=[seed], watch=watch, folder=folder)
    for name, row in rows.items():
        print(f"overhead, {name}: {row['percent']:+.2f} %", flush=True)


def averaged(between: float, on: float) -> float:
    """Percent added to a step when one step of ``FREQUENCY`` is an exchange.

    Example:
        >>> averaged(1.0, 11.0)
        1.1
    """
    return round(((FREQUENCY - 1) * between + on) / FREQUENCY, 6)


def goals(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge the rows that have a goal."""
    return [
        record.goal(f"percent longer, {name}", rows[name]["percent"], "less than", limit)
        for name, limit in GOALS.items()
    ]


def measure(recipe: secateur.Recipe, plan: Plan, seed: int) -> dict[str, dict[str, Any]]:
    """Steps with a pruner against steps without.

    Args:
        recipe: Of the pruner.
        plan: How long.
        seed: Of the network and the images.

    Returns:
        For all steps, and for those at odd and even places alone: the median of the added percent,
        its 95 % interval, and medians in milliseconds.
    """
    images = torch.randn(plan.batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(plan.batch) % 10
    batch = (images.contiguous(memory_format=torch.channels_last), labels)
    plain, other = (_runner(r, plan, seed, batch) for r in (None, recipe))
    times = []
    for number in range(1, plan.warmup + plan.pairs + 1):
        if number % 4 < 2:  # the order changes every second pair: independent of odd and even
            first, second = _timed(plain), _timed(other)
        else:
            second, first = _timed(other), _timed(plain)
        if number > plan.warmup:
            times.append((number, first, second))
    chosen = {"all": times} | {
        name: [t for t in times if t[0] % 2 == rest] for name, rest in (("odd", 1), ("even", 0))
    }
    return {name: _row([t[1] for t in own], [t[2] for t in own]) for name, own in chosen.items()}


def _runner(
    recipe: secateur.Recipe | None, plan: Plan, seed: int, batch: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    run = training.start(training.Recipe(), seed=seed, depth=plan.depth)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01
    after = (
        secateur.Gradual(run.model, run.optimizer, recipe, steps=10_000).step if recipe else None
    )
    run.model.train()

    def step() -> None:
        with training.autocast():
            found = run.model(batch[0])
        run.optimizer.zero_grad()
        functional.cross_entropy(found.float(), batch[1]).backward()
        run.optimizer.step()
        if after is not None:
            after()

    return step


def _timed(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return 1000 * (time.process_time() - began)


def _row(plain: list[float], pruned: list[float]) -> dict[str, Any]:
    added = sorted(100 * (b / a - 1) for a, b in zip(plain, pruned, strict=True))
    wide = 0.98 * math.sqrt(len(added))  # order statistics: half of a 95 % interval, in places
    low = max(0, math.floor(len(added) / 2 - wide))
    high = min(len(added) - 1, math.ceil(len(added) / 2 + wide))
    return {
        "percent": round(_median(added), 3),
        "interval": [round(added[low], 3), round(added[high], 3)],
        "plain_ms": round(_median(plain), 3),
        "pruned_ms": round(_median(pruned), 3),
        "pairs": len(added),
    }


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
