"""Nodes of a graph: what they use, which of them outputs need, and in which order they run."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from secateur.core.errors import FormatError


def ordered(graph: Any) -> tuple[Any, ...]:
    """Nodes, each after those that it needs; the order of the file where that is possible."""
    nodes = list(graph.node)
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [{maker[name] for name in uses(node) if name in maker} for node in nodes]
    needed_by: list[list[int]] = [[] for _ in nodes]
    for index, makers in enumerate(needs):
        for i in makers:
            needed_by[i].append(index)
    ready = [index for index, makers in enumerate(needs) if not makers]
    out: list[Any] = []
    while ready:
        done = heapq.heappop(ready)
        out.append(nodes[done])
        for index in needed_by[done]:
            needs[index].discard(done)
            if not needs[index]:
                heapq.heappush(ready, index)
    if len(out) < len(nodes):
        raise FormatError(
            f"a graph of {len(nodes)} nodes",
            f"{len(nodes) - len(out)} of them wait for one another",
            "a graph has no cycles",
            "export the model anew",
        )
    return tuple(out)


def live(nodes: Sequence[Any], outputs: Iterable[str]) -> tuple[Any, ...]:
    """Nodes in order, without those that no output needs."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(uses(node))
    return tuple(reversed(kept))


def names_in(nodes: Iterable[Any]) -> set[str]:
    """Every name of a value that nodes use or make, also inside their branches and bodies."""
    found: set[str] = set()
    for node in nodes:
        found.update(node.input, node.output)
        for held in node.attribute:
            for branch in (held.g, *held.graphs):
                found.update(value.name for value in (*branch.input, *branch.initializer))
                found |= names_in(branch.node)
    return found


def uses(node: Any) -> Iterator[str]:
    """Every value that a node needs, once per use, with those that its branches capture."""
    yield from (name for name in node.input if name)
    for item in node.attribute:
        for branch in ([item.g] if item.HasField("g") else []) + list(item.graphs):
            own = {i.name for i in branch.input} | {t.name for t in branch.initializer}
            own |= {name for inner in branch.node for name in inner.output}
            captured = [name for inner in branch.node for name in uses(inner)]
            captured += [o.name for o in branch.output]
            yield from (name for name in captured if name not in own)
