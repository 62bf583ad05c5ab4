"""Criteria made from criteria: normalised, weighted, smoothed, LAMP-scaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.weight import Weight
from secateur.score.criterion import Criterion, Needs
from secateur.stats import Stats


@dataclass(frozen=True)
class Normalised:
    r"""Scores divided by their norm over the weight, so that layers become comparable.

    **formula** :math:`s / \lVert s \rVert`
    **Shapes** that of the weight
    **Units** none
    **Needs** what the inner criterion needs
    **Source** e.g. the global variant of LAP, arXiv 2002.04809

    Args:
        inner: The criterion to normalise.
        by: ``"sum"``, ``"l2"``, ``"mean"`` or ``"max"`` of the absolute scores.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.score import Magnitude
        >>> w = Weight("w", torch.tensor([[3.0, 1.0]]), LINEAR)
        >>> Normalised(Magnitude(), by="sum")(w, Stats())
        tensor([[0.7500, 0.2500]])
    """

    inner: Criterion
    by: str = "l2"

    def __post_init__(self) -> None:
        if self.by not in ("sum", "l2", "mean", "max"):
            raise UsageError(
                f"Normalised(by={self.by!r})",
                "unknown norm",
                "it is sum, l2, mean or max",
                "choose one",
            )

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        scores = self.inner(weight, stats)
        size = scores.double().abs()  # squares of tiny scores underflow in float32
        norms: dict[str, Callable[[], Tensor]] = {
            "sum": size.sum,
            "l2": lambda: size.square().sum().sqrt(),
            "mean": size.mean,
            "max": size.max,
        }
        norm = norms[self.by]().clamp(min=torch.finfo(torch.float64).tiny)
        return (scores.double() / norm).to(scores.dtype)


@dataclass(frozen=True)
class Weighted:
    r"""A weighted sum of criteria, each normalised by its mean over the weight first.

    **formula** :math:`\sum_k \alpha_k\, s_k / \overline{|s_k|}`
    **Shapes** that of the weight
    **Units** none
    **Needs** the union of the parts' needs
    **Source** generic

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.score import Magnitude
        >>> w = Weight("w", torch.tensor([[3.0, 1.0]]), LINEAR)
        >>> Weighted((Magnitude(1), Magnitude(2)), (1.0, 1.0))(w, Stats())
        tensor([[3.3000, 0.7000]])
    """

    parts: tuple[Criterion, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights) or not self.parts:
            raise UsageError(
                "Weighted(...)",
                f"{len(self.parts)} criteria and {len(self.weights)} weights",
                "each criterion has one weight",
                "give two tuples of equal length",
            )

    @property
    def needs(self) -> Needs:
        return frozenset().union(*(part.needs for part in self.parts))

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        scaled = [Normalised(part, by="mean")(weight, stats) for part in self.parts]
        return torch.stack([a * s for a, s in zip(self.weights, scaled, strict=True)]).sum(0)


@dataclass(frozen=True)
class Smoothed:
    r"""An exponential moving average of scores over mask updates.

    A criterion keeps no state: the average of the previous update comes from the statistics'
    memory, where the driver puts it.

    **formula** :math:`\bar s_t = \beta\, \bar s_{t-1} + (1 - \beta)\, s_t`
    **Shapes** that of the weight
    **Units** those of the inner criterion
    **Needs** what the inner criterion needs
    **Source** e.g. PLATON, arXiv 2206.12562 (its first half)

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.score import Magnitude
        >>> w, stats = Weight("w", torch.tensor([[3.0]]), LINEAR), Stats()
        >>> smooth = Smoothed(Magnitude(), beta=0.5)
        >>> stats.remember(smooth, "w", torch.tensor([[1.0]]))
        >>> smooth(w, stats)
        tensor([[2.]])
    """

    inner: Criterion
    beta: float = 0.85

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(
                f"Smoothed(beta={self.beta:g})",
                f"{self.beta:g} is not in [0, 1)",
                "beta is the share of the scores before",
                "write e.g. beta=0.85",
            )

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        now = self.inner(weight, stats)
        before = stats.recall(self, weight.name)
        return now if before is None else self.beta * before + (1 - self.beta) * now


@dataclass(frozen=True)
class Lamp:
    r"""LAMP scaling: each score relative to the sum of all that are at least as large.

    With a global allocation it balances the relative distortion of layers and never empties one:
    the largest score of every weight becomes 1.

    **formula** :math:`\text{lamp}(s_u) = s_u^2 \big/ \sum_{v:\ s_v \ge s_u} s_v^2`
    **Shapes** that of the weight
    **Units** none, in [0, 1]
    **Needs** what the inner criterion needs
    **Source** LAMP, arXiv 2010.07611; on equal scores the earlier index counts as larger
    **Differs** the paper scales magnitudes; negative scores of other criteria count as zero

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.score import Magnitude
        >>> Lamp(Magnitude())(Weight("w", torch.tensor([[1.0, 2.0]]), LINEAR), Stats())
        tensor([[0.2000, 1.0000]])
    """

    inner: Criterion

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        scores = self.inner(weight, stats)
        squares = scores.double().clamp(min=0).square().flatten()
        order = squares.argsort(descending=True, stable=True)
        ranked = squares[order]
        scaled = torch.empty_like(squares)
        scaled[order] = ranked / ranked.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
        return scaled.reshape(scores.shape).to(scores.dtype)
