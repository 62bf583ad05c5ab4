"""Weights with named axes: the one thing a frontend must produce."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import UsageError


@dataclass(frozen=True)
class Axes:
    """Names for the axes of a weight, and its number of convolution groups.

    Every weight has one ``"out"`` axis and one ``"in"`` axis; all other axes are *taps*
    (kernel positions). Whatever the framework's order, :meth:`cube` brings a tensor to
    ``(out, in, taps)``, so a pattern or criterion is written once. An ``"expert"`` axis is no tap:
    the matrices of the experts stand below one another, as those of convolution groups do.

    Args:
        names: One name per axis of the tensor, e.g. ``("out", "in", "kh", "kw")`` for
            ``torch.nn.Conv2d`` and ``("in", "out")`` for GPT-2's ``Conv1D``.
        groups: Convolution groups, or experts. The ``in`` axis then holds the inputs of *one* group.

    Example:
        >>> import torch
        >>> axes = Axes(("in", "out"))
        >>> axes.cube(torch.zeros(3, 5)).shape
        torch.Size([5, 3, 1])
        >>> Axes(("expert", "out", "in"), groups=2).cube(torch.zeros(2, 5, 3)).shape
        torch.Size([10, 3, 1])
    """

    names: tuple[str, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        if self.names.count("out") != 1 or self.names.count("in") != 1:
            raise UsageError(
                f"Axes({self.names})",
                "a weight has exactly one 'out' and one 'in' axis",
                "all other axes are kernel taps",
                "name the axes like ('out', 'in', 'kh', 'kw')",
            )

    @property
    def stacked(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return "expert" in self.names

    @property
    def convolves(self) -> bool:
        """Whether it is the weight of a convolution."""
        return len(self.names) > 2 and not self.stacked

    def _order(self) -> tuple[int, ...]:
        first = [self.names.index("expert")] if self.stacked else []
        taps = (i for i, name in enumerate(self.names) if name not in ("out", "in", "expert"))
        return (*first, self.names.index("out"), self.names.index("in"), *taps)

    def _splits_in(self) -> bool:
        # A grouped transposed convolution stores (in, out/groups): its groups lie along "in".
        backwards = self.names.index("in") < self.names.index("out")
        return self.groups > 1 and backwards and not self.stacked

    def cube_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """``(out, in, taps)`` of a weight of ``shape``, without touching data.

        Example:
            >>> Axes(("in", "out", "kw"), groups=2).cube_shape((8, 3, 5))
            (6, 4, 5)
        """
        out, inn = shape[self.names.index("out")], shape[self.names.index("in")]
        taps = math.prod(shape) // (out * inn) if out * inn else 1
        if self.stacked:
            return out * taps, inn, 1
        if self._splits_in():
            return out * self.groups, inn // self.groups, taps
        return out, inn, taps

    def together(self, out: int) -> int:
        """How many of ``out`` rows stand together: those of one expert, or all."""
        return out // self.groups if self.stacked else out

    def cube(self, x: Tensor) -> Tensor:
        """``x`` as ``(out, in, taps)``; ``in`` counts the inputs of one group."""
        if self.stacked:
            return x.permute(self._order()).flatten(0, 1)[..., None]
        y = (
            x.permute(self._order()).flatten(2)
            if x.ndim > 2
            else x.permute(self._order())[..., None]
        )
        if self._splits_in():
            out, inn, taps = y.shape
            y = y.reshape(out, self.groups, inn // self.groups, taps).transpose(0, 1)
            y = y.reshape(out * self.groups, inn // self.groups, taps)
        return y

    def uncube(self, cube: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of :meth:`cube` for a weight of ``shape``."""
        order = self._order()
        if self.stacked:
            cube = cube[..., 0]
        if self._splits_in():
            out, inn, taps = cube.shape
            per_group = out // self.groups
            cube = cube.reshape(self.groups, per_group, inn, taps).transpose(0, 1)
            cube = cube.reshape(per_group, self.groups * inn, taps)
        x = cube.reshape([shape[i] for i in order])
        return x.permute([order.index(i) for i in range(len(order))])


@dataclass(frozen=True)
class Weight:
    """A named tensor whose axes have names.

    Args:
        name: Parameter name.
        value: The tensor, in the framework's own order of axes.
        axes: What each axis is.
        density: Share of real values in its input rows: below 1 for a transposed convolution,
            whose input is stuffed with zeros. Only the count of multiply-adds depends on it.

    Example:
        >>> import torch
        >>> w = Weight("conv.weight", torch.arange(24.0).reshape(2, 3, 2, 2), CONV2D)
        >>> w.matrix().shape
        torch.Size([2, 12])
        >>> torch.equal(w.like(w.matrix()), w.value)
        True
    """

    name: str
    value: Tensor
    axes: Axes
    density: float = 1.0

    @property
    def out(self) -> int:
        """Number of rows: output units over all groups."""
        return self.cube().shape[0]

    @property
    def fan_in(self) -> int:
        """Inputs of one output unit: ``in * taps``."""
        return math.prod(self.cube().shape[1:])

    def cube(self) -> Tensor:
        """The value as ``(out, in, taps)``."""
        return self.axes.cube(self.value)

    def matrix(self) -> Tensor:
        """The value as ``(out, in * taps)``, the shape in which a layer is a matrix product."""
        return self.cube().flatten(1)

    def like(self, matrix: Tensor) -> Tensor:
        """A matrix or cube brought back to the shape of the value; inverse of :meth:`matrix`."""
        out, inn, taps = self.cube().shape
        return self.axes.uncube(matrix.reshape(out, inn, taps), tuple(self.value.shape))

    def per_row(self, statistic: Tensor) -> Tensor:
        """Spread a per-group statistic ``(groups, fan_in)`` over the rows ``(out, fan_in)``."""
        return statistic.repeat_interleave(self.out // self.axes.groups, dim=0)


LINEAR = Axes(("out", "in"))
CONV1D = Axes(("out", "in", "kw"))
CONV2D = Axes(("out", "in", "kh", "kw"))
CONV3D = Axes(("out", "in", "kd", "kh", "kw"))
