"""Bit mask GEMV through the library: against double precision, and the benchmark's own parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench import gemv
from secateur.core.errors import UsageError
from secateur.runtime import library, native
from secateur.runtime.native import Layer, Pool, Spec, Variant

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

ISAS = native.isas() if library.available() else ()
EPS = torch.finfo(torch.float32).eps
GEMV = Variant("gemv", rows=1, vectors=1)
ACTIVATIONS = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}


def sample(rows: int, columns: int, density: float, dtype: torch.dtype) -> Tensor:
    """A weight with random zeros, one empty row and one full one."""
    kept = torch.rand(rows, columns) < density
    kept[0], kept[-1] = False, True
    return (torch.randn(rows, columns) * kept).to(dtype)


def worst(found: Tensor, weight: Tensor, x: Tensor, bias: Tensor) -> float:
    """Largest error over its bound: a sum of n terms is off by at most n eps sum |terms|."""
    w, inputs = weight.double(), x.double()
    exact = inputs @ w.T + bias.double()
    sizes = inputs.abs() @ w.abs().T + bias.double().abs()
    terms = (w != 0).sum(1) + 4
    return float(((found.double() - exact).abs() / (terms * EPS * sizes + 1e-37)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (4, 64), (5, 63), (7, 65), (33, 129), (50, 1000)):
        for density in (0.02, 0.5, 1.0):
            weight, bias = sample(rows, columns, density, dtype), torch.randn(rows)
            layer = Layer.from_dense(weight, Spec("linear", rows, columns), GEMV, bias, isa)
            for tokens in (1, 2, 3, 5, 8, 9, 19):
                x = torch.randn(tokens, columns)
                assert worst(layer.run(x), weight, x, bias) < 1, (rows, columns, density, tokens)


def test_the_bound_sees_a_planted_error() -> None:
    weight, bias, x = sample(20, 200, 0.3, torch.float32), torch.randn(20), torch.randn(3, 200)
    wrong = weight.clone()
    wrong[7, int(weight[7].nonzero()[0])] *= 1.1
    layer = Layer.from_dense(wrong, Spec("linear", 20, 200), GEMV, bias)
    assert worst(layer.run(x), weight, x, bias) > 10


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(activation: str) -> None:
    weight, bias, x = sample(37, 90, 0.3, torch.float32), torch.randn(37), torch.randn(2, 3, 90)
    added = torch.randn(2, 3, 37)
    layer = Layer.from_dense(weight, Spec("linear", 37, 90, activation=activation), GEMV, bias)
    wanted = ACTIVATIONS[activation](functional.linear(x, weight, bias) + added)
    assert torch.allclose(layer.run(x, added), wanted, atol=1e-5)


def test_threads_do_not_change_a_bit() -> None:
    weight = sample(403, 700, 0.4, torch.bfloat16)
    layer = Layer.from_dense(weight, Spec("linear", 403, 700), GEMV)
    x = torch.randn(3, 700)
    assert torch.equal(layer.run(x), layer.run(x, pool=Pool(3)))
    assert torch.equal(layer.run(x), layer.run(x, pool=Pool(2), threads=200))


def test_a_convolution_is_refused() -> None:
    with pytest.raises(UsageError, match="linear"):
        Layer.from_dense(torch.ones(2, 2, 1, 1), Spec("conv", 2, 2), GEMV)


def test_the_mask_is_what_makes_it_small() -> None:
    weight = sample(512, 1024, 0.5, torch.bfloat16)
    layer = Layer.from_dense(weight, Spec("linear", 512, 1024), GEMV)
    entries, kept = weight.numel(), int(weight.count_nonzero())
    assert entries / 8 + 2 * kept <= layer.nbytes < 1.02 * (entries / 8 + 2 * kept) + 5000


def test_the_benchmark_runs_and_judges_itself(tmp_path: Path) -> None:
    gemv.run(quick=True, folder=tmp_path)
    written = json.loads((tmp_path / "gemv.json").read_text())
    rows = written["result"]["rows"]
    assert len(rows) == 2 * len(gemv.SPARSITIES) * len(gemv.QUICK.tokens)
    # In half precision the output is rounded, once.
    bounds = {"float32": 1e-5, "bfloat16": 2.0**-8}
    assert all(row["relative_error"] < bounds[row["weights"]] for row in rows)
    assert all(row["sparse_ms"] > 0 and row["rounds"] >= 3 for row in rows)
    assert [goal["limit"] for goal in written["goals"]] == [1.6, 2.4]
    first = [r for r in rows if r["weights"] == "bfloat16" and r["tokens"] == 1]
    assert written["goals"][0]["found"] == first[0]["speedup"]
