"""One-shot pruning of trained CIFAR-10 networks, without any training afterwards.

Every criterion that needs no training, and every repair, at six sparsities, on ResNet-20 and
ResNet-56. The networks have seen all training images, so they are judged on the 1,000 test images,
beside their own dense accuracy. Calibration images come from the training set.

Two ways to spread the sparsity over the layers are kept apart: the same in every layer
("uniform"), and as one ranking over all layers gives it ("global"). The optimal-brain sweep gets
each layer's sparsity from magnitude in the same family, so that both are compared alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from bench import cifar, record
from secateur.allocate import Allocation, Given, Ranked, Uniform
from secateur.core.atomic import new_file
from secateur.pattern import Elements, Pattern, PerRow
from secateur.recover import BatchNorm, ColumnSweep, FisherUpdate, LeastSquares
from secateur.schedule import Exponential, OneShot, Schedule
from secateur.score import (
    CRITERIA,
    Criterion,
    Lamp,
    Magnitude,
    Normalised,
    ObsSaliency,
    Ria,
    SynFlow,
    Wanda,
    Weighted,
    WoodFisher,
)

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CALIBRATION = 1_024
# Movement adds up gradients while a network trains, Smoothed averages over mask updates.
NEEDS_TRAINING = {"movement", "smoothed"}
SYNFLOW_ROUNDS, FISHER_ROUNDS = 100, 4
ELEMENTS, AT_ONCE = Elements(), OneShot()
MAGNITUDE, SWEEP = "magnitude", "sweep + least squares"
# To the outputs of the dense network, each layer after the ones before it.
ASYMMETRIC = "sweep + asymmetric least squares"
FAMILIES: dict[str, Allocation] = {"uniform": Uniform(), "global": Ranked()}
# What the deep network tries, as it takes three times as long.
DEEP = {
    "uniform": {MAGNITUDE, "wanda", "magnitude mask, least squares", "sweep", SWEEP, ASYMMETRIC},
    "global": set[str](),
}
QUICK = {"uniform": {MAGNITUDE, "wanda", SWEEP, ASYMMETRIC}, "global": {MAGNITUDE, "lamp"}}


@dataclass(frozen=True, slots=True)
class Bench:
    """What all methods are tried on.

    Attributes:
        model: The dense network.
        data: For calibration.
        shifted: The same images, shifted and mirrored as in training. BatchNorm needs these: shifts
            bring in black borders, and with the statistics of images without them even the dense
            ResNet-20 falls from 91.5 to 88 %.
        test: To judge with.
        dense: Its class scores on the test images.
        seed: Of the random criterion.
    """

    model: nn.Module
    data: secateur.Data
    shifted: secateur.Data
    test: cifar.Split
    dense: Tensor
    seed: int


def run(
    *,
    quick: bool = False,
    seed: int = 0,
    folder: Path = record.RESULTS,
    depths: tuple[int, ...] = (20, 56),
) -> None:
    """Run all methods on both networks; one result for each network."""
    for depth in depths[:1] if quick else depths:
        _run_network(depth, quick=quick, seed=seed, folder=folder)


def methods(family: str, sparsity: float) -> dict[str, secateur.Recipe]:
    """Give the methods of a family, with their target.

    A criterion whose scores are comparable over layers ranks all layers; one in units of a layer's
    own output (wanda, ria, obs) gets the same sparsity everywhere. Magnitude does both.

    Args:
        family: ``"uniform"`` or ``"global"``.
        sparsity: Share of zeros.
    """
    sweep, refit, norm = ColumnSweep(), LeastSquares(), BatchNorm()
    repairs: dict[str, tuple[Any, ...]] = {"magnitude mask, least squares": (refit,)}
    own = {"magnitude", "wanda", "ria"}
    if family == "uniform":
        repairs["magnitude mask, sweep"] = (sweep,)
        repairs["magnitude mask, batchnorm (shifted images)"] = (norm,)
    parts = {n: Parts(c) for n, c in criteria().items() if (n in own) == (family == "uniform")}
    parts["magnitude"] = Parts(Magnitude())
    parts |= {name: Parts(Magnitude(), steps=steps) for name, steps in repairs.items()}
    if family == "uniform":
        parts["wanda, within rows"] = Parts(Wanda(), PerRow())
        parts["ria, within rows"] = Parts(Ria(), PerRow())
    else:
        rounds = Exponential(begin=1, end=SYNFLOW_ROUNDS, unit="rounds")
        parts["synflow"] = Parts(SynFlow(), schedule=rounds)
        few, update = Exponential(begin=0, end=FISHER_ROUNDS), (FisherUpdate(),)
        parts["magnitude mask, fisher update"] = Parts(Magnitude(), steps=update)
        parts["woodfisher, fisher update"] = Parts(WoodFisher(), steps=update)
        parts["woodfisher, fisher update, rounds"] = Parts(WoodFisher(), ELEMENTS, update, few)
    return {n: p.recipe(FAMILIES[family], sparsity) for n, p in parts.items()}


def sweeps(family: str, sparsity: float, *, levels: Allocation) -> dict[str, secateur.Recipe]:
    """Give the optimal-brain methods, whose masks are chosen while the others are repaired.

    Args:
        family: ``"uniform"`` or ``"global"``.
        sparsity: Share of zeros.
        levels: Each layer's sparsity: the one that magnitude has in this family.
    """
    sweep, refit, norm = ColumnSweep(), LeastSquares(), BatchNorm()
    steps: dict[str, tuple[Any, ...]] = {SWEEP: (sweep, refit)}
    if family == "uniform":
        steps |= {
            "obs": (),
            "sweep": (sweep,),
            f"{SWEEP} + batchnorm (shifted images)": (sweep, refit, norm),
        }
    parts = {name: Parts(ObsSaliency(), steps=each) for name, each in steps.items()}
    far = (sweep, LeastSquares(asymmetric=True))
    parts[ASYMMETRIC] = Parts(ObsSaliency(), steps=far, sequential=True)
    return {name: each.recipe(levels, sparsity) for name, each in parts.items()}


@dataclass(frozen=True, slots=True)
class Parts:
    """A method, whatever its allocation and sparsity.

    Attributes:
        criterion: Scores.
        pattern: Which weights go together.
        steps: Repairs.
        schedule: Everything at once, or in rounds.
        sequential: Each layer on the network as pruned so far.
    """

    criterion: Criterion
    pattern: Pattern = ELEMENTS
    steps: tuple[Any, ...] = ()
    schedule: Schedule = AT_ONCE
    sequential: bool = False

    def recipe(self, allocation: Allocation, sparsity: float) -> secateur.Recipe:
        """Put it together."""
        return secateur.Recipe(
            self.criterion,
            self.pattern,
            secateur.Target("sparsity", sparsity),
            allocation,
            self.schedule,
            self.steps,
            sequential=self.sequential,
        )


def criteria() -> dict[str, Criterion]:
    """Give every criterion of the catalogue that needs no training; wrappers around magnitude."""
    wrapped: dict[str, Criterion] = {
        "lamp": Lamp(Magnitude()),
        "normalised": Normalised(Magnitude()),
        "weighted": Weighted((Magnitude(), Wanda()), (1.0, 1.0)),
    }
    apart = {*NEEDS_TRAINING, "synflow", "obs"}
    return {n: wrapped[n] if n in wrapped else c() for n, c in CRITERIA.items() if n not in apart}


def _run_network(depth: int, *, quick: bool, seed: int, folder: Path) -> None:
    watch = record.Stopwatch()
    name = f"oneshot-resnet{depth}"
    bench = _bench(depth, quick=quick, seed=seed)
    score = cifar.score(bench.dense, bench.test.labels)
    sparsities = (0.8,) if quick else SPARSITIES
    wanted = QUICK if quick else DEEP if depth > 20 else None
    rows: list[dict[str, Any]] = []
    part = None if quick else record.unfinished(f"{name}-seed{seed}.json")
    if part is not None and part.exists():
        rows = json.loads(part.read_text(encoding="utf-8"))
    for sparsity in sparsities:
        for family in FAMILIES:
            begun = time.time()
            chosen = None if wanted is None else wanted[family]
            _fill_(rows, bench, family, sparsity, chosen=chosen)
            if part is not None:
                with new_file(part) as temporary:
                    temporary.write_text(json.dumps(rows), encoding="utf-8")
            took = f"{time.time() - begun:.0f} s"
            print(f"oneshot ResNet-{depth}: {sparsity:.0%} {family}, {took}", flush=True)
    # A run that was cut off and taken up has its rows in another order.
    order = {m: n for n, m in enumerate(r["method"] for r in rows if r["target"] == sparsities[-1])}
    rows.sort(key=lambda r: (r["allocation"] != "uniform", r["target"], order[r["method"]]))
    result = {
        "network": f"ResNet-{depth}",
        "dense": {**asdict(score), "standard_error": score.standard_error},
        "calibration_images": bench.data.calibration,
        "rows": rows,
    }
    found = [g for f in FAMILIES for g in goals(rows, f, sparsities, f"ResNet-{depth}, {f}")]
    record.write(name, result, goals=found, seeds=[seed], watch=watch, folder=folder)


def _fill_(
    rows: list[dict[str, Any]],
    bench: Bench,
    family: str,
    sparsity: float,
    *,
    chosen: set[str] | None,
) -> None:
    """Add the rows of one family at one sparsity that are not there yet."""

    def add(recipes: Mapping[str, secateur.Recipe]) -> None:
        for name, recipe in recipes.items():
            place = {"method": name, "allocation": family, "target": sparsity}
            if (chosen is None or name in chosen) and not _find(rows, place):
                rows.append({**place, **_try(bench, recipe)})

    add(methods(family, sparsity))
    plain = _find(rows, {"method": MAGNITUDE, "allocation": family, "target": sparsity})
    if plain:
        # Rounded to a millionth, which is less than one weight of the largest layer.
        add(sweeps(family, sparsity, levels=Given(plain["layers"])))


def _bench(depth: int, *, quick: bool, seed: int) -> Bench:
    train, test = cifar.read()
    test = test[:200] if quick else test
    count = 128 if quick else CALIBRATION
    generator = torch.Generator().manual_seed(seed)
    chosen = train[torch.randperm(len(train), generator=generator)[:count]]
    batches = [
        (cifar.normalise(pixels), labels)
        for pixels, labels in zip(chosen.pixels.split(128), chosen.labels.split(128), strict=True)
    ]
    model = cifar.trained(depth)
    shifted = list(cifar.augmented(chosen).epoch(0, seed=seed))
    return Bench(
        model,
        secateur.Data(train=batches, calibration=count),
        secateur.Data(train=shifted, calibration=count),
        test,
        cifar.logits(model, test),
        seed,
    )


def _try(bench: Bench, recipe: secateur.Recipe) -> dict[str, Any]:
    """Prune a copy and judge it."""
    data = bench.shifted if BatchNorm() in recipe.recovery else bench.data
    start, busy = time.perf_counter(), time.process_time()
    pruned = secateur.prune(bench.model, replace(recipe, seed=bench.seed), data)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    found = cifar.logits(pruned.model, bench.test)
    score = cifar.score(found, bench.test.labels)
    agree = 100 * int((found.argmax(1) == bench.dense.argmax(1)).sum()) / len(found)
    row: dict[str, Any] = {
        "sparsity": pruned.masks.sparsity,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "agreement": agree,
        "seconds": round(seconds, 2),
        # Of the processor: on a machine that does other work too, the better measure.
        "processor_seconds": round(busy, 2),
    }
    if recipe.criterion == Magnitude() and not recipe.recovery:
        layers = pruned.facts.layers
        row["layers"] = {layer.name: round(layer.sparsity, 6) for layer in layers}
    return row


def _find(rows: list[dict[str, Any]], place: Mapping[str, Any]) -> dict[str, Any]:
    """Give the row at a place, or an empty one."""
    return next((r for r in rows if all(r[k] == v for k, v in place.items())), {})


def goals(
    rows: list[dict[str, Any]], family: str, sparsities: tuple[float, ...], where: str
) -> list[dict[str, Any]]:
    """The sweep with least squares must beat magnitude at every sparsity: the least lead counts."""
    found = []
    for method in (SWEEP, ASYMMETRIC):
        points, losses = [], []
        for sparsity in sparsities:
            place = {"allocation": family, "target": sparsity}
            ours = _find(rows, {"method": method, **place})
            plain = _find(rows, {"method": MAGNITUDE, **place})
            if ours and plain:
                points.append(ours["accuracy"] - plain["accuracy"])
                losses.append(plain["loss"] - ours["loss"])
        if len(points) == len(sparsities):
            lead = f"least lead of {method} over magnitude at the same allocation ({where})"
            found += [
                record.goal(f"{lead}, points of accuracy", min(points), "more than", 0),
                record.goal(f"{lead}, loss", min(losses), "more than", 0),
            ]
    return found
