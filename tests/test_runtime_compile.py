"""Compiling ONNX files: what is fused, what is not, and that the result computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402 - only where it is installed

from secateur.core.errors import (  # noqa: E402
    DataError,
    FileError,
    FormatError,
    UnknownName,
    UsageError,
)
from secateur.runtime import available  # noqa: E402
from secateur.runtime.compiler import compile as compiling  # noqa: E402
from secateur.runtime.compiler import whole  # noqa: E402
from secateur.runtime.compiler.activations import GELU, recognise  # noqa: E402
from secateur.runtime.compiler.choose import Timed, Timing  # noqa: E402
from secateur.runtime.compiler.compile import compile_onnx, metadata  # noqa: E402
from secateur.runtime.compiler.fuse import sites  # noqa: E402
from secateur.runtime.compiler.graph import Graph, read_model  # noqa: E402
from secateur.runtime.compiler.lone import Lone  # noqa: E402
from secateur.runtime.compiler.masked import prune_onnx  # noqa: E402
from secateur.runtime.compiler.rebuild import dense_model  # noqa: E402
from secateur.runtime.compiler.sample import Sample  # noqa: E402
from secateur.runtime.compiler.site import Site  # noqa: E402
from secateur.runtime.compiler.verify import largest_error, require_same  # noqa: E402
from secateur.runtime.compiler.whole import plans  # noqa: E402
from secateur.runtime.native import Variant, has_half  # noqa: E402
from secateur.runtime.operators import is_sparse  # noqa: E402
from secateur.runtime.race import Raced, open_session  # noqa: E402

native = pytest.mark.skipif(not available(), reason="the native library was not built")

Weights = dict[str, np.ndarray]


def sparse(*shape: int, seed: int = 0) -> np.ndarray:
    """A weight with 80 % zeros, at least one entry kept."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < 0.8] = 0
    weight.flat[0] = 1
    return weight


