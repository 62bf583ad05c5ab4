"""The dense model that a compiled one stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from secateur.core.errors import FormatError
from secateur.runtime.chains import unchained
from secateur.runtime.compiler import attention
from secateur.runtime.compiler.attention import Attention
from secateur.runtime.compiler.graph import attribute, opset
from secateur.runtime.compiler.order import names_in
from secateur.runtime.native import Spec
from secateur.runtime.operators import DOMAIN, is_attention, is_sparse, spec_of
from secateur.runtime.stored import LAYOUTS

_SQRT_HALF = 0.7071067811865476


def dense_model(model: Any) -> Any:
    """A model in which every operator of ours is ordinary nodes again, for ONNX Runtime alone.

    Batch normalisation stays folded, attention becomes one operator of ONNX Runtime. A convolution over one
    axis keeps its added height.

    Args:
        model: The compiled one; it is not changed.

    Raises:
        FormatError: A packed weight is damaged.
    """
    import onnx

    out = onnx.ModelProto()
    out.CopyFrom(model)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    version = opset(model)
    layers = unchained(model.graph.node)
    taken = names_in(layers) | {i.name for i in model.graph.input} | set(held)
    del out.graph.node[:]
    for node in layers:
        if is_attention(node):
            out.graph.node.append(_theirs(node))
            continue
        if not is_sparse(node):
            out.graph.node.append(node)
            continue
        nodes, weights = _unique(node, held, version, taken)
        out.graph.node.extend(nodes)
        out.graph.initializer.extend(weights)
    used = {name for node in out.graph.node for name in node.input}
    packed = {n for node in layers if is_sparse(node) for n in node.input[1:3]}
    kept = [t for t in out.graph.initializer if t.name in used or t.name not in packed]
    del out.graph.initializer[:]
    out.graph.initializer.extend(kept)
    sets = [o for o in model.opset_import if o.domain != DOMAIN]
    known = {o.domain for o in sets}
    if any(is_attention(node) for node in model.graph.node) and attention.THEIRS not in known:
        sets.append(onnx.helper.make_opsetid(attention.THEIRS, 1))
    del out.opset_import[:]
    out.opset_import.extend(sets)
    del out.metadata_props[:]
    return out


def _theirs(node: Any) -> Any:
    """Our attention as the operator of ONNX Runtime."""
    q, k, v, mask = [*node.input, ""][:4]
    heads, scale = attribute(node, "heads"), attribute(node, "scale")
    return Attention(0, q, k, v, mask, heads, scale, attention.THEIRS).node(node.output[0])


def dense_weight(node: Any, held: Mapping[str, Any]) -> np.ndarray:
    """The weight of a node of ours as a matrix with a row for each output.

    Args:
        node: The node.
        held: The initializers of its graph.

    Raises:
        FormatError: Its parts do not fit together.
    """
    from onnx import numpy_helper

    spec = spec_of(node)
    try:
        values = np.asarray(numpy_helper.to_array(held[node.input[1]])).astype(np.float32)
        index = np.asarray(numpy_helper.to_array(held[node.input[2]]))
        out = np.zeros(spec.outputs * spec.columns, np.float32)
        out[_places(attribute(node, "layout"), index, spec)] = values
    except (KeyError, ValueError, IndexError) as error:
        raise FormatError(
            f"reading the weight of {node.name!r}",
            f"its parts do not fit together ({error})",
            "the file was altered",
            "compile the model again",
        ) from error
    return out.reshape(spec.outputs, spec.columns)


def _places(layout: int, index: np.ndarray, spec: Spec) -> Any:
    if layout == LAYOUTS["dense"]:
        return slice(None)
    total = spec.outputs * spec.columns
    if layout == LAYOUTS["bitmask"]:
        return np.unpackbits(index, bitorder="little")[:total].astype(bool)
    width = spec.columns
    counted = _smallest(width).itemsize * spec.outputs
    counts = index[:counted].view(_smallest(width))
    columns = index[counted:].view(_smallest(width - 1)).astype(np.int64)
    return np.repeat(np.arange(spec.outputs) * width, counts) + columns


def _smallest(largest: int) -> np.dtype[Any]:
    return np.dtype("u1" if largest <= 0xFF else "<u2" if largest <= 0xFFFF else "<i4")


def _unique(
    node: Any, held: Mapping[str, Any], version: int, taken: set[str]
) -> tuple[list[Any], list[Any]]:
    """One node of ours as nodes of the standard, which make no value that is there already."""
    weight, name = dense_weight(node, held), node.name
    while True:
        nodes, weights = _ordinary(node, name, weight, version)
        # The last one makes what the node made, and nothing else may.
        made = {tensor.name for tensor in weights} | {out for n in nodes[:-1] for out in n.output}
        if not made & taken:
            taken |= made
            return nodes, weights
        name = f"{name}+"


def _ordinary(
    node: Any, name: str, weight: np.ndarray, version: int
) -> tuple[list[Any], list[Any]]:
    """One node of ours as nodes of the standard; their values are called after ``name``."""
    from onnx import helper, numpy_helper

    spec = spec_of(node)
    parts = [*node.input, "", "", "", ""][:7]
    x, bias, residual, scale, shift = parts[0], *parts[3:]
    steps: list[tuple[str, list[str], dict[str, Any]]] = []
    if spec.kind == "conv":
        weight = weight.reshape(spec.outputs, spec.inputs, *spec.kernel)
        window = {
            "kernel_shape": spec.kernel,
            "strides": spec.stride,
            "dilations": spec.dilation,
            "pads": spec.pads,
        }
        inputs = [x, f"{name}.weight"] + [bias] * bool(bias)
        steps.append(("Conv", inputs, {"group": spec.groups, **window}))
    else:
        weight = np.ascontiguousarray(weight.T)
        steps.append(("MatMul", [x, f"{name}.weight"], {}))
        if bias:
            steps.append(("Add", ["", bias], {}))
    if residual:
        steps.append(("Add", ["", residual], {}))
    weights = [numpy_helper.from_array(weight, f"{name}.weight")]
    nodes: list[Any] = []
    last = ""
    for kind, inputs, attributes in steps:
        out = f"{name}.{len(nodes)}"
        nodes.append(helper.make_node(kind, [i or last for i in inputs], [out], **attributes))
        last = out
    extra, constants = _activated(spec, last, f"{name}.act", version)
    nodes += extra
    if scale:
        inputs, epsilon = [nodes[-1].output[0], scale, shift], attribute(node, "epsilon")
        kind = "LayerNormalization"
        nodes.append(helper.make_node(kind, inputs, [f"{name}.norm"], epsilon=epsilon))
    nodes[-1].output[0] = node.output[0]
    return nodes, [*weights, *(numpy_helper.from_array(c, n) for n, c in constants.items())]


def _activated(
    spec: Spec, x: str, name: str, version: int
) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes of an activation; the last one makes its result."""
    from onnx import helper

    constants: dict[str, np.ndarray] = {}

    def node(kind: str, *inputs: str | float, **attributes: Any) -> Any:
        names = []
        for value in inputs:
            if not isinstance(value, str):
                constants[f"{name}.{value}"] = np.array(value, np.float32)
            names.append(value if isinstance(value, str) else f"{name}.{value}")
        nodes.append(helper.make_node(kind, names, [f"{name}.{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    nodes: list[Any] = []
    if spec.activation == "relu":
        node("Relu", x)
    elif spec.activation == "clip" and version < 11:
        node("Clip", x, min=float(spec.alpha), max=float(spec.beta))
    elif spec.activation == "clip":
        node("Clip", x, float(spec.alpha), float(spec.beta))
    elif spec.activation == "gelu":
        whole = node("Add", node("Erf", node("Mul", x, _SQRT_HALF)), 1.0)
        node("Mul", node("Mul", x, whole), 0.5)
    elif spec.activation == "silu":
        node("Mul", x, node("Sigmoid", x))
    elif spec.activation == "hardswish":
        node("Mul", x, node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    return nodes, constants
