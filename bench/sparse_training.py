"""Sparse training of a small residual network at 90 %, every method for equally many epochs.

Six arms from the same first weights, with the same batches and learning rates: dense; a random mask
at Erdős-Rényi-kernel densities, held; SET and RigL from that mask; AC/DC; gradual magnitude pruning.
Each arm and seed is a process of its own, and can be cut off and taken up:

    python -m bench sparse_training --arm rigl --seed 1
    python -m bench sparse_training --arm summary

The settings were fixed before the first run, and the network after the last epoch is the one
reported. The test images play no part in any choice.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from bench import cifar, gradual, record, training
from secateur.allocate import ErdosRenyi, Ranked
from secateur.drive.training.regrow import Regrow
from secateur.schedule import Alternating, OneShot, Polynomial
from secateur.score import Random

ARMS = ("dense", "static", "set", "rigl", "acdc", "gradual")
SPARSITY = 0.9
EVERY = 100
GOAL = 1.0  # points below dense, at most, of the best sparse arm
ORDER = (("rigl", "set"), ("set", "static"))  # who should beat whom
PAIRS = (*((arm, "dense") for arm in ARMS[1:]), *ORDER)


RECIPE = training.Recipe(epochs=10, rate=0.2, warmup=1.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm of the study shares.

    Attributes:
        depth: Of the residual network.
        recipe: How to train.
        train_images: Train on the first so many.
        test_images: Test on the first so many.
        every: Steps between two changes of the masks.
    """

    depth: int = 8
    recipe: training.Recipe = RECIPE
    train_images: int = cifar.TRAIN
    test_images: int = cifar.HELD_OUT + 1_000
    every: int = EVERY

    def name(self, arm: str, seed: int) -> str:
        """Name of the files of one arm."""
        return f"{self.study}-{arm}-seed{seed}"

    @property
    def study(self) -> str:
        """Name of the study; another depth or length is another study."""
        usual = Plan()
        if (self.depth, self.recipe.epochs) == (usual.depth, usual.recipe.epochs):
            return "sparse_training"
        return f"sparse_training-resnet{self.depth}-{self.recipe.epochs}epochs"


# Shows that everything runs; its accuracies mean nothing.
QUICK = Plan(
    recipe=training.Recipe(epochs=10, warmup=1.0, batch=64),
    train_images=320,
    test_images=500,
    every=5,
)


