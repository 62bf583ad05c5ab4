"""Shapes of a model's values, as far as they can be inferred."""

from __future__ import annotations

import math
from typing import Any

#: One axis: a number, a name that stands for a number, or nothing known.
Axis = int | str | None
#: What some files call every open axis: no name that says which axes are equal.
NO_NAMES = ("", "None", "?", "-1", "unknown")
# Entries of a weight that cannot say anything about shapes.
_LARGE = 4096


def initializers(model: Any) -> frozenset[str]:
    """Names of the stored values of a graph, dense and sparse."""
    graph = model.graph
    sparse = (tensor.values.name for tensor in graph.sparse_initializer)
    return frozenset(tensor.name for tensor in graph.initializer) | frozenset(sparse)


def replaceable(model: Any) -> frozenset[str]:
    """Inputs that have a value already, which a caller may replace."""
    return frozenset(i.name for i in model.graph.input) & initializers(model)


def shapes_of(model: Any, *, written: bool = True) -> dict[str, tuple[Axis, ...]]:
    """Name of a value -> its axes.

    Args:
        model: An ONNX model.
        written: Believe the shapes that the file has of values inside, too.
    """
    import onnx

    try:
        outline = _outline(model, written=written)
        inferred = onnx.shape_inference.infer_shapes(outline, data_prop=True)
    except Exception:  # what cannot be inferred stays unknown: fewer fusions, no error
        inferred = model
    graph = inferred.graph
    found: dict[str, tuple[Axis, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            found[value.name] = tuple(_axis(axis) for axis in kind.shape.dim)
    return found


def _outline(model: Any, *, written: bool) -> Any:
    """The model without the content of its large weights, which inference would copy twice."""
    import onnx
    from onnx import helper

    out, graph = onnx.ModelProto(), model.graph
    out.ir_version = model.ir_version
    out.opset_import.extend(model.opset_import)
    inputs = replaceable(model)
    held = [t for t in graph.initializer if t.name not in inputs]
    large = [t for t in held if math.prod(t.dims) > _LARGE]
    out.graph.name = "outline"
    out.graph.node.extend(graph.node)
    out.graph.input.extend(graph.input)
    for tensor in large:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        out.graph.input.append(value)
    for tensor in graph.sparse_initializer:
        values = tensor.values
        if values.name not in inputs:
            value = helper.make_tensor_value_info(values.name, values.data_type, tensor.dims)
            out.graph.input.append(value)
    out.graph.output.extend(graph.output)
    if written:
        out.graph.value_info.extend(graph.value_info)
    out.graph.initializer.extend(t for t in held if math.prod(t.dims) <= _LARGE)
    return out


def _axis(axis: Any) -> Axis:
    # Some exporters write an open axis as -1 or 0.
    if axis.HasField("dim_value"):
        return int(axis.dim_value) if axis.dim_value > 0 else None
    return None if axis.dim_param in NO_NAMES else str(axis.dim_param)
