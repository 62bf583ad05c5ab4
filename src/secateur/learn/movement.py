"""Soft movement pruning: a mask where a learned score is above a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_amounts, require_numbers
from secateur.core.errors import UsageError
from secateur.core.select import keep_top
from secateur.core.slots import Slot
from secateur.learn.grain import Grain, Tiling, sides_of, tiling
from secateur.learn.learner import Learning
from secateur.learn.masked import Gate, MaskedWeights

#: Share of the scores of a weight that always stays.
LEAST = 0.005


class MovementMask(nn.Module):
    """The mask of one weight: kept where ``sigmoid(S) > tau``, and the highest half per cent anyway.

    Args:
        tiling: Which entries share a score.
        tau: The threshold.

    Example:
        >>> from secateur.core.weight import LINEAR, Weight
        >>> part = MovementMask(Tiling(Weight("w", torch.zeros(1, 2), LINEAR)))
        >>> _ = part.scores.data.copy_(torch.tensor([[-3.0, 1.0]]))
        >>> part(torch.tensor([[5.0, 6.0]])).tolist()
        [[0.0, 6.0]]
    """

    def __init__(self, tiling: Tiling, tau: float = 0.1) -> None:
        super().__init__()
        self.tiling, self.tau = tiling, tau
        self.scores = nn.Parameter(torch.zeros(tiling.shape))

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.tiling.tiles * self.tiling.members

    def _above(self) -> Tensor:
        scores = self.scores.detach()
        above = torch.sigmoid(scores) > self.tau
        least = int(LEAST * self.tiling.tiles) + 1
        if int(above.sum()) >= least:
            return above
        # A weight that is gone passes nothing on, and no gradient would ever bring it back.
        return keep_top(scores.reshape(1, -1), least).reshape(scores.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        spread = self.tiling.spread
        masked: Tensor = Gate.apply(weight, spread(self._above()), spread(self.scores))  # type: ignore[no-untyped-call]
        return masked

    def mask(self, weight: Tensor) -> Tensor:
        """True where the weight is kept."""
        return self.tiling.spread(self._above())


@dataclass(frozen=True)
class SoftMovement:
    r"""Movement pruning with a soft threshold: weights that move away from zero stay.

    The penalty lowers all scores alike; a weight stays if the loss pushes its score up more. How
    sparse the result is follows from ``strength``: there is no target.

    **formula** :math:`M = [sigmoid(S) > τ]`, and at least the highest half per cent of each S, as in
    the source's code; :math:`dS = dW_{eff} \, W`; penalty :math:`λ \, \mathrm{mean}(sigmoid(S))`, λ
    from 0 to ``strength`` in ``ramp`` steps
    **Shapes** a score an entry, row or block
    **Units** the penalty is a loss
    **Needs** gradients of a training loop
    **Source** Sanh et al., arXiv 2005.07683
    **Differs** the mean is over all masked entries; the source takes the mean over the weights'
    means, so that small weights count as much as large ones. The threshold is constant and λ grows
    linearly; the source's training script moves the threshold along a cubic ramp, and λ with it

    Args:
        strength: λ at the end; 400 in the source for very sparse networks.
        grain: ``"element"``, ``"row"``, or ``(out, in)`` sides of a block.
        tau: The threshold on the sigmoid.
        ramp: Steps in which λ grows linearly.
        lr: Learning rate of the scores.

    Example:
        >>> SoftMovement(strength=100, ramp=10).at(5), SoftMovement(strength=100, ramp=10).at(50)
        (50.0, 100.0)
    """

    strength: float = 100.0
    grain: Grain = "element"
    tau: float = 0.1
    ramp: int = 1000
    lr: float = 1e-2

    def __post_init__(self) -> None:
        require_numbers(self, ("strength", "tau", "ramp", "lr"))
        require_amounts(self, ("strength", "ramp", "lr"))
        if not 0 < self.tau < 0.5:
            raise UsageError(
                f"SoftMovement(tau={self.tau:g})",
                "it is not between 0 and 0.5",
                "all scores start at 0, whose sigmoid is 0.5: all weights must stay at first",
                "write e.g. 0.1",
            )
        sides_of(self.grain)

    @property
    def penalised(self) -> bool:
        return True

    @property
    def goal(self) -> float | None:
        return None

    @property
    def needs_objective(self) -> bool:
        return False

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        return MaskedWeights(self, model, slots)

    def part(self, slot: Slot, weight: nn.Parameter) -> MovementMask:
        """The mask of one weight, on its device."""
        return MovementMask(tiling(slot, weight, self.grain), self.tau).to(weight.device)

    def groups(self, parts: Sequence[MovementMask]) -> list[dict[str, Any]]:
        """The scores."""
        return [{"params": [p.scores for p in parts], "lr": self.lr, "weight_decay": 0.0}]

    def at(self, step: int) -> float:
        """λ at a step."""
        return self.strength * min(1.0, step / self.ramp) if self.ramp else self.strength

    def penalty(self, parts: Sequence[MovementMask], step: int) -> Tensor:
        """λ times the mean sigmoid of the scores, over all masked entries."""
        total = sum(part.size for part in parts)
        means = [torch.sigmoid(p.scores).mean() * (p.size / total) for p in parts]
        return self.at(step) * torch.stack(means).sum()
