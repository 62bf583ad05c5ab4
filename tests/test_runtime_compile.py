"""Compiling ONNX files: bad input and wrong results are refused; real networks compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_cases import PAD, SAME, W1, W3, WL, X2, X4, model, native, numpy_helper, onnx, write

from secateur.core.errors import DataError, FileError, FormatError, UnknownName, UsageError
from secateur.runtime import available
from secateur.runtime.compiler import compile as compiling
from secateur.runtime.compiler import whole
from secateur.runtime.compiler.compile import compile_onnx
from secateur.runtime.compiler.graph import Graph, read_model
from secateur.runtime.compiler.masked import prune_onnx
from secateur.runtime.compiler.sample import Sample
from secateur.runtime.compiler.verify import largest_error, require_same
from secateur.runtime.native import has_half
from secateur.runtime.race import open_session

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
