"""Dynamic structure pruning of ResNet-20 with two groups, against whole filters and dense.

Three networks a seed, which go on from one trained network, the trunk of the study ``gradual``, with
the same batches, epochs and learning rates. In stage 1, ``groups`` learns its groups of filters
while it trains; the other two just train. Then ``groups``
loses about 60 % of the multiply-adds of its convolutions by input channels of groups, ``filters``
whole filters down to the very same multiply-adds, and ``dense`` nothing. In stage 2 all train on.

The channels of groups are zeroed while the network trains on. At the end they are removed: each
convolution becomes branches that gather their channels, and all networks are timed. Every epoch is
kept, so a run that was cut off goes on where it was:

    python -m bench --arm dsp --seed 0
    python -m bench dsp

The networks after the last epoch are the ones reported, and the test images play no part in any
choice. A first plan began with untrained weights, six epochs and six times the penalty, unlike the
source, which begins with a trained network: it was given up, before any test, when ``groups`` had
learned 71 % of the training images after stage 1.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from bench import cifar, gradual, record, sparse_training, training
from bench.filters import History
from secateur.core.masks import Masks
from secateur.drive.money import uses
from secateur.drive.structural.shrink import shrink_
from secateur.drive.training.held import Held, attach_, detach_
from secateur.drive.training.learned import Learned
from secateur.drive.training.resume import Training, resume_, save_checkpoint
from secateur.frontends import discover
from secateur.learn import GroupLearning
from secateur.structure.branches import pack_branches_

ARMS = ("dsp",)
KINDS = ("groups", "filters", "dense")  # the filters must know what the groups cost
WORSE = 1.0  # points at most
FIRST = training.Recipe(epochs=4, rate=0.1, warmup=0.5, earlier=14)
SECOND = training.Recipe(epochs=6, rate=0.1, warmup=0.5, earlier=18)
EXAMPLE = torch.zeros(1, 3, cifar.SIDE, cifar.SIDE)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the networks of a seed share.

    Attributes:
        first: How stage 1 trains.
        second: How stage 2 goes on.
        groups: Groups of filters a convolution.
        target: Share of the multiply-adds of the convolutions that goes.
        strength: Of the penalty. The source takes 0.002 for 120 epochs at half this learning rate,
            which shrinks seven times as much; but the loss has as much longer to object there.
        rate: Learning rate of the groups, larger than in the source for as much fewer steps.
        train_images: Train on the first so many.
        test_images: Test on the first so many.
    """

    first: training.Recipe = FIRST
    second: training.Recipe = SECOND
    groups: int = 2
    target: float = 0.6
    strength: float = 5e-3
    rate: float = 5e-3
    train_images: int = cifar.TRAIN
    test_images: int = cifar.HELD_OUT + 1_000


# Shows that everything runs; its accuracies mean nothing.
QUICK = Plan(
    first=training.Recipe(epochs=1, warmup=0.5, batch=32),
    second=training.Recipe(epochs=1, warmup=0.5, batch=32, earlier=1),
    train_images=128,
    test_images=256,
)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run a seed, and compare all seeds that are finished."""
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory() as scratch:
        place = gradual.Place(folder, Path(scratch)) if quick else gradual.Place(folder)
        run_arm("dsp", plan, seed=seed, place=place, trunk=cifar.trained(20) if quick else None)
    summarise(plan, folder=folder)


@dataclass
class Watched:
    """Batches that remember the one they gave last.

    Attributes:
        images: To draw from.
        now: The last batch.
    """

    images: cifar.Augmented
    now: tuple[Tensor, Tensor] | None = None

    @property
    def batch(self) -> int:
        """Images in a batch."""
        return self.images.batch

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self.images)

    def epoch(self, number: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of one epoch."""
        for batch in self.images.epoch(number, seed=seed):
            self.now = batch
            yield batch


