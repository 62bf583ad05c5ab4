"""Layers of the native library, called from Python, against PyTorch in double precision."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from secateur.core.errors import UnknownName, UsageError
from secateur.formats.layouts import CSR, Bitmask
from secateur.runtime import library, native
from secateur.runtime.native import Layer, Pool, Spec, Variant
from secateur.runtime.stored import store

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

ISAS = native.isas() if library.available() else ()
EPS = 2.0**-24

ACTIVATIONS = {
    "none": lambda y, _: y,
    "relu": lambda y, _: y.relu(),
    "clip": lambda y, spec: y.clamp(spec.alpha, spec.beta),
    "gelu": lambda y, _: functional.gelu(y),
    "silu": lambda y, _: functional.silu(y),
    "hardswish": lambda y, _: functional.hardswish(y),
}

SPECS = {
    "linear": Spec("linear", 13, 37),
    "linear-relu": Spec("linear", 64, 32, activation="relu"),
    "1x1": Spec("conv", 19, 24, activation="silu"),
    "3x3": Spec("conv", 16, 5, kernel=(3, 3), pads=(1, 1, 1, 1), activation="gelu"),
    "3x3-stride": Spec("conv", 9, 7, kernel=(3, 3), stride=(2, 2), pads=(0, 1, 1, 0)),
    "grouped": Spec("conv", 12, 4, groups=3, kernel=(3, 1), dilation=(2, 1), pads=(2, 0, 2, 0)),
    "clip": Spec("conv", 8, 8, kernel=(1, 5), activation="clip", alpha=-0.5, beta=1.5),
    "hardswish": Spec("conv", 8, 16, stride=(2, 1), activation="hardswish"),
}


def sample(spec: Spec, *, density: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and input of a layer."""
    weight = torch.randn(spec.outputs, spec.columns)
    weight *= torch.rand_like(weight) < density
    weight = weight.reshape(spec.outputs, spec.inputs, *spec.kernel)
    if spec.kind == "linear":
        return weight.flatten(1), torch.randn(spec.outputs), torch.randn(2, 11, spec.inputs)
    return weight, torch.randn(spec.outputs), torch.randn(2, spec.inputs * spec.groups, 9, 14)


def linear_part(spec: Spec, weight: Tensor, x: Tensor) -> Tensor:
    """Weights times inputs."""
    if spec.kind == "linear":
        return functional.linear(x, weight)
    top, left, bottom, right = spec.pads
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(
        padded, weight, stride=spec.stride, dilation=spec.dilation, groups=spec.groups
    )


def along_rows(spec: Spec, bias: Tensor) -> Tensor:
    return bias if spec.kind == "linear" else bias.reshape(-1, 1, 1)


