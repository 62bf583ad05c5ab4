"""Which reasons a compilation gives for layers that stay dense."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_cases import FLAT, OPEN, W1, W3, WL, X4, Weights, dense, model, native, sparse

from secateur.runtime.compiler.fuse import sites
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.notes import notes
from secateur.runtime.compiler.whole import Plan

FEW = "with fewer than 20 % zeros"
PADDING = "with a stride, and a padding that depends on an open size"
BIAS = "with a bias that is not one constant for each output"
KIND = "of a kind that has no sparse operator"
ROWS = "(float[4,8] x) => (float[4,16] y)"

REASONS: dict[str, tuple[str, Weights, str]] = {
    "few zeros": (f"{FLAT} {{ y = MatMul (x, w) }}", {"w": dense(8, 16)}, FEW),
    "same padding": (
        f'{OPEN} {{ y = Conv <auto_pad = "SAME_LOWER", strides = [2,2]> (x, w) }}',
        W3,
        PADDING,
    ),
    "same padding over one axis": (
        """(float[N,8,L] x) => (float[N,M,K] y)
        { y = Conv <auto_pad = "SAME_UPPER", strides = [2]> (x, w) }""",
        {"w": sparse(16, 8, 3)},
        PADDING,
    ),
    "same padding over three axes": (
        """(float[N,2,D,H,W] x) => (float[N,M,A,B,C] y)
        { y = Conv <auto_pad = "SAME_UPPER", strides = [2,2,2]> (x, w) }""",
        {"w": sparse(4, 2, 3, 3, 3)},
        KIND,
    ),
    "a bias of rows": (f"{ROWS} {{ y = Gemm (x, w, r) }}", {**WL, "r": dense(4, 1)}, BIAS),
    "a bias of rows and outputs": (
        f"{ROWS} {{ y = Gemm (x, w, r) }}",
        {**WL, "r": dense(4, 16)},
        BIAS,
    ),
    "a bias that is an input": (
        "(float[N,8] x, float[16] b) => (float[N,16] y) { y = Gemm (x, w, b) }",
        {"w": WL["w"]},
        BIAS,
    ),
    "a weight on the left": (
        "(float[8,N] x) => (float[16,N] y) { y = MatMul (w, x) }",
        {"w": sparse(16, 8)},
        KIND,
    ),
    "transposed": (f"{X4} {{ y = ConvTranspose (x, w) }}", {"w": sparse(8, 16, 2, 2)}, KIND),
    "recurrent": (
        "(float[L,N,8] x) => (float[L,N,4] y) { d, y = LSTM <hidden_size = 4> (x, w, r) }",
        {"w": sparse(1, 16, 8), "r": sparse(1, 16, 4)},
        KIND,
    ),
    "infinite": (
        f"{X4} {{ y = Conv (x, w) }}",
        {"w": np.where(W1["w"] > 0, np.float32(np.inf), np.float32(0))},
        "with numbers that are not finite in float32",
    ),
}


def said(body: str, weights: Weights) -> tuple[str, ...]:
    graph = Graph.of(model(body, weights))
    found = sites(graph)
    return notes(graph, found, Plan.of(graph, "first", ()))


@native
@pytest.mark.parametrize("name", REASONS)
def test_why_a_layer_was_not_tried(name: str) -> None:
    body, weights, why = REASONS[name]
    assert said(body, weights)[0] == f"not tried: 1 of 1 layers (1 {why})"


@native
def test_reasons_are_counted() -> None:
    body = """(float[4,8] x) => (float[4,8] y)
    { a = MatMul (x, w) b = Gemm (a, v, c) d = MatMul (b, w) e = Gemm (d, v, c) y = MatMul (e, u) }"""
    held = {"w": sparse(8, 8), "v": sparse(8, 8), "u": dense(8, 8), "c": dense(4, 1)}
    assert said(body, held)[0] == f"not tried: 3 of 5 layers (2 {BIAS}, 1 {FEW})"


@native
@pytest.mark.parametrize(
    "moved",
    [
        "v = Identity (w)",
        "t = Transpose <perm = [1,0]> (w) v = Transpose <perm = [1,0]> (t)",
        "t = Reshape (w, flat) v = Reshape (t, back)",
    ],
)
def test_weights_of_integers_that_are_moved(moved: str) -> None:
    body = f"{FLAT} {{ w = DequantizeLinear (q, s) {moved} y = Gemm (x, v) }}"
    held = {"q": np.ones((8, 16), np.int8), "s": np.float32(0.5)}
    held |= {"flat": np.array([-1]), "back": np.array([8, 16])}
    assert said(body, held)[0].startswith(
        "not tried: layers whose weights have another type (1 in integers)"
    )


@native
@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ("h = MatMul (x, w) z = Relu (h)", "1 layer"),
        ("z = Gemm (x, w, b) h = MatMul (x, w)", "2 layers"),
        ("k = Transpose (x) q = MatMul (x, k) z = MatMul (q, c)", ""),
    ],
)
def test_layers_in_branches_are_told(nodes: str, count: str) -> None:
    branch = f"b () => (float[N,16] z) {{ {nodes} }}"
    body = f"""(float[N,8] x, bool[1] c1, float[N,16] c) => (float[N,16] y)
    {{ y = If (c1) <then_branch = {branch}, else_branch = e () => (float[N,16] z)
    {{ z = Identity (c) }}> }}"""
    expected = f"not tried: {count} in branches and loops, which stay as they are"
    assert (expected in said(body, WL)) is bool(count)
    assert any("branches" in note for note in said(body, WL)) is bool(count)


@native
def test_layers_that_an_optimizer_fused_are_told() -> None:
    body = """(float[N,8,6,6] x) => (float[N,16,6,6] y)
    { h = Relu (x) y = com.microsoft.FusedConv <activation = "Relu"> (h, w) }"""
    assert said(body, W1)[0] == (
        "not tried: 1 layer in operators that are not of the standard (com.microsoft.FusedConv); "
        "compile the file from before they were fused"
    )
    biased = "(float[N,16] x) => (float[N,16] y) { y = com.microsoft.BiasGelu (x, b) }"
    assert said(biased, {"b": WL["b"]}) == said(
        "(float[N,16] x) => (float[N,16] y) { y = Relu (x) }", {}
    )
