"""ONNX models that are unusual, but valid: bounds near zero, odd inputs and outputs, odd names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from odd_onnx_cases import W, X, both, close, compiled, model, node, numbers, weight  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402 - only where it is installed

from secateur.core.errors import UsageError  # noqa: E402
from secateur.runtime import available  # noqa: E402
from secateur.runtime.compiler import compile as compiling  # noqa: E402
from secateur.runtime.compiler.activations import recognise  # noqa: E402
from secateur.runtime.compiler.rebuild import dense_model  # noqa: E402
from secateur.runtime.compiler.sample import Sample  # noqa: E402
from secateur.runtime.compiler.verify import largest_error  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

# ---- bounds near zero


@pytest.mark.parametrize("bound", [1e-7, 1e-8, 1e-12, -1e-9, 0.0])
@pytest.mark.parametrize("kind", ["Clip", "Max"])
def test_a_bound_near_zero_is_kept_exactly(tmp_path: Path, bound: float, kind: str) -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["a"]), node(kind, ["a", "low"], ["y"])],
        {"w": W, "low": np.float32(bound)},
    )
    done, dense, sparse = compiled(tmp_path, made)
    (a,), (b,) = both(dense, sparse, {"x": numbers(4, 16)})
    assert a.min() == b.min() == np.float32(bound)
    assert done.layers[0].fused[-1] == kind


@pytest.mark.parametrize("activation", ["Relu", "HardSwish", "Identity"])
def test_a_term_near_zero_is_kept(tmp_path: Path, activation: str) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node(activation, ["a"], ["r"]),
        node("Add", ["r", "low"], ["y"]),
    ]
    _, dense, sparse = compiled(tmp_path, model(nodes, {"w": W, "low": np.float32(1e-8)}))
    (a,), (b,) = both(dense, sparse, {"x": np.zeros((1, 16), np.float32)})
    assert (a == b).all()
    assert (b == np.float32(1e-8)).all()


def test_what_only_resembles_a_bound_is_no_activation() -> None:
    x = np.concatenate([np.linspace(-9, 9, 1001), np.logspace(-6, 6, 100), [0.0]])
    relu = np.maximum(x, 0)
    assert recognise(x, relu).name == "relu"  # type: ignore[union-attr]
    assert recognise(x, 6 * (relu / 6)).name == "relu"  # type: ignore[union-attr]
    for y in (relu + 1e-8, np.where(x < 0, 1e-9 * x, x), x + 1e-9, x / (1 + np.exp(-x)) + 1e-9):
        assert recognise(x, y) is None


# ---- models without anything to replace, functions, constants


@pytest.mark.parametrize("choose", ["first", "measure"])
def test_a_model_with_nothing_to_replace_stays_dense(
    tmp_path: Path, choose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_WHOLE", 0.2)
    unpruned = model([node("MatMul", ["x", "w"], ["y"])], {"w": numbers(16, 8)})
    done = close(tmp_path, unpruned, {"x": numbers(3, 16)}, choose=choose)
    assert not done.layers
    assert any("not tried: 1 of 1" in note for note in done.notes)
    cube = model(
        [node("Conv", ["x", "w"], ["y"])], {"w": weight(4, 2, 3, 3, 3)}, [("x", ["N", 2, 5, 6, 7])]
    )
    done = close(tmp_path, cube, {"x": numbers(2, 2, 5, 6, 7)}, choose=choose)
    assert not done.layers
    assert any("no layer could be replaced" in note for note in done.notes)
    assert not any("nothing was faster" in note for note in done.notes)


def test_weights_of_other_types_are_told(tmp_path: Path) -> None:
    held = {
        "h": weight(16, 8).astype(np.float16),
        "q": (20 * weight(8, 8)).astype(np.int8),
        "s": np.float32(0.05),
        "first": weight(3, 3),
    }
    nodes = [
        node("Cast", ["x"], ["xh"], to=TensorProto.FLOAT16),
        node("MatMul", ["xh", "h"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        node("DequantizeLinear", ["q", "s"], ["w"]),
        node("MatMul", ["b", "w"], ["c"]),
        node("MatMul", ["first", "c"], ["y"]),
    ]
    done = close(tmp_path, model(nodes, held, [("x", [3, 16])]), {"x": numbers(3, 16)})
    assert any("(1 in float16, 1 in integers)" in note for note in done.notes), done.notes
    assert any("not tried: 1 of 1" in note for note in done.notes), done.notes


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [node("MatMul", ["a", "b"], ["q"]), node("Relu", ["q"], ["o"])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    function = helper.make_function("mine", "F", ["a", "b"], ["o"], body, opsets[:1])
    made = model(
        [node("F", ["x", "w"], ["y"], domain="mine")],
        {"w": W},
        opset_imports=opsets,
        functions=[function],
    )
    path = tmp_path / "f.onnx"
    path.write_bytes(made.SerializeToString())
    code = "import sys; from secateur.runtime import compile_onnx as c; c(*sys.argv[1:], choose='first')"
    # In a process of its own: onnx.inliner is there as soon as anything else imports it.
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "s.onnx"], check=True)
    assert close(tmp_path, made, {"x": numbers(3, 16)}).layers[0].fused == ("MatMul", "Relu")


def test_constants_without_an_axis_are_timed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_WHOLE", 0.2)
    monkeypatch.setattr(compiling, "_LAYERS", 0.2)
    made = model(
        [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            node("Dropout", ["c", "ratio", "training"], ["d"]),
            node("Relu", ["d"], ["e"]),
            node("Max", ["e", "least"], ["y"]),
        ],
        {"w": weight(16, 16, 3, 3), "ratio": np.float32(0.5), "training": np.array(False)},
        [("x", ["N", 16, 9, 9]), ("least", [])],
    )
    feeds = {"x": numbers(2, 16, 9, 9), "least": np.array(0.1, np.float32)}
    close(tmp_path, made, feeds, choose="measure")


# ---- inputs


@pytest.mark.parametrize(("ir", "whole"), [(3, True), (4, False), (8, False), (8, True)])
def test_a_weight_that_a_caller_may_replace_stays_an_input(
    tmp_path: Path, ir: int, whole: bool
) -> None:
    made = model(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Add", ["a", "b"], ["c"]),
            node("MatMul", ["c", "v"], ["y"]),
        ],
        {"w": W, "b": numbers(8), "v": weight(8, 40), "spare": numbers(1)},
        [X, ("w", [16, 8]), ("b", [8]), ("spare", [1])] + [("v", [8, 40])] * whole,
        ir_version=ir,
        opset_imports=[helper.make_opsetid("", 8)],
    )
    feeds = {"x": numbers(3, 16)}
    done = close(tmp_path, made, feeds)
    if whole:  # that is a habit of exporters; once every weight had to be listed
        assert [layer.weight for layer in done.layers] == ["w", "v"]
        assert any("all 4 weights" in note for note in done.notes) == (ir > 3)
        return
    assert [layer.weight for layer in done.layers] == ["v"]
    assert any("1 layer" in note and "input of the model" in note for note in done.notes)
    close(tmp_path, made, feeds | {"w": numbers(16, 8), "b": numbers(8), "spare": numbers(1)})


def test_axes_that_are_negative_are_open(tmp_path: Path) -> None:
    made = model(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Add", ["a", "r"], ["b"]),
            node("Relu", ["b"], ["y"]),
        ],
        {"w": W},
        [("x", [-1, 16]), ("r", [-1, 8])],
    )
    done = close(tmp_path, made, {"x": numbers(3, 16), "r": numbers(1, 8)})
    assert done.inputs == {"x": (1, 16), "r": (1, 8)}
    assert done.layers[0].fused == ("MatMul",)


@pytest.mark.parametrize(
    "sample", [Sample(batch=-1), Sample(batch=0), Sample(shapes={"x": (-2, 16)})]
)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, sample: Sample) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": W})
    with pytest.raises(UsageError, match=r"-1|0|-2") as caught:
        compiled(tmp_path, made, sample=sample)
    assert all(caught.value.parts().values())


@pytest.mark.parametrize("axis", [-2, -1, 0, 1, 2])
def test_flatten_counts_its_axis_from_either_end(tmp_path: Path, axis: int) -> None:
    rows = 16 if axis in (-1, 1) else 1 if axis in (-2, 0) else 128
    made = model(
        [node("Flatten", ["w"], ["flat"], axis=axis), node("MatMul", ["x", "flat"], ["y"])],
        {"w": W},
        [("x", ["N", rows])],
    )
    assert close(tmp_path, made, {"x": numbers(4, rows)}).layers


# ---- names


def test_names_that_a_file_already_uses_are_left_alone(tmp_path: Path) -> None:
    table = weight(50, 16)
    tied = model(
        [
            node("Gather", ["head.weight", "ids"], ["h"]),
            node("Relu", ["h"], ["head.0"]),
            node("Gemm", ["head.0", "head.weight"], ["y"], name="head", transB=1),
        ],
        {"head.weight": table},
        [("ids", ["N"], TensorProto.INT64)],
    )
    tall = model(
        [
            node("Conv", ["x", "w"], ["y"], name="q", pads=[1, 1]),
            node("Relu", ["y"], ["y.tall_y"]),
            node("Tanh", ["y"], ["q.tall_x"]),
        ],
        {"w": weight(8, 4, 3)},
        [("x", ["N", 4, 20])],
        ("y", "y.tall_y", "q.tall_x"),
    )
    own = model(
        [
            node("MatMul", ["x", "w"], ["a"], name="fc"),
            node("Add", ["a", "b"], ["fc.0"]),
            node("Relu", ["fc.0"], ["fc.1"]),
            node("Add", ["fc.1", "fc.0"], ["y"]),
        ],
        {"w": W, "b": numbers(8)},
    )
    flat = {"x": numbers(3, 16)}
    images = {"x": numbers(2, 4, 20)}
    for made, feeds in ((tied, {"ids": np.arange(5)}), (tall, images), (own, flat)):
        close(tmp_path, made, feeds)
        again = dense_model(onnx.load(tmp_path / "sparse.onnx"))
        (tmp_path / "again.onnx").write_bytes(again.SerializeToString())
        for a, b in zip(
            *both(tmp_path / "dense.onnx", tmp_path / "again.onnx", feeds), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- outputs and inputs that are no arrays of numbers


def sequence_output() -> Any:
    kind = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    split = node("SplitToSequence", ["a"], ["y"], axis=1)
    return model([node("MatMul", ["x", "w"], ["a"]), split], {"w": W}, outputs=(kind,))


def map_output() -> Any:
    numbers_of = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    pairs = helper.make_map_type_proto(TensorProto.INT64, numbers_of)
    kind = helper.make_value_info("y", helper.make_sequence_type_proto(pairs))
    zipped = node("ZipMap", ["a"], ["y"], domain="ai.onnx.ml", classlabels_int64s=list(range(8)))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return model(
        [node("MatMul", ["x", "w"], ["a"]), zipped], {"w": W}, outputs=(kind,), opset_imports=opsets
    )


@pytest.mark.parametrize("made", [sequence_output, map_output])
def test_sequences_and_maps_are_compared(
    tmp_path: Path, made: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, dense, sparse = compiled(tmp_path, made())
    assert done.error < 1e-5
    (a,), (b,) = both(dense, sparse, {"x": numbers(3, 16)})
    assert largest_error([a], [b]) < 1e-5
    assert largest_error([a], [a[:-1]]) == np.inf
    assert largest_error([[{0: 1.0, 1: 2.0}]], [[{0: 1.0, 1: 2.5}]]) == 0.25


def test_text_is_not_compared_and_a_note_says_so(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("t", TensorProto.STRING, None)
    made = model(
        [node("MatMul", ["x", "w"], ["y"]), node("Cast", ["y"], ["t"], to=TensorProto.STRING)],
        {"w": W},
        outputs=("y", text),
    )
    done, _, _ = compiled(tmp_path, made)
    assert done.layers[0].kernel is not None
    assert any("'t'" in note and "text" in note for note in done.notes)


def test_types_that_numpy_lacks_are_refused_as_such(tmp_path: Path) -> None:
    kind = TensorProto.BFLOAT16
    out = helper.make_tensor_value_info("y", kind, None)
    last = model(
        [node("MatMul", ["x", "w"], ["a"]), node("Cast", ["a"], ["y"], to=kind)],
        {"w": W},
        outputs=(out,),
    )
    first = model(
        [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("MatMul", ["f", "w"], ["y"])],
        {"w": W},
        [("x", ["N", 16], kind)],
    )
    for made, name in ((last, "y"), (first, "x")):
        with pytest.raises(UsageError, match=f"'{name}'.*bfloat16") as caught:
            compiled(tmp_path, made)
        assert all(caught.value.parts().values())
        assert "Cast" in str(caught.value)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(values={"x": [1.0] * 16}),  # type: ignore[dict-item]
        Sample(shapes={"x": (10**12, 16)}),
        Sample(shapes={"x": (10**30, 16)}),
    ],
)
def test_inputs_that_cannot_be_made_are_refused(tmp_path: Path, sample: Sample) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": W})
    with pytest.raises(UsageError, match="'x'") as caught:
        compiled(tmp_path, made, sample=sample)
    assert all(caught.value.parts().values())


def test_a_sequence_as_input_is_refused(tmp_path: Path) -> None:
    made = model(
        [node("SequenceAt", ["s", "i"], ["x"]), node("MatMul", ["x", "w"], ["y"])],
        {"w": W, "i": np.int64(0)},
    )
    kind = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["N", 16])
    made.graph.input[0].CopyFrom(kind)
    for sample in (Sample(), Sample(values={"s": [numbers(2, 16)]})):  # type: ignore[dict-item]
        with pytest.raises(UsageError, match="'s'"):
            compiled(tmp_path, made, sample=sample)


@pytest.mark.parametrize(
    ("lead", "ahead", "replaced"),
    [
        ((2,), (1,), True),
        ((3, 2), (1,), True),
        ((3, 2), (1, 1), True),
        (
            (),
            (1,),
            False,
        ),  # with more axes than the input, or several matrices, the output has others
        ((2,), (1, 1), False),
        ((3, 2), (2,), False),
    ],
)
def test_a_weight_with_further_axes_of_one_entry_is_a_matrix(
    tmp_path: Path, lead: tuple[int, ...], ahead: tuple[int, ...], replaced: bool
) -> None:
    rows = (*lead, 5, 16)
    held = {"w": weight(*ahead, 16, 8)}
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    made = model(nodes, held, [("x", ["N", *rows[1:]])])
    feed = {"x": numbers(*rows)}
    expected = np.maximum(feed["x"] @ held["w"], 0)
    done, dense, sparse = compiled(tmp_path, made)
    assert [layer.fused for layer in done.layers] == [("MatMul", "Relu")] * replaced
    for found in both(dense, sparse, feed):
        assert found[0].shape == expected.shape
        assert np.abs(found[0] - expected).max() < 1e-5
    restored = dense_model(onnx.load(str(sparse)))
    again = ort.InferenceSession(restored.SerializeToString()).run(None, feed)[0]
    assert again.shape == expected.shape