def dense(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model(body: str, weights: Weights, version: int = 17, ir: int = 8) -> Any:
    """A model from ONNX's text form, with weights added."""
    text = f'<ir_version: {ir}, opset_import: ["" : {version}, "com.microsoft" : 1]> net {body}'
    made = onnx.parser.parse_model(text)
    for name, value in weights.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def write(path: Path, made: Any) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def run(made: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(open_session(made, 1).run(None, feeds))


X4 = "(float[N,8,6,6] x) => (float[N,M,H,W] y)"
X3 = "(float[N,8,12] x) => (float[N,M,L] y)"
X2 = "(float[N,T,8] x) => (float[N,T,M] y)"
FLAT = "(float[N,8] x) => (float[N,M] y)"
W1 = {"w": sparse(16, 8, 1, 1)}
W3 = {"w": sparse(16, 8, 3, 3), "b": dense(16)}
WL = {"w": sparse(8, 16), "b": dense(16)}
BN = {
    "s": dense(16, seed=2),
    "t": dense(16, seed=3),
    "m": dense(16, seed=4),
    "v": np.abs(dense(16, seed=5)) + 0.1,
}
SAME = {"w": sparse(8, 8, 3, 3), "b": dense(8)}
ERF = {"q": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
SCALAR = {"three": np.float32(3), "six": np.float32(6), "zero": np.float32(0)}
PAD = "pads = [1,1,1,1]"

# name: (graph, weights, version of the operators, what stays beside one sparse operator)
FUSED: dict[str, tuple[str, Weights, int, list[str]]] = {
    "conv": (f"{X4} {{ y = Conv (x, w) }}", W1, 17, []),
    "conv, old operators": (f"{X4} {{ y = Conv <{PAD}> (x, w, b) }}", W3, 7, []),
    "conv, new operators": (f"{X4} {{ y = Conv <{PAD}> (x, w, b) }}", W3, 22, []),
    "stride and dilation": (
        f"{X4} {{ y = Conv <strides = [2,1], dilations = [1,2], pads = [1,2,0,2]> (x, w, b) }}",
        W3,
        17,
        [],
    ),
    "same upper": (
        f'{X4} {{ y = Conv <auto_pad = "SAME_UPPER", strides=[2,2]> (x, w) }}',
        W3,
        17,
        [],
    ),
    "same lower": (
        f'{X4} {{ y = Conv <auto_pad = "SAME_LOWER", strides=[2,2]> (x, w) }}',
        W3,
        17,
        [],
    ),
    "valid": (f'{X4} {{ y = Conv <auto_pad = "VALID"> (x, w) }}', W3, 17, []),
    "groups": (f"{X4} {{ y = Conv <group = 2> (x, w) }}", {"w": sparse(16, 4, 3, 3)}, 17, []),
    "depthwise": (
        f"{X4} {{ c = Conv <group = 8, {PAD}> (x, w) y = Relu (c) }}",
        {"w": dense(8, 1, 3, 3)},
        17,
        [],
    ),
    "batch normalisation": (
        f"{X4} {{ c = Conv (x, w) y = BatchNormalization (c, s, t, m, v) }}",
        {**W1, **BN},
        17,
        [],
    ),
    "old batch normalisation": (
        f"{X4} {{ c = Conv (x, w) y = BatchNormalization <epsilon = 0.01> (c, s, t, m, v) }}",
        {**W1, **BN},
        9,
        [],
    ),
    "batch normalisation after gemm": (
        f"{FLAT} {{ c = Gemm (x, w, b) y = BatchNormalization (c, s, t, m, v) }}",
        {**WL, **BN},
        17,
        [],
    ),
    "factor and term": (
        f"{X4} {{ c = Conv (x, w) d = Mul (f, c) e = Sub (d, g) h = Div (e, f) y = Add (g, h) }}",
        {**W1, "f": np.abs(dense(1, 16, 1, 1)) + 0.5, "g": dense(16, 1, 1)},
        17,
        [],
    ),
    "relu": (f"{X4} {{ c = Conv (x, w) y = Relu (c) }}", W1, 17, []),
    "clip of inputs": (
        f"{X4} {{ c = Conv (x, w) y = Clip (c, zero, six) }}",
        {**W1, **SCALAR},
        17,
        [],
    ),
    "clip of attributes": (
        f"{X4} {{ c = Conv (x, w) y = Clip <min = -0.5, max = 0.75> (c) }}",
        W1,
        9,
        [],
    ),
    "clip on one side": (
        f"{X4} {{ c = Conv (x, w) y = Clip (c, , three) }}",
        {**W1, **SCALAR},
        17,
        [],
    ),
    "relu6 as min and max": (
        f"{X4} {{ c = Conv (x, w) d = Max (c, zero) y = Min (six, d) }}",
        {**W1, **SCALAR},
        17,
        [],
    ),
    "gelu operator": (f"{X2} {{ c = MatMul (x, w) y = Gelu (c) }}", WL, 20, []),
    "gelu of torch": (
        f"""{X2} {{ c = MatMul (x, w) a = Add (b, c) d = Div (a, q) e = Erf (d)
        f = Add (e, one) g = Mul (a, f) y = Mul (g, half) }}""",
        {**WL, **ERF},
        17,
        [],
    ),
    "gelu, halved first": (
        f"""{X2} {{ c = MatMul (x, w) a = Add (c, b) h = Mul (half, a) r = Mul (a, i) e = Erf (r)
        f = Add (one, e) y = Mul (f, h) }}""",
        {**WL, **ERF, "i": np.array([0.5**0.5], np.float32)},
        17,
        [],
    ),
    "silu": (f"{X4} {{ c = Conv (x, w) s = Sigmoid (c) y = Mul (s, c) }}", W1, 17, []),
    "hardswish operator": (f"{X4} {{ c = Conv (x, w) y = HardSwish (c) }}", W1, 14, []),
    "hardswish of hardsigmoid": (
        f"""{X4} {{ c = Conv (x, w) s = HardSigmoid <alpha = 0.16666667, beta = 0.5> (c)
        y = Mul (c, s) }}""",
        W1,
        17,
        [],
    ),
    "hardswish of clip": (
        f"""{X4} {{ c = Conv (x, w) a = Add (c, three) k = Clip (a, zero, six) m = Mul (c, k)
        y = Div (m, six) }}""",
        {**W1, **SCALAR},
        17,
        [],
    ),
    "residual": (f"{X4} {{ c = Conv <{PAD}> (x, w, b) y = Add (c, x) }}", SAME, 17, []),
    "residual on the left": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) a = Add (x, c) y = Relu (a) }}",
        SAME,
        17,
        [],
    ),
    "bias after residual": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) a = Add (x, c) d = Add (a, g) y = Relu (d) }}",
        {**SAME, "g": dense(8, 1, 1)},
        17,
        [],
    ),
    "residual made elsewhere": (
        f"{X4} {{ r = Tanh (x) c = Conv <{PAD}> (x, w) y = Add (r, c) }}",
        SAME,
        17,
        ["Tanh"],
    ),
    "residual made later": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) r = Tanh (x) a = Add (c, r) y = Relu (a) }}",
        SAME,
        17,
        ["Tanh"],
    ),
    "dropout": (f"{X4} {{ c = Conv (x, w) d = Dropout (c) y = Relu (d) }}", W1, 17, []),
    "gemm": (f"{FLAT} {{ y = Gemm (x, w, b) }}", WL, 17, []),
    "gemm with factors": (
        f"{FLAT} {{ c = Gemm <transB = 1, alpha = 0.5, beta = -2.0> (x, w, b) y = Relu (c) }}",
        {"w": sparse(16, 8), "b": dense(1, 16)},
        17,
        [],
    ),
    "linear over tokens": (f"{X2} {{ c = MatMul (x, w) y = Add (c, b) }}", WL, 17, []),
    "linear with residual": (
        f"{X2} {{ c = MatMul (x, w) d = Add (c, b) y = Add (d, x) }}",
        {"w": sparse(8, 8), "b": dense(8)},
        17,
        [],
    ),
    "weight turned in the graph": (
        f"{X2} {{ v = Transpose <perm = [1,0]> (w) i = Identity (v) y = MatMul (x, i) }}",
        {"w": sparse(16, 8)},
        17,
        [],
    ),
    "weight reshaped in the graph": (
        f"{X4} {{ i = Identity (w) v = Unsqueeze (i, a) y = Conv (x, v) }}",
        {"w": sparse(16, 8), "a": np.array([2, 3])},
        17,
        [],
    ),
    "one axis": (
        f"{X3} {{ c = Conv <strides = [2], pads = [2,1], dilations = [2]> (x, w, b) y = Relu (c) }}",
        {"w": sparse(16, 8, 3), "b": dense(16)},
        17,
        ["Unsqueeze", "Squeeze"],
    ),
    "one axis, old operators": (
        f"{X3} {{ c = Conv <pads = [1,1]> (x, w) y = Add (c, x) }}",
        {"w": sparse(8, 8, 3)},
        12,
        ["Unsqueeze", "Unsqueeze", "Squeeze"],
    ),
}

