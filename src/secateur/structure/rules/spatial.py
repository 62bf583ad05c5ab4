"""Pooling, resizing and turning: channels go through untouched."""

from __future__ import annotations

from secateur.structure.labels import fill, first_along, varying
from secateur.structure.rules import rule
from secateur.structure.trace import Call, Tracer


@rule("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices", "aten.max_pool1d",
      "aten.max_pool2d", "aten.max_pool3d", "aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d",
      "aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d", "aten.adaptive_avg_pool1d",
      "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d",
      "aten.adaptive_max_pool3d", "aten.upsample_nearest1d", "aten.upsample_nearest2d",
      "aten.upsample_nearest3d", "aten._upsample_nearest_exact1d",
      "aten._upsample_nearest_exact2d", "aten.upsample_linear1d", "aten.upsample_bilinear2d",
      "aten._upsample_bilinear2d_aa", "aten.upsample_bicubic2d", "aten._upsample_bicubic2d_aa",
      "aten.upsample_trilinear3d", "aten.grid_sampler_2d", "aten.grid_sampler_3d",
      "aten.mkldnn_max_pool2d", "aten.im2col", "aten.affine_grid_generator")  # fmt: skip
def pooled(tracer: Tracer, call: Call) -> None:
    """Batch and channels stay, the other axes may change their size."""
    x = call.args[0]
    if "im2col" in call.name:
        tracer.refuse(call, "patches are unfolded into rows")
        return
    for out in call.outputs:
        labels = []
        for before in tracer.labels(x):
            label = before
            for axis in range(label.ndim):
                if out.shape[axis] == x.shape[axis]:
                    continue
                if axis in varying(label):
                    left = tracer.ledger.whole(label, axis, "their pixels are pooled or resized")
                    label = fill(tuple(label.shape)) if left is None else left
                label = first_along(label, axis)
            labels.append(label.expand(out.shape))
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