def plan_of(depth: int | None = None, epochs: int | None = None) -> Plan:
    """The plan for a depth and a number of epochs, by default the usual ones.

    Example:
        >>> plan_of().name("rigl", 1), plan_of(20, 30).study
        ('sparse_training-rigl-seed1', 'sparse_training-resnet20-30epochs')
    """
    usual = Plan()
    recipe = training.Recipe(
        epochs=epochs or usual.recipe.epochs, rate=usual.recipe.rate, warmup=usual.recipe.warmup
    )
    return Plan(depth=depth or usual.depth, recipe=recipe)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all arms that are not finished, then the comparison."""
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory() as scratch:
        place = gradual.Place(folder, Path(scratch)) if quick else gradual.Place(folder)
        for arm in ARMS:
            run_arm(arm, plan, seed=seed, place=place)
    summarise(plan, folder=folder)


def recipe_of(arm: str, steps: int, every: int, seed: int) -> secateur.Recipe | None:
    """What an arm does to the network.

    Args:
        arm: One of :data:`ARMS`.
        steps: Of the whole training.
        every: Steps between two changes of the masks.
        seed: Of random masks and growth.
    """
    target = secateur.Target("sparsity", SPARSITY)
    at_once = OneShot(unit="steps")
    if arm == "dense":
        return None
    if arm == "static":
        return secateur.Recipe(
            Random(), target=target, allocation=ErdosRenyi(), schedule=at_once, seed=seed
        )
    if arm in ("set", "rigl"):
        regrow = Regrow("random" if arm == "set" else "gradient", frequency=every)
        return secateur.Recipe(target=target, allocation=ErdosRenyi(), regrow=regrow, seed=seed)
    tenth = steps // 10
    if arm == "acdc":  # phases of a tenth, as its authors choose for CIFAR
        schedule: Any = Alternating(begin=0, end=8 * tenth, frequency=tenth)
    else:
        schedule = Polynomial(begin=tenth, end=6 * tenth, frequency=every)
    return secateur.Recipe(target=target, allocation=Ranked(), schedule=schedule, seed=seed)


def run_arm(
    arm: str, plan: Plan | None = None, *, seed: int = 0, place: gradual.Place | None = None
) -> dict[str, Any]:
    """Train one arm, or go on with it, and write its result. A finished arm is only read.

    Args:
        arm: One of :data:`ARMS`.
        plan: What all arms share.
        seed: Of first weights, masks, order and augmentation.
        place: Where to read and write.
    """
    plan, place = plan or Plan(), place or gradual.Place()
    name = plan.name(arm, seed)
    if (place.results / f"{name}.json").exists():
        return record.read(name, folder=place.results)
    watch = record.Stopwatch()
    train, test = cifar.training_splits()
    train, test = train[: plan.train_images], test[: plan.test_images]
    batches = cifar.augmented(train, batch=plan.recipe.batch)
    run = training.start(plan.recipe, seed=seed, depth=plan.depth)
    length = len(batches) * plan.recipe.epochs
    recipe = recipe_of(arm, length, plan.every, seed)
    pruner = recipe and secateur.Gradual(run.model, run.optimizer, recipe, steps=length)
    part = record.ignored(place.runs) / f"{name}.safetensors"
    if part.exists():
        state = training.load(run, part)
        if pruner:
            take_up(pruner, state)
    while len(run.history) < plan.recipe.epochs:
        seen = len(pruner.facts.history) if pruner else 0
        after = pruner.step if pruner else (lambda: None)
        training.train_epoch(run, batches, seed=seed, after_step=after)
        if pruner:
            events = pruner.facts.history[seen:]
            run.history[-1]["sparsity"] = round(pruner.masks.sparsity, 6)
            run.history[-1]["dropped"] = sum(event["dropped"] for event in events)
            run.history[-1]["grown"] = sum(event["grown"] for event in events)
        training.save(run, part, more=state_of(pruner) if pruner else None)
        print(f"{name}:", *(f"{k} {v}" for k, v in run.history[-1].items()), flush=True)
    facts = pruner.finalize().facts if pruner else None
    found = cifar.logits(run.model, test)
    score = cifar.score(found, test.labels)
    result = {
        "arm": arm,
        "plan": asdict(plan),
        "recipe": facts.recipe if facts else {},
        "sparsity_of_pruned_weights": facts.sparsity if facts else 0.0,
        "sparsity_of_whole_model": gradual.zeros(run.model),
        "layers": {x.name: round(x.sparsity, 4) for x in facts.layers} if facts else {},
        "test": {**asdict(score), "standard_error": round(score.standard_error, 3)},
        "history": run.history,
        # One digit an image: arms can be compared image by image without training again.
        "predictions": "".join(map(str, found.argmax(1).tolist())),
    }
    record.write(name, result, seeds=[seed], watch=watch, folder=place.results)
    return record.read(name, folder=place.results)


def state_of(pruner: secateur.Gradual) -> dict[str, Tensor]:
    """The numbers of a pruner's state; masks are in the network's own."""
    state = pruner.state_dict()
    numbers = {"steps": state["steps"], "share": state["share"], **state.get("regrow", {})}
    return {name: torch.tensor(float(n), dtype=torch.float64) for name, n in numbers.items()}


def take_up(pruner: secateur.Gradual, state: dict[str, Tensor]) -> None:
    """Give a pruner back what :func:`state_of` took."""
    numbers = {name: value.item() for name, value in state.items()}
    whole = pruner.state_dict()
    whole |= {"steps": numbers.pop("steps"), "share": numbers.pop("share")}
    pruner.load_state_dict(whole | ({"regrow": numbers} if numbers else {}))


def summarise(plan: Plan | None = None, *, folder: Path = record.RESULTS) -> dict[str, Any]:
    """Put the finished arms side by side; differences are between arms of one seed.

    An arm may have fewer seeds than another, or none yet; a difference is over the seeds that both
    have, and a goal is judged once its arms are there.

    Raises:
        FileNotFoundError: No two arms of one seed can be compared.
    """
    plan, watch = plan or Plan(), record.Stopwatch()
    pairs = [pair for pair in PAIRS if _seeds_of(pair, plan, folder)]
    if not pairs:
        raise FileNotFoundError(f"No two arms to compare in {folder}: run --arm {', '.join(ARMS)}.")
    compared = {arm: [p for p in pairs if arm in p] for arm in ARMS}
    files = {
        (arm, seed): record.read(plan.name(arm, seed), folder=folder)["result"]
        for arm in ARMS
        for seed in sorted(set().union(*(_seeds_of(pair, plan, folder) for pair in compared[arm])))
    }
    count = next(iter(files.values()))["test"]["images"]
    labels = cifar.training_splits()[1].labels[:count]
    rows = []
    for arm in (arm for arm in ARMS if compared[arm]):
        own = [found for (name, _), found in files.items() if name == arm]
        row = {"arm": arm, "seeds": len(own), **_spread([f["test"]["accuracy"] for f in own])}
        row["sparsity_of_pruned_weights"] = own[0]["sparsity_of_pruned_weights"]
        row["sparsity_of_whole_model"] = own[0]["sparsity_of_whole_model"]
        row["seconds"] = _spread([sum(h["seconds"] for h in f["history"]) for f in own])["mean"]
        rows.append(row)
    differences = [difference(files, pair, labels) for pair in pairs]
    goals = [
        record.goal(f"points of {d['arm']} above {d['than']}", d["mean"], "more than", 0.0)
        for d in differences
        if (d["arm"], d["than"]) in ORDER
    ]
    below = [d for d in differences if d["than"] == "dense"]
    if below:
        best = max(below, key=lambda d: d["mean"])
        words = f"points of the best sparse arm ({best['arm']}) below dense"
        goals.append(record.goal(words, round(-best["mean"], 6), "at most", GOAL))
    result = {"plan": asdict(plan), "arms": rows, "differences": differences}
    used = sorted({seed for _, seed in files})
    record.write(plan.study, result, goals=goals, seeds=used, watch=watch, folder=folder)
    return record.read(plan.study, folder=folder)


def difference(
    files: dict[tuple[str, int], dict[str, Any]],
    pair: tuple[str, str],
    labels: Tensor,
) -> dict[str, Any]:
    """Points by which one arm is above another, seed by seed and in the mean.

    The standard error is that of the images: both networks see the same ones, so only images on which
    one is right and the other wrong count. That of the seeds is shown by the single differences.
    """
    points, variances = [], []
    seeds = [s for arm, s in files if arm == pair[0] and (pair[1], s) in files]
    for seed in seeds:
        right = [
            torch.tensor([int(c) for c in files[arm, seed]["predictions"]]) == labels
            for arm in pair
        ]
        won, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        points.append(round(100 * (won - lost) / len(labels), 6))
        variances.append(won + lost - (won - lost) ** 2 / len(labels))
    error = 100 * math.sqrt(sum(variances)) / len(labels) / len(seeds)
    return {
        "arm": pair[0],
        "than": pair[1],
        **_spread(points),
        "seeds": points,
        "standard_error_of_images": round(error, 4),
    }


def _spread(values: list[float]) -> dict[str, float]:
    mean = round(sum(values) / len(values), 6)
    return {"mean": mean, "least": min(values), "most": max(values)}


def _seeds_of(pair: tuple[str, str], plan: Plan, folder: Path) -> set[int]:
    """Seeds for which both arms are finished."""
    one, other = (set(record.seeds_of(f"{plan.study}-{arm}", folder)) for arm in pair)
    return one & other
