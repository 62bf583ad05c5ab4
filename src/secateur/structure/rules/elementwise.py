"""Element-wise operators: what lies at the same place is one unit."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.counted import Counted
from secateur.structure.labels import along
from secateur.structure.named import Named
from secateur.structure.rules import rule
from secateur.structure.sizes import find_site
from secateur.structure.tracer import Call, Tracer

FIXED = "it meets a tensor whose size the code fixes"


def elementwise(tracer: Tracer, call: Call) -> None:
    """All tensor arguments broadcast to the output and meet there."""
    for out in call.outputs:
        operands = [x for x in call.tensors if broadcasts(x, out)]
        tracer.put(out, tracer.meet(tuple(out.shape), operands, FIXED))


def broadcasts(x: Tensor, out: Tensor) -> bool:
    """Whether ``x`` broadcasts to the shape of ``out``."""
    lead = out.ndim - x.ndim
    return lead >= 0 and all(
        size in (1, out.shape[lead + axis]) for axis, size in enumerate(x.shape)
    )


# Not tagged as element-wise, but they are: one value in, one value out.
rule(
    "aten.copy_",
    "aten._to_copy",
    "aten.lift_fresh",
    "aten.lift_fresh_copy",
    "aten.fill_",
    "aten.fill",
    "aten.zero_",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.empty_like",
    "aten.full_like",
    "aten.rand_like",
    "aten.randn_like",
    "aten.masked_fill",
    "aten.masked_fill_",
    "aten.native_dropout",
    "aten.bernoulli",
    "aten.bernoulli_",
    "aten.exponential_",
    "aten.normal_",
    "aten.uniform_",
    "aten.isin",
    "aten.bucketize",
    "aten.floor_divide",
    "aten.hardswish",
    "aten.hardswish_",
    "aten.log_sigmoid_forward",
    "aten.rrelu_with_noise",
    "aten.rrelu_with_noise_",
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten.complex",
    "aten.polar",
    "aten._conj",
    "aten._neg_view",
    "aten.resolve_conj",
    "aten.resolve_neg",
)(elementwise)


@rule("aten.prelu", "aten._prelu_kernel")
def prelu(tracer: Tracer, call: Call) -> None:
    """A slope per channel (axis 1), or one for all."""
    x, slope = call.args[:2]
    shape = (len(slope.reshape(-1)), *[1] * (x.ndim - 2)) if x.ndim > 1 else (slope.numel(),)
    labels = tuple(label.reshape(shape) for label in tracer.labels(slope)) if shape else ()
    operands = [(tuple(x.shape), tracer.labels(x))]
    if slope.numel() > 1:
        operands.append((shape if slope.ndim == 1 else tuple(slope.shape), labels))
    tracer.put(call.out, tracer.meet_labels(tuple(x.shape), operands, FIXED))


@rule("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones",
      "aten.new_full", "aten.new_empty", always=True)  # fmt: skip
def factory(tracer: Tracer, call: Call) -> None:
    """A constant has units along an axis whose size an attribute of the running module states.

    The hidden state that an LSTM starts from is such a tensor: it shrinks with ``hidden_size``.
    """
    out = call.out
    labels = []
    given = tracer.stated(out.ndim) or [None] * out.ndim
    for axis, size in enumerate(out.shape):
        said = given[axis]
        known = isinstance(said, Named) and said.terms
        if size > 1 and (known or (isinstance(said, Counted) and said.source)):
            label = along(tracer.ledger.new(size), axis, tuple(out.shape))
            labels.append(tracer.sized(label, axis, said))
        elif find_site(tracer.model, tracer.stack, size) is not None:
            label = along(tracer.ledger.new(size), axis, tuple(out.shape))
            tracer.size(label, axis)
            labels.append(label)
    tracer.put(out, labels)
