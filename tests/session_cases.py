"""Layers inside ONNX Runtime sessions: with our operators, and with ONNX Runtime's own dense ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from secateur.runtime import library

if not library.available():
    pytest.skip("the native library is not built", allow_module_level=True)
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from secateur.runtime.native import Spec, Variant, candidates  # noqa: E402
from secateur.runtime.operators import opset, sparse_node  # noqa: E402


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


def first_variant(case: Case) -> Variant:
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
        variant or first_variant(case),
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


def set_attribute(graph: object, key: str, value: object) -> None:
    """Change an attribute of the first node; None takes it away."""
    node = graph.node[0]  # type: ignore[attr-defined]
    kept = [attribute for attribute in node.attribute if attribute.name != key]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(key, value))
