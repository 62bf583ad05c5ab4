"""Blind adversarial pruning against adversarial pruning of fixed strength, on Fashion-MNIST.

One trunk a way of training (plain, FGSM, PGD, and DeepFool with a cut-off: "blind") is trained
dense. Its arms (0, 50, 90 and 95 %) go on from it with the same batches and epochs, and prune by
magnitude over the first half of them. Then accuracy is measured against the size of FGSM and PGD
perturbations. Every stage is kept: a run that was cut off goes on where it was.

    python -m bench adversarial

The settings were fixed before the first whole run; the test images play no part in them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from bench import cifar, record
from secateur import Data, FineTune, Recipe, Target
from secateur.allocate import Ranked
from secateur.drive.methods import window
from secateur.evaluate.robustness import robustness
from secateur.learn import Adversarial, DeepFoolCutoff, Fgsm, Objectives, Pgd, Task

EPS = 0.1
WAYS: dict[str, Any] = {
    "plain": Task(),
    "fgsm": Adversarial(Fgsm(EPS)),
    "pgd": Adversarial(Pgd(EPS, steps=4)),
    "blind": Adversarial(DeepFoolCutoff(max_iter=4, candidates=4, rho=0.95, delta="mean")),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What every arm shares.

    Attributes:
        trunk: Epochs of the dense trunk.
        arm: Epochs of each arm.
        rate: Learning rate of both, of AdamW.
        images: For training.
        test: For the curves.
        sparsities: Of the arms.
        sizes: Of the perturbations, in pixel values from 0 to 1.
    """

    trunk: float = 4
    arm: float = 4
    rate: float = 2e-3
    images: int = 10_000
    test: int = 1_000
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.9, 0.95)
    sizes: tuple[float, ...] = (0.025, 0.05, 0.1, 0.15)


WHOLE = Plan()
# Shows that everything runs; its accuracies mean nothing.
QUICK = Plan(trunk=1, arm=1, images=128, test=100, sparsities=(0.0, 0.9), sizes=(0.05, 0.1))


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Run all arms that are not finished, then the comparison."""
    plan = QUICK if quick else WHOLE
    with tempfile.TemporaryDirectory() as scratch:
        runs = record.ignored(Path(scratch) if quick else record.RUNS)
        watch = record.Stopwatch()
        arms = [
            run_arm(way, sparsity, plan, seed=seed, runs=runs)
            for way in WAYS
            for sparsity in plan.sparsities
        ]
    result = {"plan": asdict(plan), "eps": EPS, "arms": arms}
    record.write(
        "adversarial", result, goals=_goals(arms), seeds=[seed], watch=watch, folder=folder
    )


def run_arm(way: str, sparsity: float, plan: Plan, *, seed: int, runs: Path) -> dict[str, Any]:
    """Train and measure one arm, or read what was found before."""
    path = runs / f"adversarial-{way}-{sparsity}-seed{seed}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    watch = record.Stopwatch()
    model, data = _trunk(way, plan, seed=seed, runs=runs), _data(way, plan, seed=seed)
    torch.manual_seed(seed)
    training = FineTune(epochs=plan.arm, lr=plan.rate, optimizer="adamw")
    found_sparsity = 0.0
    if sparsity:
        recipe = Recipe(
            target=Target("sparsity", sparsity),
            allocation=Ranked(),
            schedule=window(plan.arm),
            recovery=(training,),
            seed=seed,
        )
        pruned = secateur.prune(model, recipe, data)
        model, found_sparsity = pruned.model, pruned.masks.sparsity
    else:
        secateur.finetune(model, data, training)
    attacks = {"fgsm": Fgsm(EPS), "pgd": Pgd(EPS, steps=10)}
    facts = robustness(model, _images("test", plan.test), attacks, sizes=plan.sizes)
    curves = {c.attack: {"accuracy": c.accuracy, "area": c.area} for c in facts.curves}
    found = {
        "way": way,
        "target": sparsity,
        "sparsity": found_sparsity,
        "natural": facts.curves[0].natural,
        "curves": curves,
        "time": watch.facts(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    areas = " ".join(f"{name} {curve['area']:.3f}" for name, curve in curves.items())
    print(f"adversarial {way} {sparsity}: natural {found['natural']:.3f}, {areas}", flush=True)
    return found


def _goals(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(a["way"], a["target"]): a for a in arms}
    goals = []
    for sparsity in sorted({a["target"] for a in arms}):
        plain, fgsm, blind = (by[way, sparsity] for way in ("plain", "fgsm", "blind"))
        lost = 100 * (fgsm["natural"] - blind["natural"])
        words = f"points of natural accuracy below FGSM training at {sparsity:.0%}"
        goals.append(record.goal(words, lost, "at most", 2.0))
        gain = 100 * (blind["curves"]["pgd"]["area"] - plain["curves"]["pgd"]["area"])
        words = f"points of mean accuracy under PGD above plain training at {sparsity:.0%}"
        goals.append(record.goal(words, gain, "more than", 0.0))
    return goals


# -- the network and the images -------------------------------------------------------------------


def _trunk(way: str, plan: Plan, *, seed: int, runs: Path) -> nn.Module:
    path = runs / f"adversarial-{way}-trunk-seed{seed}.safetensors"
    model = _network(seed)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    training = FineTune(epochs=plan.trunk, lr=plan.rate, optimizer="adamw")
    secateur.finetune(model, _data(way, plan, seed=seed), training)
    save_file({n: v.contiguous().clone() for n, v in model.state_dict().items()}, path)
    return model


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _data(way: str, plan: Plan, *, seed: int) -> Data:
    return Data(train=_images("train", plan.images, seed=seed), loss=Objectives((WAYS[way],)))


def _images(split: str, count: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images with pixels from 0 to 1; the file is ordered by class."""
    with np.load(cifar.data_folder("fashion-mnist", "fashion-mnist.npz")) as stored:
        names = (f"{split}_images", f"{split}_labels")
        pixels, labels = (torch.from_numpy(stored[name]) for name in names)
    own = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=own)[:count]
    x = pixels[chosen].reshape(-1, 1, 28, 28).float() / 255
    y = labels[chosen].long()
    return list(zip(x.split(128), y.split(128), strict=True))
