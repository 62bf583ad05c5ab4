"""Operators that pick or write entries by index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.structure.labels import first_along, own_shape, relaxed, varying
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.tracer import Call, Labels, Tracer

_LOOKED_UP = "they are looked up by index"
_LAST = "its code picks them by their distance from the end"


@rule("aten.embedding")
def embedding(tracer: Tracer, call: Call) -> None:
    """Rows are looked up; columns are the units of the output."""
    labels = tracer.fixed(tracer.labels(call.args[0]), 0, _LOOKED_UP)
    tracer.put(call.out, [label[0].expand(call.out.shape) for label in labels])


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(tracer: Tracer, call: Call) -> None:
    """Rows are looked up and summed, averaged or compared; columns are the units of the output."""
    out, (weight, *others) = call.outputs[0], call.tensors
    for x in others:
        for label in tracer.labels(x):
            tracer.ledger.pin(label, "entries of an embedding are weighted with them")
    labels = tracer.fixed(tracer.labels(weight), 0, _LOOKED_UP)
    tracer.put(out, [label[0].expand(out.shape) for label in labels])


@rule("aten.embedding_renorm_")
def renormed(tracer: Tracer, call: Call) -> None:
    """Rows that are too long are scaled; columns of zeros add nothing to their length."""
    tracer.put(call.out, tracer.labels(call.args[0]))


@rule("aten._pack_padded_sequence")
def packed(tracer: Tracer, call: Call) -> None:
    """Steps of sequences of several lengths one after the other: ``(steps, ...)``, and their counts."""
    data = call.outputs[0]
    labels = tracer.labels(call.args[0])
    for axis in (0, 1):
        labels = tuple(tracer.fixed(labels, axis, _LOOKED_UP))
    tracer.put(data, [label[0, :1].expand(data.shape) for label in labels])


@rule("aten.index_select", "aten.gather", "aten.take_along_dim")
def picked_along(tracer: Tracer, call: Call) -> None:
    """Entries along one axis are picked by an index."""
    x, axis = call.args[0], call.args[1] % max(call.args[0].ndim, 1)
    labels = tracer.fixed(tracer.labels(x), axis, _LOOKED_UP)
    found = []
    for label in labels:
        narrow = first_along(label, axis)
        for other in range(x.ndim):  # gather may also take a part of another axis
            if call.out.shape[other] != label.shape[other] and other != axis:
                if other in varying(label):
                    tracer.ledger.pin(label, _LOOKED_UP)
                narrow = first_along(narrow, other)
        found.append(narrow.expand(call.out.shape))
    tracer.put(call.out, found)


@rule("aten.index", "aten._unsafe_index")
def indexed(tracer: Tracer, call: Call) -> None:
    """``x[..., index, ...]``: the indexed axes keep their size."""
    x, indices = call.args[:2]
    labels = list(tracer.labels(x))
    if (last := _from_the_end(tracer, indices)) is not None:
        axis, places = last
        found = [_picked_last(tracer, label, axis, places) for label in labels]
        tracer.put(call.out, [label.expand(call.out.shape) for label in found])
        return
    for axis in _indexed_axes(indices):
        # Some code picks only to ask how many there are.
        tracer.owe(call.out, [v for v in labels if axis in varying(v)], axis, _LOOKED_UP)
        labels = [first_along(label, axis).expand(label.shape) for label in labels]
    plain = [None if i is None else _positions(i) for i in indices]
    moved = [relaxed(torch.ops.aten.index(label, plain)) for label in labels]
    tracer.put(call.out, [label for label in moved if label.shape == call.out.shape])


def _from_the_end(tracer: Tracer, indices: Any) -> tuple[int, list[int]] | None:
    """The axis of ``x[:, [-2]]`` and its positions, counted from the end as the code says them."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].ndim != 1:
        return None
    axis, index = given[0]
    places = tracer.picked(len(index))
    return (axis, places) if places and max(places) < 0 else None


def _picked_last(tracer: Tracer, label: Tensor, axis: int, places: list[int]) -> Tensor:
    """They are found again after a cut as long as the last positions stay."""
    if axis not in varying(label):
        return first_along(label, axis)
    size, count = label.shape[axis], -min(places)
    tracer.ledger.pin(label.narrow(axis, size - count, count), _LAST)
    return relaxed(label.index_select(axis, torch.tensor(places) + size))


def _indexed_axes(indices: Any) -> list[int]:
    axes, axis = [], 0
    for index in indices:
        width = index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        if index is not None:
            axes += list(range(axis, axis + width))
        axis += width
    return axes


