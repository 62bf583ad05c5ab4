"""Half the multiply-adds of a residual network, then fine-tuning, against the dense one fine-tuned.

Two protocols. ResNet-56 starts from the network of the data page, which has seen all 50,000
training images, and is judged by the 1,000 test images. Held out, it starts, as ResNet-20 does, from a
network trained on 40,000 images as the dense trunk of the study ``gradual``, and is judged by the
other 11,000. In each, the network is cut in five rounds and compensated; then it and the dense one are
fine-tuned for 15 epochs on the 40,000 images with the same batches and learning rates. Each protocol
is run three times for the pruned network: with labels alone, as the dense one; distilled from the
fine-tuned dense one; and distilled without labels, on blends of two images (``matched``).

    python -m bench --arm recovered --depth 56
    python -m bench --arm recovered --depth 56 --rate 0.1
    python -m bench --arm recovered --depth 56 --rate 0.1 --images 50000
    python -m bench --arm recovered --depth 56 --held-out
    python -m bench recovered

The networks after the last epoch are the ones reported. A first run had 10,000 images an epoch, for
want of time, and lost 1.3 +- 0.7 points with ResNet-56; nothing but the number of images was changed
after it. ``matched`` was added, as it is, after the other two had missed the goal; and the rate of 0.1,
of both networks and with nothing else changed, after that. Labels alone, which were worst in both
protocols, are left out with ResNet-56 held out. Last came the rate of 0.1 with all 50,000 images: the
dense network remembers the 10,000 from before, and the cut one has no other way to see them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from bench import cifar, compensation, gradual, record, sparse_training, training
from secateur.learn import Task
from secateur.learn.objectives import Term

ARMS = ("recovered",)
KINDS = ("pruned", "distilled", "matched")
WORSE = 0.7  # points at most
GOALS = {
    "pruned": "points below dense after fine-tuning",
    "distilled": "points below dense after fine-tuning, distilled",
    "matched": "points below dense after fine-tuning, distilled on blended images",
}
RECIPE = training.Recipe(epochs=15, rate=0.02, warmup=0.5)


@dataclass(frozen=True, slots=True)
class Plan:
    """What both networks share.

    Attributes:
        depth: Of the network.
        held_out: Start from a network trained on the 40,000 images, and judge by the other 11,000; else
            from that of the data page.
        recipe: How to fine-tune.
        train_images: An epoch shows the first so many.
        test_images: Test on the first so many.
        rounds: Of cutting.
        distillation: Share of the last network's loss that is towards the dense one.
        temperature: Of that share.
        kinds: Of the pruned network's runs, which.
    """

    depth: int = 56
    held_out: bool = False
    recipe: training.Recipe = RECIPE
    train_images: int = cifar.TRAIN
    test_images: int = 1_000
    rounds: int = 5
    distillation: float = 0.9
    temperature: float = 4.0
    kinds: tuple[str, ...] = KINDS

    @property
    def study(self) -> str:
        """Name of the study of this network, protocol and learning rate."""
        other = "" if self.recipe.rate == RECIPE.rate else f"-rate{self.recipe.rate:g}"
        other += f"-{self.train_images}images" if self.train_images > cifar.TRAIN else ""
        protocol = "-held-out" if self.held_out and self.depth != 20 else ""
        return f"recovered-resnet{self.depth}{protocol}{other}"


_HELD_OUT = Plan(held_out=True, test_images=cifar.HELD_OUT + 1_000)
PLANS = {
    (56, False): Plan(),
    (20, True): replace(_HELD_OUT, depth=20),
    (56, True): replace(_HELD_OUT, kinds=("distilled", "matched")),
}


def plan_of(
    depth: int | None = None,
    rate: float | None = None,
    *,
    images: int | None = None,
    held_out: bool = False,
) -> Plan:
    """The plan of a depth; with another rate only the best run so far, ``matched``.

    With more images that, and then ``distilled``, which was best held out. ResNet-20 is there with held
    out images alone.

    Raises:
        ValueError: More images than are not held out.

    Example:
        >>> plan_of(20).study, plan_of(56, 0.1).study, plan_of(56, held_out=True).study
        ('recovered-resnet20', 'recovered-resnet56-rate0.1', 'recovered-resnet56-held-out')
        >>> plan_of(56, 0.1, images=50_000).study
        'recovered-resnet56-rate0.1-50000images'
    """
    depth = depth or Plan().depth
    plan = PLANS[depth, held_out or depth == 20]
    changed = replace(
        plan,
        recipe=replace(plan.recipe, rate=rate or plan.recipe.rate),
        train_images=images or plan.train_images,
    )
    if changed.held_out and changed.train_images > cifar.TRAIN:
        raise ValueError(
            f"Training on {images:,} images: the {cifar.HELD_OUT:,} after the first {cifar.TRAIN:,} "
            "are those that are tested on. Take fewer, or the protocol of the trained network."
        )
    if changed == plan:
        return plan
    more = changed.train_images > plan.train_images
    return replace(changed, kinds=("matched", "distilled") if more else ("matched",))


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run every protocol, or go on with it."""
    if not quick:
        for plan in PLANS.values():
            run_arm("recovered", plan, seed=seed, place=gradual.Place(folder))
        return
    # Shows that everything runs; its accuracies mean nothing.
    recipe = training.Recipe(epochs=1, warmup=0.5, batch=32)
    plan = Plan(20, True, recipe=recipe, train_images=128, test_images=200, rounds=1)
    with tempfile.TemporaryDirectory() as scratch:
        place = gradual.Place(folder, Path(scratch))
        run_arm("recovered", plan, seed=seed, place=place, dense=cifar.trained(20))


