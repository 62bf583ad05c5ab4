"""Global magnitude pruning of a network of ResNet-50's size: secateur and torch side by side.

Both prune the same weights (every convolution and the classifier) to the same sparsity in place,
and must keep the same number. Timed in one process, in turns, so that a busy machine slows both.
Peak memory is measured in a process of its own for each tool.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import secateur
from bench import memory, record
from secateur.allocate import Ranked
from secateur.score import Magnitude

SPARSITY = 0.9
REPETITIONS = 9
# secateur over torch in speed; peak extra memory over the bytes of all weights.
FASTER, EXTRA = 2.0, 2.0


def network(*, quick: bool = False, seed: int = 0) -> nn.Module:
    """Build a ResNet-50 with random weights (25.6 M), or a small one of the same kind."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
    config = ResNetConfig(num_labels=1_000, **(size if quick else {}))
    model = ResNetForImageClassification(config).eval()
    # Torch's first weights of a linear layer are so small that at 90 % none of them would stay.
    # A trained classifier is not like that, and secateur always keeps one weight of a layer.
    nn.init.kaiming_normal_(_layers(model)[-1].weight)
    return model


def by_secateur(model: nn.Module) -> int:
    """Prune in place; give the number of kept weights."""
    recipe = secateur.Recipe(
        criterion=Magnitude(),
        target=secateur.Target("sparsity", SPARSITY),
        allocation=Ranked(),
        scope=secateur.Scope(sensitive=True),
    )
    return secateur.prune_(model, recipe).masks.kept


def by_torch(model: nn.Module) -> int:
    """Prune in place, torch's way: masks and a hook are added; give the number of kept weights."""
    pairs = [(layer, "weight") for layer in _layers(model)]
    torch_prune.global_unstructured(
        pairs, pruning_method=torch_prune.L1Unstructured, amount=SPARSITY
    )
    return sum(int(layer.weight_mask.sum()) for layer, _ in pairs)


TOOLS: dict[str, Callable[[nn.Module], int]] = {"secateur": by_secateur, "torch": by_torch}


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Time both tools, measure their memory, and judge."""
    watch = record.Stopwatch()
    model = network(quick=quick, seed=seed)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    kept: dict[str, int] = {}
    kept_where: dict[str, list[Tensor]] = {}
    for repetition in range(1 + (3 if quick else REPETITIONS)):
        for tool, prune in TOOLS.items():
            start = time.perf_counter()
            kept[tool] = prune(model)
            taken = time.perf_counter() - start
            if repetition:  # the first of each warms up
                seconds[tool].append(taken)
            kept_where[tool] = [layer.weight != 0 for layer in _layers(model)]
            _restore_(model, dense)
    if kept["secateur"] != kept["torch"]:
        raise AssertionError(f"The two tools kept different numbers of weights: {kept}.")
    differ = sum(int((a != b).sum()) for a, b in zip(*(kept_where[t] for t in TOOLS), strict=True))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    peaks = {t: _peak(t, quick=quick, seed=seed) for t in TOOLS}
    medians = {tool: statistics.median(values) for tool, values in seconds.items()}
    speedup = medians["torch"] / medians["secateur"]
    share = peaks["secateur"]["peak_extra_bytes"] / size
    result = {
        "network": "ResNet-50, random weights" if not quick else "a small ResNet",
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable": sum(layer.weight.numel() for layer in _layers(model)),
        "weight_bytes": size,
        "sparsity": SPARSITY,
        "kept": kept,
        "entries_where_the_masks_differ": differ,
        "seconds": {
            tool: {
                "median": round(medians[tool], 4),
                "least": round(min(values), 4),
                "most": round(max(values), 4),
                "all": [round(v, 4) for v in values],
            }
            for tool, values in seconds.items()
        },
        "speedup": speedup,
        "peak": peaks,
        "peak_extra_over_weights": {t: p["peak_extra_bytes"] / size for t, p in peaks.items()},
    }
    goals = [
        record.goal("times faster than torch's global_unstructured", speedup, "at least", FASTER),
        record.goal("peak extra memory, in bytes of all weights", share, "less than", EXTRA),
    ]
    path = record.write(
        "global_masks", result, goals=goals, seeds=[seed], watch=watch, folder=folder
    )
    print(f"global_masks: {speedup:.2f} times faster, {share:.2f} times the weights -> {path.name}")


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _restore_(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Undo what a tool did, hooks and all."""
    for layer in _layers(model):
        if torch_prune.is_pruned(layer):
            torch_prune.remove(layer, "weight")
    model.load_state_dict(dense)


def _peak(tool: str, *, quick: bool, seed: int) -> dict[str, Any]:
    words = [tool, "--seed", str(seed), *(["--quick"] if quick else [])]
    return memory.in_fresh_process("bench.global_masks", *words, threads=torch.get_num_threads())


def _main() -> None:
    """Measure one tool's memory; started by :func:`run`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = network(quick=given.quick, seed=given.seed)
    print(json.dumps(memory.measured(lambda: TOOLS[given.tool](model))))


if __name__ == "__main__":
    _main()
