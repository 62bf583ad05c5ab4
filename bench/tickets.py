"""Lottery tickets on CIFAR-10: what should happen to the survivors after pruning?

Four methods from one dense training a seed, level after level, with equal epochs at each level
(re-initialisation trains from the start): the learning rate goes back, the weights go back,
fine-tuning at the last rate, and new random weights. Global magnitude over the default scope. All
commands can be cut off and taken up, and arms may run beside one another:

    python -m bench --arm tickets-rate --seed 0
    python -m bench tickets

The plan was fixed before the first run, and every level is reported as it stood after its last
epoch. The test images play no part in any choice.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench import cifar, record, training
from secateur.allocate import Ranked
from secateur.core.masks import Masks
from secateur.experiments import (
    TicketFacts,
    TicketPlan,
    Training,
    emergent_structure,
    find_ticket,
    overall_structure,
    similarity_matrix,
)

METHODS = ("rate", "weights", "finetune", "reinit")
ARMS = tuple(f"tickets-{method}" for method in METHODS)
SEEDS = (0, 1)
# The levels at which methods are compared.
JUDGED = (0.79, 0.89)
TRAINING = Training(epochs=5, lr=0.1, decay="cosine", warmup=0.1, bfloat16=training.bfloat16())


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm of the study shares.

    Attributes:
        training: How the dense network and each level are trained; the seed is that of the arm.
        depth: Of the residual network.
        levels: Sparsities, one after the other.
        rewind_to: Epochs of the dense training to go back to.
        batch: Images a step.
        train_images: Train on the first so many.
        test_images: Test on the first so many.
    """

    training: Training = TRAINING
    depth: int = 8
    levels: tuple[float, ...] = (0.55, *JUDGED)
    rewind_to: float = 0.5
    batch: int = 128
    train_images: int = 20_000
    test_images: int = cifar.HELD_OUT + 1_000


# About 40 minutes of one core: 26 trainings of 5 epochs.
WHOLE = Plan()
# Shows that everything runs; its accuracies mean nothing.
QUICK = dataclasses.replace(
    WHOLE,
    training=dataclasses.replace(WHOLE.training, epochs=1),
    levels=JUDGED,
    train_images=512,
    test_images=256,
)


@dataclass(frozen=True)
class Images:
    """Augmented batches, drawn anew at every pass from PyTorch's own random state.

    Attributes:
        batches: To draw from.
    """

    batches: cifar.Augmented

    def __len__(self) -> int:
        """Count the batches of a pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels)."""
        yield from self.batches.epoch(int(torch.randint(2**31, ())), seed=0)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all arms of all seeds that are not finished, then compare them.

    Args:
        quick: A smoke test, with the given seed alone.
        seed: Of the smoke test.
        folder: Where the result goes.
    """
    if not quick:
        summarise(folder=folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        summarise(QUICK, seeds=(seed,), runs=Path(scratch), folder=folder)


def run_arm(
    arm: str, plan: Plan = WHOLE, *, seed: int = 0, runs: Path | None = None
) -> TicketFacts:
    """Run one method with one seed, or go on with it; what is finished is only read.

    Args:
        arm: One of :data:`ARMS`.
        plan: What all arms share.
        seed: Of first weights, order and augmentation.
        runs: Where networks go, finished or not.
    """
    rewind = arm.removeprefix("tickets-")
    train, test = cifar.training_splits()
    train, test = train[: plan.train_images], test[: plan.test_images]
    how = TicketPlan(
        levels=plan.levels,
        rewind=rewind,
        rewind_to=0.0 if rewind == "reinit" else plan.rewind_to,
        training=dataclasses.replace(plan.training, seed=seed),
    )
    pixels, labels = test.pixels.split(500), test.labels.split(500)
    data = secateur.Data(
        train=Images(cifar.augmented(train, batch=plan.batch)),
        test=[(cifar.normalise(x), y) for x, y in zip(pixels, labels, strict=True)],
    )
    found = find_ticket(
        functools.partial(_network, plan.depth),
        secateur.Recipe(allocation=Ranked()),
        data,
        folder=runs or record.unfinished(f"tickets-{plan.depth}-{plan.train_images}"),
        plan=how,
    )
    for stage in (found.dense, *found.levels):
        said = "found finished" if stage.done else f"{stage.seconds:.0f} s"
        print(f"tickets {rewind} seed {seed}: {stage.name} {stage.accuracy:.4f} {said}", flush=True)
    return found


def summarise(
    plan: Plan = WHOLE,
    *,
    seeds: tuple[int, ...] = SEEDS,
    runs: Path | None = None,
    folder: Path = record.RESULTS,
) -> dict[str, Any]:
    """Put all arms side by side and judge the goals by the mean over the seeds."""
    watch = record.Stopwatch()
    arms = {
        (method, seed): run_arm(f"tickets-{method}", plan, seed=seed, runs=runs)
        for seed in seeds
        for method in METHODS
    }
    masks = {key: found.masks() for key, found in arms.items()}
    accuracy = {
        (method, index): sum(_points(arms[method, s].levels[index].accuracy) for s in seeds)
        / len(seeds)
        for method in METHODS
        for index in range(len(plan.levels))
    }
    goals, levels = [], []
    for index, level in enumerate(plan.levels):
        row = {"sparsity": level, "accuracy": {m: accuracy[m, index] for m in METHODS}}
        named = {f"{m} seed {s}": masks[m, s][index] for m, s in masks}
        row["similarity"] = dataclasses.asdict(similarity_matrix(named))
        row["structure"] = {name: _structure(mask) for name, mask in named.items()}
        levels.append(row)
        if level in JUDGED:
            goals += _goals(level, {m: accuracy[m, index] for m in METHODS})
    result = {
        "plan": dataclasses.asdict(plan),
        "dense": [_points(arms["rate", seed].dense.accuracy) for seed in seeds],
        "standard_error": round(
            cifar.Score(accuracy["rate", 0], 0.0, plan.test_images).standard_error, 3
        ),
        "seconds": sum(s.seconds for found in arms.values() for s in found.levels),
        "levels": levels,
        "arms": [
            {
                "method": method,
                "seed": seed,
                "levels": [
                    {
                        "sparsity": level.sparsity,
                        "accuracy": _points(level.accuracy),
                        "accuracy_at_start": _points(level.accuracy_at_start),
                        "churn": level.churn,
                        "mask": level.mask,
                    }
                    for level in found.levels
                ],
            }
            for (method, seed), found in arms.items()
        ],
    }
    record.write("tickets", result, goals=goals, seeds=seeds, watch=watch, folder=folder)
    return record.read("tickets", folder=folder)


def _goals(level: float, accuracy: dict[str, float]) -> list[dict[str, Any]]:
    """The published order, in points."""
    pairs = [("rate", "weights", "at least", 0.0)]
    pairs += [(a, b, "more than", 0.5) for a in ("rate", "weights") for b in ("finetune", "reinit")]
    return [
        record.goal(
            f"points of {a} above {b} at {level:.0%}",
            round(accuracy[a] - accuracy[b], 6),
            sense,
            limit,
        )
        for a, b, sense, limit in pairs
    ]


def _structure(masks: Masks) -> dict[str, list[float]]:
    """Shares of empty filters, channels and kernels over all weights: found, and of random masks."""
    whole = overall_structure(emergent_structure(masks))
    return {kind: [each.share, each.expected] for kind, each in whole.items()}


def _points(share: float | None) -> float:
    assert share is not None
    return round(100 * share, 4)


def _network(depth: int) -> nn.Module:
    return cifar.ResNet(depth).to(memory_format=torch.channels_last)
