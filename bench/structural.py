"""What a structural cut gains in stock ONNX Runtime: at half the multiply-adds, and at a latency target.

Networks from Transformers configurations with random weights: a cut's speed does not depend on them.
The uncut network and a cut one run in turn in one process, on the same input, with two threads. A cut
to a latency target is exported and raced anew: what the run said of itself does not count.

    python -m bench structural
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from bench import record
from bench.networks import _OneOutput
from secateur.allocate.widths import RankedWidths, UniformWidths
from secateur.core.errors import BudgetError
from secateur.runtime.layer_times import stock_session
from secateur.runtime.race import race, runner

THREADS = 2
# Of several races the one counts in which the dense network was fastest; the file has all of them.
RACES, SECONDS, PAUSE = 3, 2.5, 1.0
# A target of 2.0x is met from 1.96x on.
TOLERANCE = 0.02
# Widths in multiples of up to 16, as the run chooses; 1 allows any.
DEFAULT = 0
ALLOCATIONS = {"uniform": UniformWidths(), "ranked": RankedWidths()}


@dataclass(frozen=True, slots=True)
class Subject:
    """One network.

    Attributes:
        name: In the results.
        make: Builds it, with random weights.
        size: Of its input, both sides.
        batches: Images at once.
        goal: Times faster at half the multiply-adds; None: only recorded.
        target: Times faster, as a latency target.
    """

    name: str
    make: Callable[[], nn.Module]
    size: int
    batches: tuple[int, ...]
    goal: float | None
    target: float

    def example(self, batch: int) -> torch.Tensor:
        """An input."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return _OneOutput(ResNetForImageClassification(ResNetConfig(num_labels=1_000)))


def _mobilenet2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(tf_padding=False, num_labels=1_000)
    return _OneOutput(MobileNetV2ForImageClassification(config))


def _small_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(hidden_sizes=[32, 64], depths=[1, 1], num_labels=10)
    return _OneOutput(ResNetForImageClassification(config))


SUBJECTS = (
    Subject("resnet50", _resnet50, 224, (1, 8), 1.8, 2.0),
    Subject("mobilenetv2", _mobilenet2, 224, (1, 8), 1.5, 1.5),
)
QUICK = (Subject("small-resnet", _small_resnet, 32, (1,), None, 1.2),)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Cut, measure, and judge the goals."""
    watch = record.Stopwatch()
    before = torch.get_num_threads()
    torch.set_num_threads(1 if quick else THREADS)
    rows: list[dict[str, Any]] = []
    try:
        for subject in QUICK if quick else SUBJECTS:
            torch.manual_seed(seed)
            model = subject.make().eval()
            with tempfile.TemporaryDirectory() as scratch:
                rows += _rows(subject, model, Path(scratch), races=1 if quick else RACES)
    finally:
        torch.set_num_threads(before)
    result = {"rows": rows, "ort_threads": 1 if quick else THREADS}
    record.write("structural", result, goals=goals(rows), seeds=[seed], watch=watch, folder=folder)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judge the default at half the multiply-adds, and the latency targets."""
    limits = {subject.name: subject for subject in SUBJECTS}
    found = []
    for row in rows:
        subject = limits.get(row["network"])
        if subject is None or row.get("refused"):
            continue
        words = f"{row['network']}, batch {row['batch']}, {row['target']}"
        if row["target"] == "macs=50%" and row["asked_align"] == DEFAULT:
            words += f", {row['allocation']}, times faster than dense"
            found.append(record.goal(words, row["speedup"], "at least", subject.goal or 0.0))
        elif row["target"].startswith("latency"):
            least = subject.target * (1 - TOLERANCE)
            words += ", times faster than dense, raced anew"
            found.append(record.goal(words, row["speedup"], "at least", least))
    return found


def _rows(subject: Subject, model: nn.Module, place: Path, *, races: int) -> list[dict[str, Any]]:
    dense = place / "dense.onnx"
    secateur.export_onnx(model, subject.example(1), dense)
    rows = []
    for name, allocation in ALLOCATIONS.items():
        for align in (DEFAULT, 1):
            recipe = secateur.ShrinkRecipe(allocation=allocation, align=align, recovery=())
            about = {"network": subject.name, "target": "macs=50%", "allocation": name}
            small, told = _cut(model, recipe, subject.example(1), place)
            for batch in subject.batches:
                raced = _raced(dense, small, subject.example(batch), races)
                aligned = {"asked_align": align, "align": told["reached"]["align"]}
                rows.append({**about, **aligned, "batch": batch, **told, **raced})
                _say(rows[-1])
    for batch in subject.batches:
        target = secateur.Target("latency", 1 / subject.target)
        recipe = secateur.ShrinkRecipe(target=target, recovery=())
        words = f"latency={subject.target:g}x"
        about = {"network": subject.name, "target": words, "allocation": "ranked", "batch": batch}
        try:
            small, told = _cut(model, recipe, subject.example(batch), place)
        except BudgetError as error:
            rows.append({**about, "refused": str(error)})
        else:
            raced = _raced(dense, small, subject.example(batch), races)
            rows.append({**about, "align": told["reached"].get("align"), **told, **raced})
        _say(rows[-1])
    return rows


def _cut(
    model: nn.Module, recipe: secateur.ShrinkRecipe, example: torch.Tensor, place: Path
) -> tuple[Path, dict[str, Any]]:
    """Cut and export; the proof of the cut is part of the run."""
    begun = time.perf_counter()
    pruned = secateur.shrink(model, recipe, example)
    seconds = time.perf_counter() - begun
    path = place / "small.onnx"
    path.unlink(missing_ok=True)
    secateur.export_onnx(pruned.model, example, path)
    facts = pruned.facts
    return path, {
        "seconds": round(seconds, 1),
        "proof": facts.measures["proof"],
        "parameters": facts.measures["parameters"],
        "reached": facts.measures["target"],
        "notes": [n.text for n in facts.notes if n.topic in ("target", "widths", "latency")],
        "widths": [[w.groups, w.kept] for w in facts.widths],
    }


def _raced(dense: Path, small: Path, example: torch.Tensor, races: int) -> dict[str, Any]:
    runs = []
    for path in (dense, small):
        opened = stock_session(str(path), torch.get_num_threads())
        runs.append(runner(opened, {opened.get_inputs()[0].name: example.numpy()}))
    found = []
    for number in range(races):
        time.sleep(PAUSE if number else 0)
        found.append(race(runs, seconds=SECONDS if races > 1 else 0.2, drop=False))
    best = min(found, key=lambda each: each.median(0))
    low, high = best.ratio_range(1)
    return {
        "speedup": round(1 / best.ratio(1), 4),
        "speedup_range": [round(1 / high, 4), round(1 / low, 4)],
        "milliseconds": {
            name: {
                "median": round(best.median(i), 4),
                "spread": [round(x, 4) for x in best.spread(i)],
                "runs": len(best.times[i]),
            }
            for i, name in enumerate(("dense", "cut"))
        },
        "races": [[round(each.median(i), 4) for i in (0, 1)] for each in found],
    }


def _say(row: dict[str, Any]) -> None:
    gain = f"{row['speedup']:.2f}x" if "speedup" in row else row["refused"]
    kind = f"{row['network']} {row['target']} {row['allocation']} {row.get('align', '')}"
    print(f"  {kind} batch {row['batch']}: {gain}", flush=True)
