"""Our operators inside ONNX Runtime, against ONNX Runtime's own dense operators."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from secateur.core.errors import FileError, FormatError, MissingNative, UsageError
from secateur.runtime import library

if not library.available():
    pytest.skip("the native library is not built", allow_module_level=True)
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from secateur.runtime.native import FAMILIES, Spec, Variant, candidates, lanes  # noqa: E402
from secateur.runtime.operators import (  # noqa: E402
    is_sparse,
    opset,
    sparse_node,
    spec_of,
    variant_of,
)
from secateur.runtime.session import THREADS_ENTRY, session, session_options  # noqa: E402

# What a registered-operator error of ONNX Runtime says; the README explains it.
UNKNOWN_OPERATOR = "is not a registered function/op"


@dataclass(frozen=True)
class Case:
    """A layer, an input and how the two are stored."""

    spec: Spec
    shape: tuple[int, ...]
    sparsity: float = 0.8
    bias: bool = True
    residual: bool = False
    layout: str = "auto"
    dtype: str = "float32"


def conv(outputs: int, inputs: int, kernel: int = 1, **more: object) -> Spec:
    return Spec("conv", outputs, inputs, kernel=(kernel, kernel), **more)  # type: ignore[arg-type]


CASES = {
    "1x1": Case(conv(32, 24), (1, 24, 14, 14)),
    "1x1 strided": Case(conv(16, 24, stride=(2, 2)), (1, 24, 15, 13)),
    "3x3": Case(conv(16, 8, 3, pads=(1, 1, 1, 1)), (1, 8, 17, 19)),
    "3x3 strided": Case(conv(16, 8, 3, stride=(2, 2), pads=(1, 1, 1, 1)), (1, 8, 20, 20)),
    "3x3 dilated": Case(conv(8, 8, 3, dilation=(2, 3), pads=(2, 3, 2, 3)), (1, 8, 16, 16)),
    "3x3 grouped": Case(conv(16, 4, 3, groups=2, pads=(1, 1, 1, 1)), (1, 8, 12, 12)),
    "one-sided pads": Case(conv(8, 8, 3, pads=(0, 1, 2, 0)), (1, 8, 9, 11)),
    "5x1": Case(Spec("conv", 8, 6, kernel=(5, 1), pads=(2, 0, 2, 0)), (1, 6, 10, 7)),
    "7x7 strided": Case(conv(8, 3, 7, stride=(2, 2), pads=(3, 3, 3, 3)), (1, 3, 32, 32)),
    "batch": Case(conv(16, 8, 3, pads=(1, 1, 1, 1)), (3, 8, 10, 10)),
    "no bias": Case(conv(16, 16), (2, 16, 7, 7), bias=False),
    "residual": Case(conv(16, 16, activation="relu"), (2, 16, 7, 9), residual=True),
    "residual, no bias": Case(conv(16, 16), (1, 16, 7, 9), residual=True, bias=False),
    "relu": Case(conv(16, 16, activation="relu"), (1, 16, 7, 7)),
    "clip": Case(conv(16, 16, activation="clip", alpha=-0.5, beta=1.25), (1, 16, 7, 7)),
    "gelu": Case(conv(16, 16, activation="gelu"), (1, 16, 7, 7)),
    "silu": Case(conv(16, 16, activation="silu"), (1, 16, 7, 7)),
    "hardswish": Case(conv(16, 16, activation="hardswish"), (1, 16, 7, 7)),
    "linear": Case(Spec("linear", 48, 40), (17, 40)),
    "one token": Case(Spec("linear", 48, 40), (1, 40)),
    "a vector": Case(Spec("linear", 48, 40), (40,)),
    "tokens": Case(Spec("linear", 33, 65, activation="gelu"), (2, 31, 65)),
    "4 axes": Case(Spec("linear", 16, 24), (2, 3, 5, 24), residual=True),
    "all zero": Case(conv(8, 8), (1, 8, 6, 6), sparsity=1.0),
    "all dense": Case(conv(8, 8), (1, 8, 6, 6), sparsity=0.0),
    "bitmask": Case(conv(16, 16), (1, 16, 7, 7), layout="bitmask"),
    "csr": Case(conv(16, 32, 3, pads=(1, 1, 1, 1)), (1, 32, 7, 7), layout="csr"),
    "dense layout": Case(conv(16, 16), (1, 16, 7, 7), layout="dense"),
    "bfloat16": Case(conv(16, 16), (1, 16, 7, 7), dtype="bfloat16"),
    "float16": Case(Spec("linear", 16, 16), (7, 16), dtype="float16"),
}


@dataclass(frozen=True)
class Problem:
    """The arrays of a case. The weight has the values that its stored type can hold."""

    case: Case
    weight: np.ndarray
    bias: np.ndarray | None
    feeds: dict[str, np.ndarray]


def problem(case: Case, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    spec = case.spec
    shape: tuple[int, ...] = (spec.outputs, spec.inputs)
    if spec.kind == "conv":
        shape += spec.kernel
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < case.sparsity] = 0
    if case.dtype == "bfloat16":
        weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
    elif case.dtype == "float16":
        weight = weight.astype(np.float16).astype(np.float32)
    bias = rng.standard_normal(spec.outputs).astype(np.float32) if case.bias else None
    feeds = {"x": rng.standard_normal(case.shape).astype(np.float32)}
    if case.residual:
        out = out_shape(spec, case.shape)
        feeds["residual"] = rng.standard_normal(out).astype(np.float32)
    return Problem(case, weight, bias, feeds)


def out_shape(spec: Spec, shape: tuple[int, ...]) -> tuple[int, ...]:
    if spec.kind == "linear":
        return (*shape[:-1], spec.outputs)
    sizes = []
    for axis in range(2):
        room = shape[2 + axis] + spec.pads[axis] + spec.pads[axis + 2]
        room -= spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
        sizes.append(room // spec.stride[axis] + 1)
    return (shape[0], spec.outputs, *sizes)


def first(case: Case) -> Variant:
    return candidates(case.spec, 196, max(0.01, 1 - case.sparsity))[0]


def model(nodes: list, tensors: list, ranks: dict[str, int], outputs: int = 1) -> bytes:
    """A serialised model whose inputs have these ranks, all sizes unknown."""

    def value(name: str, rank: int) -> object:
        sizes = [f"{name}{axis}" for axis in range(rank)]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    graph = helper.make_graph(
        nodes,
        "layer",
        [value(name, rank) for name, rank in ranks.items()],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)],
        tensors,
    )
    imports = [helper.make_opsetid("", 20), opset()]
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())


def ranks(task: Problem) -> dict[str, int]:
    return {name: array.ndim for name, array in task.feeds.items()}


def sparse_model(task: Problem, variant: Variant | None = None, **more: object) -> bytes:
    case = task.case
    node, tensors = sparse_node(
        task.weight,
        case.spec,
        variant or first(case),
        name="layer",
        x="x",
        y="y0",
        bias=task.bias,
        residual="residual" if case.residual else None,
        layout=case.layout,
        dtype=case.dtype,
        **more,  # type: ignore[arg-type]
    )
    return model([node], tensors, ranks(task))


def dense_model(task: Problem, activation: bool = True) -> bytes:
    """The same with ONNX's own operators."""
    spec, tensors = task.case.spec, []

    def constant(name: str, array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(array, name))
        return name

    if spec.kind == "conv":
        weight = constant("w", task.weight)
        window = {
            "kernel_shape": spec.kernel,
            "strides": spec.stride,
            "dilations": spec.dilation,
            "pads": spec.pads,
            "group": spec.groups,
        }
        nodes = [helper.make_node("Conv", ["x", weight], ["t0"], **window)]
        shape = (1, -1, 1, 1)
    else:
        weight = constant("w", np.ascontiguousarray(task.weight.T))
        nodes = [helper.make_node("MatMul", ["x", weight], ["t0"])]
        shape = (-1,)  # type: ignore[assignment]
    last = "t0"

    def then(operator: str, *others: str, **attributes: object) -> None:
        nonlocal last
        out = f"t{len(nodes)}"
        nodes.append(helper.make_node(operator, [last, *others], [out], **attributes))
        last = out

    if task.bias is not None:
        then("Add", constant("b", task.bias.reshape(shape)))
    if task.case.residual:
        then("Add", "residual")
    kind = spec.activation if activation else "none"
    if kind == "clip":
        low, high = np.float32(spec.alpha), np.float32(spec.beta)
        then("Clip", constant("low", np.array(low)), constant("high", np.array(high)))
    elif kind == "silu":
        before = last
        then("Sigmoid")
        then("Mul", before)
    elif kind != "none":
        then({"relu": "Relu", "gelu": "Gelu", "hardswish": "HardSwish"}[kind])
    then("Identity")
    nodes[-1].output[0] = "y0"
    return model(nodes, tensors, ranks(task))


