"""Attention that an exporter spelt out, as one operator: ours, or the one that ONNX Runtime has.

Between sparse layers, the transpositions, products and sums of attention are a third of what is left of
a Transformer, and most of them run on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.runtime.compiler.graph import Graph, attribute, standard
from secateur.runtime.compiler.shapes import Axis
from secateur.runtime.operators import DOMAIN, attention_node, is_attention

#: Domains of an operator for attention: ours, and where ONNX Runtime keeps those of its own.
OURS, THEIRS = DOMAIN, "com.microsoft"
_KIND = "MultiHeadAttention"
# Operators whose elements are those of their first input.
_MOVES = ("Expand", "Unsqueeze", "Squeeze", "Reshape", "Identity")
# So many different numbers of a value are told apart.
_FEW = 8
# Axes of scores.
_RANK = 4
# What moves heads before positions, and back; and keys to where a product wants them.
_SWAP, _KEYS, _LAST = [0, 2, 1, 3], [0, 2, 3, 1], [0, 1, 3, 2]


@dataclass(frozen=True)
class Attention:
    """One block of attention.

    Args:
        last: Number of the node that ends it.
        q: Queries, (batch, positions, heads * size).
        k: Keys.
        v: Values.
        mask: Added to the scores, (batch or 1, heads or 1, positions, keys); empty if nothing is.
        heads: How many.
        scale: Factor of the scores.
        domain: Of the operator.
    """

    last: int
    q: str
    k: str
    v: str
    mask: str
    heads: int
    scale: float
    domain: str = OURS

    def node(self, y: str) -> Any:
        """The operator that computes it."""
        from onnx import helper

        parts = [self.q, self.k, self.v]
        if self.domain == OURS:
            inputs = [*parts, self.mask] if self.mask else parts
            return attention_node(inputs, y, heads=self.heads, scale=self.scale)
        inputs = [*parts, "", "", self.mask] if self.mask else parts
        about: dict[str, Any] = {"num_heads": self.heads, "scale": self.scale}
        return helper.make_node(_KIND, inputs, [y], domain=THEIRS, **about)


def is_block(node: Any) -> bool:
    """Whether a node is one of the operators for attention.

    Example:
        >>> is_block(Attention(0, "q", "k", "v", "", heads=2, scale=0.5, domain=THEIRS).node("y"))
        True
    """
    return is_attention(node) or bool(node.domain == THEIRS and node.op_type == _KIND)


def attentions(graph: Graph) -> tuple[Attention, ...]:
    """Every block of attention in float32 whose shapes are surely those of the operator.

    A mask that is zero for every input is left out. Where an exporter replaces what is not a number
    after the softmax (a query that may see no key), a block is taken only if its mask is finite.
    """
    found = (_attention(graph, node) for node in graph.nodes if standard(node, "Softmax"))
    return tuple(block for block in found if block is not None)


@dataclass(frozen=True)
class _Heads:
    """A value (batch, positions, heads * size) that was split into heads."""

    source: str
    batch: Axis
    positions: Axis
    heads: int
    size: int


@dataclass(frozen=True)
class _Scores:
    """Scores of queries against keys, before the softmax."""

    q: _Heads
    k: _Heads
    scale: float
    mask: str

    @property
    def shape(self) -> tuple[Axis, ...]:
        return (self.q.batch, self.q.heads, self.q.positions, self.k.positions)


def _attention(graph: Graph, softmax: Any) -> Attention | None:
    scores = _scores(graph, softmax.input[0])
    # Before version 13 the default was another axis.
    axis = attribute(softmax, "axis", -1 if graph.opset >= 13 else 1)
    if scores is None or axis not in (-1, 3):
        return None
    shares, cleaned = _cleaned(graph, softmax.output[0])
    product = _next(graph, shares, "MatMul")
    if product is None or graph.nodes[product].input[0] != shares:
        return None
    v = _split(graph, _before(graph, graph.nodes[product].input[1], _SWAP))
    swapped = _next(graph, graph.nodes[product].output[0], "Transpose")
    if v is None or swapped is None or attribute(graph.nodes[swapped], "perm") != _SWAP:
        return None
    last = _next(graph, graph.nodes[swapped].output[0], "Reshape")
    q, k = scores.q, scores.k
    alike = (k.batch, k.heads, k.positions) == (v.batch, v.heads, v.positions)
    if last is None or not alike or (q.batch, q.heads, q.size) != (k.batch, k.heads, k.size):
        return None
    if graph.shape(graph.nodes[last].output[0]) != (q.batch, q.positions, v.heads * v.size):
        # Heads may be joined with batch and positions at once; then that stays, if it names all sizes.
        shape = graph.constant(graph.nodes[last].input[1])
        if shape is None or not shape.all():
            return None
        last = swapped
    mask = _mask(graph, scores, cleaned=cleaned)
    if mask is None:
        return None
    return Attention(last, q.source, k.source, v.source, mask, q.heads, scores.scale)


def _scores(graph: Graph, name: str) -> _Scores | None:
    """Queries times keys, scaled before or after, with something added or not."""
    added = _made(graph, name, "Add")
    sides = list(added.input) if added is not None else []
    for part, other in zip(sides, sides[::-1], strict=True):
        found = _scaled_product(graph, part)
        if found is not None:
            return _Scores(*found, other)
    found = _scaled_product(graph, name)
    return None if found is None else _Scores(*found, "")


def _scaled_product(graph: Graph, name: str) -> tuple[_Heads, _Heads, float] | None:
    name, factor = _unscaled(graph, name)
    product = _made(graph, name, "MatMul")
    if product is None:
        return None
    (first, by_q), (second, by_k) = (_unscaled(graph, part) for part in product.input)
    factors = [f for f in (factor, by_q, by_k) if f is not None]
    q = _split(graph, _before(graph, first, _SWAP))
    k = _split(graph, _keys(graph, second))
    scale = float(np.prod(factors, dtype=np.float64))
    # A factor in float32 says that all of it is. To the operator 0 would mean: as usual.
    if q is None or k is None or not factors or not np.float32(scale):
        return None
    return q, k, scale


def _unscaled(graph: Graph, name: str) -> tuple[str, float | None]:
    """What was multiplied by a float32 number, and that number; None if nothing was."""
    for kind in ("Mul", "Div"):
        node = _made(graph, name, kind)
        sides = list(node.input) if node is not None else []
        pairs = list(zip(sides, sides[::-1], strict=True))
        for part, other in pairs if kind == "Mul" else pairs[:1]:
            held = graph.constant(other)
            if held is None or held.size != 1 or held.ndim > _RANK or held.dtype != np.float32:
                continue
            number = float(held.reshape(()))
            if number and math.isfinite(number):
                return part, number if kind == "Mul" else 1 / number
    return name, None


def _keys(graph: Graph, name: str) -> str | None:
    """What was split into heads, if a value is its keys with their sizes before their positions."""
    whole = _before(graph, name, _KEYS)
    if whole is not None:
        return whole
    swapped = _before(graph, name, _LAST) or _swapped_flat(graph, name)
    return None if swapped is None else _before(graph, swapped, _SWAP)


def _swapped_flat(graph: Graph, name: str) -> str | None:
    """The value whose last two axes were swapped while those before them were one.

    PyTorch's exporter writes: reshape to (-1, m, n), transpose, reshape to (..., n, m). The sizes are
    numbers where they are fixed, and are cut from the value's own shape where they are open.
    """
    back = _made(graph, name, "Reshape")
    swap = _made(graph, back.input[0], "Transpose") if back is not None else None
    flat = _made(graph, swap.input[0], "Reshape") if swap is not None else None
    if flat is None or swap is None or back is None or attribute(swap, "perm") != [0, 2, 1]:
        return None
    source = flat.input[0]
    known = graph.shape(source) or (None,) * _RANK
    if len(known) != _RANK:
        return None
    own = [size if isinstance(size, int) else f"axis {i}" for i, size in enumerate(known)]
    first, second, m, n = own
    both = first * second if isinstance(first, int) and isinstance(second, int) else -1
    there = _fits(_entries(graph, source, flat.input[1], own), [both, m, n])
    back_again = _fits(_entries(graph, source, back.input[1], own), [first, second, n, m])
    return source if there and back_again else None


def _entries(
    graph: Graph, source: str, shape: str, own: Sequence[int | str]
) -> list[int | str] | None:
    """The entries of a shape; those that are cut from the shape of a value are what that has."""
    held, joined = graph.constant(shape), _made(graph, shape, "Concat")
    if held is not None:
        return list(held.tolist())
    found: list[int | str] = []
    for part in joined.input if joined is not None else ():
        held, cut = graph.constant(part), _made(graph, part, "Slice")
        if held is not None:
            found += held.tolist()
            continue
        if cut is None or not _is_shape_of(graph, cut.input[0], source):
            return None
        ends = [graph.constant(end) for end in cut.input[1:]]
        numbers = [int(end.reshape(())) for end in ends if end is not None and end.size == 1]
        if len(numbers) != 2 or len(ends) != 2:
            return None
        found += own[slice(*numbers)]
    return found


def _fits(entries: Sequence[int | str] | None, wanted: Sequence[int | str]) -> bool:
    """Whether a value reshaped so has the axes that are wanted; one -1 stands for what is left."""
    if entries is None or len(entries) != len(wanted) or list(entries).count(-1) > 1:
        return False
    return all(entry in (-1, axis) for entry, axis in zip(entries, wanted, strict=True))


def _is_shape_of(graph: Graph, name: str, source: str) -> bool:
    node = _made(graph, name, "Shape")
    if node is None or node.input[0] != source:
        return False
    return attribute(node, "start", 0) == 0 and attribute(node, "end") is None


def _split(graph: Graph, name: str | None) -> _Heads | None:
    """A value whose last axis was split into heads, if that is sure."""
    node = _made(graph, name, "Reshape") if name else None
    if node is None or name is None:
        return None
    before, after = graph.shape(node.input[0]), graph.shape(name)
    if before is None or after is None or (len(before), len(after)) != (3, 4):
        return None
    batch, positions, width = before
    heads, size = after[2:]
    if batch is None or positions is None or after[:2] != before[:2]:
        return None
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size != width:
        return None
    return _Heads(node.input[0], batch, positions, heads, size)


def _cleaned(graph: Graph, shares: str) -> tuple[str, bool]:
    """The shares that values are weighted with; whether they are 0 where they were no numbers."""
    users = [graph.nodes[i] for i in graph.users.get(shares, ())]
    tests = [node for node in users if standard(node, "IsNaN")]
    chosen = [node for node in users if standard(node, "Where")]
    if len(users) != 2 or not tests or not chosen:
        return shares, False
    condition, zero, other = chosen[0].input
    held = graph.constant(zero)
    if (
        condition != tests[0].output[0]
        or other != shares
        or held is None
        or held.size != 1
        or held.any()
    ):
        return shares, False
    return chosen[0].output[0], True


def _mask(graph: Graph, scores: _Scores, *, cleaned: bool) -> str | None:
    """What is added to the scores; empty if that is nothing, None if the operator cannot add it."""
    if not scores.mask:
        return ""
    axes = graph.shape(scores.mask)
    if axes is None or len(axes) > len(scores.shape):
        return None
    full = (1,) * (len(scores.shape) - len(axes)) + axes
    fits = [own in (1, axis) for own, axis in zip(full, scores.shape, strict=True)]
    if not all(fits):
        return None
    found = values(graph, scores.mask)
    if found == frozenset((0.0,)):
        return ""
    # A query that may see no key at all: exporters make zeros of what is no number then.
    if cleaned and (found is None or not all(map(math.isfinite, found))):
        return None
    return scores.mask if len(axes) == len(full) and full[2:] == scores.shape[2:] else None


def values(graph: Graph, name: str) -> frozenset[float] | None:
    """The few numbers that the elements of a value can have, whatever the inputs are; None if unknown.

    Example:
        >>> import onnx
        >>> from secateur.runtime.compiler.graph import Graph
        >>> text = '''
        ... <ir_version: 10, opset_import: ["" : 20]> g (int64[2] shape) => (float[n,m] y)
        ...   <bool[1,1] see = {1}, float[1] zero = {0}, float[1] low = {-1000}>
        ... { all = Expand(see, shape)  y = Where(all, zero, low) }'''
        >>> graph = Graph.of(onnx.parser.parse_model(text))
        >>> values(graph, "all"), values(graph, "y"), values(graph, "shape")
        (frozenset({1.0}), frozenset({0.0}), None)
    """
    held = graph.constant(name)
    if held is not None:
        found = np.unique(held[:0] if held.dtype.kind not in "fbiu" else held)
        return frozenset(map(float, found)) if 0 < len(found) <= _FEW else None
    above = _made(graph, name, "GreaterOrEqual")
    if above is not None:  # positions, against the first: every key is seen
        least, bound = _least(graph, above.input[0]), graph.constant(above.input[1])
        surely = least is not None and bound is not None and bool((bound <= least).all())
        return frozenset((1.0,)) if surely else None
    node = _made(graph, name, *_MOVES, "Where")
    if node is None:
        return None
    if node.op_type != "Where":
        return values(graph, node.input[0])
    condition = values(graph, node.input[0]) or frozenset((0.0, 1.0))
    taken = [node.input[1 if word else 2] for word in condition]
    parts = [values(graph, part) for part in taken]
    known = [part for part in parts if part is not None]
    return frozenset().union(*known) if len(known) == len(parts) else None


def _least(graph: Graph, name: str) -> float | None:
    """What no element of a range of positions is below."""
    moved, positions = _made(graph, name, *_MOVES), _made(graph, name, "Range")
    if moved is not None:
        return _least(graph, moved.input[0])
    if positions is None:
        return None
    start, step = graph.constant(positions.input[0]), graph.constant(positions.input[2])
    rising = start is not None and step is not None and bool((step >= 0).all())
    return float(start.reshape(())) if start is not None and rising else None


def _made(graph: Graph, name: str, *kinds: str) -> Any | None:
    """The node of one of these kinds that makes a value."""
    index = graph.producer.get(name)
    node = graph.nodes[index] if index is not None else None
    return node if node is not None and standard(node, *kinds) else None


def _next(graph: Graph, name: str, kind: str) -> int | None:
    """The node of this kind that alone uses a value."""
    index = graph.follower(name)
    return index if index is not None and standard(graph.nodes[index], kind) else None


def _before(graph: Graph, name: str, perm: Sequence[int]) -> str | None:
    """What was transposed so."""
    node = _made(graph, name, "Transpose")
    return node.input[0] if node is not None and attribute(node, "perm") == list(perm) else None
