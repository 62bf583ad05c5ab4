"""What becomes part of a sparse layer when an ONNX file is compiled, and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_cases import (
    BN,
    FUSED,
    LN,
    NEVER,
    PAD,
    REFUSED,
    SAME,
    W1,
    WL,
    X4,
    Weights,
    check_same,
    dense,
    model,
    native,
    onnx,
    run,
    sparse,
    write,
)

from secateur.core.errors import FormatError
from secateur.runtime.compiler.activations import GELU, recognise
from secateur.runtime.compiler.compile import compile_onnx
from secateur.runtime.compiler.fuse import sites
from secateur.runtime.compiler.graph import Graph, read_model
from secateur.runtime.compiler.rebuild import dense_model
from secateur.runtime.compiler.sample import Sample
from secateur.runtime.compiler.verify import largest_error
from secateur.runtime.operators import is_sparse


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


ANY = [[6, 8], [2, 3, 8], [1, 6, 8], [1, 2, 3, 8]]
# What follows a product, its constants, the sizes of its input that it can do, and what of it becomes
# part of the layer, if nobody knows how many axes that has: only what is right for any number.
RANKS: dict[str, tuple[str, Weights, list[list[int]], list[str]]] = {
    "nothing": ("y = Identity (p)", {}, ANY, ["Identity"]),
    "a bias": ("c = Add (p, b) y = Relu (c)", {"b": dense(16)}, ANY, ["Add", "Relu"]),
    "a bias with more axes": ("y = Add (p, b)", {"b": dense(1, 1, 16)}, ANY, []),
    "a factor with more axes": ("y = Mul (p, b)", {"b": dense(1, 16)}, ANY, []),
    "layer normalisation of the last axis": (
        "y = LayerNormalization (p, g, h)",
        LN,
        ANY,
        ["LayerNormalization"],
    ),
    "layer normalisation of an axis by its number": (
        "y = LayerNormalization <axis = 1> (p, g, h)",
        LN,
        [[6, 8], [6, 1, 8]],
        [],
    ),
    "batch normalisation": (
        "y = BatchNormalization (p, s, t, m, v)",
        BN,
        [[6, 8]],
        [],
    ),
}


@native
@pytest.mark.parametrize("name", RANKS)
def test_a_number_of_axes_that_follows_from_the_inputs(name: str, tmp_path: Path) -> None:
    after, held, sizes, taken = RANKS[name]
    body = f"""(float[N,8] x, int64[K] size) => (float y)
    {{ r = Reshape (x, size) p = MatMul (r, w) {after} }}"""
    made = model(body, {"w": WL["w"], **held})
    assert Graph.of(made).shape("r") is None
    feeds = [{"x": dense(6, 8), "size": np.array(size)} for size in sizes]
    for values in feeds:
        path, out = write(tmp_path / "a.onnx", made), tmp_path / "b.onnx"
        sample = Sample(values=values)
        found = compile_onnx(path, out, choose="first", threads=1, sample=sample)
        assert found.layers[0].fused == ("MatMul", *taken)
        compiled = onnx.load(str(out))
        for given in feeds:
            assert largest_error(run(made, given), run(compiled, given)) < 1e-5


@native
def test_a_product_after_an_operator_of_others(tmp_path: Path) -> None:
    """Shape inference knows nothing about it, not even how many axes it has."""
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