TWO = "(float[N,8,6,6] x) => (float[N,8,6,6] y, float[N,8,6,6] z)"
# The same, but the last part is what must not have been taken in.
REFUSED: dict[str, tuple[str, Weights, int, list[str]]] = {
    "used twice": (
        f"{TWO} {{ c = Conv <{PAD}> (x, w) y = Relu (c) z = Tanh (c) }}",
        SAME,
        17,
        ["Relu", "Tanh"],
    ),
    "an output": (f"{TWO} {{ z = Conv <{PAD}> (x, w) y = Relu (z) }}", SAME, 17, ["Relu"]),
    "an output in an activation": (
        f"{TWO} {{ c = Conv <{PAD}> (x, w) z = Sigmoid (c) y = Mul (c, z) }}",
        SAME,
        17,
        ["Sigmoid", "Mul"],
    ),
    "added to itself": (f"{X4} {{ c = Conv (x, w) y = Add (c, c) }}", W1, 17, ["Add"]),
    "used in a branch": (
        f"""(float[N,8,6,6] x, bool p) => (float[N,8,6,6] y, float[N,8,6,6] z)
        {{ c = Conv <{PAD}> (x, w) y = Relu (c)
           z = If (p) <then_branch = a () => (float[N,8,6,6] t) {{ t = Identity (c) }},
                       else_branch = b () => (float[N,8,6,6] e) {{ e = Neg (x) }}> }}""",
        {"w": SAME["w"]},
        17,
        ["Relu", "If"],
    ),
    "residual of one channel": (
        f"""{X4} {{ r = ReduceMean <axes = [1], keepdims = 1> (x)
        c = Conv <{PAD}> (x, w) y = Add (c, r) }}""",
        SAME,
        17,
        ["ReduceMean", "Add"],
    ),
    "residual of one sample": (
        "(float[N,8,6,6] x, float[1,8,6,6] r) => (float[N,8,6,6] y)"
        f" {{ c = Conv <{PAD}> (x, w) y = Add (c, r) }}",
        SAME,
        17,
        ["Add"],
    ),
    "residual of another batch": (
        "(float[N,8,6,6] x, float[K,8,6,6] r) => (float[N,8,6,6] y)"
        f" {{ c = Conv <{PAD}> (x, w) y = Add (c, r) }}",
        SAME,
        17,
        ["Add"],
    ),
    "factor after residual": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) a = Add (c, x) y = Mul (a, f) }}",
        {**SAME, "f": dense(8, 1, 1)},
        17,
        ["Mul"],
    ),
    "batch normalisation after residual": (
        f"""{X4} {{ c = Conv <{PAD}> (x, w) a = Add (c, x)
        y = BatchNormalization (a, s, t, m, v) }}""",
        {**SAME, **{k: v[:8] for k, v in BN.items()}},
        17,
        ["BatchNormalization"],
    ),
    "residual after activation": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) a = Relu (c) y = Add (a, x) }}",
        SAME,
        17,
        ["Add"],
    ),
    "bias along the width": (
        f"{X4} {{ c = Conv <{PAD}> (x, w) y = Add (c, g) }}",
        {**SAME, "g": dense(6)},
        17,
        ["Add"],
    ),
    "bias that adds an axis": (
        "(float[N,8] x) => (float[K,N,16] y) { c = Gemm (x, w, b) y = Add (c, g) }",
        {**WL, "g": dense(1, 1, 16)},
        17,
        ["Add"],
    ),
    "clip of an input": (
        f"(float[N,8,6,6] x, float m) => (float[N,8,6,6] y) {{ c = Conv <{PAD}> (x, w)"
        " y = Clip (c, m) }",
        SAME,
        17,
        ["Clip"],
    ),
    "gelu with tanh": (
        f'{X2} {{ c = MatMul (x, w) y = Gelu <approximate = "tanh"> (c) }}',
        WL,
        20,
        ["Gelu"],
    ),
    "leaky relu of max": (
        f"{X4} {{ c = Conv (x, w) l = Mul (c, f) y = Max (c, l) }}",
        {**W1, "f": np.float32(0.1)},
        17,
        ["Mul", "Max"],
    ),
}

