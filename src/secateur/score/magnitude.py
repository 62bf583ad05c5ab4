"""Magnitude: small weights matter little."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.weight import Weight
from secateur.score.criterion import NOTHING, Needs
from secateur.stats import Stats


@dataclass(frozen=True)
class Magnitude:
    r"""Absolute value to the power ``p``.

    Over single weights every ``p`` ranks alike. Over groups (filters, blocks) the group's mean is
    the L1 norm for ``p=1`` and the squared L2 norm for ``p=2``, per element.

    **formula** :math:`s = |w|^p`
    **Shapes** that of the weight
    **Units** weights to the power ``p``
    **Needs** nothing
    **Source** Han et al., arXiv 1506.02626; filters: Li et al., arXiv 1608.08710

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> Magnitude()(Weight("w", torch.tensor([[-2.0, 1.0]]), LINEAR), Stats())
        tensor([[2., 1.]])
    """

    p: int = 1

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise UsageError(
                f"Magnitude(p={self.p})",
                "p is 1 (L1) or 2 (L2)",
                "no other norm is used",
                "write p=1 or p=2",
            )

    @property
    def needs(self) -> Needs:
        return NOTHING

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        value = weight.value.float() if weight.value.element_size() < 4 else weight.value
        return value.abs() if self.p == 1 else value.square()
