"""Sparse layers by pattern and sparsity against dense ones, and from where on they pay.

The measurement is that of ``secateur doctor``, with more time for each figure.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from bench import record
from secateur.runtime.breakeven import CASES, break_evens
from secateur.runtime.native import isa

SECONDS = 0.4


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Time every layer with every pattern."""
    watch = record.Stopwatch()
    torch.manual_seed(seed)
    rows = []
    cases = CASES[:1] if quick else CASES
    for found in break_evens(
        torch.get_num_threads(), cases=cases, seconds=0.01 if quick else SECONDS
    ):
        rows.append(asdict(found))
        print(f"patterns {found.layer}, {found.pattern}: pays from {found.sparsity}", flush=True)
    record.write("patterns", {"isa": isa(), "rows": rows}, seeds=[seed], watch=watch, folder=folder)