# Nothing sparse at all.
NEVER: dict[str, tuple[str, Weights, int]] = {
    "few zeros": (f"{X4} {{ y = Conv (x, w) }}", {"w": dense(16, 8, 1, 1)}, 17),
    "weight is an input": (
        "(float[N,8] x, float[8,16] w) => (float[N,16] y) { y = MatMul (x, w) }",
        {},
        17,
    ),
    "weight on the left": (
        "(float[8,N] x) => (float[16,N] y) { y = MatMul (w, x) }",
        {"w": sparse(16, 8)},
        17,
    ),
    "weight of three axes": (
        "(float[2,N,8] x) => (float[2,N,16] y) { y = MatMul (x, w) }",
        {"w": sparse(2, 8, 16)},
        17,
    ),
    "transA": (
        "(float[8,N] x) => (float[N,16] y) { y = Gemm <transA = 1> (x, w, b) }",
        WL,
        17,
    ),
    "bias of rows": (
        "(float[4,8] x) => (float[4,16] y) { y = Gemm (x, w, r) }",
        {**WL, "r": dense(4, 1)},
        17,
    ),
    "same of an open size": (
        '(float[N,8,H,W] x) => (float[N,16,K,L] y) { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }',
        W3,
        17,
    ),
    "another domain": (
        "(float[N,8] x) => (float[N,16] y) { y = com.microsoft.MatMul (x, w) }",
        WL,
        17,
    ),
}


def feeds_of(made: Any, batch: int) -> dict[str, np.ndarray]:
    sample = Sample(batch=batch, seed=batch)
    return sample.feeds(Graph.of(made))


def check_same(first: Any, second: Any, batches: tuple[int, ...] = (1, 3)) -> None:
    for batch in batches:
        feeds = feeds_of(first, batch)
        assert largest_error(run(first, feeds), run(second, feeds)) < 1e-5


@native
@pytest.mark.parametrize("name", FUSED)
def test_what_follows_a_layer_becomes_part_of_it(name: str, tmp_path: Path) -> None:
    body, weights, version, beside = FUSED[name]
    made = model(body, weights, version)
    path, out = write(tmp_path / "a.onnx", made), tmp_path / "b.onnx"
    found = compile_onnx(path, out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    kinds = [node.op_type for node in compiled.graph.node]
    assert sorted(k for k in kinds if not k.startswith("Sparse")) == sorted(beside)
    assert sum(map(is_sparse, compiled.graph.node)) == 1
    assert found.error < 1e-5
    check_same(made, compiled)
    # The inverse, which bench uses.
    ordinary = dense_model(compiled)
    onnx.checker.check_model(ordinary)
    check_same(made, ordinary)


@native
@pytest.mark.parametrize("name", REFUSED)
def test_what_others_see_is_not_taken_in(name: str, tmp_path: Path) -> None:
    body, weights, version, left = REFUSED[name]
    made = model(body, weights, version)
    path, out = write(tmp_path / "a.onnx", made), tmp_path / "b.onnx"
    sample = Sample()
    if "residual of another batch" in name or "residual of one sample" in name:
        sample = Sample(batch=2, shapes={"r": (1, 8, 6, 6)})
    compile_onnx(path, out, choose="first", threads=1, sample=sample)
    compiled = onnx.load(str(out))
    kinds = [node.op_type for node in compiled.graph.node if not is_sparse(node)]
    assert kinds == left
    assert sum(map(is_sparse, compiled.graph.node)) == 1
    feeds = sample.feeds(Graph.of(made))
    assert largest_error(run(made, feeds), run(compiled, feeds)) < 1e-5


@pytest.mark.parametrize("name", NEVER)
def test_layers_that_no_operator_can_replace(name: str) -> None:
    body, weights, version = NEVER[name]
    assert sites(Graph.of(model(body, weights, version))) == ()


def test_an_approximation_of_gelu_is_not_gelu() -> None:
    x = np.linspace(-9, 9, 4001)
    tanh = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert recognise(x, tanh) is None
    assert recognise(x, x / (1 + np.exp(-1.702 * x))) is None
    from math import erf

    exact = np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in x])
    found = recognise(x, exact)
    assert found is not None
    assert found.kind == GELU


