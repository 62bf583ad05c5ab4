"""Criteria from first-order gradients: SNIP, Taylor, movement."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import Gradient, SquaredGradient, Stats, WeightGradient
from secateur.stats.gradients import require_samples


@dataclass(frozen=True)
class Snip:
    r"""Connection sensitivity: how much the loss changes when a weight's mask does.

    Made for networks at initialisation. Where training has ended the mean gradient is close to
    zero, and what is left of it is noise of the calibration samples; :class:`Taylor` and
    :class:`~secateur.score.Obd` square single gradients instead, which do not cancel.

    **formula** :math:`s = |w\,\bar g|`
    **Shapes** that of the weight
    **Units** loss
    **Needs** mean gradient
    **Source** SNIP, arXiv 1810.02340
    **Differs** the gradient is averaged over all calibration samples (the paper uses one batch),
    in evaluation mode, where BatchNorms of a network that has seen no data do not normalise (the
    paper's normalise by the batch, which chooses other weights); the division by the global sum is
    left out, since it changes no ranking

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(Gradient(), w, torch.tensor([[0.5, -3.0]]), 1)
        >>> Snip()(w, stats)
        tensor([[1., 3.]])
    """

    @property
    def needs(self) -> Needs:
        return frozenset({Gradient()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return (weight.value.float() * stats(Gradient(), weight)).abs().float()


@dataclass(frozen=True)
class Taylor:
    r"""First-order Taylor expansion of the loss, squared and averaged over batches.

    The square is taken before the mean, so gradients of different batches do not cancel. They do
    within a batch: ``samples=1`` prevents that too, and ranks as ``Obd(damp=0)`` does.

    **formula** :math:`s = \frac1m \sum_b (w\, g_b)^2`
    **Shapes** that of the weight
    **Units** loss squared
    **Needs** mean of squared gradients of batches
    **Source** Molchanov et al. 2019, arXiv 1906.10771

    Args:
        samples: Samples per gradient; by default whole batches, as in the paper.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(SquaredGradient(None), w, torch.tensor([[0.5, -3.0]]), 8)
        >>> Taylor()(w, stats)
        tensor([[1., 9.]])
    """

    samples: int | None = None

    def __post_init__(self) -> None:
        require_samples("Taylor(samples=...)", self.samples)

    @property
    def needs(self) -> Needs:
        return frozenset({SquaredGradient(self.samples)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return weight.value.float().square() * stats(SquaredGradient(self.samples), weight)


@dataclass(frozen=True)
class Movement:
    r"""Keep weights that training moves away from zero.

    Inside a training loop the sum runs over its steps with the weights of each step. In a one-shot
    run it is the sum over calibration batches at fixed weights.

    **formula** :math:`s = -\sum_t w_t\, g_t`
    **Shapes** that of the weight
    **Units** loss
    **Needs** sum of weight times gradient
    **Source** movement pruning, arXiv 2005.07683
    **Differs** without the learning rate as a factor (it is the same for all weights), and with
    the gradient of the masked network, so a pruned weight (zero) keeps the score it had; and only a
    cyclic schedule lets one back, where the paper's may return at any step

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.update(WeightGradient(), w, torch.tensor([[0.5, -3.0]]), 8)
        >>> Movement()(w, stats)
        tensor([[-1.,  3.]])
    """

    @property
    def needs(self) -> Needs:
        return frozenset({WeightGradient()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return -stats(WeightGradient(), weight)
