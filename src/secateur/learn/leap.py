"""LEAP: thresholds that are learned until the wanted number of weights remains."""

from __future__ import annotations

import math
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


class LeapMask(nn.Module):
    """The mask of one weight: scores, and the share of them that stays.

    Args:
        tiling: Which entries share a score.
        sigma: First value of the threshold; the share is its sigmoid.
        scores: First values; by default zeros.

    Example:
        >>> from secateur.core.weight import LINEAR, Weight
        >>> part = LeapMask(Tiling(Weight("w", torch.zeros(2, 2), LINEAR)), sigma=0.0)
        >>> part(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()  # equal scores: the first stay
        [[1.0, 2.0], [0.0, 0.0]]
    """

    def __init__(self, tiling: Tiling, sigma: float = 10.0, scores: Tensor | None = None) -> None:
        super().__init__()
        self.tiling = tiling
        self.scores = nn.Parameter(torch.zeros(tiling.shape) if scores is None else scores)
        self.sigma = nn.Parameter(torch.tensor(float(sigma)))

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.tiling.tiles * self.tiling.members

    def share(self) -> Tensor:
        """k, the share of the scores that stays."""
        return torch.sigmoid(self.sigma)

    def _top(self) -> Tensor:
        count = math.ceil(float(self.share().detach().double()) * self.tiling.tiles)
        flat = self.scores.detach().reshape(1, -1)
        return keep_top(flat, max(1, count)).reshape(self.tiling.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        top = self._top()
        # As a function of scores and share this has the gradients of the source: dM for a score,
        # and the sum of dM over what is kept for the share.
        soft = self.scores + top * self.share()
        masked: Tensor = Gate.apply(weight, self.tiling.spread(top), self.tiling.spread(soft))  # type: ignore[no-untyped-call]
        return masked

    def mask(self, weight: Tensor) -> Tensor:
        """True where the weight is kept."""
        return self.tiling.spread(self._top())


_LAMBDAS = ("lambda_max", "lambda_min", "lambda_rest")


@dataclass(frozen=True)
class Leap:
    r"""Learned thresholds with an adaptive penalty: the wanted sparsity is the only knob.

    Every weight has scores S and a threshold σ; the top share ``k = sigmoid(σ)`` of its scores
    stays. The penalty pulls the share of all remaining weights down to the target, and stops there.

    **formula** :math:`L_{reg} = \max(0, R(σ) - R_{target})^2` with :math:`R = \sum k n / \sum n`;
    added to the loss is :math:`λ L_{reg}`,
    :math:`λ = \max(λ_{max} L_{reg} / (1 - R_{target})^2, λ_{min})`, and ``lambda_rest`` once
    :math:`L_{reg} < 3 \cdot 10^{-4}`. Straight through: :math:`dS = dM`,
    :math:`dσ = k (1 - k) \sum dM \, M`, :math:`dM = dW_{eff} \, W`
    **Shapes** a score an entry, row or block; a threshold a weight
    **Units** the penalty is a loss
    **Needs** gradients of a training loop
    **Source** Yao et al., arXiv 2105.14636
    **Differs** R counts the entries of the masked weights for every grain; the source counts rows
    of attention and feed-forward layers by a formula of their own. Thresholds are trained without
    momentum, which would carry them past the target, and the penalty never brings them back.
    ``start="magnitude"`` is ours: the source starts all scores at zero

    The defaults are made for tens of thousands of steps of Adam, which remembers the gradients of
    the beginning, a thousand times larger than those near the target. In a few hundred steps scores
    that started at zero are still noise when the thresholds cut: for those see :meth:`short`.

    Args:
        sparsity: Share of the masked weights that shall be zero.
        grain: ``"element"``, ``"row"``, or ``(out, in)`` sides of a block; ``(64, 0)`` are heads.
        lr: Learning rate of the scores.
        threshold_lr: Learning rate of the thresholds; by default that of the scores.
        lambda_max: λ at the beginning; 3,000 to 20,000 in the source.
        lambda_min: λ is not smaller than this ...
        lambda_rest: ... until the target is almost reached; then it is this.
        sigma: First value of the thresholds; at 10 practically all weights stay.
        start: First scores: ``"zero"``, or ``"magnitude"``, the root mean square of what shares a
            score, with mean 0 and variance 1 over each weight.

    Example:
        >>> how = Leap(sparsity=0.75)
        >>> how.strength(1.0), how.strength(0.5), how.strength(0.26)  # λ for a remaining share
        (3000.0, 333.3333333333333, 10.0)
    """

    sparsity: float = 0.9
    grain: Grain = "element"
    lr: float = 1e-2
    lambda_max: float = 3000.0
    lambda_min: float = 50.0
    lambda_rest: float = 10.0
    sigma: float = 10.0
    threshold_lr: float | None = None
    start: str = "zero"

    def __post_init__(self) -> None:
        rate = () if self.threshold_lr is None else ("threshold_lr",)
        require_numbers(self, ("sparsity", "lr", *rate, *_LAMBDAS, "sigma"))
        require_amounts(self, ("lr", *rate, *_LAMBDAS))
        if not 0 < self.sparsity < 1:
            raise UsageError(
                f"Leap(sparsity={self.sparsity:g})",
                "it is not between 0 and 1",
                "sparsity is the share of zeros to reach",
                "write e.g. 0.9",
            )
        if self.start not in ("zero", "magnitude"):
            raise UsageError(
                f"Leap(start={self.start!r})",
                "scores start at 'zero' or at 'magnitude'",
                "all scores equal, or those of magnitude pruning",
                "write one of the two",
            )
        sides_of(self.grain)

    @staticmethod
    def short(
        sparsity: float = 0.9, grain: Grain = "element", *, steps: int = 200, lr: float = 1e-2
    ) -> Leap:
        """LEAP for trainings of a few hundred steps of Adam.

        Scores of single weights start at magnitude, those of rows and blocks at zero: the size of a
        row says little about its use, and its gradients are less noisy. The thresholds start where
        2 % are pruned and move by up to 40 / ``steps`` (at most 0.2) a step, so that most is pruned
        in the first third of the steps. The penalty does not grow weak near the target: from 150
        steps on it is reached within half a point.

        Args:
            sparsity: Share of the masked weights that shall be zero.
            grain: As above.
            steps: Of the training.
            lr: Learning rate of the scores.

        Example:
            >>> Leap.short(0.8, steps=800).threshold_lr
            0.05
        """
        fast = {"sigma": 4.0, "lambda_min": 3000.0, "lambda_rest": 3000.0}
        rate = min(0.2, 40 / max(steps, 1))
        start = "magnitude" if grain == "element" else "zero"
        return Leap(sparsity, grain, lr=lr, threshold_lr=rate, start=start, **fast)

    @property
    def penalised(self) -> bool:
        return True

    @property
    def goal(self) -> float | None:
        return self.sparsity

    @property
    def needs_objective(self) -> bool:
        return False

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        return MaskedWeights(self, model, slots)

    def part(self, slot: Slot, weight: nn.Parameter) -> LeapMask:
        """The mask of one weight, on its device."""
        tiles = tiling(slot, weight, self.grain)
        scores = _sizes(tiles, weight) if self.start == "magnitude" else None
        return LeapMask(tiles, self.sigma, scores).to(weight.device)

    def groups(self, parts: Sequence[LeapMask]) -> list[dict[str, Any]]:
        """Scores, and thresholds without momentum (of SGD or Adam)."""
        scores: dict[str, Any] = {"params": [p.scores for p in parts], "lr": self.lr}
        rate = self.lr if self.threshold_lr is None else self.threshold_lr
        still = {"momentum": 0.0, "nesterov": False, "betas": (0.0, 0.999)}
        thresholds = {"params": [p.sigma for p in parts], "lr": rate, **still}
        return [{**group, "weight_decay": 0.0} for group in (scores, thresholds)]

    def excess(self, remaining: Tensor) -> Tensor:
        """L_reg for the remaining share R."""
        return (remaining - (1 - self.sparsity)).clamp(min=0).square()

    def strength(self, remaining: float) -> float:
        """λ for the remaining share R."""
        excess = max(0.0, remaining - (1 - self.sparsity)) ** 2
        if excess < 3e-4:
            return self.lambda_rest
        return max(self.lambda_max * excess / self.sparsity**2, self.lambda_min)

    def penalty(self, parts: Sequence[LeapMask], step: int) -> Tensor:
        """λ L_reg; λ itself is a number, no gradient passes through it."""
        total = sum(part.size for part in parts)
        shares = torch.stack([part.share() * (part.size / total) for part in parts])
        remaining = shares.sum()
        return self.strength(float(remaining.detach())) * self.excess(remaining)


@torch.no_grad()
def _sizes(tiles: Tiling, weight: Tensor) -> Tensor:
    """Root mean squares of the tiles, with mean 0 and variance 1."""
    found = tiles.mean(weight.detach().float().square()).sqrt()
    return (found - found.mean()) / found.std(correction=0).clamp(min=1e-12)