@native
def test_two_layers_meet_in_one_addition(tmp_path: Path) -> None:
    """The later one has the addition, and the other is its residual."""
    body = f"{X4} {{ a = Conv (x, w) c = Conv <{PAD}> (x, k) s = Add (a, c) y = Relu (s) }}"
    made = model(body, {**W1, "k": sparse(16, 8, 3, 3, seed=9)})
    path, out = write(tmp_path / "a.onnx", made), tmp_path / "b.onnx"
    compile_onnx(path, out, choose="first", threads=1)
    first, second = onnx.load(str(out)).graph.node
    assert len(first.input) == 3
    assert list(second.input[3:]) == ["", first.output[0]]
    check_same(made, onnx.load(str(out)))


@native
def test_the_sparse_one_of_two_layers_has_the_addition(tmp_path: Path) -> None:
    body = f"{X4} {{ a = Conv (x, w) c = Conv <{PAD}> (x, k) s = Add (a, c) y = Relu (s) }}"
    made = model(body, {**W1, "k": dense(16, 8, 3, 3)})
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    assert [node.op_type for node in compiled.graph.node] == ["Conv", "SparseConv"]
    check_same(made, compiled)


@native
def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    body = f"{X4} {{ c = Conv <{PAD}> (x, w, b) d = Relu (c) e = Conv <{PAD}> (d, w, b) y = Relu (e) }}"
    made = model(body, SAME)
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    first, second = compiled.graph.node
    assert list(first.input[1:4]) == list(second.input[1:4])
    assert len(compiled.graph.initializer) == 3
    check_same(made, compiled)


@native
def test_a_weight_shared_with_a_dense_node_stays(tmp_path: Path) -> None:
    body = "(float[N,8] x) => (float[N,16] y, float[8,16] z) { y = MatMul (x, w) z = Neg (w) }"
    made = model(body, WL)
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    assert "w" in {tensor.name for tensor in compiled.graph.initializer}
    check_same(made, compiled)


@native
def test_names_that_are_taken(tmp_path: Path) -> None:
    """A node without a name, and a value called as a part of another node's weight would be."""
    body = "(float[N,8] x) => (float[N,8] y) { c = MatMul (x, w) d = Tanh (c) y = MatMul (d, v) }"
    made = model(body, {"w": sparse(8, 8), "v": sparse(8, 8, seed=3)})
    made.graph.node[0].name = "n"
    made.graph.node[1].name = "y"
    made.graph.node[0].output[0] = made.graph.node[1].input[0] = "n.values"
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    assert sum(map(is_sparse, compiled.graph.node)) == 2
    check_same(made, compiled)


@native
def test_weights_that_are_inputs_too_are_constants(tmp_path: Path) -> None:
    body = "(float[N,8] x, float[8,16] w) => (float[N,16] y) { y = MatMul (x, w) }"
    made = model(body, {"w": WL["w"]}, version=9, ir=3)
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    assert [i.name for i in compiled.graph.input] == ["x"]
    assert [node.op_type for node in compiled.graph.node] == ["SparseLinear"]
    check_same(read_model(tmp_path / "a.onnx"), compiled)


@native
def test_the_number_of_axes_is_found_by_running_the_model(tmp_path: Path) -> None:
    """Shape inference knows nothing about operators of others."""
    body = "(float[N,T,8] x) => (float[N,T,16] y) { g = com.microsoft.BiasGelu (x, a) y = MatMul (g, w) }"
    made = model(body, {**WL, "a": dense(8)})
    assert Graph.of(made).shape("g") is None
    out = tmp_path / "b.onnx"
    compile_onnx(write(tmp_path / "a.onnx", made), out, choose="first", threads=1)
    compiled = onnx.load(str(out))
    assert [node.op_type for node in compiled.graph.node] == ["BiasGelu", "SparseLinear"]
    check_same(made, compiled)


def test_made_up_inputs_suit_what_reads_them() -> None:
    body = """(int64[N,T] ids, int64[N,T] token_type, float[N,T] mask, int32[N,T] positions)
    => (float[N,T,4] y) { c = Cast <to = 7> (ids) y = Gather (w, c) }"""
    graph = Graph.of(model(body, {"w": dense(50, 4)}))
    found = Sample(batch=2, shapes={"mask": (2, 9)}).feeds(graph)
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(found, (2, 9))
    assert 2 < found["ids"].max() < 50
    assert found["token_type"].max() == 0
    assert found["mask"].min() == 1
    assert found["positions"][1].tolist() == list(range(9))
    larger = Sample(batch=2).larger(graph)
    assert larger is not None
    assert larger.feeds(graph)["ids"].shape == (3, 128)


def test_a_graph_out_of_order_is_put_in_order() -> None:
    made = model(f"{X4} {{ c = Conv (x, w) y = Relu (c) }}", W1)
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    assert [node.op_type for node in Graph.of(made).nodes] == ["Conv", "Relu"]


def test_nodes_that_wait_for_one_another_are_refused() -> None:
    made = model(f"{X4} {{ c = Add (x, y) y = Relu (c) }}", {})
    with pytest.raises(FormatError, match="2 of them wait"):
        Graph.of(made)