def expected(
    spec: Spec, weight: Tensor, bias: Tensor | None, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output in double precision, and how far a float32 kernel may be from it.

    A sum of n terms in any order is off by at most ``n * eps * sum |term|`` (Higham, 4.4), where
    bias and residual are terms as well. No activation here has a slope above 1.13, and it adds a
    few roundings of its own: 8 eps of what goes in or comes out.
    """
    terms = [linear_part(spec, weight.double(), x.double())]
    sizes = [linear_part(spec, weight.double().abs(), x.double().abs())]
    for extra in (None if bias is None else along_rows(spec, bias), residual):
        if extra is not None:
            terms.append(extra.double().expand_as(terms[0]))
            sizes.append(terms[-1].abs())
    n = spec.columns + 2
    total, size = sum(terms), sum(sizes)
    y = ACTIVATIONS[spec.activation](total, spec)
    return y, 1.13 * n * EPS * size + 8 * EPS * (size + y.abs()) + 1e-37


def require_close(got: Tensor | np.ndarray[Any, Any], wanted: tuple[Tensor, Tensor]) -> None:
    """Refuse another shape or type, and any value beyond its bound."""
    y, bound = wanted
    got = torch.as_tensor(got)
    assert got.dtype == torch.float32
    assert got.shape == y.shape
    worst = ((got.double() - y).abs() / bound).max() if y.numel() else torch.zeros(())
    assert worst <= 1, f"{worst:.3g} times the bound"


def first(spec: Spec, isa: str | None = None) -> Variant:
    return native.candidates(spec, 126, 0.3, isa)[0]


def test_few_tokens_leave_one_kernel_worth_timing() -> None:
    def families(spec: Spec, positions: int, density: float) -> set[str]:
        return {v.family for v in native.candidates(spec, positions, density)}

    linear, conv = Spec("linear", 64, 96), Spec("conv", 64, 96)
    assert families(linear, 1, 0.4) == families(linear, 2, 0.4) == {"gemv"}
    assert {"gemv", "list"} < families(linear, 1, 0.01)
    assert {"gemv", "list"} < families(linear, 3, 0.4)
    assert "list" in families(conv, 1, 0.4)


# --- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECS)
def test_every_candidate_computes_the_layer(name: str, isa: str) -> None:
    spec = SPECS[name]
    weight, bias, x = sample(spec)
    residual = torch.randn_like(linear_part(spec, weight, x))
    plain, full = expected(spec, weight, None, x), expected(spec, weight, bias, x, residual)
    for variant in native.candidates(spec, 126, 0.3, isa):
        layer = Layer.from_dense(weight, spec, variant, bias, isa)
        require_close(layer.run(x, residual), full)
        require_close(Layer.from_dense(weight, spec, variant, isa=isa).run(x), plain)
        assert layer.nonzeros == int((weight != 0).sum())
        assert layer.nbytes > 0


@pytest.mark.parametrize("layout", ["dense", "bitmask", "csr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_types_of_weights(layout: str, dtype: torch.dtype) -> None:
    spec = Spec("conv", 6, 300)  # counts need two bytes, columns too
    weight, bias, x = sample(spec)
    weight[3] = 0
    weight[4] = 1.25
    weight = weight.to(dtype)
    layer = Layer.from_dense(weight, spec, first(spec), bias, layout=layout)
    require_close(layer.run(x), expected(spec, weight, bias, x))


def test_numpy_in_numpy_out() -> None:
    spec = SPECS["3x3"]
    weight, bias, x = sample(spec)
    layer = Layer.from_dense(weight.numpy(), spec, first(spec), bias.numpy())
    from_torch = layer.run(x)
    given = x.numpy()
    given.flags.writeable = False
    got = layer.run(given, residual=np.zeros(tuple(from_torch.shape), np.float32))
    assert isinstance(got, np.ndarray)
    assert isinstance(from_torch, Tensor)
    require_close(got, expected(spec, weight, bias, x))


def test_bfloat16_of_ml_dtypes_is_that_of_torch() -> None:
    weight = np.array([[0, 1.5], [-2, 0]], ml_dtypes.bfloat16)
    stored = store(weight, "bitmask")
    assert stored.values.dtype == torch.bfloat16
    assert stored.values.tolist() == [1.5, -2]


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 4, 32), (0, 32)])
def test_leading_axes_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    spec = SPECS["linear-relu"]
    weight, bias, _ = sample(spec)
    x = torch.randn(shape)
    layer = Layer.from_dense(weight, spec, first(spec), bias)
    require_close(layer.run(x), expected(spec, weight, bias, x))


@pytest.mark.parametrize("name", ["linear", "3x3", "grouped"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_pools(name: str, threads: int) -> None:
    spec = SPECS[name]
    weight, bias, x = sample(spec)
    pool = Pool(threads)
    assert pool.threads == threads
    layer = Layer.from_dense(weight, spec, first(spec), bias)
    wanted = expected(spec, weight, bias, x)
    require_close(layer.run(x, pool=pool), wanted)
    require_close(layer.run(x, pool=pool, threads=2), wanted)
    require_close(layer.run(x, threads=3), wanted)


@pytest.mark.parametrize("family", ["list", "depthwise"])
@pytest.mark.parametrize("threads", [-3, 0])
def test_fewer_threads_than_one_are_one(family: str, threads: int) -> None:
    spec = Spec("conv", 4, 1, 4, kernel=(3, 3), pads=(1, 1, 1, 1))
    weight, x = torch.randn(4, 1, 3, 3), torch.randn(1, 4, 5, 5)
    layer = Layer.from_dense(weight, spec, Variant(family, 1, 1))
    assert torch.equal(layer.run(x, threads=threads), layer.run(x))


@pytest.mark.parametrize("family", ["list", "depthwise"])
def test_an_empty_batch_has_the_shape_of_the_output(family: str) -> None:
    spec = Spec("conv", 4, 1, 4, kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    layer = Layer.from_dense(torch.ones(4, 1, 3, 3), spec, Variant(family, 1, 1))
    assert layer.run(torch.ones(0, 4, 9, 8)).shape == (0, 4, 5, 4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["list", "gemv"])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_nothing_is_left_of_large_negative_numbers(activation: str, family: str, isa: str) -> None:
    spec = Spec("linear", 16, 1, activation=activation)
    layer = Layer.from_dense(torch.ones(16, 1), spec, Variant(family, 1, 1), isa=isa)
    large = -torch.logspace(2, 38, 37).unsqueeze(1)
    assert layer.run(large).abs().max() <= 1e-30
    assert (layer.run(-large) == -large).all()


def test_many_lengths_share_what_was_laid_out_for_a_few_tiles() -> None:
    spec = Spec("linear", 64, 32)
    layer = Layer.from_dense(torch.ones(64, 32), spec, Variant("list", 1, 8))
    held = []
    for tokens in range(1, 300):
        layer.run(torch.ones(tokens, 32))
        held.append(layer.nbytes)
    assert held == sorted(held)  # nothing was dropped and made again
    assert held[-1] == held[150]


@pytest.mark.parametrize("threads", [1, 4, 32])
def test_the_memory_of_lists_is_what_the_docs_say(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 1024, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.9] = 0
    layer = Layer.from_dense(weight, Spec("linear", 128, 1024), Variant("list", 1, 8))
    held = []
    for tokens in range(1, 600, 7):
        layer.run(torch.ones(tokens, 1024), threads=threads)
        held.append(layer.nbytes / layer.nonzeros)
    assert 13 < held[0] < 16
    assert held[0] + 6 * 6 < held[-1] < held[0] + 7 * 20


def test_a_run_that_is_refused_leaves_the_layer_whole() -> None:
    # Its taps are so many, and so far apart, that a list cannot say where they are.
    spec = Spec("conv", 1, 1, kernel=(129, 129), dilation=(1024, 1024), pads=(1024 * 64,) * 4)
    layer = Layer.from_dense(torch.ones(1, 1, 129, 129), spec, Variant("list", 1, 1))
    before = layer.nbytes
    for _ in range(2):
        with pytest.raises(UsageError, match="larger than 65536 floats"):
            layer.run(torch.ones(1, 1, 1, 1))
    assert layer.nbytes == before


def test_taps_that_are_far_apart_are_found_all_the_same() -> None:
    spec = Spec("conv", 1, 3, kernel=(2, 2), dilation=(1024, 1024), pads=(1024,) * 4)
    layer = Layer.from_dense(torch.ones(1, 3, 2, 2), spec, Variant("list", 1, 14))
    found = layer.run(torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1))[0, 0]
    assert found.shape == (1025, 1025)
    assert found[::1024, ::1024].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert found.count_nonzero() == 4


def test_one_layer_and_one_pool_from_many_threads() -> None:
    spec = SPECS["3x3"]
    weight, bias, _ = sample(spec)
    layer, pool = Layer.from_dense(weight, spec, first(spec), bias), Pool(2)
    inputs = [torch.randn(1, 5, 8 + i, 8) for i in range(4)]
    wanted = [expected(spec, weight, bias, x) for x in inputs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(30):
                require_close(layer.run(inputs[i], pool=pool), wanted[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_weights_are_copied_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    real = library.load().secateur_layer_destroy

    class Watched:
        """The library, with an eye on what is destroyed."""

        def __getattr__(self, name: str) -> Any:
            return getattr(library.load(), name)

        def secateur_layer_destroy(self, address: int) -> None:
            freed.append(address)
            real(address)

    monkeypatch.setattr(native, "load", Watched)
    spec = SPECS["linear"]
    weight, bias, x = sample(spec)
    wanted = expected(spec, weight, bias, x)
    layer = Layer.from_dense(weight, spec, first(spec), bias)
    weight.fill_(math.nan)
    bias.fill_(math.nan)
    require_close(layer.run(x), wanted)
    address, alive = layer.address, weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    assert freed == [address]


def test_daemon_threads_may_run_a_layer_until_the_process_ends() -> None:
    program = """
import threading, time
import numpy as np
from secateur.runtime.native import Layer, Pool, Spec, Variant

weight = np.ones((512, 512), np.float32)
layer, pool = Layer.from_dense(weight, Spec("linear", 512, 512), Variant("list", 1, 4)), Pool(2)
x = np.ones((1024, 512), np.float32)

def work():
    while True:
        layer.run(x, pool=pool)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# --- refused ---------------------------------------------------------------------------------------


def linear_layer() -> Layer:
    spec = Spec("linear", 3, 4)
    return Layer.from_dense(torch.ones(3, 4), spec, first(spec))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.ones(2, 4, dtype=torch.float64), "its type is torch.float64"),
        (torch.ones(2, 4, dtype=torch.float16), "its type is torch.float16"),
        (np.ones((2, 4), np.int32), "its type is int32"),
        (np.ones((2, 4), ">f4"), "its type is >f4"),
        (torch.ones(4, 2).T, "not contiguous"),
        (np.ones((2, 8), np.float32)[:, ::2], "not contiguous"),
        (torch.ones(2, 4).to_sparse(), "torch.sparse_coo on cpu"),
        (torch.ones(2, 4, device="meta"), "on meta"),
        (torch.ones(2, 5), "the layer needs (..., 4)"),
        (torch.ones(()), "the layer needs (..., 4)"),
    ],
)
def test_inputs_that_cannot_be_read(x: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        linear_layer().run(x)
    assert words in str(caught.value)
    assert all(caught.value.parts().values())


def test_residual_of_another_shape() -> None:
    with pytest.raises(UsageError, match=r"the residual of shape \(3,\)"):
        linear_layer().run(torch.ones(2, 4), residual=torch.ones(3))


@pytest.mark.parametrize("shape", [(4, 9, 9), (1, 5, 9, 9), (1, 4, 1, 9)])
def test_images_that_do_not_fit(shape: tuple[int, ...]) -> None:
    spec = Spec("conv", 3, 4, kernel=(3, 3))
    layer = Layer.from_dense(torch.ones(3, 4, 3, 3), spec, first(spec))
    with pytest.raises(UsageError, match="running a sparse layer"):
        layer.run(torch.ones(shape))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(4, 3), "3 rows of 4 columns"),
        (torch.ones(12), "3 rows of 4 columns"),
        (torch.ones(()), "3 rows of 4 columns"),
        (torch.ones(3, 4, dtype=torch.float64), "float32, bfloat16 and float16"),
        (torch.ones(3, 4, dtype=torch.int8), "float32, bfloat16 and float16"),
    ],
)
def test_weights_that_do_not_fit(weight: Tensor, words: str) -> None:
    spec = Spec("linear", 3, 4)
    with pytest.raises(UsageError, match=words):
        Layer.from_dense(weight, spec, first(spec))


