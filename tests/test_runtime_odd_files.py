"""ONNX files that people have: edited shapes, odd names, functions, weights elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from odd_onnx_cases import W, both, close, compiled, model, node, numbers, weight  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - only where it is installed

from secateur.core.errors import FileError, UsageError  # noqa: E402
from secateur.runtime import available, bench, compile_onnx  # noqa: E402
from secateur.runtime.compiler import compile as compiling  # noqa: E402
from secateur.runtime.compiler.compile import METADATA  # noqa: E402
from secateur.runtime.compiler.graph import Graph  # noqa: E402
from secateur.runtime.compiler.order import ordered  # noqa: E402
from secateur.runtime.compiler.sample import Sample  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

value = helper.make_tensor_value_info


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are made, and mean nothing."""
    monkeypatch.setattr(compiling, "_LAYERS", 0.1)
    monkeypatch.setattr(compiling, "_WHOLE", 0.1)
    # The package has a function of that name.
    monkeypatch.setattr(sys.modules["secateur.runtime.bench"], "_SECONDS", 0.05)


@pytest.mark.parametrize("how", ["SAME_UPPER", "SAME_LOWER"])
def test_shapes_that_are_left_from_other_inputs_are_not_believed(tmp_path: Path, how: str) -> None:
    options = {"auto_pad": how, "strides": [2, 2], "kernel_shape": [3, 3]}
    nodes = [
        node("Conv", ["x", "w"], ["a"], **options),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["y"], **options),
    ]
    made = model(
        nodes,
        {"w": weight(8, 3, 3, 3), "v": weight(16, 8, 3, 3)},
        [("x", [1, 3, 32, 32])],
        (value("y", TensorProto.FLOAT, [1, 16, 8, 8]),),
    )
    fixed = onnx.shape_inference.infer_shapes(made)
    # All sizes are known: this one is compiled as it stands.
    feeds = {"x": numbers(1, 3, 32, 32)}
    assert len(close(tmp_path, fixed, feeds).layers) == 2
    for io, names in ((fixed.graph.input[0], "nhw"), (fixed.graph.output[0], "nij")):
        for axis, name in zip((0, 2, 3), names, strict=True):
            io.type.tensor_type.shape.dim[axis].dim_param = name
    assert fixed.graph.value_info, "these still say 32, 16 and 8"
    sample = Sample(shapes={"x": (1, 3, 32, 32)})
    _, dense, sparse = compiled(tmp_path, fixed, sample=sample)
    for size in (32, 34, 31, 33, 17):
        feeds = {"x": numbers(1, 3, size, size)}
        (a,), (b,) = both(dense, sparse, feeds)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opened", [True, False])
def test_a_term_that_is_repeated_along_an_axis_opened_later_is_no_residual(
    tmp_path: Path, opened: bool
) -> None:
    nodes = [
        node("Gather", ["table", "positions"], ["p"]),
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "p"], ["y"]),
    ]
    inputs = [("x", [1, 5, 16]), ("positions", [1, 5], TensorProto.INT64)]
    made = model(nodes, {"w": W, "table": numbers(9, 8)}, inputs)
    made = onnx.shape_inference.infer_shapes(made)
    assert made.graph.value_info, "these say that both sides of the addition have a batch of 1"
    if opened:
        made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
        made.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = {"x": numbers(3 if opened else 1, 5, 16), "positions": np.arange(5)[None]}
    (layer,) = close(tmp_path, made, feeds).layers
    assert layer.fused == (("MatMul",) if opened else ("MatMul", "Add"))


def test_other_heights_and_widths_are_tried(tmp_path: Path) -> None:
    made = model(
        [node("Conv", ["x", "w"], ["y"])], {"w": weight(8, 3, 3, 3)}, [("x", ["n", 3, "h", "w"])]
    )
    (tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    graph = compiling.read_graph(tmp_path / "a.onnx")
    sample = Sample(shapes={"x": (2, 3, 9, 8)})
    assert sample.wider(graph) is None, "it was given whole"
    (x,) = Sample(batch=3).wider(graph).feeds(graph).values()  # type: ignore[union-attr]
    assert x.shape == (3, 3, 225, 225)


@pytest.mark.parametrize(
    ("declared", "made_up"),
    [
        (["N", 3, "H", "W"], (1, 3, 224, 224)),
        (["N", "H", "W", 3], (1, 224, 224, 3)),
        (["N", "H", 64, 3], (1, 224, 64, 3)),
        (["N", "C", "H", "W"], (1, 128, 224, 224)),
        (["None", 3, "None", "None"], (1, 3, 224, 224)),
        (["None", "None", "None", 3], (1, 224, 224, 3)),
        (["?", "?", 64], (1, 128, 64)),
        (["n", "n"], (1, 1)),
    ],
)
def test_sizes_of_open_axes(declared: list[Any], made_up: tuple[int, ...]) -> None:
    graph = Graph.of(model([node("Relu", ["x"], ["y"])], {}, [("x", declared)]))
    assert Sample().feeds(graph)["x"].shape == made_up


@pytest.mark.parametrize(("axis", "fused"), [("n", True), ("None", False), ("?", False)])
def test_axes_of_one_placeholder_need_not_be_equal(tmp_path: Path, axis: str, fused: bool) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "r"], ["y"])]
    made = model(nodes, {"w": W}, [("x", [axis, 16]), ("r", [axis, 8])])
    feeds = {"x": numbers(3, 16), "r": numbers(3 if fused else 1, 8)}
    (layer,) = close(tmp_path, made, feeds).layers
    assert (layer.fused == ("MatMul", "Add")) is fused


