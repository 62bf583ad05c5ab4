"""Putting chains of layers into a compiled model; see :mod:`secateur.runtime.chains`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from secateur.runtime.chains import chain_node, found_chains
from secateur.runtime.compiler.graph import attribute
from secateur.runtime.compiler.order import uses
from secateur.runtime.operators import spec_of

_FLOAT = 4


def banded(model: Any, least: int = 0) -> tuple[Any, tuple[str, ...]]:
    """A compiled model in which layers that can run band by band are one operator each.

    Args:
        model: The compiled model; it is not changed.
        least: What a layer hands on in a chain has at least so many bytes, for one image.

    Returns:
        The model, and the names of the chains.
    """
    nodes = list(model.graph.node)
    used = Counter(name for node in nodes for name in uses(node))
    used.update(value.name for value in model.graph.output)
    found = [
        [nodes[i] for i in numbers]
        for numbers in found_chains(nodes, used)
        if max(_bytes(nodes[i]) for i in numbers[:-1]) >= least
    ]
    at = {chain[-1].output[0]: chain_node(chain) for chain in found}
    gone = {node.output[0] for chain in found for node in chain[:-1]}
    out = type(model)()
    out.CopyFrom(model)
    del out.graph.node[:]
    kept = [node for node in nodes if not gone.intersection(node.output)]
    out.graph.node.extend(at.get(node.output[0], node) if node.output else node for node in kept)
    values = [value for value in model.graph.value_info if value.name not in gone]
    del out.graph.value_info[:]
    out.graph.value_info.extend(values)
    return out, tuple(chain.name for chain in at.values())


def _bytes(node: Any) -> int:
    return _FLOAT * spec_of(node).outputs * int(attribute(node, "positions", 0))
