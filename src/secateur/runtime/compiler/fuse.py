"""What a sparse operator takes in beside its own node: bias, residual, activation, normalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.runtime.compiler.activations import follow
from secateur.runtime.compiler.fold import Affine, per_output
from secateur.runtime.compiler.graph import Graph, attribute, standard
from secateur.runtime.compiler.site import LINEAR, Site, Start, start
from secateur.runtime.spec import Norm

#: Fewer zeros than this never paid, on any machine, so they are not even timed.
FEWEST_ZEROS = 0.2
# Whoever adds so many times what a layer puts out for inputs of size one wants it rounded.
_ROUNDS = 2.0**14


def sites(graph: Graph, *, fewest_zeros: float = FEWEST_ZEROS) -> tuple[Site, ...]:
    """Every layer that a sparse operator could replace, in the order of the graph.

    A layer needs constant float32 weights. It takes in what follows it as long as nobody else sees
    the value between: batch normalisation, factors and terms per output, one addition of a value of
    the same shape, an activation, and after linear layers layer normalisation. Where two layers end
    in the same addition, the later one has it: the other's output is then surely there.

    Args:
        graph: What to look at.
        fewest_zeros: Layers with a smaller share of zeros are left out, with two exceptions for
            which our dense kernels are worth a try: depthwise layers, since alone between sparse
            layers they cost the dense runtime more than they compute, and convolutions of pictures.
    """
    starts = []
    for index, node in enumerate(graph.nodes):
        begun = start(graph, index, node)
        if begun is None:
            continue
        site = begun.site
        wanted = site.sparsity >= fewest_zeros or site.depthwise or site.reads_image
        if wanted and begun.affine.usable:
            starts.append(begun)
    found: list[Site] = []
    claimed = frozenset(begun.index for begun in starts)
    for begun in reversed(starts):
        site = _grown(graph, begun, claimed)
        claimed |= set(site.nodes)
        found.append(site)
    return tuple(reversed(found))


@dataclass(frozen=True)
class _Growing:
    """A layer while it takes in the nodes that follow."""

    affine: Affine
    y: str
    nodes: tuple[int, ...]
    residual: str | None = None

    def past(self, index: int, node: Any, affine: Affine | None = None) -> _Growing:
        return replace(
            self, affine=affine or self.affine, y=node.output[0], nodes=(*self.nodes, index)
        )


def _grown(graph: Graph, begun: Start, claimed: frozenset[int]) -> Site:
    grown = _Growing(begun.affine, begun.site.y, begun.site.nodes)
    while True:
        index = graph.follower(grown.y)
        if index is None or index in claimed:
            break
        node = graph.nodes[index]
        taken = _folded(graph, begun, grown, index, node) or _added(graph, grown, index, node)
        if taken is None or not taken.affine.usable:
            break
        grown = taken
    activation, y, nodes = follow(graph, grown.y, claimed)
    norm = _layer_norm(graph, begun, y, claimed)
    if norm is not None:
        y, nodes = graph.nodes[norm[0]].output[0], [*nodes, norm[0]]
    bias = grown.affine.bias.astype(np.float32)
    return replace(
        begun.site,
        nodes=tuple(sorted((*grown.nodes, *nodes))),
        y=y,
        weight=np.ascontiguousarray(grown.affine.weight, np.float32),
        bias=bias if bias.any() else None,
        residual=grown.residual,
        activation=activation,
        norm=norm[1] if norm is not None else None,
    )


def _folded(graph: Graph, begun: Start, grown: _Growing, index: int, node: Any) -> _Growing | None:
    """The layer with a node folded into weight and bias; None if that cannot be."""
    if standard(node, "Identity", "Dropout") and _idle(graph, node):
        return grown.past(index, node)
    if standard(node, "BatchNormalization"):
        return _normalised(graph, begun, grown, index, node)
    if not standard(node, "Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    first = node.input[0] == grown.y
    held = graph.constant(node.input[1 if first else 0])
    if held is None or held.dtype.kind != "f" or (standard(node, "Sub", "Div") and not first):
        return None
    term = per_output(held, begun.site.outputs, begun.axis, begun.rank)
    # A factor would reach the residual, too.
    if term is None or (standard(node, "Mul", "Div") and grown.residual is not None):
        return None
    if standard(node, "Add", "Sub"):
        if np.abs(term).max(initial=0.0) > _ROUNDS * _reach(begun.site.weight):
            return None
        return grown.past(
            index, node, grown.affine.shifted(term if node.op_type == "Add" else -term)
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = term if node.op_type == "Mul" else 1.0 / term
        return grown.past(index, node, grown.affine.scaled(factor))


def _reach(weight: np.ndarray) -> float:
    """The most that an output has for inputs of size one."""
    return float(np.abs(weight.reshape(len(weight), -1)).sum(1).max(initial=0.0))


def _normalised(
    graph: Graph, begun: Start, grown: _Growing, index: int, node: Any
) -> _Growing | None:
    """Batch normalisation, if its statistics are constant and its channels are the outputs."""
    parts = [graph.constant(name) for name in node.input[1:5]]
    known = [part for part in parts if part is not None]
    training = attribute(node, "training_mode", 0) or any(node.output[1:])
    # The channels of batch normalisation are axis 1.
    if len(known) < 4 or training or begun.axis + begun.rank != 1 or grown.residual is not None:
        return None
    if any(part.shape != (begun.site.outputs,) for part in known):
        return None
    epsilon = attribute(node, "epsilon", 1e-5)
    scale, shift, mean, variance = known
    with np.errstate(divide="ignore", invalid="ignore"):
        return grown.past(
            index, node, grown.affine.normalised(scale, shift, mean, variance, epsilon)
        )


def _layer_norm(
    graph: Graph, begun: Start, y: str, claimed: frozenset[int]
) -> tuple[int, Norm] | None:
    """The layer normalisation that alone uses a value, by its number, if it is over the outputs."""
    index = graph.follower(y)
    if begun.site.kind != LINEAR or index is None or index in claimed:
        return None
    node = graph.nodes[index]
    # Where only one axis is sure, the last one has no number.
    last = begun.rank - 1 or -1
    if not standard(node, "LayerNormalization") or attribute(node, "axis", -1) not in (-1, last):
        return None
    if any(node.output[1:]) or node.input[0] != y or attribute(node, "stash_type", 1) != 1:
        return None
    parts = [graph.constant(name) for name in node.input[1:]]
    known = [part for part in parts if part is not None and part.dtype == np.float32]
    if len(known) < len(parts) or any(part.shape != (begun.site.outputs,) for part in known):
        return None
    scale, shift = known if len(known) == 2 else (known[0], np.zeros_like(known[0]))
    return index, Norm(scale, shift, attribute(node, "epsilon", 1e-5))


def _added(graph: Graph, grown: _Growing, index: int, node: Any) -> _Growing | None:
    """The layer with a residual; None unless the other side surely has the shape of the sum."""
    if not standard(node, "Add") or grown.residual is not None:
        return None
    other = node.input[1] if node.input[0] == grown.y else node.input[0]
    if graph.constant(other) is not None or not graph.same_shape(other, grown.y):
        return None
    return replace(grown.past(index, node), residual=other)


def _idle(graph: Graph, node: Any) -> bool:
    """Whether a node passes its input on."""
    if standard(node, "Identity"):
        return True
    unused = all(name not in graph.users and name not in graph.outputs for name in node.output[1:])
    if graph.opset < 12:
        return unused
    training = graph.constant(node.input[2]) if len(node.input) > 2 else np.False_
    return unused and training is not None and not bool(training)