@pytest.mark.usefixtures("quick")
def test_a_layer_that_gets_no_rows_stays_dense(tmp_path: Path) -> None:
    nodes = [
        node("Greater", ["score", "t"], ["c"]),
        node("NonZero", ["c"], ["i"]),
        node("Squeeze", ["i", "axis"], ["j"]),
        node("Gather", ["x", "j"], ["g"]),
        node("MatMul", ["g", "w"], ["y"]),
    ]
    held = {"w": W, "t": np.float32(9), "axis": np.array([0])}
    made = model(nodes, held, [("score", [10]), ("x", [10, 16])])
    feeds = {"score": np.arange(5, 15, dtype=np.float32), "x": numbers(10, 16)}
    assert close(tmp_path, made, feeds, choose="measure").plan == "dense"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("names", [("conv", "conv.0"), ("x", "x.0"), ("y", "y.1")])
def test_weights_called_like_copies_of_a_value(tmp_path: Path, names: tuple[str, str]) -> None:
    shown, held = names
    x, y = ("in", shown) if shown != "x" else (shown, "out")
    nodes = [node("MatMul", [x, held], [y])]
    made = model(nodes, {held: W}, [(x, ["N", 16])], (y,))
    assert close(tmp_path, made, {x: numbers(4, 16)}, choose="measure").layers


@pytest.mark.usefixtures("quick")
def test_weights_in_another_file_count_for_the_size(tmp_path: Path) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": weight(256, 64)}, [("x", ["N", 256])])
    path = tmp_path / "dense.onnx"
    onnx.save(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert path.stat().st_size < 1_000
    done = compile_onnx(path, tmp_path / "sparse.onnx", threads=1, choose="first")
    found = bench(done.path, against=path, threads=1)
    assert found.dense_bytes > 256 * 64 * 4
    assert bench(path, threads=1).dense_bytes == found.dense_bytes
    moved = tmp_path / "moved.onnx"
    held = onnx.load(done.path)
    onnx.save(held, moved, save_as_external_data=True, location="moved.bin", size_threshold=0)
    assert moved.stat().st_size < done.bytes
    assert bench(moved, against=path, threads=1).sparse_bytes == found.sparse_bytes == done.bytes


def test_functions_of_another_version_stay(tmp_path: Path) -> None:
    body = [node("MatMul", ["x", "w"], ["t"]), node("Relu", ["t"], ["y"])]
    own = helper.make_function("my", "Lin", ["x", "w"], ["y"], body, [helper.make_opsetid("", 18)])
    made = model(
        [node("Lin", ["x", "w"], ["a"], domain="my"), node("MatMul", ["a", "v"], ["y"])],
        {"w": W, "v": weight(8, 12)},
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my", 1)],
        functions=[own],
    )
    assert len(close(tmp_path, made, {"x": numbers(4, 16)}).layers) == 1


def test_an_input_without_a_shape_needs_one_and_takes_any(tmp_path: Path) -> None:
    made = model([node("Gemm", ["x", "w"], ["y"])], {"w": W}, [("x", None)])
    with pytest.raises(UsageError, match="declares none, not even how many axes") as caught:
        compiled(tmp_path, made)
    assert "--shape x=1x128" in caught.value.do
    sample = Sample(shapes={"x": (4, 16)})
    assert close(tmp_path, made, {"x": numbers(4, 16)}, sample=sample).layers


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "said", ['{"layers": [', "[]", '{"layers": [{"name": "x"}]}', '{"layers": "abc"}', ""]
)
def test_what_a_file_says_of_itself_may_have_been_changed(tmp_path: Path, said: str) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": W})
    _, _, sparse = compiled(tmp_path, made)
    changed = onnx.load(sparse)
    (item,) = (m for m in changed.metadata_props if m.key == METADATA)
    assert json.loads(item.value)["layers"]
    item.value = said
    onnx.save(changed, sparse)
    found = bench(sparse, threads=1)
    assert found.layers == ()
    assert "the file does not say how its layers were timed" in found.notes


