"""One fully connected layer, 4096 x 11008, a few tokens: our bit masks against PyTorch's dense.

Every call takes the next of several copies of the layer, so that the weights come from memory and
not from a cache, as they do in a language model. The two sides run in turn in one process, on the
same number of threads. Dense bfloat16 gets its input in bfloat16; ours stays in float32.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import record
from secateur.runtime.native import Layer, Pool, Spec, Variant, isa
from secateur.runtime.race import race

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
GOALS = {0.5: 1.6, 0.7: 2.4}
GEMV = Variant("gemv", rows=1, vectors=1)
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Size:
    """How large the problem is.

    Attributes:
        outputs: Rows of the weight.
        inputs: Columns.
        tokens: Numbers of tokens to measure.
        bytes: Of copies of the layer, at least, that each side goes through.
        seconds: For each row of the result.
    """

    outputs: int = 4_096
    inputs: int = 11_008
    tokens: tuple[int, ...] = (1, 4, 8)
    bytes: int = 512 << 20
    seconds: float = 6.0


WHOLE = Size()
QUICK = Size(outputs=64, inputs=200, tokens=(1, 3), bytes=1 << 16, seconds=0.0)


def run(*, quick: bool = False, seed: int = 0, folder: Path = record.RESULTS) -> None:
    """Measure every type, sparsity and number of tokens."""
    watch = record.Stopwatch()
    size = QUICK if quick else WHOLE
    rows = []
    for name in TYPES:
        for sparsity in SPARSITIES:
            for row in measure(name, sparsity, size, seed=seed):
                rows.append(row)
                print(
                    f"gemv {name} {sparsity:.0%} {row['tokens']} tokens: {row['dense_ms']:.2f} ms "
                    f"dense, {row['sparse_ms']:.2f} ms sparse, {row['speedup']:.2f} times",
                    flush=True,
                )
    goals = [
        record.goal(
            f"times faster than dense bfloat16 at {sparsity:.0%}, one token",
            _speedup(rows, sparsity),
            "at least",
            limit,
        )
        for sparsity, limit in GOALS.items()
    ]
    result = {"outputs": size.outputs, "inputs": size.inputs, "isa": isa(), "rows": rows}
    record.write("gemv", result, goals=goals, seeds=[seed], watch=watch, folder=folder)


def measure(name: str, sparsity: float, size: Size, *, seed: int) -> list[dict[str, Any]]:
    """Time one weight with every number of tokens.

    Args:
        name: Type of the weights.
        sparsity: Share of zeros, at random places.
        size: How large.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    dtype, threads = TYPES[name], torch.get_num_threads()
    weight = torch.randn(size.outputs, size.inputs) * size.inputs**-0.5
    weight *= torch.rand_like(weight) >= sparsity
    held = weight.to(dtype)
    spec, pool = Spec("linear", size.outputs, size.inputs), Pool(threads)
    copies = max(2, -(-size.bytes // held.nbytes))
    dense = [held.clone() for _ in range(copies)]
    sparse = [Layer.from_dense(held, spec, GEMV)]
    copies = max(2, -(-size.bytes // sparse[0].nbytes))
    sparse += [Layer.from_dense(held, spec, GEMV) for _ in range(copies - 1)]
    rows = []
    for tokens in size.tokens:
        x = torch.randn(tokens, size.inputs)
        runners = [_dense(dense, x.to(dtype)), _sparse(sparse, x, pool)]
        with torch.inference_mode():
            raced = race(runners, seconds=size.seconds, most=10_000, drop=False)
        low, high = raced.ratio_range(1)
        rows.append(
            {
                "weights": name,
                "sparsity": sparsity,
                "tokens": tokens,
                "dense_ms": raced.median(0),
                "sparse_ms": raced.median(1),
                "speedup": 1 / raced.ratio(1),
                "speedup_range": [1 / high, 1 / low],
                "rounds": len(raced.times[0]),
                "dense_bytes": held.nbytes,
                "sparse_bytes": sparse[0].nbytes,
                "dense_gb_per_s": held.nbytes / 1e6 / raced.median(0),
                "sparse_gb_per_s": sparse[0].nbytes / 1e6 / raced.median(1),
                "relative_error": _error(held, x, sparse[0].run(x, pool=pool)),
                "dense_relative_error": _error(held, x, functional.linear(x.to(dtype), held)),
            }
        )
    return rows


def _dense(weights: list[Tensor], x: Tensor) -> Callable[[], None]:
    turn = itertools.cycle(weights)

    def run() -> None:
        functional.linear(x, next(turn))

    return run


def _sparse(layers: list[Layer], x: Tensor, pool: Pool) -> Callable[[], None]:
    turn = itertools.cycle(layers)

    def run() -> None:
        next(turn).run(x, pool=pool)

    return run


def _error(weight: Tensor, x: Tensor, y: Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((y.double() - exact).abs().max() / exact.abs().max())


def _speedup(rows: list[dict[str, Any]], sparsity: float) -> float:
    wanted = ("bfloat16", sparsity, min(r["tokens"] for r in rows))
    found = [r for r in rows if (r["weights"], r["sparsity"], r["tokens"]) == wanted]
    return statistics.median(float(r["speedup"]) for r in found)
