"""Which architectures can be cut, how much of them, and how exactly; beside Torch-Pruning.

Every network of ``bench.zoo`` is traced, coupled and cut in random ways, and each cut network is
compared with the masked one. The same network then goes through the newest Torch-Pruning with its
defaults (filters by magnitude, half of the channels of every layer but the last; no hints about
heads), in a process of its own with a time limit, because some do not come back. Torch-Pruning is no
dependency: ``pip install --no-deps torch-pruning`` brings it; without it its columns stay empty.

    python -m bench coverage
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.zoo.fresh import refresh_
from secateur.drive.structural.width_cost import removable_share
from secateur.structure import Structure, apply_, couple, cuts_for, prove

CHOICES = 20
ENOUGH = 0.3
EXACT = 1e-5
PATIENCE = 60


def run(*, quick: bool, seed: int, folder: Path) -> None:
    """Fill the table; write ``coverage.json``."""
    from bench.zoo import ZOO

    watch = record.Stopwatch()
    names = list(ZOO)[:: 12 if quick else 1]
    rows = []
    for name in names:
        row = ours(name, choices=2 if quick else CHOICES, seed=seed) | theirs(name)
        rows.append(row)
        print(_line(row), flush=True)
    traced = [row for row in rows if row["traced"]]
    exact = [row for row in traced if row["error"] is not None and row["error"] < EXACT]
    enough = [row for row in traced if row["removable"] >= ENOUGH]
    goals = [
        record.goal("share of networks that trace", len(traced) / len(rows), "at least", 1.0),
        record.goal("share of them cut exactly", len(exact) / len(rows), "at least", 1.0),
        record.goal("share that can lose 30 %", len(enough) / len(rows), "at least", 0.9),
    ]
    record.write(
        "coverage",
        {
            "rows": rows,
            "couple_resnet50": speed(),
            "torch_pruning": _version(),
            "choices": 2 if quick else CHOICES,
        },
        goals=goals,
        watch=watch,
        seeds=[seed],
        folder=folder,
    )


def ours(name: str, *, choices: int, seed: int) -> dict[str, Any]:
    """One network through our own structure."""
    from bench.zoo import ZOO

    torch.manual_seed(seed)
    model, example = ZOO[name]()
    model.eval()
    refresh_(model)
    begun = time.perf_counter()
    try:
        structure = couple(model, example)
    except Exception as error:  # a row of the table
        return {"network": name, "traced": False, "why": f"{type(error).__name__}: {error}"[:300]}
    seconds = time.perf_counter() - begun
    worst: float | None = 0.0
    for choice in range(choices):
        keep = random_keep(structure, seed + choice)
        try:
            small = copy.deepcopy(model)
            apply_(small, cuts_for(model, structure, keep))
            error = prove(model, small, structure, keep, example).error
            if worst is not None:
                worst = max(worst, error) if math.isfinite(error) else None
        except Exception as failure:  # a row of the table
            worst = None  # not cut
            print(f"{name}: {type(failure).__name__}: {str(failure)[:200]}")
    reasons = dict.fromkeys(structure.pinned.values())
    return {
        "network": name,
        "traced": True,
        "parameters": sum(p.numel() for p in model.parameters()),
        "widths": len(structure.widths),
        "groups": sum(width.groups for width in structure.widths),
        "removable": round(removable_share(model, structure), 4),
        "pinned": list(reasons)[:6],
        "error": worst,
        "seconds": round(seconds, 3),
    }


def random_keep(structure: Structure, seed: int) -> dict[str, Tensor]:
    """A random choice of groups in every width; at least one stays."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for width in structure.widths:
        flags = torch.rand(width.groups, generator=generator) < 0.6
        flags[int(torch.randint(width.groups, (1,), generator=generator))] = True
        keep[width.name] = flags
    return keep


def theirs(name: str) -> dict[str, Any]:
    """The same network through Torch-Pruning, in a process that may be stopped."""
    if _version() is None:
        return {"their": "not installed"}
    command = [sys.executable, "-c", f"from bench import coverage; coverage.child({name!r})"]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=root
        )
    except subprocess.TimeoutExpired:
        return {"their": f"not done after {PATIENCE} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {
            "their": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300]
        }
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def child(name: str) -> None:
    """What :func:`theirs` runs: prune half of the channels, then run the network."""
    import torch_pruning

    from bench.zoo import ZOO

    torch.manual_seed(0)
    model, example = ZOO[name]()
    model.eval()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    before = sum(p.numel() for p in model.parameters())
    begun = time.perf_counter()
    found: dict[str, Any] = {"their": "works"}
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=linears[-1:],
            output_transform=_first,
        )
        pruner.step()
        found["their_seconds"] = round(time.perf_counter() - begun, 3)
        after = sum(p.numel() for p in model.parameters())
        found["their_removed"] = round(1 - after / before, 4)
        with torch.no_grad():
            _call(model, example)
        if after == before:
            found["their"] = "nothing was removed"
    except Exception as error:  # a row of the table
        found["their"] = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps(found))


def _first(output: Any) -> Tensor:
    """One tensor to trace back from, whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    return next(x for x in values if isinstance(x, Tensor))


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def speed(repeats: int = 7) -> dict[str, Any]:
    """ResNet-50, 224 pixels: traced, coupled and cut, in turn with Torch-Pruning."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig()).eval()
    example = torch.zeros(1, 3, 224, 224)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        small = copy.deepcopy(model)
        begun = time.perf_counter()
        structure = couple(small, example)
        keep = {w.name: torch.arange(w.groups) < -(-w.groups // 2) for w in structure.widths}
        apply_(small, cuts_for(small, structure, keep))
        times["ours"].append(time.perf_counter() - begun)
        if _version() is not None:
            times["theirs"].append(_their_time(copy.deepcopy(model), example))
    found = {name: round(statistics.median(t), 3) for name, t in times.items() if t}
    pairs = [b / a for a, b in zip(times["ours"], times["theirs"], strict=False)]
    if pairs:
        found["ratio"] = round(statistics.median(pairs), 2)
    return found | {"repeats": repeats}


def _their_time(model: nn.Module, example: Tensor) -> float:
    import torch_pruning

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    begun = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=linears[-1:],
    )
    pruner.step()
    return time.perf_counter() - begun


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return None


def _line(row: dict[str, Any]) -> str:
    if not row["traced"]:
        return f"{row['network']:28} NOT TRACED: {row['why']}"
    return (
        f"{row['network']:28} {row['widths']:3} widths, {100 * row['removable']:5.1f} % removable, "
        f"error {row['error'] or 0:.1e}, {row['seconds']:.2f} s | {row.get('their', '')[:60]}"
    )
