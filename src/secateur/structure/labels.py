"""Labels: unit numbers that ride along with a tensor.

A label of a tensor is an integer tensor of the same shape that says, for every element, with which
unit it vanishes. Along axes where nothing changes its stride is 0, so it takes no memory. A tensor
can carry several labels, e.g. a weight one for its outputs and one for its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1


def varying(label: Tensor) -> tuple[int, ...]:
    """The axes along which a label changes.

    Example:
        >>> varying(torch.arange(3)[:, None].expand(3, 4))
        (0,)
    """
    strided = zip(label.shape, label.stride(), strict=True)
    return tuple(axis for axis, (size, stride) in enumerate(strided) if size > 1 and stride != 0)


def along(ids: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """The label of a tensor of ``shape`` whose units lie along ``axis``.

    Example:
        >>> along(torch.tensor([7, 8]), 1, (3, 2)).tolist()
        [[7, 8], [7, 8], [7, 8]]
    """
    view = [1] * len(shape)
    view[axis] = len(ids)
    return ids.reshape(view).expand(shape)


def first_along(label: Tensor, axis: int) -> Tensor:
    """The first slice along ``axis``, with that axis kept at size 1."""
    return label.narrow(axis, 0, 1)


def compact(*labels: Tensor) -> list[Tensor]:
    """Labels of one shape, cut down to size 1 along the axes where none of them changes."""
    keep = {axis for label in labels for axis in varying(label)}
    return [_narrow(label, keep) for label in labels]


def _narrow(label: Tensor, keep: set[int]) -> Tensor:
    for axis in range(label.ndim):
        if axis not in keep and label.shape[axis] > 1:
            label = first_along(label, axis)
    return label


def relaxed(label: Tensor) -> Tensor:
    """The same label with stride 0 along the axes where it happens not to change.

    Operators like ``cat`` write copies; later steps are cheap only on labels without copies.
    """
    shape, label = label.shape, narrowed(label)
    for axis in varying(label):
        head = first_along(label, axis)
        if bool((label == head).all()):
            label = head
    return label.expand(shape)


def narrowed(label: Tensor) -> Tensor:
    """The label with size 1 wherever it does not change."""
    return compact(label)[0]


def fill(shape: tuple[int, ...]) -> Tensor:
    """A label without any unit."""
    return torch.tensor(NONE).expand(shape)


def own_shape(x: Tensor) -> tuple[int, ...]:
    """The shape with 1 along axes to which a tensor was only expanded: there it fits any size.

    Example:
        >>> own_shape(torch.zeros(2, 1).expand(2, 5))
        (2, 1)
    """
    return tuple(1 if step == 0 else n for n, step in zip(x.shape, x.stride(), strict=True))
