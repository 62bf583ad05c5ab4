"""Soft threshold reparametrization: every weight is moved towards zero by a learned amount."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_amounts, require_numbers
from secateur.core.slots import Slot
from secateur.learn.learner import Learning
from secateur.learn.masked import MaskedWeights


class SoftThreshold(nn.Module):
    """The soft threshold of one weight.

    Args:
        s: First value; the threshold is its sigmoid.

    Example:
        >>> SoftThreshold(0.0)(torch.tensor([-2.0, 0.4, 0.75])).tolist()
        [-1.5, 0.0, 0.25]
    """

    def __init__(self, s: float = -8.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(float(s)))

    def forward(self, weight: Tensor) -> Tensor:
        """``sign(w) relu(|w| - sigmoid(s))``."""
        rest = torch.relu(weight.abs() - torch.sigmoid(self.s).to(weight.dtype))
        # sign(w) * 0 is -0.0 for negative w; pruned weights are plain zeros.
        return torch.where(rest > 0, weight.sign() * rest, 0.0)

    def mask(self, weight: Tensor) -> Tensor:
        """True where the weight is kept."""
        return weight.abs() > torch.sigmoid(self.s).to(weight.dtype)


@dataclass(frozen=True)
class Str:
    r"""Soft threshold weights, one learned threshold a weight tensor.

    The thresholds rise by their weight decay (s decays towards 0, so the threshold towards 0.5) and
    by their gradient. How sparse the result is follows from the decay: there is no target.

    **formula** :math:`W_{eff} = sign(W) \, relu(|W| - sigmoid(s))`
    **Shapes** a threshold a weight
    **Units** those of the weight
    **Needs** gradients of a training loop
    **Source** Kusupati et al., arXiv 2002.03231

    Args:
        start: First s. The source starts at -3,200 with long trainings, where the gradient of the
            sigmoid is exactly 0 and only the decay moves s.
        lr: Learning rate of the thresholds.
        weight_decay: On the thresholds; what drives the sparsity.

    Example:
        >>> Str(weight_decay=1e-3).goal is None
        True
    """

    start: float = -8.0
    lr: float = 1e-1
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        require_numbers(self, ("start", "lr", "weight_decay"))
        require_amounts(self, ("lr", "weight_decay"))

    @property
    def penalised(self) -> bool:
        return False

    @property
    def goal(self) -> float | None:
        return None

    @property
    def needs_objective(self) -> bool:
        return False

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        return MaskedWeights(self, model, slots)

    def part(self, slot: Slot, weight: nn.Parameter) -> SoftThreshold:
        """The threshold of one weight, on its device."""
        return SoftThreshold(self.start).to(weight.device)

    def groups(self, parts: Sequence[SoftThreshold]) -> list[dict[str, Any]]:
        """The thresholds, with their weight decay."""
        own = [p.s for p in parts]
        return [{"params": own, "lr": self.lr, "weight_decay": self.weight_decay}]

    def penalty(self, parts: Sequence[SoftThreshold], step: int) -> None:
        """None: the optimizer's weight decay does it."""
