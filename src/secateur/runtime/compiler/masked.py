"""Pruning the weights of an ONNX file by magnitude, for benchmarks and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.core.atomic import new_file
from secateur.core.errors import UsageError
from secateur.core.select import keep_top
from secateur.runtime.compiler.graph import MOVES, Graph, read_model, standard
from secateur.runtime.compiler.site import Site, start


def prune_onnx(
    path: str | Path,
    out: str | Path,
    sparsity: float,
    *,
    depthwise: bool = False,
    first: bool = False,
) -> int:
    """Set the smallest weights of every layer to zero, without any care for accuracy.

    Args:
        path: An ONNX file.
        out: The file to write.
        sparsity: Share of zeros in every layer, 0 to 1.
        depthwise: Whether depthwise convolutions take part.
        first: Whether the first layer does.

    Returns:
        How many weights were pruned; a weight that several layers share counts once.

    Raises:
        UsageError: ``sparsity`` is not in [0, 1].
        FileError: The file cannot be read or written.
    """
    if not 0 <= sparsity <= 1:
        raise UsageError(
            f"sparsity={sparsity}", f"{sparsity} is not in [0, 1]", "it is a share", "write 0.8"
        )
    graph = Graph.of(read_model(path))
    found = [start(graph, i, node) for i, node in enumerate(graph.nodes)]
    layers = [begun.site for begun in found if begun is not None]
    chosen = layers if first else layers[1:]
    names = {_origin(graph, site) for site in chosen if depthwise or not site.depthwise}
    pruned = [_prune_(graph.model, name, sparsity) for name in sorted(names)]
    with new_file(out) as temporary:
        temporary.write_bytes(graph.model.SerializeToString())
    return sum(pruned)


def _origin(graph: Graph, site: Site) -> str:
    """The stored tensor whose elements a weight has; what nodes compute has none."""
    name = site.source
    while name in graph.producer and standard(graph.nodes[graph.producer[name]], *MOVES):
        name = graph.nodes[graph.producer[name]].input[0]
    return name


def _prune_(model: Any, name: str, sparsity: float) -> bool:
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            tensors.update((name, item.t) for item in node.attribute if item.name == "value")
    if name not in tensors:
        return False
    weight = np.array(numpy_helper.to_array(tensors[name]))
    score = torch.from_numpy(np.abs(weight).reshape(1, -1))
    kept = keep_top(score, weight.size - round(sparsity * weight.size))
    weight[~kept.numpy().reshape(weight.shape)] = 0
    tensors[name].CopyFrom(numpy_helper.from_array(weight, tensors[name].name))
    return True
