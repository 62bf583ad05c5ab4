"""What sessions refuse: inputs that do not fit, damaged models, and a library that is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from session_cases import (
    CASES,
    Problem,
    helper,
    numpy_helper,
    onnx,
    onnxruntime,
    problem,
    require_same,
    set_attribute,
    sparse_model,
)

from secateur.core.errors import FileError, FormatError, MissingNative, UsageError
from secateur.runtime import library
from secateur.runtime.session import session

# What a registered-operator error of ONNX Runtime says; the README explains it.
UNKNOWN_OPERATOR = "is not a registered function/op"


def refused(task: Problem, feeds: dict[str, np.ndarray], message: str) -> None:
    opened = session(sparse_model(task), 2)
    with pytest.raises(Exception, match=message) as caught:
        opened.run(None, feeds)
    assert type(caught.value).__module__.startswith("onnxruntime")
    # The session lives on.
    require_same(task, opened.run(None, task.feeds)[0])


def test_inputs_that_do_not_fit() -> None:
    conv, linear, both = (problem(CASES[name]) for name in ("3x3", "tokens", "residual"))
    x = conv.feeds["x"]
    refused(conv, {"x": x[:, :7]}, r"'layer': X has the shape \[1, 7, 17, 19\].*\[batch, 8, height")
    for empty, shape in ((x[:, :, :0], "0, 19"), (x[..., :0], "17, 0")):
        message = rf"X has the shape \[1, 8, {shape}\]: .* at least one row and one column"
        refused(conv, {"x": empty}, message)
    refused(conv, {"x": x.astype(np.float64)}, "double")
    refused(conv, {"x": x.astype(np.float16)}, "float16")
    refused(conv, {"x": x.astype(np.int64)}, "int64")
    refused(linear, {"x": linear.feeds["x"][..., :64]}, r"\[2, 31, 64\].*\[\.\.\., 65\]")
    short = both.feeds["residual"][:, :, :-1]
    refused(both, {"x": both.feeds["x"], "residual": short}, "the residual has .*like the output")


def test_input_smaller_than_the_kernel() -> None:
    task = problem(CASES["7x7 strided"])
    no_pads = replace(task.case, spec=replace(task.case.spec, pads=(0, 0, 0, 0)))
    refused(replace(task, case=no_pads), {"x": task.feeds["x"][:, :, :5]}, r"\[1, 3, 5, 32\]")


def test_non_contiguous_inputs_work() -> None:
    task = problem(CASES["3x3"])
    x = np.asfortranarray(task.feeds["x"])
    assert not x.flags.c_contiguous
    require_same(task, session(sparse_model(task), 1).run(None, {"x": x})[0])


def altered(task: Problem, change: object) -> bytes:
    proto = onnx.load_from_string(sparse_model(task))
    change(proto.graph)  # type: ignore[operator]
    return bytes(proto.SerializeToString())


# attribute, value (None: taken away), what the message says
BAD_ATTRIBUTES = [
    ("abi", 2, "version 2 .*this library has version 1"),
    ("abi", None, "no integer attribute 'abi'"),
    ("outputs", None, "no integer attribute 'outputs'"),
    ("outputs", "16", "no integer attribute 'outputs'"),
    ("outputs", 2**40, "far out of range"),
    ("outputs", 17, "'bias' has .*17 outputs"),
    ("inputs", 9, "the index has"),
    ("outputs", 0, "outputs"),
    ("inputs", -1, "inputs"),
    ("group", 0, "group"),
    ("group", 3, "group"),
    ("kernel", [3], "not a list of 2 integers"),
    ("kernel", [3, 2**31], "far out of range"),
    ("kernel", [3, 0], "kernel"),
    ("strides", [0, 1], "stride"),
    ("dilations", [1, -1], "dilation"),
    ("pads", [1, 1, 1], "not a list of 4 integers"),
    ("pads", [1, -1, 1, 1], "pad"),
    ("activation", 6, "activation"),
    ("alpha", 1, "no float attribute 'alpha'"),
    ("layout", 3, "layout"),
    ("family", 99, "family"),
    ("family", 3, "linear"),
    ("vectors", 0, "vectors"),
    ("columns", -1, "columns"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_ATTRIBUTES)
def test_bad_attributes(key: str, value: object, message: str) -> None:
    task = problem(CASES["3x3"])
    with pytest.raises(FormatError, match=rf"(?s)SparseConv 'layer'.*{message}"):
        session(altered(task, lambda graph: set_attribute(graph, key, value)), 1)


def replace_tensor(graph: object, index: int, array: np.ndarray) -> None:
    old = graph.initializer[index]  # type: ignore[attr-defined]
    old.CopyFrom(numpy_helper.from_array(array, old.name))


def make_input(graph: object, index: int) -> None:
    tensors = graph.initializer  # type: ignore[attr-defined]
    value = helper.make_tensor_value_info(
        tensors[index].name, tensors[index].data_type, tensors[index].dims
    )
    del tensors[index]
    graph.input.append(value)  # type: ignore[attr-defined]


def test_bad_weights() -> None:
    task = problem(replace(CASES["3x3"], layout="bitmask"))
    count = int((task.weight != 0).sum())
    bits = -(-task.weight.size // 8)
    changes = {
        rf"index has 100 bytes; {bits}": lambda g: replace_tensor(g, 1, np.zeros(100, np.uint8)),
        "bits are set": lambda g: replace_tensor(g, 1, np.zeros(bits, np.uint8)),
        f"{count} bits are set": lambda g: replace_tensor(g, 0, np.zeros(5, np.float32)),
        "'values' has ONNX's type 6": lambda g: replace_tensor(g, 0, np.zeros(count, np.int32)),
        "'values' has the shape": lambda g: replace_tensor(g, 0, np.zeros((count, 1), np.float32)),
        "'bias' has": lambda g: replace_tensor(g, 2, np.zeros(3, np.float32)),
        "'values' is not a constant": lambda g: make_input(g, 0),
        "'index' is not a constant": lambda g: make_input(g, 1),
        "'bias' is not a constant": lambda g: make_input(g, 2),
    }
    for message, change in changes.items():
        with pytest.raises(FormatError, match=message):
            session(altered(task, change), 1)
    # These never get as far as our operator: ONNX Runtime checks them by what we declare.
    for change in (
        lambda g: replace_tensor(g, 1, np.zeros(bits, np.int8)),
        lambda g: g.node[0].input.extend(["", "x"]),
        lambda g: g.node[0].input.__setitem__(2, ""),
        lambda g: g.node[0].output.append("z"),
    ):
        with pytest.raises(FormatError, match="ONNX Runtime refuses it"):
            session(altered(task, change), 1)


def test_index_beyond_the_packed_stream() -> None:
    task = problem(replace(CASES["3x3"], layout="csr"))

    def last_column(graph: object) -> None:
        index = bytearray(graph.initializer[1].raw_data)  # type: ignore[attr-defined]
        index[-1] = 255  # there are 72 columns
        graph.initializer[1].raw_data = bytes(index)  # type: ignore[attr-defined]

    def first_count(graph: object) -> None:
        index = bytearray(graph.initializer[1].raw_data)  # type: ignore[attr-defined]
        index[0] = 255
        graph.initializer[1].raw_data = bytes(index)  # type: ignore[attr-defined]

    for change in (last_column, first_count):
        with pytest.raises(FormatError, match="SparseConv 'layer': row"):
            session(altered(task, change), 1)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "sparse.onnx"
    with pytest.raises(FileError, match="no such file"):
        session(path)
    with pytest.raises(FileError, match="no such file"):
        session(tmp_path)
    data = sparse_model(problem(CASES["3x3"]))
    for damaged in (b"", b"no model", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"sparse\.onnx.*ONNX Runtime refuses it"):
            session(path)


def test_bad_arguments() -> None:
    data = sparse_model(problem(CASES["1x1"]))
    with pytest.raises(UsageError, match="threads=0"):
        session(data, 0)


def test_without_the_library_registered() -> None:
    with pytest.raises(Exception, match=UNKNOWN_OPERATOR):
        onnxruntime.InferenceSession(sparse_model(problem(CASES["1x1"])))


def test_without_the_native_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = sparse_model(problem(CASES["1x1"]))
    monkeypatch.setattr(library, "_PATH", tmp_path / "libsecateur.so")
    library.load.cache_clear()
    try:
        with pytest.raises(MissingNative):
            session(data)
    finally:
        library.load.cache_clear()
