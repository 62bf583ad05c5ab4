"""Blocks, rows, columns and kernels: weights that are kept or pruned together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import FoldError, UsageError
from secateur.core.select import quota
from secateur.core.weight import Axes
from secateur.pattern.elements import uncube_like
from secateur.pattern.nm import multiple


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``rows`` outputs by ``cols`` inputs, ``block=(out, in)``.

    The matrix is ``(out, in * taps)``: for a 3 x 3 convolution nine neighbouring columns belong to
    one input channel.

    **formula** one pool of all ``rows x cols`` blocks of the matrix
    **Shapes** ``(1, out / rows * in * taps / cols, rows * cols)``
    **Units** none
    **Needs** nothing
    **Source** Gray et al. 2017 (block-sparse kernels); the members' mean score decides

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> Blocks(4, 1).fold(torch.zeros(8, 6), LINEAR).shape
        torch.Size([1, 12, 4])
    """

    rows: int = 4
    cols: int = 1

    def span(self, taps: int) -> int:
        return math.lcm(taps, self.cols)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UsageError(
                f"Blocks({self.rows}, {self.cols})",
                "a side is not positive",
                "a block is so many outputs by so many inputs",
                "write e.g. Blocks(4, 1)",
            )

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        down, across = self._check(tuple(x.shape), axes)
        y = axes.cube(x).reshape(down, self.rows, across, self.cols)
        return y.transpose(1, 2).reshape(1, down * across, self.rows * self.cols)

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        down, across = self._check(shape, axes)
        y = folded.reshape(down, across, self.rows, self.cols).transpose(1, 2)
        return uncube_like(y, shape, axes)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)

    def _check(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
        out, inn, taps = axes.cube_shape(shape)
        rows = axes.together(out)
        for axis, size, step in (("out", rows, self.rows), ("in", inn * taps, self.cols)):
            if size % step:
                raise FoldError(
                    f"Blocks({self.rows}, {self.cols})",
                    f"its {axis!r} axis is {size}" + (" (with kernel taps)" if taps > 1 else ""),
                    multiple(size, step),
                    "leave this weight out with ignore=, or use the pattern 'elements'",
                )
        return out // self.rows, inn * taps // self.cols


@dataclass(frozen=True)
class Rows:
    """Whole output rows: filters of a convolution, neurons of a linear layer.

    The rows are set to zero; removing them from the network is structural pruning.

    **formula** one pool of all rows
    **Shapes** ``(1, out, in * taps)``
    **Units** none
    **Needs** nothing
    **Source** Li et al., arXiv 1608.08710

    Example:
        >>> import torch
        >>> from secateur.core.weight import CONV2D
        >>> Rows().fold(torch.zeros(8, 4, 3, 3), CONV2D).shape
        torch.Size([1, 8, 36])
    """

    def span(self, taps: int) -> int:
        return 0

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        return axes.cube(x).flatten(1)[None]

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        return uncube_like(folded, shape, axes)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)


@dataclass(frozen=True)
class Columns:
    """Whole input channels with all their taps.

    **formula** one pool of all columns
    **Shapes** ``(1, in, out * taps)``
    **Units** none
    **Needs** nothing
    **Source** He et al., arXiv 1707.06168

    Example:
        >>> import torch
        >>> from secateur.core.weight import CONV2D
        >>> Columns().fold(torch.zeros(8, 4, 3, 3), CONV2D).shape
        torch.Size([1, 4, 72])
    """

    def span(self, taps: int) -> int:
        return 0

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        self._check(axes)
        return axes.cube(x).transpose(0, 1).flatten(1)[None]

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        self._check(axes)
        out, inn, taps = axes.cube_shape(shape)
        return axes.uncube(folded.reshape(inn, out, taps).transpose(0, 1), shape)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)

    def _check(self, axes: Axes) -> None:
        if axes.groups > 1:
            raise FoldError(
                "Columns()",
                f"the weight has {axes.groups} groups, or experts",
                "each group reads other inputs, so a column is no input channel",
                "leave this weight out with ignore=, or use the pattern 'kernels'",
            )


@dataclass(frozen=True)
class Kernels:
    """Whole k x k kernels: one output's view of one input channel (intra-channel sparsity).

    **formula** one pool of all kernels
    **Shapes** ``(1, out * in, taps)``
    **Units** none
    **Needs** nothing
    **Source** Anwar et al., arXiv 1512.08571

    Example:
        >>> import torch
        >>> from secateur.core.weight import CONV2D
        >>> Kernels().fold(torch.zeros(8, 4, 3, 3), CONV2D).shape
        torch.Size([1, 32, 9])
    """

    def span(self, taps: int) -> int:
        return taps

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        return axes.cube(x).flatten(0, 1)[None]

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        return uncube_like(folded, shape, axes)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)
