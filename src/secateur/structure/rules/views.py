"""Operators that only move data: they are executed on the labels themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.structure.counted import Counted, Sizes
from secateur.structure.labels import NONE, along, fill, first_along, relaxed, varying
from secateur.structure.named import Named
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.sizes import find_site
from secateur.structure.tracer import Call, Labels, Tracer

_PAIRS = "they are the two parts of a complex number"
_SHAPED = "its code gives their number to a tensor of fixed size"
_PICKED = "one of them is picked by its position"
_SLICED = "they are sliced at fixed positions"


def moved(
    tracer: Tracer, call: Call, move: Callable[[Tensor], Tensor], given: Sizes | None = None
) -> None:
    """Put ``move(label)`` on the output for each label of the first argument.

    ``given`` is the shape of the output as the code of the network states it, if it does.
    """
    labels = []
    for label in tracer.labels(call.args[0]):
        new = relaxed(move(label))
        labels.append(new)
        if len(varying(new)) > len(varying(label)):
            tracer.ledger.box(new)
        for axis in varying(new):
            if given is not None:
                labels[-1] = tracer.sized(labels[-1], axis, given[axis])
    tracer.part_of(call.out, call.args[0])
    tracer.put(call.out, _apart(tracer, labels))


def _apart(tracer: Tracer, labels: list[Tensor]) -> list[Tensor]:
    """Of several kinds of units that were flattened into one axis, the first (channels) go on.

    Those that stay in any case stand back.
    """
    found: list[Tensor] = []
    if len(labels) > 1:
        labels = sorted(labels, key=tracer.ledger.stuck)
    for label in labels:
        if any(set(varying(label)) & set(varying(other)) for other in found):
            tracer.ledger.pin(label, "they are flattened into one axis with other units")
        else:
            found.append(label)
    return found


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_copy",
      "aten._reshape_alias", always=True)  # fmt: skip
def reshaped(tracer: Tracer, call: Call) -> None:
    """The shape of the output is what counts; the arguments may hold -1."""
    shape = tuple(call.out.shape)
    given = tracer.stated(len(shape))
    moved(tracer, call, lambda label: label.reshape(shape), given)
    along_units = {axis for label in tracer.labels(call.out) for axis in varying(label)}
    for axis, size in enumerate(given or ()):
        if isinstance(size, Counted) and size.source and axis not in along_units:
            tracer.ledger.pin(size.source.rows, _SHAPED)


@rule("aten.permute", "aten.transpose", "aten.t", "aten.unsqueeze", "aten.squeeze", "aten.alias",
      "aten.detach", "aten.movedim", "aten.contiguous", "aten.unsqueeze_",
      "aten.squeeze_", "aten.t_", "aten.transpose_", "aten.permute_copy", "aten.transpose_copy")  # fmt: skip
def same_move(tracer: Tracer, call: Call) -> None:
    """Run the operator itself on the labels."""
    # A view in place would change the label of the input as well.
    name = call.name.removeprefix("aten.").rstrip("_").removesuffix("_copy")
    packet = getattr(torch.ops.aten, name)
    moved(tracer, call, lambda label: packet(label, *call.args[1:], **call.kwargs))


@rule("aten.expand")
def expanded(tracer: Tracer, call: Call) -> None:
    """Copies along axes of size 1 have units of their own where their number follows another tensor.

    Of keys that all heads share there are as many copies as heads, after a cut, too.
    """
    x, out = call.args[0], call.out
    labels = [label.expand(out.shape) for label in tracer.labels(x)]
    given = tracer.stated(out.ndim) or [None] * out.ndim
    lead = out.ndim - x.ndim
    for axis, size in enumerate(given):
        grown = out.shape[axis] > 1 and (axis < lead or x.shape[axis - lead] == 1)
        if grown and (size is None or isinstance(size, Counted)):
            ids = tracer.ledger.new(out.shape[axis])
            labels.append(tracer.sized(along(ids, axis, tuple(out.shape)), axis, size))
    tracer.put(out, labels)


@rule("aten.view_as_complex")
def complex_pairs(tracer: Tracer, call: Call) -> None:
    """Two numbers become one. They are read in memory, so that all strides must be even."""
    x = call.args[0]
    for label, axis in tracer.wider(x):
        tracer.ledger.block(label, axis, 2, _PAIRS)
    labels = tracer.fixed(tracer.labels(x), x.ndim - 1, _PAIRS)
    tracer.put(call.out, [label.select(-1, 0) for label in labels])


@rule("aten.view_as_real")
def real_pairs(tracer: Tracer, call: Call) -> None:
    """One number becomes two."""
    labels = tracer.labels(call.args[0])
    tracer.put(call.out, [label.unsqueeze(-1).expand(call.out.shape) for label in labels])


@rule("aten.clone")
def cloned(tracer: Tracer, call: Call) -> None:
    """A copy in any memory format."""
    tracer.put(call.out, tracer.labels(call.args[0]))


@rule("aten.as_strided", "aten.as_strided_")
def restrided(tracer: Tracer, call: Call) -> None:
    """Only where it changes nothing but strides that do not matter."""
    x, out = call.args[0], call.out
    before = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    after = [stride for size, stride in zip(out.shape, out.stride(), strict=True) if size > 1]
    if x.shape != out.shape or before != after:
        tracer.refuse(call, "it is read by strides in memory")
        return
    tracer.put(out, tracer.labels(x))


@rule("aten.repeat")
def repeated(tracer: Tracer, call: Call) -> None:
    """Copies side by side; repeating along units ties the copies."""
    moved(tracer, call, lambda label: label.repeat(call.args[1]))


@rule("aten.repeat_interleave")
def interleaved(tracer: Tracer, call: Call) -> None:
    """Only the form with a number; with a tensor the result depends on data."""
    if len(call.args) < 2 or not isinstance(call.args[1], int):
        tracer.refuse(call, f"{call.name} repeats by data")
        return
    dim = call.argument(2, "dim")
    moved(tracer, call, lambda label: label.repeat_interleave(call.args[1], dim))


@rule("aten.roll", "aten.flip")
def turned(tracer: Tracer, call: Call) -> None:
    """Turning along tokens or pixels is fine; along units it is not the same after a cut."""
    dims = call.argument(2 if "roll" in call.name else 1, "dims", [])
    if not dims:  # the whole tensor in a row is rolled
        dims = list(range(call.out.ndim))
    labels = list(tracer.labels(call.args[0]))
    for axis in _axes(dims, call.out.ndim):
        labels = tracer.fixed(labels, axis, "they are turned around by a fixed step")
    tracer.put(call.out, labels)


@rule("aten.select", "aten.unbind")
def picked(tracer: Tracer, call: Call) -> None:
    """Positions along an axis are taken apart, so that axis keeps its size."""
    axis = _axes(call.argument(1, "dim", 0), call.args[0].ndim)[0]
    labels = tracer.labels(call.args[0])
    for out in call.outputs:
        tracer.put(out, [label.select(axis, 0) for label in labels])
        # Some code picks only to ask for a shape: nothing keeps its size until a value is used.
        tracer.owe(out, [label for label in labels if axis in varying(label)], axis, _PICKED)


@rule("aten.split", "aten.split_with_sizes", "aten.unsafe_split", "aten.unsafe_split_with_sizes",
      "aten.chunk", "aten.unsafe_chunk", "aten.tensor_split", "aten.hsplit", "aten.vsplit")  # fmt: skip
def parted(tracer: Tracer, call: Call) -> None:
    """Equal parts stay equal: the same place in each of them is one group."""
    axis = _axes(call.argument(2, "dim", 0), call.args[0].ndim)[0]
    outs = call.outputs
    kept: list[list[Tensor]] = [[] for _ in outs]
    for label in tracer.labels(call.args[0]):
        pieces = list(label.split([x.shape[axis] for x in outs], axis))
        if axis in varying(label) and len(outs) > 1:
            _part(tracer, pieces, axis)
            for out in outs:
                tracer.part_of(out, call.args[0], label, axis)
        for labels, piece in zip(kept, pieces, strict=True):
            labels.append(piece)
    for out, labels in zip(outs, kept, strict=True):
        tracer.put(out, labels)


def by_name(size: object) -> bool:
    """Whether a size is a sum of products of attributes."""
    return isinstance(size, Named) and bool(size.terms)


def _part(tracer: Tracer, pieces: list[Tensor], axis: int) -> None:
    sizes = {piece.shape[axis] for piece in pieces}
    given = tracer.stated(len(pieces)) or [None] * len(pieces)
    if any(map(by_name, given)) and all(by_name(x) or isinstance(x, Counted) for x in given):
        for size, piece in zip(given, pieces, strict=True):
            tracer.sized(piece, axis, size)
    elif len(sizes) == 1:
        for piece in pieces[1:]:
            tracer.ledger.join(pieces[0], piece)
        tracer.sized(pieces[0], axis, given[0])
    elif all(isinstance(size, Counted) or find_site(tracer.model, tracer.stack, piece.shape[axis])
             for size, piece in zip(given, pieces, strict=True)):  # fmt: skip
        for size, piece in zip(given, pieces, strict=True):
            tracer.sized(piece, axis, piece.shape[axis] if size is None else size)
    else:
        for piece in pieces:
            tracer.ledger.pin(piece, _SLICED)


@rule("aten.slice", "aten.narrow")
def sliced(tracer: Tracer, call: Call) -> None:
    """A part of an axis. Along units only parts of equal size, or of a stated one, can shrink."""
    x, out = call.args[0], call.out
    axis = next((i for i, (a, b) in enumerate(zip(x.shape, out.shape, strict=True)) if a != b), -1)
    if axis < 0:
        tracer.put(out, tracer.labels(x))
        return
    labels: list[Tensor] = []
    for label in tracer.labels(x):
        if axis not in varying(label):
            labels.append(first_along(label, axis).expand(out.shape))
            continue
        piece = call.func(label, *call.args[1:], **call.kwargs)
        labels.append(_slice(tracer, call, label, piece, axis))
        tracer.part_of(out, x, label, axis)
    tracer.put(out, labels)


def _slice(tracer: Tracer, call: Call, label: Tensor, piece: Tensor, axis: int) -> Tensor:
    size, length = label.shape[axis], piece.shape[axis]
    step = call.argument(4, "step", 1)
    start = call.argument(2, "start", 0) or 0
    start = start + size if start < 0 else start
    whole_parts = length and size % length == 0
    names = [tracer.said(bound) for bound in (start, start + length) if 0 < bound < size]
    if step == 1 and names and all(map(by_name, names)):
        for bound in names:
            tracer.sized(label.narrow(axis, 0, int(bound)), axis, bound)
    elif whole_parts and (step == 1 and start % length == 0):
        parts = label.unflatten(axis, (size // length, length))
        tracer.ledger.join(parts, first_along(parts, axis))
        for bound in filter(tracer.literal, names):
            tracer.doubt(label, f"its code slices them at the number {bound}")
    elif whole_parts and step == size // length:
        parts = label.unflatten(axis, (length, step))
        tracer.ledger.join(parts, first_along(parts, axis + 1))
    elif step == 1 and all(
        bound in (0, size) or find_site(tracer.model, tracer.stack, bound)
        for bound in (start, start + length)
    ):
        for bound in (start, start + length):
            if 0 < bound < size:
                tracer.size(label.narrow(axis, 0, bound), axis)
    else:
        tracer.ledger.pin(label, _SLICED)
    return piece


@rule("aten.cat", "aten.concat", "aten.concatenate", "aten._cat")
def joined(tracer: Tracer, call: Call) -> None:
    """Along units the labels are strung together; along other axes the parts meet."""
    tensors = [x for x in call.args[0] if x.shape != (0,)]
    axis = _axes(call.argument(1, "dim", 0), call.out.ndim)[0]
    tensors = [x for x in tensors if x.shape[axis] or not call.out.shape[axis]]
    labels = _strung(tracer, tensors, axis)
    labels += _meeting(tracer, tensors, axis, tuple(call.out.shape))
    tracer.put(call.out, labels)


@rule("aten.stack")
def stacked(tracer: Tracer, call: Call) -> None:
    """A new axis, along which the parts meet."""
    tensors = list(call.args[0])
    axis = _axes(call.argument(1, "dim", 0), call.out.ndim)[0]
    shape = tuple(tensors[0].shape)
    flat = tracer.meet(shape, tensors, FIXED)
    tracer.put(call.out, [label.unsqueeze(axis).expand(call.out.shape) for label in flat])


def _strung(tracer: Tracer, tensors: list[Tensor], axis: int) -> list[Tensor]:
    lying = {axes for x in tensors for axes in map(varying, tracer.labels(x)) if axis in axes}
    if not lying:
        return []
    parts = [_part_along(tracer, x, axis, lying) for x in tensors]
    label = relaxed(torch.cat(parts, axis))
    if len(varying(label)) > max(len(varying(part)) for part in parts):
        tracer.ledger.box(label)
    return [label]


def _part_along(tracer: Tracer, x: Tensor, axis: int, lying: set[tuple[int, ...]]) -> Tensor:
    """The label of one part of a concatenation whose units lie along ``axis``, here or in others."""
    for label in tracer.labels(x):
        # Of a whole head that meets parts of heads, the units do not differ along the axis.
        if axis in varying(label) or _lies(label, axis, lying):
            return label
    return fill(tuple(x.shape))


def _lies(label: Tensor, axis: int, lying: set[tuple[int, ...]]) -> bool:
    return any({*varying(label), axis} == set(axes) for axes in lying)


def _meeting(
    tracer: Tracer, tensors: list[Tensor], axis: int, shape: tuple[int, ...]
) -> list[Tensor]:
    flat: list[tuple[tuple[int, ...], Labels]] = []
    lying = {axes for x in tensors for axes in map(varying, tracer.labels(x)) if axis in axes}
    for x in tensors:
        still = [
            label
            for label in tracer.labels(x)
            if axis not in varying(label) and not _lies(label, axis, lying)
        ]
        narrow = tuple(first_along(label, axis) for label in still)
        flat.append(((*x.shape[:axis], 1, *x.shape[axis + 1 :]), narrow))
    frame = (*shape[:axis], 1, *shape[axis + 1 :])
    return [label.expand(shape) for label in tracer.meet_labels(frame, flat, FIXED)]


@rule("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d",
      "aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad2d",
      "aten.replication_pad3d")  # fmt: skip
def padded(tracer: Tracer, call: Call) -> None:
    """Padding along units adds places without a unit; elsewhere it changes nothing."""
    pads = list(call.args[1])
    labels = []
    for label in tracer.labels(call.args[0]):
        axes = varying(label)
        narrow, amounts = label, []
        for axis in reversed(range(label.ndim)):
            before, after = (pads[2 * k : 2 * k + 2] if (k := label.ndim - 1 - axis) * 2 < len(pads)
                             else (0, 0))  # fmt: skip
            if axis not in axes:
                narrow, before, after = first_along(narrow, axis), 0, 0
            amounts += [before, after]
        labels.append(relaxed(F.pad(narrow, amounts, value=NONE)).expand(call.out.shape))
    tracer.put(call.out, labels)


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle", "aten.channel_shuffle",
      "aten.native_channel_shuffle", "aten.unfold", "aten.diagonal", "aten.tril", "aten.triu")  # fmt: skip
def run_on_labels(tracer: Tracer, call: Call) -> None:
    """Executed on labels with all their values."""
    if "tri" in call.name:
        tracer.put(call.out, tracer.labels(call.args[0]))
        return
    if "channel_shuffle" in call.name:
        _shuffle(tracer, call)
        return
    moved(tracer, call, lambda label: call.func(label, *call.args[1:], **call.kwargs))


def _shuffle(tracer: Tracer, call: Call) -> None:
    """Groups keep their number: the same place in each of them is one group of units."""
    groups = call.args[1]
    labels = []
    for label in tracer.labels(call.args[0]):
        parts = label.unflatten(1, (groups, -1))
        tracer.ledger.join(parts, first_along(parts, 1))
        labels.append(relaxed(parts.transpose(1, 2).flatten(1, 2)))
    tracer.put(call.out, labels)


def _axes(dims: Any, ndim: int) -> list[int]:
    listed = [dims] if isinstance(dims, int) else list(dims)
    return [dim % ndim for dim in listed]
