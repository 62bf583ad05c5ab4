"""Chains: sparse convolutions in one operator, which go through an image band by band."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_cases import model, native, run, sparse, write
from session_cases import helper, numpy_helper, onnx, set_attribute
from session_cases import model as sized

from secateur.core.errors import FormatError
from secateur.runtime.chains import chain_node, found_chains, is_chain, links, unchained
from secateur.runtime.compiler import compile as compiling
from secateur.runtime.compiler import whole
from secateur.runtime.compiler.banded import banded
from secateur.runtime.compiler.compile import compile_onnx
from secateur.runtime.compiler.order import uses
from secateur.runtime.compiler.rebuild import dense_model
from secateur.runtime.compiler.verify import largest_error
from secateur.runtime.native import Spec, Variant
from secateur.runtime.operators import sparse_node
from secateur.runtime.race import Raced
from secateur.runtime.session import session

# Kernels of the two kinds of layers that chains have.
LIST, DEEP = Variant("list", 1, 4), Variant("depthwise", 1, 1)


def pixels(outputs: int, inputs: int) -> Spec:
    return Spec("conv", outputs, inputs, activation="clip", alpha=-1.0, beta=2.0)


def depthwise(channels: int, kernel: int = 3, stride: int = 1, pads: Any = (1, 1, 1, 1)) -> Spec:
    window = {"kernel": (kernel, kernel), "stride": (stride, stride), "pads": tuple(pads)}
    return Spec("conv", channels, 1, groups=channels, activation="relu", **window)


def layer(spec: Spec, x: str, y: str, residual: str | None = None, seed: int = 0) -> Any:
    """A node and its weights; half of the pixels' weights are zero."""
    rng = np.random.default_rng(seed)
    deep = spec.groups > 1
    weight = rng.standard_normal((spec.outputs, spec.inputs, *spec.kernel)).astype(np.float32)
    if not deep:
        weight[rng.random(weight.shape) < 0.5] = 0
    bias = rng.standard_normal(spec.outputs).astype(np.float32) if seed % 3 else None
    how = {"name": y, "x": x, "y": y, "bias": bias, "residual": residual, "positions": 4096}
    return sparse_node(weight, spec, DEEP if deep else LIST, **how)  # type: ignore[arg-type]


def network(specs: list[Spec], residual: bool = False) -> Any:
    """Layers one after the other from x to y0; the last adds what is given as ``residual``."""
    names = ["x", *(f"v{i}" for i in range(len(specs) - 1)), "y0"]
    made = [
        layer(spec, *names[i : i + 2], "residual" if residual and spec is specs[-1] else None, i)
        for i, spec in enumerate(specs)
    ]
    nodes, tensors = [node for node, _ in made], [t for _, held in made for t in held]
    ranks = {"x": 4} | ({"residual": 4} if residual else {})
    return onnx.load_from_string(sized(nodes, tensors, ranks))


BLOCK = [pixels(24, 8), depthwise(24), pixels(8, 24)]


def opened(made: Any, threads: int = 2) -> Any:
    return session(made.SerializeToString(), threads)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[Spec], tuple[int, int, int], bool]:
    """What may stand around a depthwise layer, an input of it, and whether something is added."""
    channels = draw(st.sampled_from([4, 17, 40]))
    kernel, stride = draw(st.sampled_from([3, 5])), draw(st.sampled_from([1, 2]))
    pads = draw(st.lists(st.integers(0, kernel - 1), min_size=4, max_size=4))
    specs = [depthwise(channels, kernel, stride, pads)]
    if before := draw(st.booleans()):
        specs.insert(0, pixels(channels, draw(st.sampled_from([3, 8]))))
    if not before or draw(st.booleans()):
        specs.append(pixels(draw(st.sampled_from([5, 16])), channels))
    sizes = draw(st.integers(1, 3)), *(draw(st.integers(kernel, 40)) for _ in range(2))
    return specs, sizes, draw(st.booleans())