def _positions(index: Tensor) -> Tensor:
    """Which rows are taken does not matter on axes that keep their size; how many does."""
    if index.dtype in (torch.bool, torch.uint8):
        return index.cpu()
    return torch.zeros(index.shape, dtype=torch.long)


@rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_", "aten.scatter",
      "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce")  # fmt: skip
def written_along(tracer: Tracer, call: Call) -> None:
    """Entries along one axis are written by an index; along the others the two sides meet."""
    x, axis = call.args[0], call.args[1] % max(call.args[0].ndim, 1)
    sources = [s for s in call.args[3:4] if isinstance(s, Tensor)]
    operands: list[tuple[tuple[int, ...], Labels]] = []
    for side in (x, *sources):
        labels = tracer.fixed(tracer.labels(side), axis, _LOOKED_UP)
        shape = (*side.shape[:axis], 1, *side.shape[axis + 1 :])
        operands.append((shape, tuple(first_along(label, axis) for label in labels)))
    frame = operands[0][0]
    if any(shape != frame for shape, _ in operands):
        tracer.refuse(call, "entries are written into a part of a tensor")
        return
    merged = tracer.meet_labels(frame, operands, FIXED)
    tracer.put(call.out, [label.expand(call.out.shape) for label in merged])


@rule("aten.index_put", "aten.index_put_", "aten._index_put_impl_")
def put(tracer: Tracer, call: Call) -> None:
    """``x[index] = values`` for leading index axes; trailing axes meet."""
    x, indices, values = call.args[:3]
    labels = list(tracer.labels(x))
    axes = _indexed_axes(indices)
    for axis in axes:
        labels = tracer.fixed(labels, axis, _LOOKED_UP)
    trailing = tuple(x.shape[len(axes) :])
    leading = axes == list(range(len(axes))) and values.ndim >= len(trailing)
    if not leading:
        tracer.refuse(call, "entries are written by index along inner axes")
        return
    mine = tuple(label[(0,) * len(axes)] for label in labels)
    shape = tuple(values.shape[values.ndim - len(trailing) :])
    theirs = []
    for label in tracer.labels(values):
        lead = values.ndim - len(trailing)
        if any(axis < lead for axis in varying(label)):
            tracer.ledger.pin(label, _LOOKED_UP)
        else:
            theirs.append(label[(0,) * lead])
    merged = tracer.meet_labels(trailing, [(trailing, mine), (shape, tuple(theirs))], FIXED)
    tracer.put(call.out, [label.expand(call.out.shape) for label in merged])


@rule("aten.masked_scatter", "aten.masked_scatter_")
def scattered(tracer: Tracer, call: Call) -> None:
    """``x[mask] = rows of source``, one after the other: features of an image among those of a text.

    Along the last axes, where the mask does not change, each row is written whole, and the two meet.
    """
    x, mask, source = call.args[:3]
    inner = _unmasked(x, mask, source)
    if not inner:
        tracer.refuse(call, "entries are written one by one where a mask says so")
        return
    trailing = tuple(x.shape[x.ndim - inner :])
    operands: list[tuple[tuple[int, ...], Labels]] = []
    for side in (x, source, mask):
        own = min(inner, side.ndim)
        labels = tracer.labels(side)
        for axis in range(side.ndim - own):
            labels = tuple(tracer.fixed(labels, axis, _LOOKED_UP))
        shape = own_shape(side)[side.ndim - own :]
        operands.append((shape, tuple(label[(0,) * (side.ndim - own)] for label in labels)))
    merged = tracer.meet_labels(trailing, operands, FIXED)
    tracer.put(call.out, [label.expand(call.out.shape) for label in merged])


def _unmasked(x: Tensor, mask: Tensor, source: Tensor) -> int:
    """How many of the last axes are the same in both tensors, and left alone by the mask."""
    still = mask if mask.is_meta else relaxed(mask)
    frame = (*(1,) * (x.ndim - mask.ndim), *own_shape(still))
    count = 0
    for mine, theirs, masked in zip(x.shape[::-1], source.shape[::-1], frame[::-1], strict=False):
        if mine != theirs or masked != 1:
            break
        count += 1
    return count


@rule("aten.nonzero", "aten.item", "aten._local_scalar_dense", "aten.one_hot", "aten.bincount",
      "aten.searchsorted", "aten.histc", "aten.equal")  # fmt: skip
def values_only(tracer: Tracer, call: Call) -> None:
    """Values decide what happens next: what they depend on keeps its size."""
    tracer.refuse(call, "the network decides by their values")