def test_what_its_author_wrote_into_a_file_stays(tmp_path: Path) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": W})
    made.doc_string, made.graph.doc_string = "of the model", "of the graph"
    for holder in (made, made.graph):
        holder.metadata_props.add(key="licence", value="Apache-2.0")
    _, _, sparse = compiled(tmp_path, made)
    kept = onnx.load(sparse)
    assert (kept.doc_string, kept.graph.doc_string) == ("of the model", "of the graph")
    for holder in (kept, kept.graph):
        assert ("licence", "Apache-2.0") in [(m.key, m.value) for m in holder.metadata_props]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_indices_are_made_up_for_the_axis_that_is_looked_up(tmp_path: Path, axis: int) -> None:
    table = numbers(40, 16) if axis == 0 else numbers(16, 5)
    after = [] if axis == 0 else [node("Transpose", ["g"], ["x"], perm=[1, 0])]
    nodes = [node("Gather", ["e", "ids"], ["x" if axis == 0 else "g"], axis=axis), *after]
    made = model(
        [*nodes, node("MatMul", ["x", "w"], ["y"])],
        {"e": table, "w": W},
        [("ids", ["t"], TensorProto.INT64)],
    )
    assert close(tmp_path, made, {"ids": np.arange(5)}).layers


def test_kernels_that_are_not_there_are_no_damage(tmp_path: Path) -> None:
    _, _, sparse = compiled(tmp_path, model([node("MatMul", ["x", "w"], ["y"])], {"w": W}))
    # Which kernels run is decided once in a process.
    code = "import sys; from secateur.runtime import session; session(sys.argv[1], 1)"
    env = {**os.environ, "SECATEUR_ISA": "foo"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(sparse)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "The environment asks for other kernels. Unset SECATEUR_ISA" in done.stderr
    code = "from secateur.runtime.native import isa; isa()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert "that run (avx2, baseline). Kernels are compiled for a few sets" in re.sub(
        r"here \(.*?\)", "(avx2, baseline)", done.stderr
    )


@pytest.mark.parametrize(("constant", "folded"), [(1.5 * 2**23, False), (3.0, True)])
def test_rounding_by_a_large_constant_is_kept(
    tmp_path: Path, constant: float, folded: bool
) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "k"], ["b"]),
        node("Sub", ["b", "k"], ["y"]),
    ]
    done = close(tmp_path, model(nodes, {"w": W, "k": np.float32(constant)}), {"x": numbers(4, 16)})
    assert ("Add" in done.layers[0].fused) == folded


def test_names_inside_branches_are_taken(tmp_path: Path) -> None:
    def branch(kind: str, out: str) -> Any:
        result = [value(out, TensorProto.FLOAT, None)]
        return helper.make_graph([node(kind, ["a"], [out])], kind, [], result)

    first = node("MatMul", ["x", "w"], ["a"], name="fc")
    then, other = branch("Relu", "fc.values"), branch("Tanh", "t")
    choice = node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    inputs = [("x", ["N", 16]), ("c", [], TensorProto.BOOL)]
    made = model([first, choice], {"w": W}, inputs)
    _, _, sparse = compiled(tmp_path, made)
    named = {t.name for t in onnx.load(sparse).graph.initializer}
    assert "fc+.values" in named
    for flag in (True, False):
        close(tmp_path, made, {"x": numbers(4, 16), "c": np.array(flag)})
    assert numpy_helper.to_array(made.graph.initializer[0]).shape == W.shape


def refusal(tmp_path: Path, made: Any) -> str:
    with pytest.raises(FileError) as caught:
        compiled(tmp_path, made)
    assert all(caught.value.parts().values())
    return str(caught.value)


def test_what_is_not_known_is_not_called_damaged(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    newer = model(nodes, {"w": W}, opset_imports=[helper.make_opsetid("", 99)])
    assert "newer" in refusal(tmp_path, newer)
    assert "newer" in refusal(tmp_path, model(nodes, {"w": W}, ir_version=99))
    foreign = model(
        [*nodes, node("Foo", ["y"], ["z"], domain="acme")],
        {"w": W},
        outputs=("z",),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)],
    )
    said = refusal(tmp_path, foreign)
    assert "acme:Foo" in said
    assert "library" in said
    assert "damaged" not in said


def test_what_no_output_needs_is_left_out(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["a", "v"], ["unused"]),
        node("Relu", ["a"], ["y"]),
    ]
    made = model(nodes, {"w": W, "v": weight(8, 4)})
    done = close(tmp_path, made, {"x": numbers(4, 16)})
    assert [layer.fused for layer in done.layers] == [("MatMul", "Relu")]
    (one,) = (held := onnx.load(done.path).graph).node
    assert {tensor.name for tensor in held.initializer} <= set(one.input)


@pytest.mark.parametrize("seed", range(3))
def test_nodes_may_stand_in_any_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = model(
        [node("Add", [f"v{i}", f"v{rng.integers(i + 1)}"], [f"v{i + 1}"]) for i in range(50)],
        {},
        [("v0", [4])],
        ("v50",),
    )
    assert list(ordered(made.graph)) == list(made.graph.node)
    shuffled = onnx.GraphProto(node=[made.graph.node[i] for i in rng.permutation(50)])
    assert list(ordered(shuffled)) == list(made.graph.node)
