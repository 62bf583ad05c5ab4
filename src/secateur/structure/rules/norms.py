"""Normalisations: scale and shift belong to their channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.structure.labels import varying
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.tracer import Call, Labels, Tracer


def _scaled(
    tracer: Tracer, x: Tensor, vectors: list[Any], axis: int, labels: Labels | None = None
) -> list[Tensor]:
    """``x`` meets vectors that lie along ``axis``, or along the last axes for ``axis == -1``."""
    mine = tracer.labels(x) if labels is None else labels
    operands: list[tuple[tuple[int, ...], Labels]] = [(tuple(x.shape), mine)]
    for vector in vectors:
        if not isinstance(vector, Tensor):
            continue
        shape = (len(vector), *[1] * (x.ndim - 1 - axis)) if axis >= 0 else tuple(vector.shape)
        operands.append((shape, tuple(label.reshape(shape) for label in tracer.labels(vector))))
    return tracer.meet_labels(tuple(x.shape), operands, FIXED)


@rule("aten.native_batch_norm", "aten._native_batch_norm_legit",
      "aten._native_batch_norm_legit_no_training", "aten._native_batch_norm_legit_functional",
      "aten.cudnn_batch_norm", "aten.batch_norm", "aten._batch_norm_no_update",
      "aten._batch_norm_with_update")  # fmt: skip
def batch_norm(tracer: Tracer, call: Call) -> None:
    """Scale, shift and running statistics of a channel go with it."""
    x = call.args[0]
    labels = _scaled(tracer, x, list(call.args[1:5]), 1)
    for label in labels:
        if own_statistics(call) and set(varying(label)) - {1}:
            tracer.reduces(f"{call.name} over a cut axis sees the kept units only", label)
    tracer.put(call.outputs[0], labels)


def own_statistics(call: Call) -> bool:
    """Whether a batch norm computes mean and variance of its input: over all axes but 1."""
    names = [a.name for a in call.func._schema.arguments]
    values = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    return bool(values.get("training", values.get("train", True)))


@rule("aten.native_layer_norm", "aten.layer_norm", "aten._fused_rms_norm", "aten.rms_norm")
def layer_norm(tracer: Tracer, call: Call) -> None:
    """Over the last axes. After a cut the mean and variance are those of the kept units."""
    x, shape = call.args[:2]
    labels = _scaled(tracer, x, list(call.args[2:4]), -1)
    over = range(x.ndim - len(shape), x.ndim)
    for label in labels:
        for axis in over:
            if axis in varying(label):
                tracer.reduces(f"{call.name} over a cut axis sees the kept units only", label)
                tracer.size(label, axis, value=label.shape[axis])
    tracer.put(call.outputs[0], labels)


@rule("aten.native_group_norm", "aten.group_norm")
def group_norm(tracer: Tracer, call: Call) -> None:
    """Whole groups go, or the same places of all: whichever leaves more choices."""
    x = call.args[0]
    fused = "native" in call.name
    groups = call.args[6] if fused else call.args[1]
    vectors = list(call.args[1:3]) if fused else list(call.args[2:4])
    labels = _scaled(tracer, x, vectors, 1)
    for label in labels:
        if 1 not in varying(label):
            continue
        places = label.unflatten(1, (groups, -1))
        tracer.ledger.box(places)
        tracer.reduces(f"{call.name} over a cut axis sees the kept units only", label)
        if groups > 1 and tracer.size(places, 1) is None:
            tracer.ledger.whole(places, 1, f"its code gives the {groups} groups as a number")
    tracer.put(call.outputs[0], labels)