@native
@settings(max_examples=40)
@given(made=blocks(), threads=st.sampled_from([1, 2, 3]))
def test_a_chain_computes_what_its_layers_compute(
    made: tuple[list[Spec], tuple[int, int, int], bool], threads: int
) -> None:
    specs, (batch, height, width), residual = made
    parts = network(specs, residual)
    chain, names = banded(parts)
    assert names == ("y0",)
    assert [node.op_type for node in chain.graph.node] == ["SparseChain"]
    assert unchained(chain.graph.node) == list(parts.graph.node)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, specs[0].inputs * specs[0].groups, height, width))
    feeds = {"x": x.astype(np.float32)}
    if residual:
        shape = opened(network(specs)).run(None, {"x": feeds["x"]})[0].shape
        feeds["residual"] = rng.standard_normal(shape).astype(np.float32)
    expected = opened(parts, threads).run(None, feeds)
    assert largest_error(expected, opened(chain, threads).run(None, feeds)) < 1e-5
    # Another image through the same session: nothing is kept from the one before.
    smaller = {name: array[:1, :, : height - 1] for name, array in feeds.items()}
    if not residual and height > max(spec.kernel[0] for spec in specs):
        expected = opened(parts, threads).run(None, smaller)
        assert largest_error(expected, opened(chain, threads).run(None, smaller)) < 1e-5


@native
def test_a_wrong_weight_in_a_chain_is_seen() -> None:
    parts = network(BLOCK)
    chain, _ = banded(parts)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 8, 20, 20)).astype(np.float32)}
    expected = opened(parts).run(None, feeds)
    for i in range(3):
        wrong = type(chain)()
        wrong.CopyFrom(chain)
        held = {t.name: t for t in wrong.graph.initializer}
        tensor = held[wrong.graph.node[0].input[2 + 3 * i]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.05, tensor.name))
        assert largest_error(expected, opened(wrong).run(None, feeds)) > 1e-3


@native
def test_no_batch_is_no_work() -> None:
    chain, _ = banded(network(BLOCK))
    (y,) = opened(chain).run(None, {"x": np.zeros((0, 8, 9, 9), np.float32)})
    assert y.shape == (0, 8, 9, 9)


# --- which layers become chains -------------------------------------------------------------------


def found(nodes: list[Any], outputs: tuple[str, ...] = ("y",)) -> list[tuple[int, ...]]:
    used = Counter(name for node in nodes for name in uses(node))
    return found_chains(nodes, used + Counter(outputs))


@native
def test_what_others_read_is_written_out() -> None:
    first, deep, last = (
        layer(spec, *names)[0] for spec, names in zip(BLOCK, ("xa", "ab", "by"), strict=True)
    )
    assert found([first, deep, last]) == [(0, 1, 2)]
    assert found([first, deep, last], ("y", "a")) == [(1, 2)]
    assert found([first, deep, last], ("y", "b")) == [(0, 1)]
    assert found([first, deep, last, helper.make_node("Relu", ["a"], ["z"])]) == [(1, 2)]
    assert found([first, last]) == []
    # The last adds what the chain itself has made.
    adds = layer(BLOCK[2], "b", "y", residual="b")[0]
    assert found([first, deep, adds]) == [(0, 1)]


@native
def test_only_the_last_layer_of_a_chain_adds_something() -> None:
    first = layer(BLOCK[0], "x", "a", residual="r")[0]
    deep = layer(BLOCK[1], "a", "b")[0]
    last = layer(BLOCK[2], "b", "y", residual="x")[0]
    assert found([first, deep, last]) == [(1, 2)]
    between = layer(BLOCK[1], "a", "b", residual="r")[0]
    assert found([layer(BLOCK[0], "x", "a")[0], between, last]) == [(0, 1)]


@native
def test_layers_that_take_no_bands_end_a_chain() -> None:
    wide = replace(pixels(24, 8), kernel=(3, 3), pads=(1, 1, 1, 1))
    deep, last = (layer(s, *xy)[0] for s, xy in zip(BLOCK[1:], ("ab", "by"), strict=True))
    assert found([layer(wide, "x", "a")[0], deep, last]) == [(1, 2)]
    strided = replace(BLOCK[2], stride=(2, 2))
    assert found([layer(BLOCK[0], "x", "a")[0], deep, layer(strided, "b", "y")[0]]) == [(0, 1)]
    # A layer is in one chain alone.
    more = [layer(depthwise(8), "y", "c")[0], layer(pixels(4, 8), "c", "z")[0]]
    nodes = [layer(BLOCK[0], "x", "a")[0], deep, last, *more]
    assert found(nodes, ("z",)) == [(0, 1, 2), (3, 4)]


@native
def test_small_images_can_be_left_alone() -> None:
    parts = network(BLOCK)  # says 4,096 positions of 24 channels
    size = 4 * 24 * 4096
    assert banded(parts, size)[1] == ("y0",)
    assert banded(parts, size + 1)[1] == ()


# --- whole models ---------------------------------------------------------------------------------


