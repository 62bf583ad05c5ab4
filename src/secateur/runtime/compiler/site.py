"""Layers of a graph: nodes that multiply by a constant weight, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from secateur.runtime.compiler.activations import NOTHING, Activation
from secateur.runtime.compiler.fold import Affine, per_output
from secateur.runtime.compiler.graph import Graph, attribute, standard
from secateur.runtime.compiler.shapes import Axis
from secateur.runtime.spec import Norm

CONV, LINEAR = "conv", "linear"
# Red, green, blue and alpha.
_CHANNELS_OF_IMAGE = 4


@dataclass(frozen=True)
class Site:
    """Nodes of a graph that are one layer: ``y = activation(weight x + bias + residual)``.

    Args:
        name: Of the layer: that of its node, or of its weight.
        kind: ``"conv"`` or ``"linear"``.
        nodes: Numbers of the nodes that it replaces.
        x: Name of its input.
        y: Name of its output.
        weight: Float32; ``(outputs, inputs of a group, height, width)`` or ``(outputs, inputs)``.
        bias: Float32, or None if all are zero.
        source: Name of the weight in the file.
        groups: Of a convolution, as are the following.
        kernel: Height and width.
        strides: The same.
        dilations: The same.
        pads: Top, left, bottom, right.
        flat: A convolution over one axis: it runs as one of height 1.
        residual: Name of what is added before the activation.
        activation: What follows.
        norm: Layer normalisation after that, of a linear layer.
    """

    name: str
    kind: str
    nodes: tuple[int, ...]
    x: str
    y: str
    weight: np.ndarray
    bias: np.ndarray | None
    source: str
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    flat: bool = False
    residual: str | None = None
    activation: Activation = NOTHING
    norm: Norm | None = None

    @property
    def outputs(self) -> int:
        """Output channels or features."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Input channels of one group, or features."""
        return int(self.weight.shape[1])

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weight."""
        return 1.0 - np.count_nonzero(self.weight) / self.weight.size

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.groups > 1 and self.inputs == 1

    @property
    def reads_image(self) -> bool:
        """Whether it is a convolution of so few channels as a picture has."""
        return self.kind != LINEAR and self.groups * self.inputs <= _CHANNELS_OF_IMAGE

    def output_shape(self, x: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of this shape.

        Example:
            >>> site = Site("a", "linear", (0,), "x", "y", np.ones((8, 4)), None, "w")
            >>> site.output_shape((2, 7, 4))
            (2, 7, 8)
        """
        if self.kind == LINEAR:
            return (*x[:-1], self.outputs)
        ahead = [1] if self.flat else []
        sizes = []
        for i, size in enumerate([*ahead, *x[2:]]):
            reach = self.dilations[i] * (self.kernel[i] - 1) + 1
            sizes.append((size + self.pads[i] + self.pads[i + 2] - reach) // self.strides[i] + 1)
        return (x[0], self.outputs, *sizes[len(ahead) :])

    def multiply_adds(self, x: Sequence[int]) -> int:
        """Of the dense layer, for an input of this shape."""
        return math.prod(self.output_shape(x)) * int(self.weight[0].size)


@dataclass(frozen=True)
class Start:
    """A node that multiplies by a weight, before anything is fused into it.

    Args:
        index: Its number.
        site: It alone, as a layer.
        affine: Its weight and bias in double precision.
        rank: Number of axes that its output surely has. A product with a matrix has one at least;
            how many more may follow from what is in the inputs.
    """

    index: int
    site: Site
    affine: Affine
    rank: int

    @property
    def axis(self) -> int:
        """The output axis, counted from the end."""
        return -1 if self.site.kind == LINEAR else 1 - self.rank


def start(graph: Graph, index: int, node: Any) -> Start | None:
    """The layer that a node is by itself; None if it is none, or its weight is not constant."""
    if standard(node, "Conv"):
        return _conv(graph, index, node)
    if standard(node, "Gemm"):
        return _gemm(graph, index, node)
    return _matmul(graph, index, node) if standard(node, "MatMul") else None


def _conv(graph: Graph, index: int, node: Any) -> Start | None:
    weight, bias = _weight(graph, node, 1), _optional(graph, node, 2)
    if weight is None or bias is None or weight.ndim not in (3, 4):
        return None
    rank = weight.ndim
    flat = rank == 3
    if flat:
        weight = weight[:, :, None, :]
    strides, dilations = (_pair(attribute(node, key), flat) for key in ("strides", "dilations"))
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    groups = int(attribute(node, "group", 1))
    if weight.shape[0] % groups:
        return None
    site = Site(
        _name(node),
        CONV,
        (index,),
        node.input[0],
        node.output[0],
        weight,
        None,
        node.input[1],
        groups=groups,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        flat=flat,
    )
    pads = _pads(graph, node, site)
    if pads is None:
        return None
    site = replace(site, pads=pads)
    return Start(index, site, Affine.of(weight, bias if bias.size else None), rank)


def _gemm(graph: Graph, index: int, node: Any) -> Start | None:
    weight, bias = _weight(graph, node, 1), _optional(graph, node, 2)
    if weight is None or bias is None or weight.ndim != 2 or attribute(node, "transA", 0):
        return None
    if not attribute(node, "transB", 0):
        weight = weight.T
    if bias.size:
        spread = per_output(bias, weight.shape[0], -1, 2)
        if spread is None:
            return None
        bias = spread * np.float64(attribute(node, "beta", 1.0))
    started = _linear(index, node, 2, weight)
    factor = np.full(weight.shape[0], attribute(node, "alpha", 1.0), np.float64)
    affine = started.affine.scaled(factor)
    return replace(started, affine=affine.shifted(bias) if bias.size else affine)


def _matmul(graph: Graph, index: int, node: Any) -> Start | None:
    weight, x = _weight(graph, node, 1), graph.shape(node.input[0])
    if weight is None or weight.ndim < 2 or (x is not None and len(x) < 2):
        return None
    matrix = weight.shape[-2:]
    # Further axes of one entry change nothing, unless there are more of them than of the input.
    if weight.ndim > 2 and (x is None or len(x) < weight.ndim or weight.size != math.prod(matrix)):
        return None
    return _linear(index, node, 1 if x is None else len(x), weight.reshape(matrix).T)


def _linear(index: int, node: Any, rank: int, weight: np.ndarray) -> Start:
    x, y = node.input[0], node.output[0]
    site = Site(_name(node), LINEAR, (index,), x, y, weight, None, node.input[1])
    return Start(index, site, Affine.of(weight, None), rank)


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


def _weight(graph: Graph, node: Any, position: int) -> np.ndarray | None:
    held = graph.constant(node.input[position])
    return held if held is not None and held.dtype == np.float32 and held.size else None


def _optional(graph: Graph, node: Any, position: int) -> np.ndarray | None:
    """A constant input; empty if it is left out, None if it is not constant."""
    if len(node.input) <= position or not node.input[position]:
        return np.empty(0)
    held = graph.constant(node.input[position])
    return held if held is not None and held.dtype.kind == "f" else None


def _pair(values: Sequence[int] | None, flat: bool) -> tuple[int, int]:
    held = [int(v) for v in values] if values else [1] * (1 if flat else 2)
    return (1, held[0]) if flat else (held[0], held[1])


def _pads(graph: Graph, node: Any, site: Site) -> tuple[int, int, int, int] | None:
    """Top, left, bottom, right; None where they depend on a size that is not known."""
    how = attribute(node, "auto_pad", b"NOTSET").decode()
    if how == "NOTSET":
        held = [int(v) for v in attribute(node, "pads", ())] or [0] * (2 if site.flat else 4)
        if min(held) < 0:
            return None
        return (0, held[0], 0, held[1]) if site.flat else (held[0], held[1], held[2], held[3])
    if how == "VALID":
        return (0, 0, 0, 0)
    sizes = [1, *_sizes(graph, node, 1)] if site.flat else _sizes(graph, node, 2)
    before, after = [], []
    for i in (0, 1):
        reach = site.dilations[i] * (site.kernel[i] - 1) + 1
        need = _same(sizes[i], site.strides[i], reach)
        if need is None:
            return None
        small, large = need // 2, need - need // 2
        before.append(small if how == "SAME_UPPER" else large)
        after.append(large if how == "SAME_UPPER" else small)
    return (before[0], before[1], after[0], after[1])


def _sizes(graph: Graph, node: Any, axes: int) -> list[Axis]:
    """Of the image that a convolution reads, along so many axes."""
    shape = graph.computed_shape(node.input[0])
    return list(shape[2:]) if shape and len(shape) == axes + 2 else [None] * axes


def _same(size: Axis, stride: int, reach: int) -> int | None:
    """Padding on both sides for ``ceil(size / stride)`` outputs; None if only the size can tell."""
    if stride == 1 or reach == 1:
        return reach - 1
    if not isinstance(size, int):
        return None
    return max(0, (-(-size // stride) - 1) * stride + reach - size)