def run_arm(
    arm: str,
    plan: Plan,
    *,
    seed: int = 0,
    place: gradual.Place | None = None,
    dense: nn.Module | None = None,
) -> dict[str, Any]:
    """Cut and fine-tune, or go on with it, and write the result.

    Args:
        arm: ``"recovered"``, there is no other.
        plan: What both networks share.
        seed: Of order and augmentation.
        place: Where to read and write.
        dense: The network to begin with; by default that of the protocol.
    """
    place = place or gradual.Place()
    if (place.results / f"{plan.study}.json").exists():
        return record.read(plan.study, folder=place.results)
    watch = record.Stopwatch()
    train, test = _images(plan)
    dense = dense or _dense(plan, seed, place)
    bundle = record.ignored(place.runs) / f"{plan.study}-cut"
    if not bundle.exists():
        _cut(dense, plan, seed).save(bundle)
    pruned = secateur.load(_copy(dense, plan.depth), bundle)
    told = pruned.facts.measures
    before = {kind: _judged(m, test) for kind, m in (("dense", dense), ("pruned", pruned.model))}
    tuned = _Tuned(plan, seed, place)
    images = cifar.augmented(train, batch=plan.recipe.batch)
    reference = tuned("dense", _copy(dense, plan.depth), images)
    taught = functools.partial(training.distilled, reference.model, temperature=plan.temperature)
    blended = replace(images, blended=True)
    ways: dict[str, tuple[Any, ...]] = {
        "pruned": (images,),
        "distilled": (images, taught(plan.distillation)),
        "matched": (blended, taught(1.0)),
    }
    runs = {"dense": reference}
    for kind in plan.kinds:
        runs[kind] = tuned(kind, copy.deepcopy(pruned.model), *ways[kind])
    networks = {k: {**_judged(r.model, test), "history": r.history} for k, r in runs.items()}
    differences = {
        "before": _difference(before, "pruned", test),
        **{kind: _difference(networks, kind, test) for kind in plan.kinds},
    }
    goals = [
        record.goal(GOALS[kind], round(-differences[kind]["mean"], 6), "at most", WORSE)
        for kind in plan.kinds
    ]
    result = {
        "plan": asdict(plan),
        "macs": [told["target"]["dense"], told["target"]["reached"]],
        "parameters": told["parameters"],
        "before": before,
        "networks": networks,
        "differences": differences,
    }
    record.write(plan.study, result, goals=goals, seeds=[seed], watch=watch, folder=place.results)
    return record.read(plan.study, folder=place.results)


@dataclass(frozen=True)
class _Tuned:
    """Fine-tunes a network, or goes on with it."""

    plan: Plan
    seed: int
    place: gradual.Place

    def __call__(
        self,
        kind: str,
        model: nn.Module,
        images: cifar.Augmented,
        terms: Sequence[Term] = (Task(),),
    ) -> training.Run:
        run = training.go_on(model, self.plan.recipe)
        file = self.place.runs / f"{self.plan.study}-{kind}.safetensors"
        if file.exists():
            training.load(run, file)
        while len(run.history) < self.plan.recipe.epochs:
            training.train_epoch(run, images, seed=self.seed, terms=terms)
            training.save(run, file)
            told = " ".join(f"{k} {v}" for k, v in run.history[-1].items())
            print(f"{self.plan.study} {kind}: {told}", flush=True)
        return run


def _images(plan: Plan) -> tuple[cifar.Split, cifar.Split]:
    train, test = cifar.training_splits() if plan.held_out else cifar.read()
    return train[: plan.train_images], test[: plan.test_images]


def _dense(plan: Plan, seed: int, place: gradual.Place) -> nn.Module:
    if not plan.held_out:
        return cifar.trained(plan.depth)
    return gradual.trained_trunk(seed=seed, place=place, depth=plan.depth).model.eval()


def _copy(dense: nn.Module, depth: int) -> nn.Module:
    model = cifar.ResNet(depth).to(memory_format=torch.channels_last)
    model.load_state_dict(dense.state_dict())
    return model.eval()


def _cut(dense: nn.Module, plan: Plan, seed: int) -> secateur.Pruned:
    train = cifar.training_splits()[0]
    count = min(compensation.IMAGES, plan.train_images)
    batches = itertools.islice(cifar.augmented(train).epoch(0, seed=seed), -(-count // 128))
    data = secateur.Data(train=list(batches), calibration=count)
    return secateur.shrink(dense, compensation.best(plan.rounds), None, data)


def _judged(model: nn.Module, test: cifar.Split) -> dict[str, Any]:
    found = cifar.logits(model, test)
    score = cifar.score(found, test.labels)
    return {
        "test": {**asdict(score), "standard_error": round(score.standard_error, 3)},
        "predictions": "".join(map(str, found.argmax(1).tolist())),
    }


def _difference(found: dict[str, Any], kind: str, test: cifar.Split) -> dict[str, Any]:
    files = {(name, 0): each for name, each in found.items()}
    return sparse_training.difference(files, (kind, "dense"), test.labels)