@dataclass(frozen=True)
class _Stage:
    """One stage of one network: trains epoch by epoch, and goes on where it was."""

    name: str
    run: training.Run
    images: Any
    seed: int
    runs: Path
    pruner: Any = None

    def train(self, after: Callable[[], object] = lambda: None) -> None:
        run = self.run
        others = {"history": History(run.history)}
        loop = Training(run.model, run.optimizer, self.pruner, others=others)
        file = record.ignored(self.runs) / f"{self.name}.safetensors"
        resume_(file, loop)
        while len(run.history) < run.recipe.epochs:
            training.train_epoch(run, self.images, seed=self.seed, after_step=after)
            save_checkpoint(file, loop, step=len(run.history))
            print(f"{self.name}:", *(f"{k} {v}" for k, v in run.history[-1].items()), flush=True)


def run_arm(
    arm: str,
    plan: Plan | None = None,
    *,
    seed: int = 0,
    place: gradual.Place | None = None,
    trunk: nn.Module | None = None,
) -> dict[str, Any]:
    """Train the three networks of a seed, or go on with them, and write their results.

    Args:
        arm: ``"dsp"``, there is no other.
        plan: What the networks share.
        seed: Of groups, order, augmentation, and of the training of the trunk.
        place: Where to read and write.
        trunk: The network to begin with; by default that of the study ``gradual``.
    """
    plan, place = plan or Plan(), place or gradual.Place()
    name = f"dsp-seed{seed}"
    if (place.results / f"{name}.json").exists():
        return record.read(name, folder=place.results)
    watch = record.Stopwatch()
    train, test = cifar.training_splits()
    images = Watched(cifar.augmented(train[: plan.train_images], batch=plan.first.batch))
    trunk = trunk or gradual.trained_trunk(seed=seed, place=place).model
    networks: dict[str, Any] = {}
    models: dict[str, nn.Module] = {}
    for kind in KINDS:
        run = training.go_on(copy.deepcopy(trunk), plan.first)
        stage = f"{name}-{'groups' if kind == 'groups' else 'trunk'}"
        learned = _learning(run, plan, len(images), seed) if kind == "groups" else None
        one = _Stage(stage, run, images, seed, place.runs, learned)
        one.train((lambda: None) if learned is None else _steps(learned, images))
        used, masks = uses(run.model, discover(run.model), EXAMPLE), Masks({})
        if learned is not None:
            pruned = learned.harden()
            masks = pruned.masks
            facts: dict[str, Any] = {k: pruned.facts.measures[k] for k in ("beta", "groups")}
        elif kind == "filters":
            facts = _cut(run.model, networks["groups"]["macs"])
        else:
            facts = {}
        macs = _macs(run.model, masks, used)
        # Stage 2 begins with a new optimizer for every network.
        second = training.go_on(run.model, plan.second)
        attach_(run.model, masks)
        held = Held(run.model, second.optimizer)
        _Stage(f"{name}-{kind}-second", second, images, seed, place.runs).train(held.hold_)
        detach_(run.model)
        told = _judged(run, second, test[: plan.test_images])
        networks[kind] = {**told, "macs": macs, "pruning": facts}
        models[kind] = run.model
    packed = _packed(models["groups"], networks["groups"]["pruning"]["groups"])
    result = {"plan": asdict(plan), "networks": networks, "branches": packed.told}
    result["milliseconds_of_100_images"] = _times({**models, "branches": packed.model})
    record.write(name, result, seeds=[seed], watch=watch, folder=place.results)
    return record.read(name, folder=place.results)


def _learning(run: training.Run, plan: Plan, per_epoch: int, seed: int) -> Learned:
    last = [n for n, _ in run.model.named_parameters() if n.endswith("conv2.weight")]
    how = GroupLearning(
        plan.groups,
        plan.target,
        strength=plan.strength,
        ramp=plan.first.epochs * per_epoch,
        filters=tuple(last),  # the last convolution of each block, as in the source
        lr=plan.rate,
        seed=seed,
    )
    return Learned(run.model, run.optimizer, how, data=secateur.Data(loss=_loss))


def _steps(learned: Learned, images: Watched) -> Callable[[], object]:
    return lambda: learned.step(images.now)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    with training.autocast():
        found = model(batch[0])
    return functional.cross_entropy(found.float(), batch[1])


def _cut(model: nn.Module, macs: float) -> dict[str, Any]:
    recipe = secateur.ShrinkRecipe(target=secateur.Target("macs", macs), recovery=(), align=1)
    facts = shrink_(model, recipe, EXAMPLE).facts
    return {"widths": {w.name: [w.groups, w.kept] for w in facts.widths}}


