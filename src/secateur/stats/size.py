"""The mean size of inputs: mean activation, as it is where activations are not negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats.activations import count_rows, no_rows, per_row
from secateur.stats.stat import State

_PIECE = 4096


@dataclass(frozen=True)
class InputSize:
    r"""Mean absolute value of each input feature.

    **formula** :math:`\frac1n \sum_x |x_j|`
    **Shapes** ``(groups, fan_in)``
    **Units** those of the activations
    **Needs** a forward pass
    **Source** definition; behind a ReLU it is the mean activation

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 2), LINEAR)
        >>> stat = InputSize()
        >>> state = stat.update(stat.init(w), w, torch.tensor([[[3.0, 0.0], [-4.0, 2.0]]]), 2)
        >>> stat.value(state, w)
        tensor([[3.5000, 1.0000]])
    """

    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        device = weight.value.device
        return {
            "sizes": torch.zeros(
                weight.axes.groups, weight.fan_in, dtype=torch.float64, device=device
            ),
            "rows": no_rows(weight),
        }

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        sizes = state["sizes"]
        for piece in seen.split(_PIECE, dim=1):
            sizes = sizes + piece.double().abs().sum(1)
        return {"sizes": sizes, "rows": state["rows"] + count_rows(weight, seen)}

    def value(self, state: State, weight: Weight) -> Tensor:
        return per_row(state["sizes"], state["rows"]).float()
