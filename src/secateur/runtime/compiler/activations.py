"""Which activation a group of element-wise nodes computes, found by computing it.

Exporters write GELU, SiLU or HardSwish in a dozen ways. All are functions of one number, so the
nodes are evaluated in double precision on some ten thousand numbers and compared with the
definition, instead of being matched shape by shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.runtime.compiler.graph import Graph, attribute, standard

NONE, RELU, CLIP, GELU, SILU, HARDSWISH = range(6)
NAMES = ("none", "relu", "clip", "gelu", "silu", "hardswish")
# More nodes than any known way to write an activation.
_MOST_NODES = 16
# Relative, but absolute below 0.1 for the smooth ones. Constants are stored as float32: that moves a
# bound of HardSwish by 5e-8. The approximations of GELU (with tanh, with a sigmoid) differ by 5e-4
# and more. Where all of them are 0 a result must be 0, and a bound must be that very number: what
# divides by max(x, 1e-8), or takes its logarithm, sees the difference.
_TOLERANCE, _SMALL = 1e-6, 0.1

Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Activation:
    """What follows the sum: ``min(max(y, alpha), beta)`` for a clip, where both are needed."""

    kind: int = NONE
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def name(self) -> str:
        """One word.

        Example:
            >>> Activation(CLIP, 0.0, 6.0).name
            'clip'
        """
        return NAMES[self.kind]


NOTHING = Activation()


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, in double precision."""
    import torch

    return np.asarray(torch.erf(torch.from_numpy(np.asarray(x, np.float64))).numpy())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1 / (1 + small), small / (1 + small)))


_DEFINITIONS: dict[int, Function] = {
    RELU: lambda x: np.maximum(x, 0.0),
    GELU: lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    SILU: lambda x: x * _sigmoid(x),
    HARDSWISH: lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
}


def follow(graph: Graph, value: str, claimed: frozenset[int]) -> tuple[Activation, str, list[int]]:
    """The longest activation that starts at ``value``.

    Args:
        graph: Where.
        value: A sum that nothing but the activation may use.
        claimed: Nodes that belong to other layers.

    Returns:
        The activation, the name of its result, and the nodes that make it; without an activation,
        ``value`` itself and no nodes.
    """
    samples = _samples(graph, value)
    region: dict[str, np.ndarray] = {value: samples}
    members: list[int] = []
    best: tuple[Activation, str, list[int]] = (NOTHING, value, [])
    while len(members) < _MOST_NODES:
        index = _next(graph, region, members, claimed)
        if index is None:
            break
        node = graph.nodes[index]
        computed = _compute(graph, node, region)
        if computed is None:
            break
        members.append(index)
        region[node.output[0]] = computed
        if not _closed(graph, region, members, node.output[0]):
            continue
        found = recognise(samples, computed)
        if found is not None:
            best = (found, node.output[0], sorted(members))
    return best


def recognise(x: np.ndarray, y: np.ndarray) -> Activation | None:
    """The activation whose values these are.

    Example:
        >>> x = np.linspace(-9, 9, 1001)
        >>> recognise(x, x / (1 + np.exp(-x))).name, recognise(x, np.tanh(x)) is None
        ('silu', True)
    """
    if not np.isfinite(y).all():
        return None
    for kind, definition in {NONE: lambda x: x, **_DEFINITIONS}.items():
        if (
            _agree(definition(x), y, 0.0 if kind in (NONE, RELU) else _SMALL)
            and not y[x == 0].any()
        ):
            return Activation(kind)
    low, high = float(y[x.argmin()]), float(y[x.argmax()])
    if not low < high or not _agree(np.clip(x, low, high), y, 0.0):
        return None
    # A bound at the end of the samples is none.
    limit = float(np.finfo(np.float32).max)
    return Activation(CLIP, -limit if low == x.min() else low, limit if high == x.max() else high)


def _agree(a: np.ndarray, b: np.ndarray, small: float) -> bool:
    return bool((np.abs(a - b) <= _TOLERANCE * np.maximum(np.abs(a), small)).all())