@dataclass(frozen=True, slots=True)
class _Packed:
    model: nn.Module
    told: dict[str, Any]


def _packed(model: nn.Module, groups: dict[str, Any]) -> _Packed:
    """The network with branches. What does not compute the same is no result."""
    small, found = copy.deepcopy(model).eval(), {}
    for name, told in groups.items():
        own, keep, kept = (torch.tensor(told[key]) for key in ("groups", "keep", "filters"))
        # Filters that went as a whole form one more group, which reads nothing.
        own = torch.where(kept.bool(), own, len(keep))
        nothing = torch.zeros(1, keep.shape[1], dtype=torch.bool)
        found[name.removesuffix(".weight")] = (own, torch.cat([keep.bool(), nothing]))
    pack_branches_(small, found)
    x = torch.randn(8, 3, cifar.SIDE, cifar.SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, got = model.eval()(x), small(x)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if error > 1e-4:
        raise AssertionError(f"The branches differ from the masked network by {error:.2g}.")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return _Packed(small, {"error": error, "parameters": [before, after]})


def _times(models: dict[str, nn.Module], rounds: int = 9) -> dict[str, float]:
    """Median of a forward pass in evaluation mode, all networks in turn."""
    x = torch.zeros(100, 3, cifar.SIDE, cifar.SIDE).to(memory_format=torch.channels_last)
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, model in models.items():
                begun = time.perf_counter()
                model.eval()(x)
                taken[name].append(1000 * (time.perf_counter() - begun))
    return {name: round(statistics.median(each[1:]), 3) for name, each in taken.items()}


def _macs(model: nn.Module, masks: Masks, used: dict[str, float]) -> float:
    """Multiply-adds of an image, without those of pruned weights."""
    return sum(
        used.get(name, 0.0) * (int(masks[name].sum()) if name in masks else p.numel())
        for name, p in model.named_parameters()
    )


def _judged(first: training.Run, second: training.Run, test: cifar.Split) -> dict[str, Any]:
    found = cifar.logits(second.model, test)
    score = cifar.score(found, test.labels)
    return {
        "test": {**asdict(score), "standard_error": round(score.standard_error, 3)},
        "zeros": gradual.zeros(second.model),
        "history": [*first.history, *second.history],
        # One digit an image: networks can be compared image by image without training again.
        "predictions": "".join(map(str, found.argmax(1).tolist())),
    }


def summarise(plan: Plan | None = None, *, folder: Path = record.RESULTS) -> dict[str, Any]:
    """Put the networks side by side; differences are between those of one seed.

    Raises:
        FileNotFoundError: No seed is finished.
    """
    plan, watch = plan or Plan(), record.Stopwatch()
    seeds = record.seeds_of("dsp", folder)
    if not seeds:
        raise FileNotFoundError(f"No seed is finished in {folder}: run --arm dsp --seed 0.")
    files = {
        (kind, seed): record.read(f"dsp-seed{seed}", folder=folder)["result"]["networks"][kind]
        for kind in KINDS
        for seed in seeds
    }
    labels = cifar.training_splits()[1].labels[: plan.test_images]
    rows = [
        {
            "network": kind,
            "accuracy": [files[kind, s]["test"]["accuracy"] for s in seeds],
            "macs": [files[kind, s]["macs"] for s in seeds],
            "macs_share": [files[kind, s]["macs"] / files["dense", s]["macs"] for s in seeds],
        }
        for kind in KINDS
    ]
    pairs = (("groups", "dense"), ("filters", "dense"), ("groups", "filters"))
    gaps = [sparse_training.difference(files, pair, labels) for pair in pairs]
    words = f"points of {plan.groups} groups a convolution below dense"
    goals = [record.goal(words, round(-gaps[0]["mean"], 6), "at most", WORSE)]
    result = {"plan": asdict(plan), "networks": rows, "differences": gaps}
    whole = [record.read(f"dsp-seed{s}", folder=folder)["result"] for s in seeds]
    for key in ("milliseconds_of_100_images", "branches"):
        result[key] = [each[key] for each in whole]
    record.write("dsp", result, goals=goals, seeds=seeds, watch=watch, folder=folder)
    return record.read("dsp", folder=folder)
