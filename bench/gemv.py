"""One fully connected layer, 4096 x 11008, a few tokens: `accelerate` against dense PyTorch.

Both sides are what a user calls: `nn.Linear`, and the layer that `accelerate` puts in its place, with
inputs and outputs in the type of the weights. Every call takes the next of several copies of the
layer, so that the weights come from memory and not from a cache, as they do in a language model. The
two sides run in turn in one process, on the same number of threads.

    python -m bench gemv --threads 2
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from secateur.runtime import accelerate
from secateur.runtime.native import Spec, isa
from secateur.runtime.race import race
from secateur.runtime.torch_layers import SparseLayer
from secateur.runtime.torch_packed import Operands, stays_dense

SPARSITIES = (0.5, 0.7, 0.8, 0.9)
GOALS = {0.5: 1.6, 0.7: 2.4}
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
    weight = torch.randn(size.outputs, size.inputs) * size.inputs**-0.5
    weight *= torch.rand_like(weight) >= sparsity
    held = weight.to(TYPES[name])
    dense = [_linear(held) for _ in range(max(2, -(-size.bytes // held.nbytes)))]
    first = _sparse(held)
    stored = first.values.nbytes + first.index.nbytes
    operands = Operands(Spec("linear", *first.shape), first.values, first.index, None)
    sparse = [first, *(_sparse(held) for _ in range(max(1, -(-size.bytes // stored) - 1)))]
    rows = []
    for tokens in size.tokens:
        x = torch.randn(tokens, size.inputs).to(TYPES[name])
        with torch.inference_mode():
            for layer in sparse:  # its first call chooses and packs
                layer(x)
            runners = [_calls(dense, x), _calls(sparse, x)]
            raced = race(runners, seconds=size.seconds, most=10_000, drop=False)
            errors = [_error(held, x, layer(x)) for layer in (dense[0], first)]
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
                "sparse_bytes": stored,
                "dense_gb_per_s": held.nbytes / 1e6 / raced.median(0),
                "stays_dense": stays_dense(operands, tokens),
                "relative_error": errors[1],
                "dense_relative_error": errors[0],
            }
        )
    return rows


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").eval()
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _sparse(weight: Tensor) -> SparseLayer:
    layer = accelerate(_linear(weight), minimum_sparsity=0.0)
    assert isinstance(layer, SparseLayer)
    return layer


def _calls(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    turn = itertools.cycle(layers)

    def run() -> None:
        next(turn)(x)

    return run


def _error(weight: Tensor, x: Tensor, y: Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((y.double() - exact).abs().max() / exact.abs().max())


def _speedup(rows: list[dict[str, Any]], sparsity: float) -> float:
    wanted = ("bfloat16", sparsity, min(r["tokens"] for r in rows))
    found = [r for r in rows if (r["weights"], r["sparsity"], r["tokens"]) == wanted]
    return statistics.median(float(r["speedup"]) for r in found)
