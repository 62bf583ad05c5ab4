"""Gradual magnitude pruning of ResNet-20 against a dense network trained equally long.

Two protocols, each with four arms (dense, 80 %, 90 %, 95 %) that see the same batches at the same
learning rates. In the first, the arms start from one trunk, trained dense; the pruned ones prune over
the first half of their own epochs and only train over the second. In the other (``--epochs 30``) there
is no trunk: every arm is trained from the same first weights in one cycle, the pruned ones prune from a
tenth of it to six tenths, and learn from the dense arm when that is finished, as well as from the
labels. All commands can be cut off and taken up:

    python -m bench --arm trunk
    python -m bench --arm dense
    python -m bench --arm 0.9
    python -m bench --arm 0.9 --epochs 30

The recipe of each protocol was fixed before its first run, and the network after the last epoch is the
one reported. The test images play no part in any choice, but for this one: the second protocol was
added after the first had missed its goals.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench import cifar, record, training
from secateur.allocate import Ranked
from secateur.learn import Task
from secateur.learn.objectives import Term
from secateur.schedule import Polynomial
from secateur.score import Magnitude

ARMS = ("dense", "0.8", "0.9", "0.95")
# Points below dense, at most.
GOALS = {"0.8": 0.3, "0.9": 1.0, "0.95": 2.5}
TRUNK = training.Recipe(epochs=14, rate=0.2, warmup=1.5)
EPOCHS = 30  # of the protocol without a trunk
ARM = training.Recipe(epochs=12, rate=0.1, warmup=1.0, earlier=14)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm of the study shares.

    Attributes:
        trunk: How to train the dense network that all arms start from; None: all start untrained.
        recipe: How to go on in each arm.
        train_images: Train on the first so many.
        test_images: Test on the first so many.
        pruning: Epochs of the arm at which pruning begins and ends; afterwards the masks stay.
        every: Steps between two changes of the masks.
        tested_after: Epochs of the arm after which to test on the way, for the record only.
        distillation: Share of a pruned arm's loss that is towards the finished dense arm.
        temperature: Of that share.
    """

    trunk: training.Recipe | None = TRUNK
    recipe: training.Recipe = ARM
    train_images: int = cifar.TRAIN
    test_images: int = cifar.HELD_OUT + 1_000
    pruning: tuple[float, float] = (0, 6)
    every: int = 50
    tested_after: tuple[int, ...] = (6,)
    distillation: float = 0.0
    temperature: float = 4.0

    @property
    def study(self) -> str:
        """Name of the study, and beginning of the names of its files."""
        return "gradual" if self.trunk else f"gradual-resnet20-{self.recipe.epochs}epochs"

    @property
    def epochs(self) -> int:
        """Of every network, in all."""
        return self.recipe.epochs + (self.trunk.epochs if self.trunk else 0)


WHOLE = Plan()
# Show that everything runs; their accuracies mean nothing.
QUICK = Plan(
    trunk=training.Recipe(epochs=1, warmup=0.5),
    recipe=training.Recipe(epochs=2, warmup=0.5, earlier=1),
    train_images=640,
    test_images=500,
    pruning=(0, 1),
    every=1,
    tested_after=(1,),
)
QUICK_CYCLE = Plan(
    trunk=None,
    recipe=training.Recipe(epochs=2, warmup=0.5),
    train_images=256,
    test_images=500,
    pruning=(0, 1),
    every=1,
    distillation=0.9,
)


