"""Filters removed while ResNet-20 trains, against the same training without removal.

In one process, epoch about epoch, the dense network and two that shrink are trained with the same
batches and learning rates, so that a busy machine slows all of them alike:

* ``filters``: one dense epoch, then filters go every half epoch until half of the multiply-adds are
  left; the same share of every layer (after "Pruning Filters while Training").
* ``iplt``: filters go from an eighth of an epoch on, over all layers in one ranking (after IPLT).

Widths are multiples of 8, which processors like. Every epoch is kept, so a run that was cut off
goes on where it was; seeds may run beside one another:

    python -m bench --arm filters --seed 1
    python -m bench filters

The plan was fixed before the first run, and the networks after the last epoch are the ones
reported. The test images play no part in any choice.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import secateur
from bench import cifar, gradual, record, sparse_training, training
from secateur.allocate.widths import RankedWidths, UniformWidths
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import Shrinking
from secateur.drive.training.resume import Training, resume_, save_checkpoint
from secateur.schedule import Exponential
from secateur.score import Grouped, Magnitude

ARMS = ("filters",)
KINDS = ("dense", "filters", "iplt")
SEEDS = (0, 1)
TARGET = 0.5
FASTER, WORSE = 25.0, 1.0  # percent of the wall time at least, points at most
RECIPE = training.Recipe(epochs=8, rate=0.2, warmup=1.0)
PACES = {
    "filters": Exponential(begin=0.5, end=1.5, frequency=0.5, unit="epochs"),
    "iplt": Exponential(begin=0, end=0.5, frequency=0.125, unit="epochs"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the networks of a seed share.

    Attributes:
        depth: Of the residual network.
        recipe: How to train.
        align: Kept filters come in multiples of this.
        train_images: Train on the first so many.
        test_images: Test on the first so many.
    """

    depth: int = 20
    recipe: training.Recipe = RECIPE
    align: int = 8
    train_images: int = cifar.TRAIN
    test_images: int = cifar.HELD_OUT + 1_000

    @property
    def study(self) -> str:
        """Name of the study; another depth or length is another study."""
        usual = Plan()
        if (self.depth, self.recipe.epochs) == (usual.depth, usual.recipe.epochs):
            return "filters"
        return f"filters-resnet{self.depth}-{self.recipe.epochs}epochs"


# Shows that everything runs; its accuracies and times mean nothing.
QUICK = Plan(
    recipe=training.Recipe(epochs=2, warmup=0.5, batch=32), train_images=256, test_images=256
)


def plan_of(depth: int | None = None, epochs: int | None = None) -> Plan:
    """The plan for a depth and a number of epochs, by default the usual ones.

    Example:
        >>> plan_of().study, plan_of(56).study
        ('filters', 'filters-resnet56-8epochs')
    """
    recipe = training.Recipe(epochs=epochs or RECIPE.epochs, rate=RECIPE.rate, warmup=RECIPE.warmup)
    return Plan(depth=depth or Plan().depth, recipe=recipe)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all seeds that are not finished, then the comparison."""
    plan, seeds = (QUICK, (seed,)) if quick else (Plan(), SEEDS)
    with tempfile.TemporaryDirectory() as scratch:
        place = gradual.Place(folder, Path(scratch)) if quick else gradual.Place(folder)
        for each in seeds:
            run_arm("filters", plan, seed=each, place=place)
    summarise(plan, folder=folder)


@dataclass
class History:
    """What a checkpoint keeps of a run beside its tensors.

    Attributes:
        entries: Those of :class:`training.Run`, the same list.
    """

    entries: list[dict[str, Any]]

    def state_dict(self) -> dict[str, Any]:
        """Give the entries."""
        return {"entries": [dict(entry) for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back, in place."""
        self.entries[:] = state["entries"]


def recipe_of(kind: str, align: int) -> secateur.ShrinkRecipe:
    """What goes in a network that shrinks."""
    allocation = UniformWidths() if kind == "filters" else RankedWidths(floor=0.25)
    return secateur.ShrinkRecipe(
        Grouped(Magnitude()), secateur.Target("macs", TARGET), allocation, recovery=(), align=align
    )


def run_arm(
    arm: str, plan: Plan | None = None, *, seed: int = 0, place: gradual.Place | None = None
) -> dict[str, Any]:
    """Train the three networks of a seed, or go on with them, and write their results.

    Args:
        arm: ``"filters"``, there is no other.
        plan: What the networks share.
        seed: Of first weights, order and augmentation.
        place: Where to read and write.
    """
    plan, place = plan or Plan(), place or gradual.Place()
    name = f"{plan.study}-seed{seed}"
    if (place.results / f"{name}.json").exists():
        return record.read(name, folder=place.results)
    watch = record.Stopwatch()
    train, test = cifar.training_splits()
    batches = cifar.augmented(train[: plan.train_images], batch=plan.recipe.batch)
    loops = {kind: _start(kind, plan, len(batches), seed) for kind in KINDS}
    files = {kind: record.ignored(place.runs) / f"{name}-{kind}.safetensors" for kind in KINDS}
    for kind, (_, loop) in loops.items():
        resume_(files[kind], loop)
    for epoch in range(plan.recipe.epochs):
        # Each comes first in turn: the first of an epoch finds other things in the caches.
        for kind in (*KINDS[epoch % len(KINDS) :], *KINDS[: epoch % len(KINDS)]):
            run, loop = loops[kind]
            if len(run.history) > epoch:
                continue
            _epoch(run, loop.pruner, batches, seed)
            save_checkpoint(files[kind], loop, step=len(run.history))
            print(f"{name} {kind}:", *(f"{k} {v}" for k, v in run.history[-1].items()), flush=True)
    networks = {kind: _judged(*loops[kind], test[: plan.test_images]) for kind in KINDS}
    result = {"plan": asdict(plan), "paces": {k: asdict(p) for k, p in PACES.items()}}
    record.write(
        name, {**result, "networks": networks}, seeds=[seed], watch=watch, folder=place.results
    )
    return record.read(name, folder=place.results)


