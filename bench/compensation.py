"""Half the multiply-adds of a trained residual network, repaired without training.

ResNet-20 and ResNet-56 for CIFAR-10, trained with all 50,000 training images, so they are judged on
the 1,000 test images, paired with the uncut network. Calibration: 2,048 augmented training images,
for the criterion, for compensation and for BatchNorm. Every row is one call of ``secateur.shrink``.

    python -m bench compensation [--depth 56]
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from bench import cifar, record
from secateur.allocate.widths import RankedWidths, UniformWidths
from secateur.recover import BatchNorm, Compensation
from secateur.score import Grouped, GroupTaylor, Magnitude

TARGET = 0.5
GOAL = 3.0  # points lost, at most
IMAGES = 2048

REPAIRED = (Compensation(),)
# Only the layers that read what was cut are fitted, and BatchNorm is measured anew.
READERS = (Compensation(refit=False), BatchNorm())
RANKED = RankedWidths(normalise="none", per_cost=True)


def recipes() -> dict[str, secateur.ShrinkRecipe]:
    """What is compared; the names go into the table."""
    target = secateur.Target("macs", TARGET)
    plain = (BatchNorm(),)
    return {
        "magnitude, uniform": secateur.ShrinkRecipe(
            Grouped(Magnitude(p=2)), target, UniformWidths(), plain, align=1
        ),
        "magnitude, uniform, compensated": secateur.ShrinkRecipe(
            Grouped(Magnitude(p=2)), target, UniformWidths(), REPAIRED, align=1
        ),
        "Taylor, per cost": secateur.ShrinkRecipe(GroupTaylor(), target, RANKED, plain, align=1),
        "Taylor, per cost, compensated": secateur.ShrinkRecipe(
            GroupTaylor(), target, RANKED, REPAIRED, align=1
        ),
        "Taylor, per cost, compensated, 5 rounds, readers only": secateur.ShrinkRecipe(
            GroupTaylor(), target, RANKED, READERS, align=1, rounds=5
        ),
        "Taylor, per cost, compensated, 5 rounds": best(5),
    }


def best(rounds: int) -> secateur.ShrinkRecipe:
    """The recipe that loses least, cut in so many rounds."""
    target = secateur.Target("macs", TARGET)
    return secateur.ShrinkRecipe(GroupTaylor(), target, RANKED, REPAIRED, align=1, rounds=rounds)


def run(*, quick: bool, seed: int, folder: Path, depths: tuple[int, ...] = (20, 56)) -> None:
    """Cut each network with each recipe; write ``compensation-resnet<depth>.json``."""
    for depth in depths:
        _one(depth, quick=quick, seed=seed, folder=folder)


def _one(depth: int, *, quick: bool, seed: int, folder: Path) -> None:
    watch = record.Stopwatch()
    train, test = cifar.read()
    if quick:
        test = cifar.Split(test.pixels[:100], test.labels[:100])
    net = cifar.trained(depth)
    batches = list(itertools.islice(cifar.augmented(train).epoch(0, seed=seed), 1 if quick else 16))
    data = secateur.Data(train=batches, calibration=64 if quick else IMAGES)
    dense = cifar.logits(net, test)
    right = (dense.argmax(1) == test.labels).float()
    rows: list[dict[str, Any]] = []
    for name, recipe in itertools.islice(recipes().items(), 2 if quick else None):
        begun = time.time()
        pruned = secateur.shrink(net, recipe, None, data)
        found = cifar.logits(pruned.model, test)
        score = cifar.score(found, test.labels)
        change = (found.argmax(1) == test.labels).float() - right
        told = pruned.facts.measures["target"]
        rows.append(
            {
                "recipe": name,
                "accuracy": score.accuracy,
                "loss": round(score.loss, 4),
                "points_lost": round(-100 * float(change.mean()), 2),
                "standard_error": round(100 * float(change.std()) / len(change) ** 0.5, 2),
                "macs": round(told["reached"] / told["dense"], 4),
                "parameters": pruned.facts.measures["parameters"],
                "proof": pruned.facts.measures["proof"],
                "seconds": round(time.time() - begun, 1),
            }
        )
        print(rows[-1], flush=True)
    best = min(rows, key=lambda row: row["points_lost"])
    goals = [
        record.goal(
            "points lost by the best without training", best["points_lost"], "at most", GOAL
        )
    ]
    base = cifar.score(dense, test.labels)
    record.write(
        f"compensation-resnet{depth}",
        {
            "rows": rows,
            "dense": {"accuracy": base.accuracy, "loss": round(base.loss, 4)},
            "images": len(test.labels),
            "calibration": data.calibration,
            "threads": torch.get_num_threads(),
        },
        goals=goals if depth == 56 else [],
        seeds=[seed],
        watch=watch,
        folder=folder,
    )