def mobile() -> Any:
    """An inverted residual of an exported network."""
    body = """(float[N,8,32,32] x) => (float[N,8,32,32] y) {
        a = Conv (x, w0) b = Relu (a)
        c = Conv <group = 24, pads = [1, 1, 1, 1]> (b, w1) d = Relu (c)
        e = Conv (d, w2) y = Add (e, x) }"""
    rng = np.random.default_rng(0)
    held = {"w1": rng.standard_normal((24, 1, 3, 3)).astype(np.float32)}
    held |= {"w0": sparse(24, 8, 1, 1), "w2": sparse(8, 24, 1, 1)}
    return model(body, held)


@native
@pytest.mark.parametrize("pays", [True, False])
def test_chains_are_kept_if_they_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    def race(runners: Any, *, seconds: float, drop: bool = True, turn: float) -> Raced:
        """The last one wins, but among chains, if they shall not pay."""
        loses = drop and seconds == of_chains and not pays
        winner = 0 if loses else len(runners) - 1
        return Raced(tuple((0.5 if i == winner else 1.0,) * 9 for i in range(len(runners))))

    of_chains = whole._CHAINS * compiling._WHOLE
    monkeypatch.setattr(compiling, "_LAYERS", 0.1)
    monkeypatch.setattr(whole, "race", race)
    monkeypatch.setattr(whole, "_DOUBTFUL", (1.0, 1.0))
    path, out = write(tmp_path / "net.onnx", mobile()), tmp_path / "own.onnx"
    # Of the plans only the pixels' layers win: the depthwise one is there for its chain.
    monkeypatch.setattr(
        whole, "plans", lambda timed: {"all": tuple(t for t in timed if not t.site.depthwise)}
    )
    done = compile_onnx(path, out, threads=1)
    kinds = [node.op_type for node in onnx.load(out).graph.node]
    assert ("SparseChain" in kinds) is pays
    assert (done.plan == "chained") is pays
    assert any("1 run of layers around a depthwise" in note for note in done.notes) is pays
    assert [each.kernel is not None for each in done.layers] == [True, pays, True]
    assert done.error < 1e-5


@native
def test_a_chain_can_be_made_dense_again() -> None:
    parts = network(BLOCK, residual=True)
    chain, _ = banded(parts)
    feeds = {
        name: np.random.default_rng(0).standard_normal((2, 8, 9, 7)).astype(np.float32)
        for name in ("x", "residual")
    }
    again = dense_model(chain)
    assert all(not node.domain for node in again.graph.node)
    assert largest_error(opened(parts).run(None, feeds), run(again, feeds)) < 1e-5


# --- damage ---------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("layers", 1, "it has 1 layers, and a chain has from 2 to 3"),
        ("layers", 4, "it has 4 layers"),
        ("layers", None, "no integer attribute 'layers'"),
        ("abi", 99, "version 99"),
        ("outputs_1", None, "no integer attribute 'outputs_1'"),
        ("family_1", 0, "layer 2 of the chain is neither depthwise"),
        ("group_1", 7, "SparseChain"),
        (
            "strides_2",
            [2, 2],
            "layer 3 of the chain is neither depthwise nor a convolution of single",
        ),
        ("layout_2", 9, "SparseChain"),
    ],
)
def test_a_damaged_chain_is_refused(key: str, value: Any, says: str) -> None:
    chain, _ = banded(network(BLOCK))
    set_attribute(chain.graph, key, value)
    with pytest.raises(FormatError, match=says):
        opened(chain)


@native
def test_a_chain_refuses_what_does_not_fit() -> None:
    chain, _ = banded(network(BLOCK, residual=True))
    ready = opened(chain)
    x = np.zeros((1, 8, 9, 9), np.float32)
    for feeds, says in (
        ({"x": x[:, :7], "residual": x}, r"X has the shape \[1, 7, 9, 9\].*\[batch, 8, height"),
        ({"x": x, "residual": x[:, :, :8]}, "the residual has .*like the output"),
        ({"x": x[:, :, :0], "residual": x}, "at least one row and one column"),
    ):
        with pytest.raises(Exception, match=says):
            ready.run(None, feeds)
    assert ready.run(None, {"x": x, "residual": x})[0].shape == x.shape


@native
def test_links_of_an_altered_chain_are_refused() -> None:
    chain = chain_node(list(network(BLOCK).graph.node))
    assert is_chain(chain)
    for key, value, says in (("layers", 9, "9 layers"), ("y_0", 3, "no attribute 'y'")):
        altered = type(chain)()
        altered.CopyFrom(chain)
        kept = [a for a in altered.attribute if a.name != key]
        del altered.attribute[:]
        altered.attribute.extend([*kept, helper.make_attribute(key, value)])
        with pytest.raises(FormatError, match=says):
            links(altered)