@pytest.mark.parametrize(
    ("spec", "variant"),
    [
        (Spec("lienar", 3, 4), Variant("list", 1, 4)),
        (Spec("linear", 3, 4, activation="rleu"), Variant("list", 1, 4)),
        (Spec("linear", 3, 4), Variant("lists", 1, 4)),
    ],
)
def test_unknown_names_suggest_the_nearest(spec: Spec, variant: Variant) -> None:
    with pytest.raises(UnknownName, match="Did you mean"):
        Layer.from_dense(torch.ones(3, 4), spec, variant)


def test_unknown_layout() -> None:
    with pytest.raises(UnknownName, match="layout 'coo'"):
        store(torch.ones(3, 4), "coo")


@pytest.mark.parametrize("call", ["layer", "candidates", "lanes"])
def test_unknown_instruction_set(call: str) -> None:
    spec = Spec("linear", 3, 4)
    with pytest.raises(UsageError, match="mmx"):
        {
            "layer": lambda: Layer.from_dense(torch.ones(3, 4), spec, first(spec), isa="mmx"),
            "candidates": lambda: native.candidates(spec, 8, 0.5, isa="mmx"),
            "lanes": lambda: native.lanes("mmx"),
        }[call]()


@pytest.mark.parametrize("variant", [Variant("list", 1, 0), Variant("list", 1, 999)])
def test_variants_that_do_not_exist(variant: Variant) -> None:
    with pytest.raises(UsageError, match="kernel list"):
        Layer.from_dense(torch.ones(3, 4), Spec("linear", 3, 4), variant)


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_pools_of_no_or_too_many_threads(threads: int) -> None:
    with pytest.raises(UsageError, match="1 to 256") as caught:
        Pool(threads)
    assert all(caught.value.parts().values())


