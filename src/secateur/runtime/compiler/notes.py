"""What a user should know about a compiled model beside its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur.runtime.compiler import attention
from secateur.runtime.compiler.graph import Graph, attribute, standard
from secateur.runtime.compiler.shapes import replaceable
from secateur.runtime.compiler.site import Site, start
from secateur.runtime.compiler.whole import DENSE, Plan

_PRODUCTS = ("Gemm", "MatMul")
_LAYERS = ("Conv", *_PRODUCTS, "ConvTranspose", "LSTM", "GRU", "RNN")
# Axes of the weights of convolutions over one axis, and over images.
_IMAGES = (3, 4)
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast")
_QUANTIZED = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def notes(graph: Graph, found: Sequence[Site], plan: Plan) -> tuple[str, ...]:
    """Sentences about what was not tried, not compared, or taken to be constant.

    Args:
        graph: The dense model.
        found: The layers that could be replaced.
        plan: What was chosen.
    """
    said = []
    layers = [node for node in graph.nodes if standard(node, *_LAYERS)]
    types = [_weight_type(graph, node) for node in graph.nodes]
    others = Counter(t for t in types if t not in ("", "float32"))
    inputs = replaceable(graph.model)
    given = [n for n in layers if any(name in inputs for name in n.input[1:2])]
    if graph.frozen:
        said.append(
            f"all {len(graph.frozen)} weights are inputs of the file, too: they were taken as constants, "
            "which a caller cannot replace any more"
        )
    if given:
        word = (
            "layer whose weight is an input"
            if len(given) == 1
            else "layers whose weights are inputs"
        )
        said.append(
            f"not tried: {len(given)} {word} of the model, which a caller may replace; leave the "
            "initializers out of the inputs to have them compiled"
        )
    if others:
        counts = ", ".join(f"{count} in {kind}" for kind, count in others.items())
        said.append(
            f"not tried: layers whose weights have another type ({counts}); sparse operators are made "
            "from float32"
        )
    own = [i for i, kind in enumerate(types) if kind == "float32"]
    tried = {i for site in found for i in site.nodes}
    left = Counter(_why_dense(graph, i, graph.nodes[i]) for i in own if i not in tried)
    if left:
        counts = ", ".join(f"{count} {why}" for why, count in left.items())
        said.append(f"not tried: {left.total()} of {len(own)} layers ({counts})")
    inside = sum(_inside(graph, node) for node in graph.nodes)
    if inside:
        said.append(f"not tried: {_count(inside)} in branches and loops, which stay as they are")
    fused = Counter(f"{node.domain}.{node.op_type}" for node in graph.nodes if _fused(graph, node))
    if fused:
        said.append(
            f"not tried: {_count(fused.total())} in operators that are not of the standard "
            f"({', '.join(fused)}); compile the file from before they were fused"
        )
    if plan.blocks:
        blocks = "1 block" if len(plan.blocks) == 1 else f"{len(plan.blocks)} blocks"
        ours = plan.blocks[0].domain == attention.OURS
        where = "an operator of secateur" if ours else "ONNX Runtime's own MultiHeadAttention"
        said.append(f"{blocks} of attention run in {where}, not in the nodes that were exported")
    if plan.chains:
        runs = "1 run" if plan.chains == 1 else f"{plan.chains} runs"
        said.append(
            f"{runs} of layers around a depthwise convolution go through an image band by band, in one "
            "operator each; their times in the table are those of each layer alone"
        )
    text = [o.name for o in graph.model.graph.output if _is_text(o)]
    if text:
        said.append(f"not compared with the dense model, as text: {', '.join(map(repr, text))}")
    if not found:
        said.append("no layer could be replaced: the dense model was kept")
    elif plan.name == DENSE:
        said.append("nothing was faster than the dense model on this machine: it was kept")
    return tuple(said)


def _why_dense(graph: Graph, index: int, node: Any) -> str:
    """Why a layer with a constant weight in float32 was not tried."""
    begun = start(graph, index, node)
    if begun is not None and begun.affine.usable:
        return "with fewer than 20 % zeros"
    if begun is not None:
        return "with numbers that are not finite in float32"
    if standard(node, "Conv", "Gemm") and any(node.input[2:3]):
        bias = graph.constant(node.input[2])
        if bias is None or bias.size not in (1, *bias.shape[-1:]):
            return "with a bias that is not one constant for each output"
    weight = graph.constant(node.input[1]) if standard(node, "Conv") else None
    same = attribute(node, "auto_pad", b"").startswith(b"SAME")
    if same and weight is not None and weight.ndim in _IMAGES:
        return "with a stride, and a padding that depends on an open size"
    return "of a kind that has no sparse operator"


def _weight_type(graph: Graph, node: Any) -> str:
    """Of a layer with a constant weight; empty for other nodes."""
    if standard(node, *_QUANTIZED):
        return "integers"
    if not standard(node, *_LAYERS):
        return ""
    for name in node.input[:2]:
        held, maker = graph.constant(name), _maker(graph, name)
        if held is not None and (name == node.input[1] or held.ndim == 2):
            return str(held.dtype)
        if maker is None or not standard(maker, "DequantizeLinear"):
            continue
        if graph.constant(maker.input[0]) is not None:
            return "integers"
    return ""


def _inside(graph: Graph, node: Any) -> int:
    """Layers with a stored weight in the branches or the body of a node."""
    found = 0
    for item in node.attribute:
        for branch in (item.g, *item.graphs):
            stored = {tensor.name for tensor in branch.initializer}
            stored |= {n.output[0] for n in branch.node if standard(n, "Constant")}
            for inner in branch.node:
                own = any(
                    name in stored or graph.constant(name) is not None for name in inner.input[:2]
                )
                # Other kinds than products never have a second input that is no weight.
                found += standard(inner, *_LAYERS) and (own or not standard(inner, *_PRODUCTS))
                found += _inside(graph, inner)
    return found


def _fused(graph: Graph, node: Any) -> bool:
    """Whether an operator outside the standard holds a weight, as those that optimizers fuse do."""
    held = graph.constant(node.input[1]) if len(node.input) > 1 else None
    ours = standard(node, node.op_type)
    return not ours and held is not None and held.ndim > 1 and held.dtype == np.float32


def _count(layers: int) -> str:
    return f"{layers} layer{'s' if layers > 1 else ''}"


def _maker(graph: Graph, name: str) -> Any | None:
    """The node that made the elements of a value, before others moved them about."""
    index = graph.producer.get(name)
    if index is None:
        return None
    node = graph.nodes[index]
    return _maker(graph, node.input[0]) if standard(node, *_MOVES) else node


def _is_text(value: Any) -> bool:
    import onnx

    return bool(value.type.tensor_type.elem_type == onnx.TensorProto.STRING)
