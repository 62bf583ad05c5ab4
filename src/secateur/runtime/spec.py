"""What a sparse layer is, and which kernel runs it: the words of the C interface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.core.errors import UnknownName
from secateur.runtime.library import CSpec, CVariant

#: Names and numbers of the C interface.
KINDS = {"conv": 0, "linear": 1}
ACTIVATIONS = {"none": 0, "relu": 1, "clip": 2, "gelu": 3, "silu": 4, "hardswish": 5}
FAMILIES = {"list": 0, "panels": 1, "blocks": 2, "gemv": 3, "half": 4, "depthwise": 5}


@dataclass(frozen=True)
class Spec:
    """The shape of a layer: ``y = activation(weights * x + bias + residual)``.

    Args:
        kind: ``"conv"`` (x is NCHW) or ``"linear"`` (x is ``(..., features)``).
        outputs: Output channels or features.
        inputs: Input channels of *one group*, or features.
        groups: Groups of a convolution.
        kernel: Height and width; (1, 1) for linear, as all that follow are left alone there.
        stride: Rows and columns.
        dilation: Rows and columns.
        pads: Top, left, bottom, right.
        activation: ``"none"``, ``"relu"``, ``"clip"``, ``"gelu"`` (with erf), ``"silu"`` or
            ``"hardswish"``.
        alpha: Lower end of ``"clip"``.
        beta: Upper end of ``"clip"``.

    Example:
        >>> Spec("conv", 64, 32, kernel=(3, 3), pads=(1, 1, 1, 1)).columns
        288
    """

    kind: str
    outputs: int
    inputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str = "none"
    alpha: float = 0.0
    beta: float = 0.0

    def __str__(self) -> str:
        groups = f" in each of {self.groups} groups" if self.groups > 1 else ""
        kernel = "" if self.kind == "linear" else " of kernel {}x{}".format(*self.kernel)
        return (
            f"a {self.kind} layer{kernel}, {self.outputs} outputs and {self.inputs} inputs{groups}"
        )

    @property
    def columns(self) -> int:
        """Columns of the weight matrix; it has ``outputs`` rows."""
        return self.inputs * self.kernel[0] * self.kernel[1]

    def c(self) -> CSpec:
        """The structure of the C interface.

        Example:
            >>> Spec("linear", 3, 5, activation="relu").c().activation
            1
        """
        return CSpec(
            kind=_number("kind of layer", self.kind, KINDS),
            outputs=self.outputs,
            inputs=self.inputs,
            groups=self.groups,
            kernel=self.kernel,
            stride=self.stride,
            dilation=self.dilation,
            pads=self.pads,
            activation=_number("activation", self.activation, ACTIVATIONS),
            alpha=self.alpha,
            beta=self.beta,
        )


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalisation of what a linear layer puts out, over its outputs.

    Args:
        scale: Float32, ``(outputs,)``.
        shift: Float32, ``(outputs,)``.
        epsilon: Added to the variance.
    """

    scale: np.ndarray
    shift: np.ndarray
    epsilon: float


@dataclass(frozen=True)
class Variant:
    """A kernel and its tile.

    Args:
        family: ``"list"``, ``"panels"``, ``"blocks"``, ``"gemv"``, ``"half"`` (a list in float16) or
            ``"depthwise"``.
        rows: Rows of a block; 4 for panels, 1 otherwise.
        vectors: Width of a tile of positions, in vectors of the instruction set.
        columns: Input channels that are packed at a time; 0 for all.

    Example:
        >>> Variant("list", rows=1, vectors=4).c().vectors
        4
    """

    family: str
    rows: int
    vectors: int
    columns: int = 0

    def __str__(self) -> str:
        packed = f", {self.columns} channels at a time" if self.columns else ""
        return f"kernel {self.family} {self.rows}x{self.vectors}{packed}"

    def c(self) -> CVariant:
        """The structure of the C interface."""
        family = _number("family of kernels", self.family, FAMILIES)
        return CVariant(family, self.rows, self.vectors, self.columns)


def _number(kind: str, name: str, known: dict[str, int]) -> int:
    if name not in known:
        raise UnknownName(kind, name, known)
    return known[name]
