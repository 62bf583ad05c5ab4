"""Ways in which files hold a weight: under a mask, in parts, as a sparse tensor, in 16 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_onnx_cases import close, helper, model, node, numbers, numpy_helper, onnx, weight

from secateur.runtime import available
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.masked import prune_onnx
from secateur.runtime.compiler.sample import Sample
from secateur.runtime.operators import is_sparse

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

W = weight(16, 8)
KEPT = (W != 0).astype(np.float32)
LINEAR = node("MatMul", ["x", "w"], ["y"])
FEEDS = {"x": numbers(4, 16)}
SIXTEEN = Sample(shapes={"x": (4, 16)})
NUMBERS = ("zero", "one", "two")
# name: (nodes that make the weight, what is stored)
MADE: dict[str, tuple[list[Any], dict[str, np.ndarray]]] = {
    "under a mask": (
        [node("Mul", ["whole", "mask"], ["w"])],
        {"whole": numbers(16, 8), "mask": KEPT},
    ),
    "under a mask of flags": (
        [node("Cast", ["flags"], ["mask"], to=1), node("Mul", ["mask", "whole"], ["w"])],
        {"whole": numbers(16, 8), "flags": KEPT > 0},
    ),
    "where it is kept": (
        [node("Where", ["flags", "whole", "zero"], ["w"])],
        {"whole": numbers(16, 8), "flags": KEPT > 0, "zero": np.float32(0)},
    ),
    "of a given norm": (
        [
            node("ReduceL2", ["direction"], ["length"], axes=[0], keepdims=1),
            node("Div", ["gain", "length"], ["factor"]),
            node("Mul", ["direction", "factor"], ["w"]),
        ],
        {"direction": W + KEPT, "gain": numbers(1, 8)},
    ),
    "cut from a larger one": (
        [node("Split", ["all", "sizes"], ["left", "w"], axis=1)],
        {"all": np.concatenate([W, W], 1), "sizes": np.array([8, 8])},
    ),
    "joined": ([node("Concat", ["up", "down"], ["w"], axis=0)], {"up": W[:5], "down": W[5:]}),
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_that_is_computed_from_constants(name: str, tmp_path: Path) -> None:
    nodes, held = MADE[name]
    made = model([*nodes, LINEAR], held)
    (layer,) = close(tmp_path, made, FEEDS).layers
    assert layer.sparsity > 0.5
    graph = onnx.load(str(tmp_path / "sparse.onnx")).graph
    assert all(map(is_sparse, graph.node))
    assert not {tensor.name for tensor in graph.initializer} & set(held), "they are packed"


def test_a_weight_that_is_computed_from_an_input_is_none(tmp_path: Path) -> None:
    nodes, held = MADE["under a mask"]
    inputs = [("x", ["N", 16]), ("mask", [16, 8])]
    made = model([*nodes, LINEAR], {"whole": held["whole"]}, inputs)
    assert not close(tmp_path, made, {**FEEDS, "mask": held["mask"]}).layers


@pytest.mark.parametrize("width", [16, "M"])
@pytest.mark.parametrize("cut", ["Gather", "Slice"])
def test_a_weight_that_is_cut_at_a_size(cut: str, width: int | str, tmp_path: Path) -> None:
    """As PyTorch's older exporter cuts the keys' part of ``in_proj_weight``."""
    ends = ["one"] if cut == "Gather" else ["one", "two"]
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node(cut, ["shape", *ends], ["size"]),
        node("Slice", ["all", "zero", "size"], ["w"]),
        LINEAR,
    ]
    held = {"all": np.concatenate([W, W]), **{k: np.array([i]) for i, k in enumerate(NUMBERS)}}
    done = close(tmp_path, model(nodes, held, [("x", ["N", width])]), FEEDS, sample=SIXTEEN)
    assert len(done.layers) == (width == 16)


def test_pruning_a_file_leaves_masks_alone(tmp_path: Path) -> None:
    nodes, held = MADE["under a mask of flags"]
    full, pruned = tmp_path / "full.onnx", tmp_path / "pruned.onnx"
    full.write_bytes(model([*nodes, LINEAR], held).SerializeToString())
    assert prune_onnx(full, pruned, 0.9, first=True) == 0
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(pruned)).graph.initializer}
    assert np.array_equal(stored["flags"], held["flags"])


@pytest.mark.parametrize("along_each_axis", [True, False])
@pytest.mark.parametrize("constant", [True, False])
def test_a_sparse_tensor_of_onnx(constant: bool, along_each_axis: bool, tmp_path: Path) -> None:
    places = np.argwhere(W) if along_each_axis else np.flatnonzero(W)
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(W[W != 0], "w"), numpy_helper.from_array(places, "at"), W.shape
    )
    if constant:
        made = model([node("Constant", [], ["w"], sparse_value=tensor), LINEAR], {})
    else:
        # What follows it is fused only if the shape of the product is known.
        following = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "r"], ["y"])]
        made = model(following, {}, [("x", ["N", 16]), ("r", ["N", 8])])
        made.graph.sparse_initializer.append(tensor)
    feeds = FEEDS if constant else {**FEEDS, "r": numbers(4, 8)}
    done = close(tmp_path, made, feeds)
    (layer,) = done.layers
    assert layer.sparsity == np.mean(W == 0)
    assert done.dense_bytes == (tmp_path / "dense.onnx").stat().st_size
    graph = onnx.load(str(tmp_path / "sparse.onnx")).graph
    assert all(map(is_sparse, graph.node))
    assert not graph.sparse_initializer, "it is packed"


def test_a_sparse_tensor_of_a_layer_that_stays_dense(tmp_path: Path) -> None:
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(W[W != 0], "w"), numpy_helper.from_array(np.flatnonzero(W)), W.shape
    )
    made = model([node("MatMul", ["r", "w"], ["y"])], {}, [("r", ["N", 3, 16]), ("w", [16, 8])])
    made.graph.sparse_initializer.append(tensor)
    made.graph.initializer.append(numpy_helper.from_array(numbers(2), "other"))
    # An input, too, beside a constant that is none: a caller may replace it.
    assert not close(tmp_path, made, {"r": numbers(2, 3, 16)}).layers
    assert len(onnx.load(str(tmp_path / "sparse.onnx")).graph.sparse_initializer) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_that_fit_into_16_bits_are_stored_so(dtype: str, tmp_path: Path) -> None:
    kind = {"float16": 10, "bfloat16": 16, "float32": 1}[dtype]
    half = numpy_helper.to_array(
        onnx.helper.make_tensor("h", kind, [64, 64], numbers(64, 64).ravel().tolist())
    ).copy()
    half[np.random.default_rng(0).random(half.shape) < 0.3] = 0
    made = model(
        [node("Cast", ["h"], ["w"], to=1), node("MatMul", ["x", "w"], ["y"])],
        {"h": half},
        [("x", ["N", 64])],
    )
    done = close(tmp_path, made, {"x": numbers(4, 64)})
    tensors = onnx.load(str(tmp_path / "sparse.onnx")).graph.initializer
    assert [t.data_type for t in tensors if t.name.endswith(".values")] == [kind]
    about = 4096 * half.dtype.itemsize
    assert done.dense_bytes - done.bytes > 0.15 * about - 1200, "beside what is said of the layer"


@pytest.mark.parametrize("constant", [True, False])
def test_what_is_constant_is_found_through_more_nodes_than_python_has_stack(constant: bool) -> None:
    length = sys.getrecursionlimit()
    steps = [node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    first = node("Identity", ["w" if constant else "x"], ["v0"])
    graph = Graph.of(model([first, *steps], {"w": W}, outputs=(f"v{length}",)))
    found = graph.constant(f"v{length}")
    np.testing.assert_array_equal(found, W * (-1) ** length if constant else None)
