"""Products with a sum: linear layers, attention, convolutions.

A product is an element-wise meeting in a larger frame, followed by a sum over the common axis. For
``(n, k) @ (k, m)`` the frame is ``(n, k, m)``. So units of the input meet those of the weight's
columns along ``k``, and the weight's rows go on as the units of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.structure.labels import along, first_along, narrowed, varying
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.tracer import Call, Labels, Tracer

READS = "it reads a tensor of fixed size, such as the input of the model"
_TAPS = "positions of a kernel are not removed"
_ROWS = "a product grouped by experts needs rows of whole 16 bytes"
_SOLVED = "an equation is solved for all of them together"
_HEAD = "a product of two activations runs over them, so they are one head"


def contract(tracer: Tracer, a: Tensor, b: Tensor) -> list[Tensor]:
    """Labels of ``a @ b`` for ``(..., n, k) @ (..., k, m)``."""
    for x, axis in ((a, a.ndim - 1), (b, b.ndim - 2)):
        for label in tracer.labels(x):
            # Said before the two meet: that may take the other axes away.
            if axis in varying(label) and len(varying(label)) > 1:
                tracer.ledger.whole(label, axis, _HEAD)
    frame = (*a.shape, b.shape[-1])
    left = ((*a.shape, 1), tuple(label.unsqueeze(-1) for label in tracer.labels(a)))
    right_shape = (*b.shape[:-2], 1, *b.shape[-2:])
    right = (right_shape, tuple(label.unsqueeze(-3) for label in tracer.labels(b)))
    return summed(tracer, tracer.meet_labels(frame, [left, right], READS), len(frame) - 2)


def summed(tracer: Tracer, labels: list[Tensor], axis: int, *, keep: bool = False) -> list[Tensor]:
    """Labels after a sum over ``axis``: it ends those that lie along it alone."""
    found = []
    for label in labels:
        axes = varying(label)
        left: Tensor | None = label
        if axis in axes:
            left = tracer.ledger.whole(label, axis, _HEAD) if len(axes) > 1 else None
        if left is not None:
            found.append(first_along(left, axis) if keep else left.select(axis, 0))
    return found


def with_bias(tracer: Tracer, out: Tensor, labels: list[Tensor], bias: Any) -> None:
    """Add a bias (any tensor that broadcasts) and put the labels on the output."""
    operands: list[tuple[tuple[int, ...], Labels]] = [(tuple(out.shape), tuple(labels))]
    if isinstance(bias, Tensor):
        operands.append((tuple(bias.shape), tracer.labels(bias)))
    tracer.put(out, tracer.meet_labels(tuple(out.shape), operands, FIXED))


@rule("aten.mm", "aten.bmm")
def product(tracer: Tracer, call: Call) -> None:
    """A matrix product."""
    tracer.put(call.out, contract(tracer, call.args[0], call.args[1]))


@rule("aten.mv", "aten.dot", "aten.vdot")
def vector_product(tracer: Tracer, call: Call) -> None:
    """With a vector: the sum of an element-wise product."""
    a, b = call.args[:2]
    labels = summed(tracer, tracer.meet(tuple(a.shape), [a, b], READS), a.ndim - 1)
    tracer.put(call.out, labels)


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm")
def product_with_bias(tracer: Tracer, call: Call) -> None:
    """``bias + a @ b``."""
    bias, a, b = call.args[:3]
    with_bias(tracer, call.out, contract(tracer, a, b), bias)


@rule("aten.linear")
def linear(tracer: Tracer, call: Call) -> None:
    """Where it is not taken apart: ``x @ weight.T + bias``."""
    x, weight = call.args[:2]
    frame = (*x.shape[:-1], weight.shape[0], weight.shape[1])
    left = (
        (*x.shape[:-1], 1, x.shape[-1]),
        tuple(label.unsqueeze(-2) for label in tracer.labels(x)),
    )
    right = (tuple(weight.shape), tracer.labels(weight))
    labels = summed(tracer, tracer.meet_labels(frame, [left, right], READS), len(frame) - 1)
    with_bias(tracer, call.out, labels, call.argument(2, "bias"))


@rule("aten._trilinear")
def trilinear(tracer: Tracer, call: Call) -> None:
    """A product of three tensors, each with new axes where it is told so, then sums over axes."""
    x, weight, y, *places, axes = call.args[:7]
    operands: list[tuple[tuple[int, ...], Labels]] = []
    for tensor, new in zip((x, weight, y), places, strict=True):
        shape, labels = list(tensor.shape), list(tracer.labels(tensor))
        for axis in new:
            shape.insert(axis, 1)
            labels = [label.unsqueeze(axis) for label in labels]
        operands.append((tuple(shape), tuple(labels)))
    frame = torch.broadcast_shapes(*(shape for shape, _ in operands))
    found = tracer.meet_labels(tuple(frame), operands, READS)
    for axis in sorted(axes, reverse=True):
        found = summed(tracer, found, axis)
    tracer.put(call.out, found)


@rule("aten._cdist_forward", "aten._euclidean_dist")
def distances(tracer: Tracer, call: Call) -> None:
    """Between all rows of two tensors: a sum over the last axis, as of a product."""
    a, b = call.args[:2]
    left = ((*a.shape[:-1], 1, a.shape[-1]), tuple(v.unsqueeze(-2) for v in tracer.labels(a)))
    right = ((*b.shape[:-2], 1, *b.shape[-2:]), tuple(v.unsqueeze(-3) for v in tracer.labels(b)))
    frame = (*call.out.shape, a.shape[-1])
    tracer.put(call.out, summed(tracer, tracer.meet_labels(frame, [left, right], READS), -1))


@rule("aten.linalg_matrix_exp", "aten.linalg_householder_product", "aten._linalg_solve_ex",
      "aten.linalg_inv_ex", "aten.linalg_qr", "aten.linalg_cholesky_ex", "aten._linalg_svd",
      "aten._linalg_eigh", "aten._linalg_det", "aten._linalg_slogdet")  # fmt: skip
def of_a_matrix(tracer: Tracer, call: Call) -> None:
    """Inverses, factors and exponentials: every entry depends on all of the matrix."""
    tracer.refuse(call, "a function of a whole matrix mixes them, as in an orthogonal weight")


@rule("aten.linalg_solve_triangular")
def solved(tracer: Tracer, call: Call) -> None:
    """``A @ x = b`` (or ``x @ A = b``) for each of a batch of triangles, which are solved as a whole.

    In linear attention by the delta rule there is one for each head.
    """
    a, b = call.args[:2]
    solved_axis = b.ndim - (2 if call.kwargs.get("left", True) else 1)
    operands: list[tuple[tuple[int, ...], Labels]] = []
    for x, axes in ((a, (a.ndim - 2, a.ndim - 1)), (b, (solved_axis,))):
        labels, shape = list(tracer.labels(x)), list(x.shape)
        for axis in axes:
            labels = [first_along(left, axis) for left in tracer.fixed(labels, axis, _SOLVED)]
            shape[axis] = 1
        operands.append((tuple(shape), tuple(labels)))
    frame = list(call.out.shape)
    frame[solved_axis - b.ndim] = 1
    merged = tracer.meet_labels(tuple(frame), operands, FIXED)
    tracer.put(call.out, [label.expand(call.out.shape) for label in merged])


@rule("aten._grouped_mm")
def grouped_product(tracer: Tracer, call: Call) -> None:
    """Rows of ``x`` are sorted by expert, and each expert has its own matrix ``(e, k, m)``."""
    x, weight = call.args[:2]
    if x.ndim != 2 or weight.ndim != 3:
        tracer.refuse(call, "a grouped product of another form")
        return
    labels = [label for label in tracer.labels(weight) if 0 not in varying(label)]
    for label in tracer.labels(weight):
        if 0 in varying(label):
            tracer.ledger.pin(label, "experts are chosen by data")
    # Rows must start at multiples of 16 bytes, so their lengths stay such multiples.
    for label in (*tracer.labels(x), *labels):
        for axis in varying(label):
            tracer.ledger.block(label, axis, 16 // x.element_size(), _ROWS)
    frame = (*x.shape, weight.shape[-1])
    left = ((*x.shape, 1), tuple(label.unsqueeze(-1) for label in tracer.labels(x)))
    right = (tuple(weight.shape[1:]), tuple(label.select(0, 0) for label in labels))
    tracer.put(call.out, summed(tracer, tracer.meet_labels(frame, [left, right], READS), 1))


@rule("aten.convolution", "aten._convolution", "aten.cudnn_convolution", "aten.mkldnn_convolution")
def convolution(tracer: Tracer, call: Call) -> None:
    """Channels meet as in a matrix product; kernel positions are not removed.

    A convolution in groups keeps their number, and each loses the same places. One with a single
    input channel a group (depthwise) loses whole groups.
    """
    x, weight, bias = call.args[:3]
    transposed, groups = _form(call)
    rows, columns = _channels(tracer, weight)
    passed, mixed = _by_pixel(tracer, call)
    inputs = _along_channels(tracer, mixed)
    if transposed:
        rows, columns = columns, rows
    # rows: units of the output channels, columns: of the input channels; one of the two counts
    # channels of a single group.
    outs = _grouped(tracer, inputs, rows, columns, (groups, x.shape[1], call.out.shape[1]))
    if groups > 1 and outs is not None and x.shape[1] == groups:
        tracer.size(along(outs.reshape(groups, -1)[:, 0], 0, (groups,)), 0, value=groups)
    labels = passed if outs is None else [along(outs, 1, tuple(call.out.shape)), *passed]
    if isinstance(bias, Tensor):
        shape = (len(bias), *[1] * (call.out.ndim - 2))
        mine = tuple(label.reshape(shape) for label in tracer.labels(bias))
        operands = [(tuple(call.out.shape), tuple(labels)), (shape, mine)]
        labels = tracer.meet_labels(tuple(call.out.shape), operands, FIXED)
    tracer.put(call.out, labels)


def _form(call: Call) -> tuple[bool, int]:
    values = _named(call)
    return bool(values.get("transposed", False)), int(values["groups"])


def _named(call: Call) -> dict[str, Any]:
    names = [a.name for a in call.func._schema.arguments]
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


def _by_pixel(tracer: Tracer, call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """Labels of the output along pixels that meet no others, and the labels of the input that are left.

    Where a kernel has one position and goes on by one, each pixel of the input is one of the output.
    Networks that mix tokens by ``Conv1d(tokens, tokens, 1)`` have the residual width there.
    """
    x, weight = call.args[:2]
    values = _named(call)
    alone = {
        axis + 2
        for axis, size in enumerate(weight.shape[2:])
        if size == 1 and _at(values["stride"], axis) == 1 and _at(values["padding"], axis) == 0
    }
    passed, mixed = [], []
    for label in tracer.labels(x):
        if alone.issuperset(varying(label)):
            passed.append(narrowed(label).expand(call.out.shape))
        else:
            mixed.append(label)
    return passed, mixed


def _at(sizes: Sequence[int], axis: int) -> int:
    return sizes[axis % len(sizes)]


def _channels(tracer: Tracer, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Units along the first and the second axis of a weight; its taps are pinned."""
    found: list[Tensor | None] = [None, None]
    for label in tracer.labels(weight):
        axes = varying(label)
        if len(axes) == 1 and axes[0] < 2:
            axis = axes[0]
            found[axis] = label.movedim(axis, 0).flatten(1)[:, 0]
        else:
            tracer.ledger.pin(label, _TAPS)
    return found[0], found[1]


