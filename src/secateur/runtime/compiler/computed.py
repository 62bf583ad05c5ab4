"""Constants: stored tensors, and what ONNX Runtime makes of them when it opens a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Operators that exporters leave between a stored weight and its layer: a mask, the norm of a
#: parametrization, parts that are joined or cut. All others, and those of integers in particular,
#: are no constants here.
ARITHMETIC = (
    *("Mul", "Div", "Add", "Sub", "Neg", "Abs", "Pow", "Sqrt", "Exp", "Where"),
    *("ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceMean", "ReduceMax"),
    *("Concat", "Slice", "Split", "Gather"),
)


def computed(
    node: Any, parts: Mapping[str, np.ndarray], version: int
) -> Mapping[str, np.ndarray] | None:
    """The outputs of one node by name; None if ONNX Runtime cannot tell.

    Args:
        node: Of the standard operators, without branches.
        parts: Its inputs by name.
        version: Of the standard operators.

    Example:
        >>> from onnx import helper
        >>> node = helper.make_node("Mul", ["weight", "mask"], ["w"])
        >>> parts = {"weight": np.float32([2, 3]), "mask": np.float32([1, 0])}
        >>> computed(node, parts, 17)["w"]
        array([2., 0.], dtype=float32)
    """
    import onnxruntime
    from onnx import helper

    names = [name for name in node.output if name]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        kinds = {n: helper.np_dtype_to_tensor_dtype(part.dtype) for n, part in parts.items()}
        inputs = [helper.make_tensor_value_info(n, kinds[n], p.shape) for n, p in parts.items()]
        outputs = [helper.make_empty_tensor_value_info(n) for n in names]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        opsets = [helper.make_opsetid("", version)]
        # Any format that every ONNX Runtime of ours reads: it says nothing about operators.
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        opened = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        made = opened.run(names, {n: np.asarray(p, order="C") for n, p in parts.items()})
    except Exception:  # a type that Python has no arrays of, say: fewer layers, no error
        return None
    return dict(zip(names, made, strict=True))


def numbers(tensor: Any) -> np.ndarray:
    """A stored tensor, dense or sparse."""
    import onnx
    from onnx import numpy_helper

    if not isinstance(tensor, onnx.SparseTensorProto):
        return np.asarray(numpy_helper.to_array(tensor))
    values, places = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    shape = tuple(tensor.dims)
    # Places are counted through all of the tensor, or along each axis.
    at = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
    out = np.zeros(math.prod(shape), values.dtype)
    out[at] = values
    return out.reshape(shape)
