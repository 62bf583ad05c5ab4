"""Sums, means and other reductions; softmax and its like along an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.structure.labels import first_along, varying
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.tracer import Call, Tracer

REDUCTIONS = ("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.var", "aten.std",
              "aten.prod", "aten.any", "aten.all", "aten.logsumexp", "aten.linalg_vector_norm",
              "aten.norm", "aten.var_mean", "aten.std_mean", "aten.argmax", "aten.argmin",
              "aten.max", "aten.min", "aten.median", "aten.count_nonzero", "aten.nansum",
              "aten.kthvalue", "aten.mode", "aten.nanmedian")  # fmt: skip
_EXACT = ("aten.sum", "aten.count_nonzero")
_WITH_POSITIONS = tuple(
    f"aten.{name}" for name in ("max", "min", "median", "nanmedian", "kthvalue", "mode")
)
LOSSES = ("aten.mse_loss", "aten.smooth_l1_loss", "aten.huber_loss")
_SPECTRUM = "a Fourier transform runs over them"
_FUSED = "they are compared or normalised with one another"
_NUMBERED = "the position of one of them is a value"


@rule(*REDUCTIONS)
def reduced(tracer: Tracer, call: Call) -> None:
    """Over units only the kept ones are seen; over other axes nothing changes."""
    x = call.args[0]
    if len(call.args) > 1 and isinstance(call.args[1], Tensor):  # max of two tensors
        from secateur.structure.rules.elementwise import elementwise

        elementwise(tracer, call)
        return
    axes = reduced_axes(call)
    for out in call.outputs:
        keep = out.ndim == x.ndim
        labels: list[Tensor] = []
        for label in tracer.labels(x):
            left = _reduce(tracer, call, label, axes)
            if left is not None:
                for axis in sorted(axes, reverse=True):
                    left = first_along(left, axis)
                    left = left if keep else left.squeeze(axis)
                labels.append(left)
        tracer.put(out, labels)
    for out in _positions(call):
        for axis in axes:
            found = [label for label in tracer.labels(x) if axis in varying(label)]
            tracer.owe(out, found, axis, _NUMBERED)


def _positions(call: Call) -> list[Tensor]:
    """The results that say where along the reduced axes something lies, e.g. the likeliest class."""
    if call.name in ("aten.argmax", "aten.argmin"):
        return call.outputs
    return call.outputs[1:] if call.name in _WITH_POSITIONS else []


def reduced_axes(call: Call) -> list[int]:
    """The axes that a reduction takes away; all of them where none is named."""
    x = call.args[0]
    known = call.func._schema.arguments
    values = {a.name: a.default_value for a in known} | dict(call.kwargs)
    values |= dict(zip((a.name for a in known), call.args, strict=False))
    dims = values.get("dim")
    if dims is None or dims == []:
        return list(range(x.ndim))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return sorted(dim % x.ndim for dim in listed)


def _reduce(tracer: Tracer, call: Call, label: Tensor, axes: list[int]) -> Tensor | None:
    mine = set(varying(label))
    if not mine & set(axes):
        return label
    if call.name not in _EXACT:
        tracer.reduces(f"{call.name} over a cut axis sees the kept units only", label)
    if mine <= set(axes):
        return None
    left: Tensor | None = label
    for axis in sorted(mine & set(axes)):
        if left is not None:
            left = tracer.ledger.whole(left, axis, f"{call.name} runs over them")
    return left


@rule(*LOSSES)
def compared(tracer: Tracer, call: Call) -> None:
    """Two tensors meet element by element; without a reduction that is all."""
    a, b = call.args[:2]
    shape = torch.broadcast_shapes(a.shape, b.shape)
    labels = tracer.meet(tuple(shape), [a, b], FIXED)
    if call.out.ndim == len(shape):
        tracer.put(call.out, labels)
        return
    if call.argument(2, "reduction", 1) == 1:
        for label in labels:
            tracer.reduces(f"{call.name} over a cut axis sees the kept units only", label)


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", "aten.softmax",
      "aten.log_softmax", "aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax",
      "aten.sort", "aten.topk", "aten.argsort", "aten.glu", "aten.renorm",
      "aten._weight_norm_interface")  # fmt: skip
def along_axis(tracer: Tracer, call: Call) -> None:
    """Every result depends on all that lies along the axis, so the axis keeps its size."""
    x = call.args[0]
    if call.name == "aten._weight_norm_interface":
        _weight_norm(tracer, call)
        return
    names = [a.name for a in call.func._schema.arguments]
    values = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    axis = int(values.get("dim", -1)) % max(x.ndim, 1)
    if call.name == "aten.glu":
        _glu(tracer, call, axis)
        return
    labels = tracer.fixed(tracer.labels(x), axis, _FUSED)
    for out in call.outputs:
        tracer.put(out, [first_along(label, axis).expand(out.shape) for label in labels])


def _glu(tracer: Tracer, call: Call, axis: int) -> None:
    labels = []
    for label in tracer.labels(call.args[0]):
        a, b = label.chunk(2, axis)
        if axis in varying(label):
            tracer.ledger.join(a, b)
        labels.append(a)
    tracer.put(call.out, labels)


def _weight_norm(tracer: Tracer, call: Call) -> None:
    """``g * v / ||v||``, the norm over all axes but one."""
    v, g = call.args[:2]
    for label in tracer.labels(v):
        # g has one number for each slice of v, and size 1 along the axes of the norm.
        if g.ndim != v.ndim or any(g.shape[axis] == 1 for axis in varying(label)):
            tracer.reduces("a weight norm over a cut axis sees the kept units only", label)
    operands = [(tuple(v.shape), tracer.labels(v)), (tuple(g.shape), tracer.labels(g))]
    labels = tracer.meet_labels(tuple(v.shape), operands, "")
    tracer.put(call.outputs[0], labels)


@rule("aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r")
def transformed(tracer: Tracer, call: Call) -> None:
    """A Fourier transform along some axes; the others pass."""
    labels = list(tracer.labels(call.args[0]))
    for axis in call.args[1]:
        labels = tracer.fixed(labels, axis % call.out.ndim, _SPECTRUM)
        labels = [first_along(label, axis % call.out.ndim) for label in labels]
    tracer.put(call.out, [label.expand(call.out.shape) for label in labels])
