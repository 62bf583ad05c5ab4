"""Grains: which entries of a weight share one score of a learned mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from secateur.core.errors import FoldError, UsageError
from secateur.core.slots import Slot
from secateur.core.weight import Weight

#: ``"element"``, ``"row"``, or the sides ``(out, in)`` of a block; a side of 0 is the whole axis.
Grain = str | tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """A weight's matrix ``(out, in * taps)`` cut into equal tiles, each with one score.

    Args:
        weight: Only its shape and axes are used.
        grain: ``"element"``, ``"row"`` or ``(out, in)``; ``(64, 0)`` are the heads of 64 outputs.

    Raises:
        FoldError: A side does not divide its axis.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> tiling = Tiling(Weight("w", torch.zeros(4, 6), LINEAR), (2, 3))
        >>> tiling.shape, tiling.members
        ((2, 2), 6)
        >>> tiling.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[:, 0].tolist()
        [1.0, 1.0, 3.0, 3.0]
    """

    weight: Weight
    grain: Grain = "element"

    def __post_init__(self) -> None:
        meta = Weight(self.weight.name, self.weight.value.to("meta"), self.weight.axes)
        object.__setattr__(self, "weight", meta)  # no second hold on the tensor
        for axis, size, side in zip(("out", "in"), self._whole, self.sides, strict=True):
            if size % side:
                raise FoldError(
                    f"the grain {self.grain!r}",
                    f"the {axis!r} axis of {self.weight.name!r} is {size} (with kernel taps)",
                    f"{size} is not a multiple of {side}",
                    "choose sides that divide every weight, or leave this weight out with ignore=",
                )

    @property
    def _whole(self) -> tuple[int, int]:
        rows, columns = self.weight.matrix().shape
        return rows, columns

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of one tile."""
        down, across = sides_of(self.grain)
        rows, columns = self._whole
        return down or rows, across or columns

    @property
    def shape(self) -> tuple[int, int]:
        """How many tiles there are, down and across: the shape of the scores."""
        (rows, columns), (down, across) = self._whole, self.sides
        return rows // down, columns // across

    @property
    def tiles(self) -> int:
        """How many scores there are."""
        return math.prod(self.shape)

    @property
    def members(self) -> int:
        """Entries of the weight under one score."""
        return math.prod(self.sides)

    def spread(self, scores: Tensor) -> Tensor:
        """Scores ``shape`` repeated over the entries of their tiles, in the weight's own shape."""
        down, across = self.sides
        wide = scores
        if down > 1 or across > 1:
            tall = scores[:, None, :, None].expand(self.shape[0], down, self.shape[1], across)
            wide = tall.reshape(self._whole)
        return self.weight.like(wide)

    def mean(self, values: Tensor) -> Tensor:
        """Means of the tiles of ``values``, which has the weight's own shape."""
        (down, across), (rows, columns) = self.shape, self.sides
        matrix = Weight(self.weight.name, values, self.weight.axes).matrix()
        return matrix.reshape(down, rows, across, columns).mean((1, 3))


def sides_of(grain: Grain) -> tuple[int, int]:
    """Sides of one tile as given, 0 for a whole axis.

    Example:
        >>> sides_of("row"), sides_of((16, 16))
        ((1, 0), (16, 16))
    """
    if grain == "element":
        return 1, 1
    if grain == "row":
        return 1, 0
    sides: Any = grain
    pair = isinstance(sides, (tuple, list)) and len(sides) == 2
    if pair and all(isinstance(side, Integral) and int(side) >= 0 for side in sides) and any(sides):
        return int(sides[0]), int(sides[1])
    raise UsageError(
        f"grain={grain!r}",
        "a grain is 'element', 'row', or the two sides (out, in) of a block",
        "a score stands for a rectangle of the weight's matrix, and not for all of it",
        "write e.g. (16, 16), or (64, 0) for heads of 64 outputs",
    )


def tiling(slot: Slot, weight: Tensor, grain: Grain) -> Tiling:
    """The tiles of the weight of a slot.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> tiling(Slot("w", "Linear", (4, 6), LINEAR), torch.zeros(4, 6), "row").shape
        (4, 1)
    """
    assert slot.axes is not None, f"{slot.name} has no axes"
    return Tiling(Weight(slot.name, weight.detach(), slot.axes), grain)