def plan_of(epochs: int | None = None) -> Plan:
    """The plan with a trunk, or that with one cycle of so many epochs.

    Example:
        >>> plan_of().study, plan_of(30).study, plan_of(30).pruning
        ('gradual', 'gradual-resnet20-30epochs', (3.0, 18.0))
    """
    if epochs is None:
        return WHOLE
    return Plan(
        trunk=None,
        recipe=training.Recipe(epochs=epochs),
        pruning=(epochs / 10, 6 * epochs / 10),
        tested_after=(),
        distillation=0.9,
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a study reads and writes.

    Attributes:
        results: Results of finished arms.
        runs: Networks, finished or not.
    """

    results: Path = record.RESULTS
    runs: Path = record.RUNS


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all arms that are not finished, then the comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(folder, Path(scratch)) if quick else Place(folder)
        for plan in (QUICK, QUICK_CYCLE) if quick else (WHOLE, plan_of(EPOCHS)):
            for arm in ARMS:
                run_arm(arm, plan, seed=seed, place=place)
            summarise(plan, folder=folder)


def trained_trunk(
    recipe: training.Recipe = TRUNK,
    images: int = cifar.TRAIN,
    *,
    seed: int = 0,
    place: Place = Place(),
    depth: int = 20,
) -> training.Run:
    """The dense network that all arms start from, trained if it is not yet."""
    other = "" if depth == 20 else f"-resnet{depth}"
    path = record.ignored(place.runs) / f"gradual-trunk{other}-seed{seed}.safetensors"
    run = training.start(recipe, seed=seed, depth=depth)
    if path.exists():
        training.load(run, path)
    batches = cifar.augmented(cifar.training_splits()[0][:images], batch=recipe.batch)
    while len(run.history) < recipe.epochs:
        training.train_epoch(run, batches, seed=seed)
        training.save(run, path)
        _say("trunk", run)
    return run


def run_arm(
    arm: str, plan: Plan = WHOLE, *, seed: int = 0, place: Place = Place()
) -> dict[str, Any]:
    """Train one arm, or go on with it, and write its result. A finished arm is only read.

    Args:
        arm: One of :data:`ARMS`.
        plan: What all arms share.
        seed: Of first weights, order and augmentation.
        place: Where to read and write.
    """
    name = f"{plan.study}-{arm}-seed{seed}"
    if (place.results / f"{name}.json").exists():
        return record.read(name, folder=place.results)
    before = _begun(plan, seed, place)
    watch = record.Stopwatch()
    test = cifar.training_splits()[1][: plan.test_images]
    run, pruning = _trained(arm, before, plan, seed, place)
    sparsity, pruned = pruning.sparsity(), pruning.finish()
    found = cifar.logits(run.model, test)
    score = cifar.score(found, test.labels)
    result = {
        "arm": arm,
        "plan": asdict(plan),
        "epochs_in_all": plan.epochs,
        "pruning": pruned,
        "sparsity_of_pruned_weights": sparsity,
        "sparsity_of_whole_model": zeros(run.model),
        "test": {**asdict(score), "standard_error": round(score.standard_error, 3)},
        "trunk_test_accuracy": _tested(before.model, test).accuracy if plan.trunk else None,
        "trunk_history": before.history,
        "history": run.history,
        # One digit an image: arms can be compared image by image without training again.
        "predictions": "".join(map(str, found.argmax(1).tolist())),
    }
    record.write(name, result, seeds=[seed], watch=watch, folder=place.results)
    return record.read(name, folder=place.results)


def _begun(plan: Plan, seed: int, place: Place) -> training.Run:
    """The network that all arms start from."""
    if plan.trunk:
        return trained_trunk(plan.trunk, plan.train_images, seed=seed, place=place)
    return training.start(plan.recipe, seed=seed)


def _trained(
    arm: str, before: training.Run, plan: Plan, seed: int, place: Place
) -> tuple[training.Run, _Dense | _Gradual]:
    """An arm's network after its last epoch, begun with another one's, and what prunes it."""
    train, test = cifar.training_splits()
    batches = cifar.augmented(train[: plan.train_images], batch=plan.recipe.batch)
    run = training.start(plan.recipe, seed=seed)
    run.model.load_state_dict(before.model.state_dict())
    pruning = _pruning(arm, run, plan, len(batches))
    terms: Sequence[Term] = (Task(),)
    if plan.distillation and arm != "dense":
        teacher = _trained("dense", before, plan, seed, place)[0].model
        terms = training.distilled(teacher, plan.distillation, temperature=plan.temperature)
    part = record.ignored(place.runs) / f"{plan.study}-{arm}-seed{seed}.safetensors"
    if part.exists():
        pruning.take_up(training.load(run, part))
    while len(run.history) < plan.recipe.epochs:
        training.train_epoch(run, batches, seed=seed, after_step=pruning.step, terms=terms)
        run.history[-1]["sparsity"] = round(pruning.sparsity(), 5)
        if len(run.history) in plan.tested_after:
            tested = _tested(run.model, test[: plan.test_images])
            run.history[-1]["test_accuracy"] = tested.accuracy
        training.save(run, part, more=pruning.state())
        _say(arm, run)
    return run, pruning


def summarise(plan: Plan = WHOLE, *, folder: Path = record.RESULTS) -> dict[str, Any]:
    """Put the finished arms side by side, and judge the goals by the mean over the seeds.

    Raises:
        FileNotFoundError: The dense arm has not been run.
    """
    watch, name = record.Stopwatch(), plan.study
    seeds = _seeds(name, folder)
    if not seeds:
        raise FileNotFoundError(f"No seed has all arms in {folder}: run --arm {', '.join(ARMS)}.")
    count = record.read(f"{name}-dense-seed{seeds[0]}", folder=folder)["result"]["test"]["images"]
    labels = cifar.training_splits()[1].labels[:count]
    rows, goals = [], []
    for arm in ARMS:
        each = [_row(name, arm, seed, labels, folder) for seed in seeds]
        accuracies = [row["accuracy"] for row in each]
        row: dict[str, Any] = {"arm": arm, "accuracy": _mean(accuracies), "seeds": each}
        if arm != "dense":
            row["drop"] = _mean([row["drop"] for row in each])
            row["drop_standard_error"] = math.sqrt(
                sum(row["drop_standard_error"] ** 2 for row in each)
            ) / len(each)
            words = f"points below dense at {float(arm):.0%} sparsity"
            words += ", distilled" if plan.distillation else ""
            goals.append(record.goal(words, row["drop"], "at most", GOALS[arm]))
        rows.append(row)
    result = {"plan": asdict(plan), "arms": rows}
    record.write(name, result, goals=goals, seeds=seeds, watch=watch, folder=folder)
    return record.read(name, folder=folder)


def zeros(model: nn.Module) -> float:
    """Share of zeros among all parameters, those that are never pruned included."""
    parameters = [p.detach() for p in model.parameters()]
    return sum(int((p == 0).sum()) for p in parameters) / sum(p.numel() for p in parameters)


def _tested(model: nn.Module, test: cifar.Split) -> cifar.Score:
    return cifar.score(cifar.logits(model, test), test.labels)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _seeds(name: str, folder: Path) -> list[int]:
    """Seeds for which every arm is finished."""
    seeds = record.seeds_of(f"{name}-dense", folder)
    names = {s: [folder / f"{name}-{arm}-seed{s}.json" for arm in ARMS] for s in seeds}
    return sorted(s for s in seeds if all(path.exists() for path in names[s]))


def _row(name: str, arm: str, seed: int, labels: Tensor, folder: Path) -> dict[str, Any]:
    own = record.read(f"{name}-{arm}-seed{seed}", folder=folder)["result"]
    row = {
        "seed": seed,
        "accuracy": own["test"]["accuracy"],
        "loss": own["test"]["loss"],
        "sparsity_of_pruned_weights": own["sparsity_of_pruned_weights"],
        "sparsity_of_whole_model": own["sparsity_of_whole_model"],
    }
    if arm == "dense":
        return row
    dense = record.read(f"{name}-dense-seed{seed}", folder=folder)["result"]
    here, there = (torch.tensor([int(c) for c in r["predictions"]]) for r in (own, dense))
    lost = int(((there == labels) & (here != labels)).sum())
    won = int(((there != labels) & (here == labels)).sum())
    count = len(labels)
    row["drop"] = round(dense["test"]["accuracy"] - own["test"]["accuracy"], 6)
    # Both nets see the same images, so only images on which they differ add to the error.
    row["drop_standard_error"] = 100 * math.sqrt(lost + won - (lost - won) ** 2 / count) / count
    row["agreement"] = 100 * int((here == there).sum()) / count
    return row


def _say(arm: str, run: training.Run) -> None:
    print(f"gradual {arm}:", *(f"{k} {v}" for k, v in run.history[-1].items()), flush=True)


class _Dense:
    """The arm without pruning."""

    def step(self) -> None:
        """Do nothing."""

    def sparsity(self) -> float:
        """Give 0."""
        return 0.0

    def state(self) -> dict[str, Tensor]:
        """Give nothing."""
        return {}

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""

    def finish(self) -> dict[str, Any]:
        """Give nothing."""
        return {}


class _Gradual:
    """An arm with pruning: global magnitude on a cubic schedule, over the default scope."""

    def __init__(self, sparsity: float, run: training.Run, plan: Plan, steps_an_epoch: int) -> None:
        begin, end = (round(epoch * steps_an_epoch) for epoch in plan.pruning)
        self._recipe = secateur.Recipe(
            criterion=Magnitude(),
            target=secateur.Target("sparsity", sparsity),
            allocation=Ranked(),
            schedule=Polynomial(begin=begin, end=end, frequency=plan.every),
        )
        self._pruner = secateur.Gradual(run.model, run.optimizer, self._recipe)

    def step(self) -> None:
        """Count a step and hold the masks."""
        self._pruner.step()

    def sparsity(self) -> float:
        """Share of zeros among the weights that are pruned."""
        return self._pruner.masks.sparsity

    def state(self) -> dict[str, Tensor]:
        """Give the position in the schedule; the masks are in the network's own state."""
        state = self._pruner.state_dict()
        return {
            "steps": torch.tensor(state["steps"]),
            "share": torch.tensor(state["share"], dtype=torch.float64),
        }

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        values = {name: value.item() for name, value in state.items()}
        self._pruner.load_state_dict({**values, "fingerprint": self._recipe.fingerprint()})

    def finish(self) -> dict[str, Any]:
        """Take the masks off the network, which keeps its zeros; give sparsities and layers."""
        facts = self._pruner.finalize().facts
        return {
            "recipe": facts.recipe,
            "fingerprint": facts.fingerprint,
            "layers": {layer.name: round(layer.sparsity, 4) for layer in facts.layers},
            "left_out": [note.where for note in facts.notes if note.topic == "left-out"],
        }


def _pruning(arm: str, run: training.Run, plan: Plan, steps_an_epoch: int) -> _Dense | _Gradual:
    return _Dense() if arm == "dense" else _Gradual(float(arm), run, plan, steps_an_epoch)