def _samples(graph: Graph, value: str) -> np.ndarray:
    """Numbers of all sizes, and more of them around each constant that the nodes use."""
    wide = np.logspace(-6, 30, 500)
    fine = np.linspace(-16, 16, 8001)
    near = []
    frontier, seen = [value], {value}
    for _ in range(_MOST_NODES):
        for index in [i for name in frontier for i in graph.users.get(name, ())]:
            node = graph.nodes[index]
            for name in node.input:
                held = graph.constant(name) if name not in seen else None
                if held is not None and held.size == 1 and held.dtype.kind == "f":
                    near.append(float(held.reshape(())))
        users = [graph.nodes[i] for name in frontier for i in graph.users.get(name, ())]
        frontier = [o for node in users for o in node.output if o not in seen][:8]
        seen.update(frontier)
    around = [s * c * f for c in near for s in (1, -1) for f in (0.5, 0.999, 1.0, 1.001, 2.0)]
    return np.unique(np.concatenate([-wide, wide, fine, np.array([*around, 0.0])]))


def _next(
    graph: Graph, region: dict[str, np.ndarray], members: list[int], claimed: frozenset[int]
) -> int | None:
    """The first node outside that uses only the region and constants."""
    near = sorted({i for name in region for i in graph.users.get(name, ())})
    for index in near:
        node = graph.nodes[index]
        known = all(not n or n in region or graph.constant(n) is not None for n in node.input)
        if index not in members and index not in claimed and known and _known(node):
            return index
    return None


def _closed(graph: Graph, region: dict[str, np.ndarray], members: list[int], result: str) -> bool:
    """Whether nothing outside uses anything of the region but ``result``."""
    inside = set(region) - {result}
    return all(
        name not in graph.outputs and all(i in members for i in graph.users.get(name, ()))
        for name in inside
    )


def _bounds(graph: Graph, node: Any) -> tuple[float, float] | None:
    """Of a Clip: attributes before version 11, inputs since."""
    low, high = attribute(node, "min", -math.inf), attribute(node, "max", math.inf)
    inputs = [*node.input, "", ""][1:3]
    for side, name in enumerate(inputs):
        held = graph.constant(name)
        if name and (held is None or held.size != 1):
            return None
        if held is not None and side == 0:
            low = float(held.reshape(()))
        elif held is not None:
            high = float(held.reshape(()))
    return float(low), float(high)


_UNARY: dict[str, Function] = {
    "Relu": lambda x: np.maximum(x, 0.0),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Erf": erf,
    "Neg": np.negative,
    "Identity": lambda x: x,
    "HardSwish": _DEFINITIONS[HARDSWISH],
}
_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Min": np.minimum,
    "Max": np.maximum,
}
# x * sigmoid(alpha * x), in the standard and in ONNX Runtime, with what alpha is if it is not said.
_SWISH = {"Swish": 1.0, "QuickGelu": 1.702}
_OTHER = ("Clip", "HardSigmoid", "Gelu", "Swish")


def _known(node: Any) -> bool:
    contrib = node.domain == "com.microsoft" and node.op_type in ("Gelu", "QuickGelu")
    return contrib or standard(node, *_UNARY, *_BINARY, *_OTHER)


def _compute(graph: Graph, node: Any, region: dict[str, np.ndarray]) -> np.ndarray | None:
    """The result of one node on the samples; None where it is no function of a single number."""
    kind = node.op_type
    names = [n for n in node.input if n]
    with np.errstate(all="ignore"):
        if kind == "Clip":
            bounds = _bounds(graph, node)
            return (
                None
                if bounds is None or names[0] not in region
                else np.clip(region[names[0]], *bounds)
            )
        parts = [_operand(graph, name, region) for name in names]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        if kind in _UNARY:
            return _UNARY[kind](known[0])
        if kind in _BINARY and len(known) == 2:
            return _BINARY[kind](known[0], known[1])
        if kind == "HardSigmoid":
            slope, shift = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
            return np.asarray(np.clip(slope * known[0] + shift, 0.0, 1.0))
        if kind == "Gelu" and attribute(node, "approximate", b"none") == b"none":
            return _DEFINITIONS[GELU](known[0])
        if kind in _SWISH:
            return np.asarray(
                known[0] * _sigmoid(attribute(node, "alpha", _SWISH[kind]) * known[0])
            )
    return None


def _operand(graph: Graph, name: str, region: dict[str, np.ndarray]) -> np.ndarray | None:
    if name in region:
        return region[name]
    held = graph.constant(name)
    # A constant of one axis broadcasts without adding an axis to anything that a layer gives.
    if held is None or held.size != 1 or held.ndim > 2 or held.dtype.kind != "f":
        return None
    return np.asarray(held.reshape(()), np.float64)