def _along_channels(tracer: Tracer, labels: list[Tensor]) -> Tensor | None:
    """The units along the channels of an input; others end here."""
    found = None
    for label in labels:
        rest = [label]
        for axis in varying(label):
            if axis != 1:
                rest = tracer.fixed(rest, axis, "a convolution mixes their pixels")
        for left in rest:
            if found is None:
                found = left.movedim(1, 0).flatten(1)[:, 0]
            else:
                tracer.ledger.pin(left, "two kinds of units lie along the channels")
    return found


def _grouped(
    tracer: Tracer,
    inputs: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    counts: tuple[int, int, int],
) -> Tensor | None:
    """Tie the channels of one convolution; returns the units of its output channels."""
    groups, channels, outputs = counts
    ledger = tracer.ledger
    if groups == 1:
        _tie(tracer, inputs, columns)
        return rows
    if channels == groups:  # depthwise, possibly with several outputs a channel
        for ids in (rows, columns):
            if ids is not None and len(ids) >= groups:
                _tie(tracer, inputs, ids.reshape(groups, -1))
        out = next(
            (ids for ids in (rows, columns) if ids is not None and len(ids) == outputs), None
        )
        if out is not None:
            box = out.reshape(groups, -1)
            ledger.join(box, box[:, :1])
        elif columns is not None and len(columns) == groups:
            # Transposed, several outputs a channel: a group's outputs come and go with its channel.
            out = columns.repeat_interleave(outputs // groups)
        if rows is not None and len(rows) < groups:
            ledger.pin(rows, "every group has the same number of outputs")
        return out
    per_group = columns if columns is not None and len(columns) == channels // groups else None
    if inputs is not None:
        places = inputs.reshape(groups, -1)
        ledger.join(places, places[:1])
        _tie(tracer, places[0], None if columns is None else columns[: channels // groups])
    elif per_group is not None:
        ledger.pin(per_group, READS)
    if columns is not None and len(columns) == channels:  # transposed: all inputs have a row
        ledger.join(columns.reshape(groups, -1), columns[: channels // groups][None])
    if rows is None:
        return None
    if len(rows) == outputs:
        places = rows.reshape(groups, -1)
        ledger.join(places, places[:1])
        return rows
    return rows.repeat(groups)  # transposed: the second axis serves every group


def _tie(tracer: Tracer, inputs: Tensor | None, columns: Tensor | None) -> None:
    if inputs is None and columns is not None:
        tracer.ledger.pin(columns, READS)
    elif inputs is not None and columns is None:
        tracer.ledger.pin(inputs, FIXED)
    elif inputs is not None and columns is not None:
        tracer.ledger.join(inputs if columns.ndim == 1 else inputs[:, None], columns)