# --- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [200, 255, 256, 257, 70_000])
def test_stored_weights_are_those_of_a_bundle(columns: int) -> None:
    weight = torch.randn(4, columns) * (torch.rand(4, columns) < 0.1)
    mask = weight != 0
    csr, bitmask = CSR().pack(weight, mask), Bitmask().pack(weight, mask)
    got = store(weight, "csr")
    counts, places = (part.numpy().tobytes() for part in (csr["row_counts"], csr["columns"]))
    assert got.index.numpy().tobytes() == counts + places
    assert got.values.equal(csr["values"])
    assert store(weight, "bitmask").index.equal(bitmask["bitmask"])
    sizes = {name: store(weight, name).nbytes for name in ("dense", "bitmask", "csr")}
    assert store(weight).nbytes == min(sizes.values())


def test_negative_zero_is_dropped_and_nan_kept() -> None:
    stored = store(torch.tensor([[-0.0, math.nan, 0.0, 2.0]]), "bitmask")
    assert stored.index.tolist() == [0b1010]
    assert stored.values.isnan().tolist() == [True, False]


# --- the comparison can fail -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["value", "nan", "shape", "type", "weight"])
def test_planted_errors_are_caught(fault: str) -> None:
    spec = SPECS["linear"]
    weight, bias, x = sample(spec)
    wanted = expected(spec, weight, bias, x)
    y = Layer.from_dense(weight, spec, first(spec), bias).run(x)
    require_close(y, wanted)
    if fault == "value":
        y[1, 2, 3] += 2 * wanted[1][1, 2, 3]
    elif fault == "nan":
        y[0, 0, 0] = math.nan
    elif fault == "shape":
        y = y[:1]
    elif fault == "type":
        y = y.double()
    else:
        weight[5, int(weight[5].abs().argmax())] *= 1.0001
        y = Layer.from_dense(weight, spec, first(spec), bias).run(x)
    with pytest.raises(AssertionError):
        require_close(y, wanted)
