"""Single weights: unstructured sparsity, over the whole weight or row by row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.select import quota
from secateur.core.weight import Axes


@dataclass(frozen=True)
class Elements:
    """Single weights, compared over the whole weight (unstructured sparsity).

    **formula** one pool of all elements
    **Shapes** ``(1, out * in * taps, 1)``
    **Units** none
    **Needs** nothing
    **Source** Han et al., arXiv 1506.02626

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> Elements().fold(torch.zeros(2, 6), LINEAR).shape
        torch.Size([1, 12, 1])
    """

    def span(self, taps: int) -> int:
        return taps

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        return x.reshape(1, -1, 1)

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        return folded.reshape(shape)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)


@dataclass(frozen=True)
class PerRow:
    """Single weights, compared within each output row: every row keeps equally many.

    **formula** one pool a row
    **Shapes** ``(out, in * taps, 1)``
    **Units** none
    **Needs** nothing
    **Source** Wanda, arXiv 2306.11695

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> PerRow().fold(torch.zeros(2, 6), LINEAR).shape
        torch.Size([2, 6, 1])
    """

    def span(self, taps: int) -> int:
        return taps

    def fold(self, x: Tensor, axes: Axes) -> Tensor:
        return axes.cube(x).flatten(1)[..., None]

    def unfold(self, folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        return uncube_like(folded, shape, axes)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)


def uncube_like(values: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
    """Values in the order of the cube ``(out, in, taps)`` brought to ``shape``."""
    return axes.uncube(values.reshape(axes.cube_shape(shape)), shape)
