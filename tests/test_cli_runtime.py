"""The commands compile and bench, and the facts behind them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402 - only where it is installed

from secateur.cli.main import app  # noqa: E402
from secateur.cli.sparse_options import sample_of  # noqa: E402
from secateur.core.errors import UsageError  # noqa: E402
from secateur.report.runtime import (  # noqa: E402
    bench_layers,
    bench_table,
    compiled_layers,
    notes_lines,
)
from secateur.runtime import available  # noqa: E402
from secateur.runtime.bench import Bench, LayerSpeed, Median, bench  # noqa: E402
from secateur.runtime.compiler.compile import Compiled, CompiledLayer  # noqa: E402
from secateur.runtime.compiler.graph import Graph  # noqa: E402
from secateur.runtime.compiler.masked import prune_onnx  # noqa: E402
from secateur.runtime.compiler.sample import Sample  # noqa: E402
from secateur.runtime.native import Variant  # noqa: E402
from secateur.runtime.operators import is_sparse  # noqa: E402
from secateur.runtime.race import Raced  # noqa: E402
from secateur.runtime.session import session  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
net (float[N,16,12,12] image) => (float[N,16,12,12] y) {
  a = Conv <pads = [1,1,1,1]> (image, w0, b0) b = Relu (a)
  c = Conv <pads = [1,1,1,1]> (b, w1, b0) d = Add (c, b) y = Relu (d)
}"""
KEYS = {
    "dense_ms",
    "sparse_ms",
    "speedup",
    "max_rel_error",
    "dense_bytes",
    "sparse_bytes",
    "layers",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time for measuring: the numbers do not matter here."""
    compiling = importlib.import_module("secateur.runtime.compiler.compile")
    benching = importlib.import_module("secateur.runtime.bench")
    monkeypatch.setattr(compiling, "_LAYERS", 0.2)
    monkeypatch.setattr(compiling, "_WHOLE", 0.1)
    monkeypatch.setattr(benching, "_SECONDS", 0.1)
    monkeypatch.setattr(importlib.import_module("secateur.runtime.machine"), "_SECONDS", 0.01)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = onnx.parser.parse_model(TEXT)
    for name, shape in {"w0": (16, 16, 3, 3), "w1": (16, 16, 3, 3), "b0": (16,)}.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(weight, name))
    (tmp_path / "full.onnx").write_bytes(made.SerializeToString())
    assert prune_onnx(tmp_path / "full.onnx", tmp_path / "net.onnx", 0.9, first=True) == 2
    return tmp_path / "net.onnx"


def call(*words: object) -> tuple[int, dict[str, Any]]:
    """Run a command with --json; its exit code and document."""
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--json")])
    return done.exit_code, json.loads(done.stdout)


def compiled(network: Path, *words: str) -> Path:
    out = network.with_name("net.sparse.onnx")
    code, _ = call("compile", network, "-o", out, "--choose", "first", "--threads", 1, *words)
    assert code == 0
    return out


def test_compile_writes_a_file_that_a_session_opens(network: Path) -> None:
    out = network.with_name("out.onnx")
    code, found = call("compile", network, "-o", out, "--choose", "first", "--threads", 1)
    assert code == 0
    assert found["bytes"] == out.stat().st_size < found["dense_bytes"] == network.stat().st_size
    assert found["error"] < 1e-5
    assert (found["plan"], found["speedup"], found["inputs"]) == (
        "first",
        None,
        {"image": [1, 16, 12, 12]},
    )
    kinds = [layer["fused"] for layer in found["layers"]]
    assert kinds == [["Conv", "Relu"], ["Conv", "Add", "Relu"]]
    assert all(layer["kernel"]["family"] for layer in found["layers"])
    opened = session(out, threads=1)
    x = np.random.default_rng(1).standard_normal((3, 16, 12, 12)).astype(np.float32)
    assert opened.run(None, {"image": x})[0].shape == x.shape


@pytest.mark.usefixtures("quick")
def test_compile_measures_and_says_so(network: Path) -> None:
    out = network.with_name("out.onnx")
    done = CliRunner().invoke(app, ["compile", str(network), "-o", str(out), "--threads", "1"])
    assert done.exit_code == 0
    assert "Written to" in done.stdout
    assert "ms dense" in done.stdout
    again = CliRunner().invoke(app, ["compile", str(network), "-o", str(out)])
    assert again.exit_code == 4
    assert "already exists" in again.stderr


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("against", [None, "dense", "file"])
def test_bench_of_a_compiled_file(network: Path, against: str | None) -> None:
    words = {None: (), "dense": ("--against", "dense"), "file": ("--against", network)}[against]
    code, found = call("bench", compiled(network), *words, "--threads", 1, "--batch", 2)
    assert code == 0
    assert set(found) >= KEYS
    assert found["inputs"] == {"image": [2, 16, 12, 12]}
    assert 0 < found["max_rel_error"] < 1e-5
    assert found["sparse_bytes"] < found["dense_bytes"] == network.stat().st_size
    low, high = found["speedup_range"]
    assert 0 < low <= found["speedup"] <= high
    assert [layer["sparsity"] for layer in found["layers"]] == [pytest.approx(0.9, abs=1e-3)] * 2


@pytest.mark.usefixtures("quick")
def test_bench_of_a_dense_file_compiles_it_first(network: Path) -> None:
    before = sorted(network.parent.iterdir())
    code, found = call("bench", network, "--threads", 1)
    assert code == 0
    assert set(found) >= KEYS
    assert found["dense_bytes"] == network.stat().st_size
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        assert layer["dense_ms"] > 0
        work = 2 * 0.1 * 16 * 16 * 9 * 144
        assert layer["gflops"] == pytest.approx(work / layer["sparse_ms"] / 1e6, rel=0.02)
        assert layer["peak_share"] == pytest.approx(layer["gflops"] / found["peak_gflops"])
    assert sorted(network.parent.iterdir()) == before


@pytest.mark.usefixtures("quick")
def test_no_layer_is_faster_than_the_peak(network: Path) -> None:
    """A matrix multiplication that was disturbed says too little."""
    found = bench(network, threads=1, peak=1e-3)
    shares = [layer.peak_share for layer in found.layers]
    assert max(share for share in shares if share is not None) == 1.0
    assert found.peak_gflops == max(layer.gflops or 0 for layer in found.layers)
    assert bench(compiled(network), threads=1).peak_gflops is None


@pytest.mark.usefixtures("quick")
def test_bench_sees_a_file_that_computes_something_else(network: Path) -> None:
    out = compiled(network)
    made = onnx.load(str(out))
    for tensor in made.graph.initializer:
        if tensor.name.endswith(".values"):
            values = np.array(numpy_helper.to_array(tensor))
            values[0] += 1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    out.write_bytes(made.SerializeToString())
    _, found = call("bench", out, "--against", network, "--threads", 1)
    assert found["max_rel_error"] > 1e-3
    assert "not the same network" in found["notes"][0]
    _, found = call("bench", compiled(network, "--overwrite"), "--against", network, "--threads", 1)
    assert not any("same network" in note for note in found["notes"])


OTHERS = {
    "another name": (
        "(float[N,16,12,12] picture) => (float[N,16,12,12] y) { y = Relu (picture) }",
        "inputs are picture float32 ?x16x12x12, those of the compiled model image",
    ),
    "another size": (
        "(float[N,8,12,12] image) => (float[N,8,12,12] y) { y = Relu (image) }",
        "inputs are image float32 ?x8x12x12, those of the compiled model image",
    ),
    "another type": (
        "(double[N,16,12,12] image) => (double[N,16,12,12] y) { y = Abs (image) }",
        "inputs are image float64 ?x16x12x12, those of the compiled model image",
    ),
    "one more input": (
        "(float[N,16,12,12] image, float[N] k) => (float[N,16,12,12] y) { y = Relu (image) }",
        "inputs are image float32 ?x16x12x12, k float32 ?, those",
    ),
    "another shape": (
        "(float[N,16,12,12] image) => (float[N,M,K] y) { y = ReduceMax <keepdims=0, axes=[1]> (image) }",
        "outputs are 1x12x12, those of the compiled model 1x16x12x12",
    ),
    "one more output": (
        "(float[N,16,12,12] image) => (float[N,16,12,12] y, float[N,16,12,12] z)"
        " { y = Relu (image) z = Neg (image) }",
        "outputs are 1x16x12x12, 1x16x12x12, those of the compiled model 1x16x12x12",
    ),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", OTHERS)
def test_bench_refuses_another_network(network: Path, name: str) -> None:
    body, said = OTHERS[name]
    other = network.with_name("other.onnx")
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net {body}')
    other.write_bytes(made.SerializeToString())
    code, found = call("bench", compiled(network), "--against", other, "--threads", 1)
    assert code == 2
    assert said in found["error"]["found"]
    assert all(found["error"][part] for part in ("asked", "why", "do"))


@pytest.mark.usefixtures("quick")
def test_a_difference_that_is_no_number_is_null(network: Path) -> None:
    made = onnx.load(str(network))
    for tensor in made.graph.initializer:
        if tensor.name == "b0":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, np.inf, np.float32), "b0"))
    other = network.with_name("other.onnx")
    other.write_bytes(made.SerializeToString())
    code, found = call("bench", compiled(network), "--against", other, "--threads", 1)
    assert (code, found["max_rel_error"]) == (0, None)
    assert "not the same network" in found["notes"][0]


@pytest.mark.usefixtures("quick")
def test_bench_as_text(network: Path) -> None:
    done = CliRunner().invoke(app, ["bench", str(compiled(network)), "--threads", "1"])
    assert done.exit_code == 0
    for word in ("GFLOP/s", "median", "pairs", "largest difference"):
        assert word in done.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("said", [None, "many", -1])
def test_a_file_that_does_not_say_how_large_it_was(network: Path, said: object) -> None:
    out = compiled(network)
    made = onnx.load(str(out))
    entry = next(item for item in made.metadata_props if item.key == "secateur.compiled")
    entry.value = json.dumps({**json.loads(entry.value), "dense_bytes": said})
    out.write_bytes(made.SerializeToString())
    code, found = call("bench", out, "--threads", 1)
    assert code == 0
    assert found["sparse_bytes"] < found["dense_bytes"] != network.stat().st_size


def test_errors_end_with_their_codes(network: Path) -> None:
    code, found = call("compile", network.with_name("no.onnx"), "-o", network.with_name("o.onnx"))
    assert (code, found["error"]["type"]) == (4, "FileError")
    out = compiled(network)
    code, found = call("compile", out, "-o", network.with_name("o.onnx"))
    assert (code, found["error"]["found"]) == (2, "it is compiled already")
    code, found = call("bench", out, "--against", out)
    assert (code, found["error"]["found"]) == (2, "it is compiled, too")
    wish = ("-o", network.with_name("o.onnx"), "--precision", "int4")
    assert call("compile", network, *wish)[0] == 2
    assert call("bench", out, "--shape", "image=1x16")[0] == 2


def test_words_are_judged_before_places(network: Path) -> None:
    out = compiled(network)
    for flag, word in (("--choose", "slow"), ("--precision", "int4")):
        code, found = call("compile", network, "-o", out, flag, word)
        assert (code, word in found["error"]["asked"]) == (2, True)


@pytest.mark.parametrize("command", ["compile", "bench"])
def test_more_threads_than_any_machine_has_are_refused(network: Path, command: str) -> None:
    place = ("-o", network.with_name("o.onnx")) if command == "compile" else ()
    code, found = call(command, network, *place, "--threads", 100_000)
    assert (code, found["error"]["asked"]) == (2, "threads=100000")
    assert "1 to 256" in found["error"]["found"]


@pytest.mark.parametrize("command", ["compile", "bench"])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_batch_that_a_shape_contradicts(network: Path, command: str, batch: int) -> None:
    model = compiled(network) if command == "bench" else network
    place = ("-o", network.with_name("o.onnx")) if command == "compile" else ()
    code, found = call(command, model, *place, "--batch", batch, "--shape", "image=2x16x12x12")
    assert (code, found["error"]["found"]) == (2, "that is a batch of 2")
    assert all(found["error"][part] for part in ("asked", "why", "do"))


def test_tables_of_layers_fit_into_80_columns() -> None:
    kernel = Variant("panels", 4, 11, 128)
    name = "/layer4/layer4.0/downsample/downsample.0/Conv"
    shape = (2048, 1024, 1, 1)
    what = (name, "conv", shape, 1, 0.9, kernel, 12.34, 3.456, 123.4, 0.45)
    timed = Median(96.83, 94.2, 1234.0)
    shapes = {"input": (1, 3, 224, 224), "rate": ()}
    found = Bench(
        *(timed, timed, 0.079, (0.07, 0.08), 200, 1e-7, 10**8, 10**7, 1, "avx512", 100.0, shapes),
        layers=(LayerSpeed(*what),),
        notes=("long " * 30,),
    )
    made = CompiledLayer(
        *(name, "w", "conv", shape, 1, 0.9, ("Conv", "Add", "Relu"), 49, 1, kernel, 12.3, 3.4, ()),
    )
    whole = ("o", 1, 2, "first", None, None, None, 1e-7, None, "float32", "avx2", None, {})
    for table, row in (
        (bench_layers(found), "2048x1024x1x1 90.0 % panels 4x11/128 12.3 3.46 123 45 %"),
        (
            compiled_layers(Compiled(*whole, (made,), ())),
            "90.0 % Add Relu panels 4x11/128 12.3 3.40",
        ),
        (bench_table(found), "80 % of turns 94.2 to 1234 ms 94.2 to 1234 ms"),
        (bench_table(found), "input 1x3x224x224, rate scalar."),
        (notes_lines(found.notes), "note: long"),
    ):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert any(row in " ".join(line.split()) for line in text.splitlines()), text
        assert "\u2026" not in text


def test_shapes_are_written_with_an_x() -> None:
    assert sample_of(2, ["a=b=1x3"]).shapes == {"a=b": (1, 3)}
    for wrong in ("a", "a=", "=1x2", "a=1x", "a=0x2", "a=1,2"):
        with pytest.raises(UsageError, match="NAME=SIZExSIZE"):
            sample_of(1, [wrong])
    with pytest.raises(UsageError, match="'x' was given the shape 2x3 before"):
        sample_of(None, ["x=2x3", "y=1x3", "x=2x4"])


BATCHES = {
    "open": ("(float[N,8] x) => (float[N,8] y) { y = Relu (x) }", {"x": (2, 8)}, False),
    "of two names": (
        "(float[N,8] x, float[K,8] z) => (float[N,8] y) { y = Relu (x) }",
        {"z": (2, 8)},
        True,
    ),
    "of one name": (
        "(float[N,8] x, float[N,8] z) => (float[N,8] y) { y = Add (x, z) }",
        {"z": (2, 8)},
        False,
    ),
    "fixed": ("(float[2,T] x) => (float[2,T] y) { y = Relu (x) }", {"x": (2, 9)}, True),
    "of a list": ("(float[T] x) => (float[T] y) { y = Relu (x) }", {"x": (9,)}, True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_which_batch_a_shape_contradicts(name: str) -> None:
    body, shapes, fine = BATCHES[name]
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net {body}')
    graph = Graph.of(made)
    for batch in (None, 2, 7):
        sample = Sample(batch=batch, shapes=shapes)
        with contextlib.nullcontext() if fine or batch != 7 else pytest.raises(UsageError):
            sample.require_one_batch(graph)


def test_pruning_a_file(network: Path) -> None:
    made = onnx.load(str(network))
    weights = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    full = onnx.load(str(network.with_name("full.onnx")))
    before = {t.name: numpy_helper.to_array(t) for t in full.graph.initializer}
    for name in ("w0", "w1"):
        kept = weights[name] != 0
        assert kept.sum() == round(0.1 * kept.size)
        assert np.array_equal(weights[name][kept], before[name][kept])
        assert np.abs(before[name][~kept]).max() <= np.abs(before[name][kept]).min()
    assert prune_onnx(network.with_name("full.onnx"), network.with_name("p.onnx"), 0.5) == 1
    with pytest.raises(UsageError, match="not in"):
        prune_onnx(network, network.with_name("p.onnx"), 50)


def test_ratios_are_those_of_pairs() -> None:
    raced = Raced(((1.0, 2.0, 4.0, 8.0, 16.0), (0.5, 1.0, 2.0, 4.0, 8.0), (3.0, 6.0)))
    assert raced.ratio(1) == 0.5
    assert raced.ratio_range(1) == (0.5, 0.5)
    assert raced.ratio(2) == 3.0
    # A process that is held up every other time.
    busy = Raced(((1.0, 9.0, 1.0, 9.0, 9.0), (9.0, 0.5, 9.0, 9.0, 0.5)))
    assert (busy.undisturbed(0), busy.undisturbed(1)) == (1.0, 0.5)
    assert [raced.finished(i) for i in range(3)] == [True, True, False]


def test_the_compiled_file_holds_sparse_operators(network: Path) -> None:
    assert sum(map(is_sparse, onnx.load(str(compiled(network))).graph.node)) == 2
