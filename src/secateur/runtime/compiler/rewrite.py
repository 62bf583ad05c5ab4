"""Putting sparse operators into a graph in place of the nodes that they replace."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from secateur.runtime.compiler import attention
from secateur.runtime.compiler.attention import Attention
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.order import live, names_in, uses
from secateur.runtime.compiler.shapes import replaceable
from secateur.runtime.compiler.site import Site
from secateur.runtime.native import Spec, Variant
from secateur.runtime.operators import DOMAIN, sparse_node
from secateur.runtime.operators import opset as sparse_opset

#: The family of kernels that multiply float16, and are given such weights.
HALF = "half"
# What the initializers of a sparse node are called after it, and the values around it.
_TALL = (".tall_x", ".tall_y", ".tall_residual")
_PARTS = (
    ".values",
    ".index",
    ".bias",
    ".scale",
    ".shift",
    *_TALL,
    *(f"{part}.axes" for part in _TALL),
)


def spec(site: Site) -> Spec:
    """A site in the words of the native library."""
    return Spec(
        site.kind,
        site.outputs,
        site.inputs,
        groups=site.groups,
        kernel=site.kernel,
        stride=site.strides,
        dilation=site.dilations,
        pads=site.pads,
        activation=site.activation.name,
        alpha=site.activation.alpha,
        beta=site.activation.beta,
    )


def replacement(
    site: Site, variant: Variant, positions: int, version: int
) -> tuple[list[Any], list[Any]]:
    """Nodes and initializers that compute a site with a kernel.

    Args:
        site: The layer.
        variant: The kernel.
        positions: Output positions of an image, or tokens, that it was chosen for.
        version: Of the standard operators. A convolution over one axis needs some of them: it is
            given a height of 1 before, and loses it after.
    """
    x, y, residual = site.x, site.y, site.residual
    before: list[Any] = []
    after: list[Any] = []
    weights: list[Any] = []
    if site.flat:
        x, y = f"{site.name}.tall_x", f"{site.name}.tall_y"
        before.append(_tall("Unsqueeze", site.x, x, version, weights))
        after.append(_tall("Squeeze", y, site.y, version, weights))
        if site.residual is not None:
            residual = f"{site.name}.tall_residual"
            before.append(_tall("Unsqueeze", site.residual, residual, version, weights))
    node, held = sparse_node(
        site.weight,
        spec(site),
        variant,
        name=site.name,
        x=x,
        y=y,
        bias=site.bias,
        residual=residual,
        positions=positions,
        norm=site.norm,
        dtype="float16" if variant.family == HALF else _narrowest(site.weight),
    )
    return [*before, node, *after], [*held, *weights]


def sparse_model(
    graph: Graph,
    chosen: Sequence[tuple[Site, Variant, int]],
    blocks: Sequence[Attention] = (),
) -> Any:
    """The model of a graph with sites replaced.

    Args:
        graph: The dense one; it is not changed.
        chosen: Sites, their kernels, and the positions that these were chosen for.
        blocks: Attention that becomes one operator each.
    """
    import onnx

    at: dict[int, list[Any]] = {}
    held: dict[str, Any] = {}
    same: dict[str, str] = {}
    gone = {i for site, _, _ in chosen for i in site.nodes}
    names = {node.name for i, node in enumerate(graph.nodes) if i not in gone}
    values = names_in(graph.nodes) | {i.name for i in graph.model.graph.input}
    for site, variant, positions in chosen:
        named = _renamed(site, names, values)
        nodes, weights = replacement(named, variant, positions, graph.opset)
        at[max(site.nodes)] = _shared(nodes, weights, held, same)
    at |= {block.last: [block.node(graph.nodes[block.last].output[0])] for block in blocks}
    nodes = []
    for index, node in enumerate(graph.nodes):
        nodes += at.get(index, [] if index in gone else [node])
    return _assembled(graph, live(nodes, graph.outputs), held, onnx)


def _narrowest(weight: np.ndarray) -> str:
    """The smallest type that holds every weight as it is: many come from checkpoints in 16 bits.

    Kernels compute in float32 from any; those for single tokens read bfloat16 as it is stored.
    """
    whole = torch.tensor(weight)
    exact = (
        name
        for name in ("bfloat16", "float16")
        if torch.equal(whole.to(getattr(torch, name)).float(), whole)
    )
    return next(exact, "float32")


def _tall(kind: str, x: str, y: str, version: int, weights: list[Any]) -> Any:
    from onnx import helper, numpy_helper

    if version < 13:
        return helper.make_node(kind, [x], [y], axes=[2])
    axes = f"{y}.axes" if kind == "Unsqueeze" else f"{x}.axes"
    weights.append(numpy_helper.from_array(np.array([2], np.int64), axes))
    return helper.make_node(kind, [x, axes], [y])


def _renamed(site: Site, names: set[str], values: set[str]) -> Site:
    """The site under a name that no other node has, and whose parts no value has."""
    name = site.name
    while name in names or any(f"{name}{part}" in values for part in _PARTS):
        name = f"{name}+"
    names.add(name)
    return replace(site, name=name)


def _shared(
    nodes: Sequence[Any], weights: Sequence[Any], held: dict[str, Any], same: dict[str, str]
) -> list[Any]:
    """Add weights to ``held``, equal ones once; the nodes then read those."""
    moved: dict[str, str] = {}
    for tensor in weights:
        content = hashlib.sha256(tensor.raw_data).hexdigest()
        key = f"{tensor.data_type} {list(tensor.dims)} {content}"
        moved[tensor.name] = same.setdefault(key, tensor.name)
        if moved[tensor.name] == tensor.name:
            held[tensor.name] = tensor
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = moved.get(name, name)
    return list(nodes)


def _assembled(graph: Graph, nodes: Sequence[Any], held: Mapping[str, Any], onnx: Any) -> Any:
    model = onnx.ModelProto()
    source = graph.model
    for key in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        if source.HasField(key):
            setattr(model, key, getattr(source, key))
    model.doc_string = source.doc_string
    model.metadata_props.extend(source.metadata_props)
    model.opset_import.extend(source.opset_import)
    model.functions.extend(source.functions)
    used, known = {node.domain for node in nodes}, {o.domain for o in source.opset_import}
    if DOMAIN in used - known:
        model.opset_import.append(sparse_opset())
    if attention.THEIRS in used - known:
        model.opset_import.append(onnx.helper.make_opsetid(attention.THEIRS, 1))
    inner = model.graph
    inner.name = source.graph.name or "graph"
    inner.doc_string = source.graph.doc_string
    inner.metadata_props.extend(source.graph.metadata_props)
    inner.node.extend(nodes)
    inner.input.extend(source.graph.input)
    inner.output.extend(source.graph.output)
    needed = {name for node in nodes for name in uses(node)} | graph.outputs
    needed |= replaceable(source)  # without their values they would have to be given
    inner.initializer.extend(t for t in source.graph.initializer if t.name in needed)
    inner.sparse_initializer.extend(
        t for t in source.graph.sparse_initializer if t.values.name in needed
    )
    inner.initializer.extend(held.values())
    # What attention puts out may have had more axes before.
    own = [node for node in nodes if not attention.is_block(node)]
    made = {name for node in own for name in node.output}
    inner.value_info.extend(v for v in source.graph.value_info if v.name in made)
    return model