# --- errors ------------------------------------------------------------------------------------


def altered(make: Any) -> Any:
    """A rewriting of graphs that gets one weight wrong."""

    def wrong(*args: Any) -> Any:
        made = make(*args)
        for tensor in made.graph.initializer:
            if tensor.name.endswith(".values"):
                values = np.array(numpy_helper.to_array(tensor))
                values[0] += 0.05
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                break
        return made

    return wrong


@native
def test_a_wrong_weight_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(f"{X4} {{ c = Conv (x, w) y = Relu (c) }}", W1)
    path, out = write(tmp_path / "a.onnx", made), tmp_path / "b.onnx"
    monkeypatch.setattr(whole, "sparse_model", altered(whole.sparse_model))
    with pytest.raises(DataError, match="differs from the dense one"):
        compile_onnx(path, out, choose="first", threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx"]


def test_the_comparison_of_outputs_sees_every_kind_of_difference() -> None:
    one = np.array([1.0, -2.0], np.float32)
    assert largest_error([one], [one]) == 0
    assert largest_error([one], [one + np.float32(0.5)]) == 0.25
    assert largest_error([one], [np.array([1.0, np.nan], np.float32)]) == np.inf
    assert largest_error([np.array([np.inf, 1.0])], [np.array([-np.inf, 1.0])]) == np.inf
    assert largest_error([np.array([np.nan, 1.0])], [np.array([np.nan, 1.0])]) == 0
    assert largest_error([np.arange(3)], [np.array([0, 1, 3])]) == np.inf
    assert largest_error([one], [one.astype(np.float64)]) == np.inf
    with pytest.raises(DataError, match="differs"):
        require_same(float("nan"), "compiling")


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        compile_onnx(tmp_path / "none.onnx", tmp_path / "b.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(FormatError):
        compile_onnx(tmp_path / "text.onnx", tmp_path / "b.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(FormatError, match="no graph"):
        compile_onnx(tmp_path / "empty.onnx", tmp_path / "b.onnx")


@native
@pytest.mark.parametrize(
    "body",
    [
        f"{X4} {{ y = Conv (x) }}",
        f"{X4} {{ y = Conv (x, w, nowhere) }}",
        f"{X4} {{ y = Clip (x, w) z = BatchNormalization (y, w) }}",
        f"{X4} {{ y = Unheard (x) }}",
        f"{X2} {{ y = Gemm (x, w) }}",
    ],
)
def test_models_that_onnx_runtime_refuses_are_refused(body: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", model(body, W1))
    with pytest.raises(FormatError, match="ONNX Runtime refuses it"):
        compile_onnx(path, tmp_path / "b.onnx", choose="first")


@native
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_cut_file_is_refused(kept: float, tmp_path: Path) -> None:
    whole_file = model(
        f"{X4} {{ c = Conv <{PAD}> (x, w, b) y = Relu (c) }}", W3
    ).SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole_file[: int(kept * len(whole_file))])
    with pytest.raises((FormatError, UsageError)):
        compile_onnx(path, tmp_path / "b.onnx", choose="first")
    assert not (tmp_path / "b.onnx").exists()


def test_wishes_that_cannot_be_met(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", model(f"{X2} {{ y = MatMul (x, w) }}", WL))
    with pytest.raises(UnknownName, match="precision"):
        compile_onnx(path, tmp_path / "b.onnx", precision="int3")
    with pytest.raises(UnknownName, match="way to choose"):
        compile_onnx(path, tmp_path / "b.onnx", choose="guess")
    with pytest.raises(UsageError, match="none of that name"):
        compile_onnx(path, tmp_path / "b.onnx", sample=Sample(shapes={"z": (1,)}))
    with pytest.raises(UsageError, match="Fixed axes"):
        compile_onnx(path, tmp_path / "b.onnx", sample=Sample(shapes={"x": (1, 2, 3)}))
    old = model(f"{X2} {{ y = MatMul (x, w) }}", WL, version=5)
    with pytest.raises(UsageError, match="version 5"):
        compile_onnx(write(tmp_path / "old.onnx", old), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@native
def test_a_compiled_file_is_not_compiled_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx", model(f"{X2} {{ y = MatMul (x, w) }}", WL))
    compile_onnx(path, tmp_path / "b.onnx", choose="first", threads=1)
    with pytest.raises(UsageError, match="compiled already"):
        compile_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx")


@native
def test_a_sample_that_does_not_suit_the_model(tmp_path: Path) -> None:
    body = "(float[N,T,8] x) => (float[N,K,16] y) { r = Reshape (x, s) y = MatMul (r, w) }"
    made = model(body, {**WL, "s": np.array([-1, 5, 8])})
    path = write(tmp_path / "a.onnx", made)
    with pytest.raises(UsageError, match="Give sizes that do"):
        compile_onnx(path, tmp_path / "b.onnx", choose="first")
    sample = Sample(shapes={"x": (2, 10, 8)})
    assert compile_onnx(path, tmp_path / "b.onnx", choose="first", sample=sample).error < 1e-5


@native
def test_half_precision_is_refused_where_the_machine_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.onnx", model(f"{X2} {{ y = MatMul (x, w) }}", WL))
    monkeypatch.setattr(compiling, "has_half", lambda: False)
    with pytest.raises(UsageError, match="does not multiply float16"):
        compile_onnx(path, tmp_path / "b.onnx", precision="float16")


@native
@pytest.mark.skipif(not available() or not has_half(), reason="no float16 on this machine")
def test_half_precision_stores_halves_and_reports_what_it_cost(tmp_path: Path) -> None:
    body = f"{X4} {{ c = Conv <{PAD}> (x, w, b) y = Relu (c) }}"
    path, out = write(tmp_path / "a.onnx", model(body, SAME)), tmp_path / "b.onnx"
    found = compile_onnx(path, out, choose="first", precision="float16", threads=1)
    compiled = onnx.load(str(out))
    (values,) = [t for t in compiled.graph.initializer if t.name.endswith(".values")]
    assert values.data_type == onnx.TensorProto.FLOAT16
    assert 1e-7 < found.error < 3e-3
    assert found.agreement is not None
    assert 0.9 < found.agreement <= 1.0
    assert found.layers[0].kernel is not None
    assert found.layers[0].kernel.family == "half"


# --- choosing ------------------------------------------------------------------------------------


def timed(ratio: float, number: int, groups: int = 1) -> Timed:
    weight = np.ones((groups, 1, 1, 1), np.float32)
    site = Site("n", "conv", (number,), "x", "y", weight, None, "w", groups=groups)
    kernel = Variant("list", 1, 4)
    return Timed(site, 1, 1, (Timing(None, 1.0, 1.0), Timing(kernel, ratio, ratio)), kernel)


def test_plans_leave_ties_dense_and_try_sets_once() -> None:
    layers = [timed(0.5, 0), timed(0.9, 1), timed(0.98, 2), timed(1.2, 3), timed(0.6, 4, groups=8)]
    found = {
        name: [layer.site.nodes[0] for layer in chosen] for name, chosen in plans(layers).items()
    }
    assert found == {
        "all that win": [0, 1, 4],
        "all that win, depthwise dense": [0, 1],
        "clear wins": [0, 4],
        "near losses, too": [0, 1, 2, 3, 4],
    }
    assert list(plans([timed(0.5, 0)])) == ["all that win"]
    assert plans([timed(2.0, 0)]) == {}


@dataclass(frozen=True)
class Pretend:
    """A clock for which a model takes what ``cost`` says about the names of its sparse nodes."""

    cost: Callable[[set[str]], float]
    seconds: float = 1.0

    def runner(self, made: Any) -> set[str]:
        return {node.name for node in made.graph.node if is_sparse(node)}

    def race(self, runners: list[set[str]], share: float, drop: bool = True) -> Raced:
        return Raced(tuple((self.cost(run),) * 9 for run in runners))

    def say(self, stage: str, done: float, total: float) -> None:
        pass


@native
@pytest.mark.parametrize(
    ("cost", "name", "layers"),
    [
        (lambda names: 10.0 - len(names), "near losses, too", {"a", "b", "c"}),
        (lambda names: 10.0 if len(names) < 3 else 9.9, "dense", set()),
        (lambda names: 10.0 + len(names), "dense", set()),
        # A choice that no plan makes: only the layer that looked worst alone, and not the best one.
        (lambda names: 10.0 - 3 * ("c" in names) + ("a" in names), "tuned", {"b", "c"}),
    ],
)
def test_the_whole_model_decides(
    cost: Callable[[set[str]], float], name: str, layers: set[str]
) -> None:
    body = f"""(float[N,8,6,6] x) => (float[N,8,6,6] y) {{
    p = Conv <{PAD}> (x, w) q = Conv <{PAD}> (p, w) y = Conv <{PAD}> (q, w) }}"""
    made = model(body, SAME)
    for node, text in zip(made.graph.node, "abc", strict=True):
        node.name = text
    graph = Graph.of(made)
    kernel = Variant("list", 1, 4)
    alone = [
        Timed(site, 36, 1, (Timing(None, 1.0 + i, 1.0), Timing(kernel, ratio, ratio)), kernel)
        for i, (site, ratio) in enumerate(zip(sites(graph), (0.6, 0.99, 1.2), strict=True))
    ]
    found = whole.fastest(graph, alone, Pretend(cost))
    assert (found.name, {layer.site.name for layer in found.layers}) == (name, layers)
    assert found.speedup == pytest.approx(10.0 / cost(layers) if layers else 1.0)


@native
def test_a_layer_alone_computes_the_same_densely_and_sparsely() -> None:
    body, weights, version, _ = FUSED["residual on the left"]
    graph = Graph.of(model(body, weights, version))
    (site,) = sites(graph)
    lone = Lone(graph, site, {"x": (1, 8, 6, 6)}, copies=3)
    feeds = lone.feeds()
    assert len(feeds) == 3
    outputs = [run(made, feeds) for made in (lone.dense(), lone.sparse(Variant("list", 1, 4), 36))]
    assert largest_error(*outputs) < 1e-5


@native
def test_measured_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fastest here, every layer has its timings, and the file says so."""
    monkeypatch.setattr(compiling, "_LAYERS", 0.2)
    monkeypatch.setattr(compiling, "_WHOLE", 0.2)
    weights = {"w": sparse(64, 64), "b": dense(64)}
    body = (
        "(float[N,T,64] x) => (float[N,T,64] y) { c = MatMul (x, w) d = Add (c, b) y = Relu (d) }"
    )
    out = tmp_path / "b.onnx"
    found = compile_onnx(write(tmp_path / "a.onnx", model(body, weights)), out, threads=1)
    (layer,) = found.layers
    assert layer.timings[0].variant is None
    assert len(layer.timings) > 1
    assert layer.dense_ms == layer.timings[0].ms
    assert found.speedup is not None
    assert (layer.kernel is None) == (found.plan == "dense")
    about = metadata(onnx.load(str(out)))
    assert about is not None
    assert about["plan"] == found.plan
    assert len(about["layers"][0]["timings"]) == len(layer.timings)


@native
def test_a_model_that_no_plan_makes_faster_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_LAYERS", 0.1)
    monkeypatch.setattr(compiling, "_WHOLE", 0.1)
    monkeypatch.setattr(whole, "plans", lambda timed: {})
    monkeypatch.setattr(whole, "_DOUBTFUL", (1.0, 1.0))
    path = write(tmp_path / "a.onnx", model(f"{X2} {{ y = MatMul (x, w) }}", WL))
    found = compile_onnx(path, tmp_path / "b.onnx", threads=1)
    assert (found.plan, found.speedup) == ("dense", 1.0)
    assert any("dense model" in note for note in found.notes)
    assert [node.op_type for node in onnx.load(str(tmp_path / "b.onnx")).graph.node] == ["MatMul"]


# --- real networks -------------------------------------------------------------------------------

REAL = {
    "MobileNetV2": ("mobilenetv2-imagenet/mobilenetv2-1.0-224-fp32.onnx", 52),
    "SqueezeNet": ("squeezenet-imagenet/SqueezeNet-1.1-fp32.onnx", 25),
    "ResNet-8": ("mlperf-tiny/ic/pretrainedResnet.onnx", 9),
    "DS-CNN": ("mlperf-tiny/kws/kws_ref_model_float32.onnx", 9),
    "VWW": ("mlperf-tiny/vww/vww_96_float.onnx", 27),
    "UltraFace RFB": ("ultraface/version-RFB-320.onnx", 51),
    "UltraFace slim": ("ultraface/version-slim-320.onnx", 41),
    "Silero VAD": ("silero-vad/silero_vad_16k_op15.onnx", 5),
}


@native
@pytest.mark.parametrize("name", REAL)
def test_real_networks_compute_the_same(name: str, data_path: Path, tmp_path: Path) -> None:
    file, layers = REAL[name]
    pruned, out = tmp_path / "pruned.onnx", tmp_path / "compiled.onnx"
    prune_onnx(data_path / file, pruned, 0.8)
    sample = Sample()
    if name == "Silero VAD":
        sample = Sample(shapes={"input": (1, 576)}, values={"sr": np.array(16000)})
    found = compile_onnx(pruned, out, choose="first", threads=1, sample=sample)
    replaced = sum(layer.kernel is not None for layer in found.layers)
    assert replaced == len(found.layers) >= layers
    assert found.error < 1e-4
    assert found.bytes < 0.8 * found.dense_bytes
    before, after = read_model(pruned), onnx.load(str(out))
    graph = Graph.of(before)
    dense_session, sparse_session = open_session(before, 1), open_session(after, 1)
    for other in _others(name):
        feeds = other.feeds(graph)
        error = largest_error(dense_session.run(None, feeds), sparse_session.run(None, feeds))
        assert error < 1e-4


def _others(name: str) -> list[Sample]:
    """More sizes, where the model has open axes."""
    if name == "Silero VAD":
        rng, rate = np.random.default_rng(3), np.array(16000)
        sounds = [rng.standard_normal((n, 576)).astype(np.float32) for n in (2, 5)]
        return [
            Sample(
                values={
                    "input": sound,
                    "state": rng.standard_normal((2, len(sound), 128)).astype(np.float32),
                    "sr": rate,
                }
            )
            for sound in sounds
        ]
    return [Sample(batch=2, seed=3), Sample(batch=5, seed=4)]