def _start(kind: str, plan: Plan, per_epoch: int, seed: int) -> tuple[training.Run, Training]:
    run = training.start(plan.recipe, seed=seed, depth=plan.depth)
    pruner = None
    if kind != "dense":
        pace = Pace(PACES[kind], per_epoch, steps=per_epoch * plan.recipe.epochs)
        example = torch.zeros(1, 3, cifar.SIDE, cifar.SIDE)
        recipe = recipe_of(kind, plan.align)
        pruner = Shrinking(run.model, run.optimizer, recipe, pace=pace, example_inputs=example)
    return run, Training(run.model, run.optimizer, pruner, others={"history": History(run.history)})


def _epoch(
    run: training.Run, pruner: Shrinking | None, batches: cifar.Augmented, seed: int
) -> None:
    wall, processor = time.perf_counter(), time.process_time()
    after = (lambda: None) if pruner is None else pruner.step
    training.train_epoch(run, batches, seed=seed, after_step=after)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    run.history[-1] |= {"seconds": round(wall, 3), "processor_seconds": round(processor, 3)}
    if pruner is not None:
        pruner.took(wall)
        run.history[-1]["macs_share"] = round(pruner.facts.measures["epochs"][-1]["share"], 4)


def _judged(run: training.Run, loop: Training, test: cifar.Split) -> dict[str, Any]:
    found = cifar.logits(run.model, test)
    score = cifar.score(found, test.labels)
    pruning: dict[str, Any] = {}
    if loop.pruner is not None:
        facts = loop.pruner.finalize().facts
        pruning = {
            "recipe": facts.recipe,
            "macs": facts.measures["macs"],
            "training_macs": facts.measures["training_macs"],
            "parameters": facts.measures["parameters"],
            "cutting_seconds": round(facts.measures["cutting_seconds"], 2),
            "widths": {w.name: [w.groups, w.kept] for w in facts.widths},
            "removals": facts.history,
        }
    return {
        "test": {**asdict(score), "standard_error": round(score.standard_error, 3)},
        "seconds": round(sum(h["seconds"] for h in run.history), 3),
        "processor_seconds": round(sum(h["processor_seconds"] for h in run.history), 3),
        "pruning": pruning,
        "history": run.history,
        # One digit an image: networks can be compared image by image without training again.
        "predictions": "".join(map(str, found.argmax(1).tolist())),
    }


def summarise(plan: Plan | None = None, *, folder: Path = record.RESULTS) -> dict[str, Any]:
    """Put the networks side by side; differences and ratios are between those of one seed.

    Raises:
        FileNotFoundError: No seed is finished.
    """
    plan, watch = plan or Plan(), record.Stopwatch()
    seeds = record.seeds_of(plan.study, folder)
    if not seeds:
        raise FileNotFoundError(f"No seed is finished in {folder}: run --arm filters --seed 0.")
    files = {
        (kind, seed): record.read(f"{plan.study}-seed{seed}", folder=folder)["result"]["networks"][
            kind
        ]
        for kind in KINDS
        for seed in seeds
    }
    labels = cifar.training_splits()[1].labels[: plan.test_images]
    rows, goals = [], []
    for kind in KINDS:
        own = [files[kind, seed] for seed in seeds]
        row: dict[str, Any] = {"network": kind}
        row["accuracy"] = [f["test"]["accuracy"] for f in own]
        for clock in ("seconds", "processor_seconds"):
            row[clock] = [f[clock] for f in own]
            pairs = [(files[kind, s][clock], files["dense", s][clock]) for s in seeds]
            row[f"percent_fewer_{clock}"] = [round(100 * (1 - a / b), 3) for a, b in pairs]
        if kind != "dense":
            row["training_macs_share"] = [f["pruning"]["training_macs"]["share"] for f in own]
            row["macs"] = [f["pruning"]["macs"] for f in own]
            gap = sparse_training.difference(files, (kind, "dense"), labels)
            row["points_above_dense"] = gap
            saved = _mean(row["percent_fewer_seconds"])
            words = f"percent less wall time of training, {kind}"
            goals.append(record.goal(words, saved, "at least", FASTER))
            words = f"points below dense, {kind}"
            goals.append(record.goal(words, round(-gap["mean"], 6), "at most", WORSE))
        rows.append(row)
    result = {"plan": asdict(plan), "networks": rows}
    record.write(plan.study, result, goals=goals, seeds=seeds, watch=watch, folder=folder)
    return record.read(plan.study, folder=folder)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 6)
