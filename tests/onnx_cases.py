"""Small ONNX models with sparse layers: what a compiler may take into them, and what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402 - only where it is installed

from secateur.runtime import available  # noqa: E402
from secateur.runtime.compiler.graph import Graph  # noqa: E402
from secateur.runtime.compiler.sample import Sample  # noqa: E402
from secateur.runtime.compiler.verify import largest_error  # noqa: E402
from secateur.runtime.race import open_session  # noqa: E402

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
OPEN = "(float[N,8,P,Q] x) => (float[N,M,H,W] y)"
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
LN = {"g": dense(16, seed=2), "h": dense(16, seed=3)}
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
    "same of an open size": (
        f'{OPEN} {{ y = Conv <auto_pad = "SAME_UPPER"> (x, w, b) }}',
        W3,
        17,
        [],
    ),
    "same lower of an open size, with an even kernel": (
        f'{OPEN} {{ y = Conv <auto_pad = "SAME_LOWER"> (x, w) }}',
        {"w": sparse(16, 8, 4, 2)},
        17,
        [],
    ),
    "same of an open size, one position": (
        f'{OPEN} {{ y = Conv <auto_pad = "SAME_UPPER", strides = [2,3]> (x, w) }}',
        W1,
        17,
        [],
    ),
    "same of an open size, one axis": (
        """(float[N,8,L] x) => (float[N,M,K] y)
        { y = Conv <auto_pad = "SAME_LOWER"> (x, w) }""",
        {"w": sparse(16, 8, 4)},
        17,
        ["Unsqueeze", "Squeeze"],
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
    "layer normalisation": (
        f"{X2} {{ c = MatMul (x, w) a = Add (b, c) y = LayerNormalization (a, g, h) }}",
        {**WL, **LN},
        17,
        [],
    ),
    "layer normalisation without a shift, of an axis by its number": (
        f"{FLAT} {{ c = Gemm (x, w) y = LayerNormalization <axis = 1, epsilon = 0.1> (c, g) }}",
        {**WL, **LN},
        17,
        [],
    ),
    "residual, activation and layer normalisation": (
        """(float[N,T,16] x) => (float[N,T,16] y)
        { c = MatMul (x, w) a = Add (c, x) r = Relu (a) y = LayerNormalization (r, g, h) }""",
        {"w": sparse(16, 16), **LN},
        17,
        [],
    ),
    "silu as swish": (f"{X4} {{ c = Conv (x, w) y = Swish (c) }}", W1, 24, []),
    "silu of an optimizer": (
        f"{X4} {{ c = Conv (x, w) y = com.microsoft.QuickGelu <alpha = 1.0> (c) }}",
        W1,
        17,
        [],
    ),
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
    "batch normalisation with a root of what is negative": (
        f"{X4} {{ c = Conv (x, w) y = BatchNormalization (c, s, t, m, v) }}",
        {**W1, **BN, "v": np.float32([-1] * 16)},
        17,
        ["BatchNormalization"],
    ),
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
    "layer normalisation of a value that others see": (
        """(float[N,T,8] x) => (float[N,T,16] y, float[N,T,16] z)
        { c = MatMul (x, w) y = LayerNormalization (c, g, h) z = Tanh (c) }""",
        {**WL, **LN},
        17,
        ["LayerNormalization", "Tanh"],
    ),
    "layer normalisation of two axes": (
        """(float[N,4,8] x) => (float[N,4,16] y)
        { c = MatMul (x, w) y = LayerNormalization <axis = 1> (c, all) }""",
        {**WL, "all": dense(4, 16)},
        17,
        ["LayerNormalization"],
    ),
    "layer normalisation with one factor for all": (
        f"{X2} {{ c = MatMul (x, w) y = LayerNormalization (c, one) }}",
        {**WL, "one": dense(1)},
        17,
        ["LayerNormalization"],
    ),
    "layer normalisation whose mean is seen": (
        """(float[N,T,8] x) => (float[N,T,16] y, float[N,T,1] z)
        { c = MatMul (x, w) y, z = LayerNormalization (c, g, h) }""",
        {**WL, **LN},
        17,
        ["LayerNormalization"],
    ),
    "layer normalisation by an input": (
        """(float[N,T,8] x, float[16] g) => (float[N,T,16] y)
        { c = MatMul (x, w) y = LayerNormalization (c, g) }""",
        WL,
        17,
        ["LayerNormalization"],
    ),
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
    "same of an open size, with a stride": (
        f'{OPEN} {{ y = Conv <auto_pad = "SAME_UPPER", strides = [1,2]> (x, w) }}',
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
