"""Run the measurements: ``python -m bench [study ...] [--quick]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import (
    adversarial,
    chains,
    cifar,
    compensation,
    coverage,
    dsp,
    filters,
    gemv,
    global_masks,
    gradual,
    leap,
    oneshot,
    overhead,
    patterns,
    record,
    recovered,
    sparse_training,
    speed,
    structural,
    sweep,
    tickets,
)

# In the order in which they run: the short ones first.
STUDIES: dict[str, Callable[..., None]] = {
    "global_masks": global_masks.run,
    "sweep": sweep.run,
    "gemv": gemv.run,
    "patterns": patterns.run,
    "speed": speed.run,
    "chains": chains.run,
    "coverage": coverage.run,
    "compensation": compensation.run,
    "structural": structural.run,
    "overhead": overhead.run,
    "adversarial": adversarial.run,
    "leap": leap.run,
    "oneshot": oneshot.run,
    "gradual": gradual.run,
    "sparse_training": sparse_training.run,
    "tickets": tickets.run,
    "filters": filters.run,
    "recovered": recovered.run,
    "dsp": dsp.run,
}


def main(words: list[str] | None = None) -> int:
    """Run the studies that are named, or all; one that lacks its data is skipped and named."""
    given = _parser().parse_args(words)
    torch.set_num_threads(given.threads)
    if given.arm and given.study == ["sparse_training"]:
        plan = sparse_training.plan_of(given.depth, given.epochs)
        if given.arm == "summary":
            sparse_training.summarise(plan)
        else:
            sparse_training.run_arm(given.arm, plan, seed=given.seed)
        return 0
    if given.arm in filters.ARMS:
        filters.run_arm(given.arm, filters.plan_of(given.depth, given.epochs), seed=given.seed)
        return 0
    if given.arm in recovered.ARMS:
        how = recovered.plan_of(
            given.depth, given.rate, images=given.images, held_out=given.held_out
        )
        recovered.run_arm(given.arm, how, seed=given.seed)
        return 0
    if given.arm in dsp.ARMS:
        dsp.run_arm(given.arm, seed=given.seed)
        return 0
    if given.arm in tickets.ARMS:
        tickets.run_arm(given.arm, seed=given.seed)
        return 0
    if given.arm:
        _run_part_of_gradual(given.arm, given.epochs, given.seed)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if given.quick else record.RESULTS
        for number, name in enumerate(given.study or STUDIES, start=1):
            print(f"[{number}/{len(given.study or STUDIES)}] {name}", flush=True)
            begun = time.time()
            try:
                options = (
                    {"depths": (given.depth,)}
                    if name in ("oneshot", "compensation") and given.depth
                    else {}
                )
                STUDIES[name](quick=given.quick, seed=given.seed, folder=folder, **options)
            except cifar.DataMissing as missing:
                print(f"skipped: {missing}")
            print(f"[{name}] {time.time() - begun:.0f} s", flush=True)
    return 0


def _run_part_of_gradual(arm: str, epochs: int | None, seed: int) -> None:
    if arm == "trunk":
        gradual.trained_trunk(seed=seed)
    elif arm == "summary":
        gradual.summarise(gradual.plan_of(epochs))
    else:
        gradual.run_arm(arm, gradual.plan_of(epochs), seed=seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "study", nargs="*", choices=[*STUDIES, []], help="which ones; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test; keeps no results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="for torch")
    parser.add_argument(
        "--arm",
        choices=[
            "trunk",
            *dict.fromkeys(
                (
                    *gradual.ARMS,
                    "summary",
                    *tickets.ARMS,
                    *sparse_training.ARMS,
                    *filters.ARMS,
                    *dsp.ARMS,
                    *recovered.ARMS,
                )
            ),
        ],
        help="one part of 'gradual' or 'tickets' (or of 'sparse_training', if that is named as the "
        "study), resumable; several may run beside one another",
    )
    parser.add_argument(
        "--depth", type=int, help="one network of 'oneshot' (20, 56), or that of the arm's study"
    )
    parser.add_argument(
        "--epochs", type=int, help="of each arm of 'sparse_training', 'filters' or 'gradual'"
    )
    parser.add_argument("--rate", type=float, help="highest learning rate of 'recovered'")
    parser.add_argument("--images", type=int, help="to fine-tune on in 'recovered'")
    parser.add_argument(
        "--held-out", action="store_true", help="'recovered' with a network trained here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