def dense(task: Problem, activation: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    dense = onnxruntime.InferenceSession(
        dense_model(task, activation), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(dense.run(None, task.feeds)[0])


def require_same(task: Problem, found: np.ndarray) -> None:
    """Within the rounding errors of two sums of the same terms in any order.

    A sum of K float32 terms is off by at most K * 2**-24 * sum(abs(terms)), to first order; we and
    ONNX Runtime may each be that far off. No activation here is steeper than 1.13, and each of the
    two is computed to a few units in the last place.
    """
    expected = dense(task)
    size = replace(
        task,
        weight=abs(task.weight),
        bias=None if task.bias is None else abs(task.bias),
        feeds={name: abs(array) for name, array in task.feeds.items()},
    )
    terms = task.weight[0].size + 2
    bound = 1.13 * 2 * terms * 2.0**-24 * dense(size, activation=False) + 1e-6
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert (abs(found - expected) <= bound).all(), float((abs(found - expected) / bound).max())


def run(task: Problem, threads: int = 1, **more: object) -> np.ndarray:
    return np.asarray(session(sparse_model(task, **more), threads).run(None, task.feeds)[0])


@pytest.mark.parametrize("name", CASES)
def test_like_dense_operators(name: str) -> None:
    task = problem(CASES[name])
    require_same(task, run(task, threads=2))


@pytest.mark.parametrize("name", ["3x3", "tokens", "residual", "one token"])
def test_comparison_sees_one_wrong_weight(name: str) -> None:
    task = problem(CASES[name])
    place = tuple(np.argwhere(task.weight != 0)[0])
    wrong = task.weight.copy()
    wrong[place] *= 1.01
    found = run(replace(task, weight=wrong))
    with pytest.raises(AssertionError):
        require_same(task, found)


@pytest.mark.parametrize("name", ["3x3 grouped", "tokens", "one token"])
def test_every_family(name: str) -> None:
    case = CASES[name]
    found = {v.family: v for v in candidates(case.spec, 144, 0.2)}
    found |= {"list": Variant("list", 1, 2), "panels": Variant("panels", 4, 2)}
    found["blocks"] = Variant("blocks", 4, 2)
    assert set(found) <= set(FAMILIES)
    task = problem(case)
    for variant in found.values():
        if variant.rows > 1 and case.spec.outputs // case.spec.groups % variant.rows:
            continue
        require_same(task, run(task, variant=variant))


def test_sizes_may_change_from_run_to_run() -> None:
    case = CASES["3x3 strided"]
    weights = problem(case)
    opened = session(sparse_model(weights), 2)
    for shape in ((1, 8, 20, 20), (4, 8, 20, 20), (1, 8, 33, 5), (2, 8, 7, 64), (1, 8, 20, 20)):
        task = replace(weights, feeds=problem(replace(case, shape=shape), seed=1).feeds)
        require_same(task, opened.run(None, task.feeds)[0])
    case = CASES["tokens"]
    weights = problem(case)
    opened = session(sparse_model(weights), 2)
    for shape in ((2, 31, 65), (1, 1, 65), (1, 128, 65), (5, 3, 65)):
        task = replace(weights, feeds=problem(replace(case, shape=shape), seed=1).feeds)
        require_same(task, opened.run(None, task.feeds)[0])


@pytest.mark.parametrize(
    ("name", "shape", "out"),
    [("3x3 strided", (0, 8, 20, 20), (0, 16, 10, 10)), ("tokens", (2, 0, 65), (2, 0, 33))],
)
def test_empty_batch(name: str, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
    opened = session(sparse_model(problem(CASES[name])), 1)
    assert opened.run(None, {"x": np.empty(shape, np.float32)})[0].shape == out


def test_two_sessions_and_other_operators_in_one_model() -> None:
    one, two = problem(CASES["3x3"]), problem(CASES["tokens"])
    opened = [session(sparse_model(task), threads) for task, threads in ((one, 1), (two, 2))]
    for _ in range(3):
        for task, ours in zip((one, two), opened, strict=True):
            require_same(task, ours.run(None, task.feeds)[0])
    del opened[0]
    require_same(two, opened[0].run(None, two.feeds)[0])


def test_one_session_from_many_threads() -> None:
    task = problem(CASES["3x3"])
    opened = session(sparse_model(task), 2)
    inputs = [
        problem(replace(CASES["3x3"], shape=(1 + i % 3, 8, 17 + i % 5, 19)), seed=i).feeds
        for i in range(12)
    ]
    alone = [opened.run(None, feeds)[0] for feeds in inputs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            together = list(threads.map(lambda feeds: opened.run(None, feeds)[0], inputs))
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a, b)


def test_number_of_threads_does_not_change_the_result_beyond_rounding() -> None:
    task = problem(CASES["batch"])
    for threads in (None, 1, 2, 3):
        require_same(task, np.asarray(run(task, threads)))  # type: ignore[arg-type]


def test_same_options_for_many_sessions() -> None:
    task = problem(CASES["1x1"])
    options = session_options(1)
    for threads in (None, None, 2):
        opened = session(sparse_model(task), threads, options=options)
        require_same(task, opened.run(None, task.feeds)[0])
    plain = onnxruntime.InferenceSession(sparse_model(task), options)
    require_same(task, plain.run(None, task.feeds)[0])


def test_options_of_our_own_are_passed_on() -> None:
    task = problem(CASES["1x1"])
    for first, second in ((2, None), (None, 1), (2, 2), (2, 1), (None, None)):
        options = session_options(first)
        opened = session(sparse_model(task), second, options=options)
        require_same(task, opened.run(None, task.feeds)[0])
        wanted = second or first or 0
        assert options.intra_op_num_threads == wanted
        assert options.get_session_config_entry(THREADS_ENTRY) == str(wanted)
        # And on again: the options that come back are the ones that were given.
        assert session_options(options=options) is options
        require_same(task, session(sparse_model(task), options=options).run(None, task.feeds)[0])


def test_own_session_with_the_library_alone() -> None:
    task = problem(CASES["1x1"])
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    own = onnxruntime.InferenceSession(sparse_model(task), options)
    require_same(task, own.run(None, task.feeds)[0])
    # Registering again changes nothing, whoever does it.
    options.register_custom_ops_library(str(library.library_path()))
    require_same(task, session(sparse_model(task), options=options).run(None, task.feeds)[0])


def test_other_vector_width_takes_the_first_candidate() -> None:
    task = problem(CASES["1x1"])
    odd = Variant("list", 1, 1, columns=1)
    require_same(task, run(task, variant=odd, isa_lanes=lanes() * 2, positions=196))
    # The variant of the file is not even looked at: this one is refused where it is.
    impossible = Variant("blocks", 5, 1)
    require_same(task, run(task, variant=impossible, isa_lanes=lanes() * 2))
    with pytest.raises(FormatError, match="rows"):
        run(task, variant=impossible)


def test_file_and_plain_models(tmp_path: Path) -> None:
    task = problem(CASES["3x3"])
    path = tmp_path / "sparse.onnx"
    path.write_bytes(sparse_model(task))
    require_same(task, session(path, 1).run(None, task.feeds)[0])
    require_same(task, session(str(path)).run(None, task.feeds)[0])
    np.testing.assert_array_equal(
        session(dense_model(task), 1).run(None, task.feeds)[0], dense(task)
    )


def test_node_says_what_it_is_made_of() -> None:
    for name, case in CASES.items():
        task = problem(case)
        node = onnx.load_from_string(sparse_model(task)).graph.node[0]
        assert is_sparse(node)
        spec = spec_of(node)
        assert spec == replace(
            case.spec, alpha=np.float32(spec.alpha), beta=np.float32(spec.beta)
        ), name
        assert variant_of(node) == first(case)
    stripped = onnx.load_from_string(sparse_model(task)).graph.node[0]
    del stripped.attribute[:]
    with pytest.raises(FormatError, match="outputs"):
        spec_of(stripped)
    with pytest.raises(FormatError, match="family"):
        variant_of(stripped)
    assert not is_sparse(helper.make_node("SparseConv", ["x"], ["y"]))


def test_stored_sizes() -> None:
    node, tensors = sparse_node(
        np.eye(1000, dtype=np.float32),
        Spec("linear", 1000, 1000),
        Variant("list", 1, 4),
        name="eye",
        x="x",
        y="y",
    )
    assert [t.name for t in tensors] == ["eye.values", "eye.index"]
    assert [len(t.raw_data) for t in tensors] == [4000, 1000 * 2 + 1000 * 2]
    assert list(node.input) == ["x", "eye.values", "eye.index"]


# --- bad input ------------------------------------------------------------------------------------


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
    refused(conv, {"x": x[:, :, :0]}, r"X has the shape \[1, 8, 0, 19\]")
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


def set_attribute(graph: object, key: str, value: object) -> None:
    node = graph.node[0]  # type: ignore[attr-defined]
    kept = [attribute for attribute in node.attribute if attribute.name != key]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(key, value))


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
