"""Pooling, resizing and turning: channels go through untouched."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.labels import fill, first_along, relaxed, varying
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import FIXED
from secateur.structure.tracer import Call, Tracer

_WINDOW = (
    "a window slides over them, as in a LocalResponseNorm: after a cut others would be neighbours"
)
_RESIZED = "they are pixels that are resized: after a cut others would be neighbours"
_PATCHES = "patches are taken along them"


@rule("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices", "aten.max_pool1d",
      "aten.max_pool2d", "aten.max_pool3d", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d",
      "aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d", "aten.adaptive_avg_pool1d",
      "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d",
      "aten.adaptive_max_pool3d", "aten.upsample_nearest1d", "aten.upsample_nearest2d",
      "aten.upsample_nearest3d", "aten._upsample_nearest_exact1d",
      "aten._upsample_nearest_exact2d", "aten.upsample_linear1d", "aten.upsample_bilinear2d",
      "aten._upsample_bilinear2d_aa", "aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa",
      "aten.upsample_trilinear3d", "aten.grid_sampler_2d", "aten.grid_sampler_3d",
      "aten.mkldnn_max_pool2d", "aten.affine_grid_generator")  # fmt: skip
def pooled(tracer: Tracer, call: Call) -> None:
    """Batch and channels stay, the other axes may change their size."""
    x, why = call.args[0], _WINDOW if "pool" in call.name else _RESIZED
    for out in call.outputs:
        axes = _windows(call, out)
        tracer.put(out, [_slid(tracer, label, out, axes, why) for label in tracer.labels(x)])


def _windows(call: Call, out: Tensor) -> list[int]:
    """The axes along which an output is made of several entries of the input."""
    x = call.args[0]
    axes = [axis for axis in range(x.ndim) if out.shape[axis] != x.shape[axis]]
    if "pool" in call.name and "adaptive" not in call.name:
        sizes = list(call.argument(1, "kernel_size"))
        dims = int(call.name.partition("d_with")[0].rstrip("d")[-1])
        sizes = sizes * dims if len(sizes) == 1 else sizes
        axes += [x.ndim - dims + i for i, size in enumerate(sizes) if size > 1]
    return sorted(set(axes))


def _slid(tracer: Tracer, label: Tensor, out: Tensor, axes: list[int], why: str) -> Tensor:
    for axis in axes:
        if axis in varying(label):
            left = tracer.ledger.whole(label, axis, why)
            label = fill(tuple(label.shape)) if left is None else left
        label = first_along(label, axis)
    return label.expand(out.shape)


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpooled(tracer: Tracer, call: Call) -> None:
    """Values go back to the pixels that they came from, in each channel."""
    x, places = call.args[:2]
    labels = tracer.meet(tuple(x.shape), [x, places], FIXED)
    axes = list(range(x.ndim - int(call.name[-2]), x.ndim))
    tracer.put(call.out, [_slid(tracer, label, call.out, axes, _WINDOW) for label in labels])


@rule("aten.fractional_max_pool2d", "aten.fractional_max_pool3d")
def pooled_at_random(tracer: Tracer, call: Call) -> None:
    """Other channels would get other regions after a cut, so no proof is possible."""
    tracer.refuse(call, "the regions that are pooled are drawn at random for each of them")


@rule("aten.im2col")
def unfolded(tracer: Tracer, call: Call) -> None:
    """Patches ``(n, c, h, w) -> (n, c * taps, patches)``: each channel gives as many rows as taps."""
    x, out = call.args[0], call.out
    labels = []
    for label in tracer.labels(x):
        kept = tracer.fixed([label], x.ndim - 1, _PATCHES)
        kept = tracer.fixed(kept, x.ndim - 2, _PATCHES)
        rows = [v[..., :1, 0].repeat_interleave(out.shape[-2] // x.shape[-3], -2) for v in kept]
        labels += [relaxed(v).expand(out.shape) for v in rows]
    tracer.put(out, labels)


@rule("aten.col2im")
def folded(tracer: Tracer, call: Call) -> None:
    """The other way round: the rows of a channel are one unit."""
    x, out = call.args[0], call.out
    labels = []
    for label in tracer.labels(x):
        for left in tracer.fixed([label], x.ndim - 1, _PATCHES):
            rows = left[..., 0].unflatten(-1, (out.shape[-3], -1))
            tracer.ledger.join(rows, rows[..., :1])
            labels.append(relaxed(rows[..., :1])[..., None].expand(out.shape))
    tracer.put(out, labels)


@rule("aten.rot90")
def rotated(tracer: Tracer, call: Call) -> None:
    """Turning pixels is fine; along units it is not the same after a cut."""
    axes = call.argument(2, "dims", (0, 1))
    labels = list(tracer.labels(call.args[0]))
    for axis in (axis % call.out.ndim for axis in axes):
        labels = tracer.fixed(labels, axis, "they are turned around by a fixed step")
        labels = [first_along(label, axis) for label in labels]
    tracer.put(call.out, [label.expand(call.out.shape) for label in labels])
