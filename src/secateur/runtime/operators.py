"""The operators of a compiled ONNX model: ``SparseConv``, ``SparseLinear``, ``SparseChain``, ``Attention``.

All have the domain ``secateur``. Sparse layers have the inputs X, values, index, bias (may be left
out), residual (may be left out), and scale and shift, if what a linear layer puts out is normalised.
``values`` and ``index`` are the packed weight, in the layouts of :mod:`secateur.formats.layouts`;
everything else is in the attributes. ``SparseChain`` is several convolutions, see
:mod:`secateur.runtime.chains`. ``Attention`` is dense: queries, keys and values ``(batch,
positions, heads * size)``, and a mask (may be left out) that is added to the scores, ``(batch or 1,
heads or 1, positions, keys)``. The library that implements them is registered by
:func:`secateur.runtime.session.session`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from secateur.core.errors import FormatError, MissingExtra, UnknownName, UsageError
from secateur.runtime.library import ABI
from secateur.runtime.native import ACTIVATIONS, FAMILIES, Norm, Spec, Variant, lanes
from secateur.runtime.stored import LAYOUTS, store

DOMAIN = "secateur"
#: Version of the operator set. The attribute ``abi`` has that of the packed form.
VERSION = 1
#: Operator names, by the kind of a layer.
NAMES = {"conv": "SparseConv", "linear": "SparseLinear"}
#: Convolutions that run one after the other, band by band; see :mod:`secateur.runtime.chains`.
CHAIN = "SparseChain"
#: Attention between sparse layers.
ATTENTION = "Attention"
#: ONNX's numbers for the types that values can have.
VALUE_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
_UINT8 = 2
# Attributes, and what a Spec calls them. Those of the second list have only convolutions.
_SIZES = {"outputs": "outputs", "inputs": "inputs"}
_WINDOW = {"kernel": "kernel", "strides": "stride", "dilations": "dilation", "pads": "pads"}


def sparse_node(  # noqa: PLR0913 - one call describes a whole layer
    weight: np.ndarray,
    spec: Spec,
    variant: Variant,
    *,
    name: str,
    x: str,
    y: str,
    bias: np.ndarray | None = None,
    residual: str | None = None,
    layout: str = "auto",
    dtype: str = "float32",
    isa_lanes: int | None = None,
    positions: int | None = None,
    norm: Norm | None = None,
) -> tuple[Any, list[Any]]:
    """A sparse layer as an ONNX node and the initializers that it reads.

    Args:
        weight: Float32, ``(outputs, inputs, height, width)`` or ``(outputs, inputs)``. Zeros are
            left out.
        spec: Shape of the layer.
        variant: The kernel to run it with.
        name: Of the node, and the beginning of the names of its initializers
            (``name.values``, ``name.index``, ``name.bias``, ``name.scale``, ``name.shift``).
        x: Name of the input.
        y: Name of the output.
        bias: Float32, ``(outputs,)``.
        residual: Name of a tensor of the output's shape that is added before the activation.
        layout: ``"dense"``, ``"bitmask"``, ``"csr"``, or ``"auto"``: the smallest.
        dtype: How the values are stored: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        isa_lanes: Floats in a vector of the machine that the variant was chosen for; None: this one.
        positions: Output positions of an image, or tokens, that the variant was chosen for. A
            machine with vectors of another width chooses again, for as many.
        norm: How the output is normalised.

    Returns:
        ``(node, initializers)``

    Raises:
        UsageError: The weight or the bias does not fit the spec.
        UnknownName: There is no such layout or type.

    Example:
        >>> spec, variant = Spec("linear", 4, 4, activation="relu"), Variant("list", 1, 4)
        >>> weight = np.eye(4, dtype=np.float32)
        >>> node, tensors = sparse_node(weight, spec, variant, name="fc", x="x", y="y", isa_lanes=16)
        >>> node.op_type, list(node.input), [list(t.dims) for t in tensors]
        ('SparseLinear', ['x', 'fc.values', 'fc.index'], [[4], [2]])
        >>> spec_of(node) == spec, variant_of(node) == variant
        (True, True)
    """
    helper = onnx_helper()
    _require_fit(name, weight, bias, norm, spec)
    if dtype not in VALUE_TYPES:
        raise UnknownName("type of stored weights", dtype, VALUE_TYPES)
    stored = store(torch.tensor(weight).to(getattr(torch, dtype)), layout)
    attributes = {
        "abi": ABI,
        "layout": LAYOUTS[stored.layout],
        "isa_lanes": lanes() if isa_lanes is None else isa_lanes,
        **_spec_attributes(spec),
        "family": FAMILIES[variant.family],
        "rows": variant.rows,
        "vectors": variant.vectors,
        "columns": variant.columns,
    }
    if positions is not None:
        attributes["positions"] = positions

    def tensor(part: str, number: int, data: torch.Tensor) -> Any:
        raw = data.view(torch.uint8).numpy().tobytes()
        return helper.make_tensor(f"{name}.{part}", number, [len(data)], raw, raw=True)

    tensors = [
        tensor("values", VALUE_TYPES[dtype], stored.values),
        tensor("index", _UINT8, stored.index),
    ]
    if bias is not None:
        tensors.append(tensor("bias", VALUE_TYPES["float32"], torch.tensor(bias)))
    inputs = [x, *(t.name for t in tensors)]
    if residual is not None:
        inputs += [""] * (bias is None) + [residual]
    if norm is not None:
        inputs += [""] * (5 - len(inputs))
        for part, held in (("scale", norm.scale), ("shift", norm.shift)):
            tensors.append(tensor(part, VALUE_TYPES["float32"], torch.tensor(held)))
            inputs.append(tensors[-1].name)
        attributes["epsilon"] = float(norm.epsilon)
    node = helper.make_node(NAMES[spec.kind], inputs, [y], name=name, domain=DOMAIN)
    # Two attributes have the names of make_node's own arguments.
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    return node, tensors


def attention_node(inputs: Sequence[str], y: str, *, heads: int, scale: float) -> Any:
    """The node that computes softmax(scale * q k^T + mask) v for every head.

    Args:
        inputs: Names of queries, keys, values and, if something is added to the scores, the mask.
        y: Name of the output.
        heads: How many.
        scale: Factor of the scores.

    Example:
        >>> node = attention_node(["q", "k", "v"], "y", heads=2, scale=0.5)
        >>> node.op_type, list(node.input), is_attention(node), is_sparse(node)
        ('Attention', ['q', 'k', 'v'], True, False)
    """
    about: dict[str, Any] = {"abi": ABI, "heads": heads, "scale": float(scale)}
    helper = onnx_helper()
    return helper.make_node(ATTENTION, inputs, [y], name=y, domain=DOMAIN, **about)


def is_attention(node: Any) -> bool:
    """Whether an ONNX node is our attention.

    Example:
        See :func:`attention_node`.
    """
    return bool(node.domain == DOMAIN and node.op_type == ATTENTION)


def opset() -> Any:
    """The entry for the operator sets of a model that contains our operators.

    Example:
        >>> opset().domain, opset().version
        ('secateur', 1)
    """
    return onnx_helper().make_opsetid(DOMAIN, VERSION)


def is_sparse(node: Any) -> bool:
    """Whether an ONNX node is a sparse layer of ours, or several.

    Example:
        >>> from onnx import helper
        >>> is_sparse(helper.make_node("Conv", ["x", "w"], ["y"]))
        False
    """
    return node.domain == DOMAIN and node.op_type in (*NAMES.values(), CHAIN)


def spec_of(node: Any) -> Spec:
    """The shape of the layer that a node of ours holds.

    Raises:
        FormatError: An attribute is missing or has no meaning.

    Example:
        See :func:`sparse_node`.
    """
    found = _Attributes.of(node)
    kind = found.one_of(NAMES, node.op_type)
    names = dict(_SIZES)
    if kind == "conv":
        names |= {"group": "groups", **_WINDOW}
    numbers = {ours: found[key] for key, ours in names.items()}
    return Spec(
        kind,
        activation=found.one_of(ACTIVATIONS, found["activation"]),
        alpha=found["alpha"],
        beta=found["beta"],
        **numbers,
    )


def variant_of(node: Any) -> Variant:
    """The kernel that a node of ours asks for.

    Raises:
        FormatError: An attribute is missing or has no meaning.

    Example:
        See :func:`sparse_node`.
    """
    found = _Attributes.of(node)
    family = found.one_of(FAMILIES, found["family"])
    return Variant(family, found["rows"], found["vectors"], found["columns"])


@dataclass(frozen=True)
class _Attributes:
    node: str
    values: Mapping[str, Any]

    @staticmethod
    def of(node: Any) -> _Attributes:
        get = onnx_helper().get_attribute_value
        values = {attribute.name: get(attribute) for attribute in node.attribute}
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return _Attributes(f"the {node.op_type} {node.name!r}", values | lists)

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise self._damaged(f"it has no attribute {key!r}")
        return self.values[key]

    def one_of(self, names: Mapping[str, Any], number: Any) -> str:
        for name, known in names.items():
            if known == number:
                return name
        raise self._damaged(f"{number!r} stands for none of {', '.join(names)}")

    def _damaged(self, found: str) -> FormatError:
        why = "its attributes describe a layer of another version, or were altered"
        return FormatError(self.node, found, why, "compile the model again")


def _spec_attributes(spec: Spec) -> dict[str, Any]:
    found: dict[str, Any] = {key: getattr(spec, ours) for key, ours in _SIZES.items()}
    found["activation"] = ACTIVATIONS[spec.activation]
    found |= {"alpha": float(spec.alpha), "beta": float(spec.beta)}
    if spec.kind == "conv":
        found["group"] = spec.groups
        found |= {key: list(getattr(spec, ours)) for key, ours in _WINDOW.items()}
    return found


def _require_fit(
    name: str, weight: np.ndarray, bias: np.ndarray | None, norm: Norm | None, spec: Spec
) -> None:
    shape: tuple[int, ...] = (spec.outputs, spec.inputs)
    if spec.kind == "conv":
        shape += tuple(spec.kernel)
    each = (spec.outputs,)
    scale, shift = (norm.scale, norm.shift) if norm is not None else (None, None)
    parts = [("weight", weight, shape), ("bias", bias, each), ("scale", scale, each)]
    for what, array, fits in (*parts, ("shift", shift, each)):
        if array is not None and (array.shape != fits or array.dtype != np.float32):
            raise UsageError(
                f"the sparse layer {name!r}",
                f"its {what} is {array.dtype} of shape {array.shape}",
                f"its spec asks for float32 of shape {fits}",
                f"convert the {what}, or make the spec from it",
            )


def onnx_helper() -> Any:
    """What makes nodes.

    Raises:
        MissingExtra: onnx is not installed.
    """
    try:
        from onnx import helper
    except ImportError:
        raise MissingExtra("onnx", "onnx", "reading or building ONNX operators") from None
    return helper
