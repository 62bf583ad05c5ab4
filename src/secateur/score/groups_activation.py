"""Group criteria from what the consumers of a width read: mean, energy and variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.groups import Groups, Part
from secateur.score.groups import GroupCriterion, GroupNeeds, measured, no_part
from secateur.stats import InputNorm, Moments, Stats
from secateur.stats.size import InputSize


@dataclass(frozen=True)
class MeanActivation:
    r"""How large a unit's activation is on average, seen at the inputs of its consumers.

    **formula** :math:`I_g = E|x_j|`, averaged over members, kernel taps and consumers
    **Shapes** ``(groups,)``
    **Units** those of the activations
    **Needs** mean sizes of inputs
    **Source** Pruning Filters while Training, arXiv 2003.02800
    **Differs** read at the consumers (behind pooling, with their padding) and as absolute value,
    which is the paper's mean wherever a ReLU comes between

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> criterion = MeanActivation()
        >>> stats = collect_groups(sample.model, sample.groups, criterion.needs, sample.batches)
        >>> criterion(sample.groups[0], stats).shape
        torch.Size([6])
    """

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({InputSize()})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        means = []
        for part in _consumers(self, groups, stats):
            sizes = _spread(part, stats(InputSize(), part.weight))
            means.append(part.mean(sizes).mean(1))
        return torch.stack(means).mean(0).float()


@dataclass(frozen=True)
class ActivationEnergy:
    r"""Energy that a unit brings into its consumers' outputs.

    **formula** :math:`I_g = \sum_{j\in g} E[x_j^2]\, \lVert W_{:j} \rVert^2`, summed over consumers
    **Shapes** ``(groups,)``
    **Units** output squared; none with ``standardise``
    **Needs** input norms
    **Source** structured Wanda, as in arXiv 2306.11695; squares, so that members add up

    Args:
        standardise: Subtract the mean over the width and divide by the standard deviation.

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> criterion = ActivationEnergy()
        >>> stats = collect_groups(sample.model, sample.groups, criterion.needs, sample.batches)
        >>> bool((criterion(sample.groups[0], stats) >= 0).all())
        True
    """

    standardise: bool = False

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({InputNorm()})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in _consumers(self, groups, stats):
            energy = stats(InputNorm(), part.weight).double().square()
            total = total.to(energy.device) + _weighed(part, energy).sum(1)
        return (_standardised(total) if self.standardise else total).float()


@dataclass(frozen=True)
class ActivationVariance:
    r"""Fluctuation: the part of a unit's contribution that a bias cannot replace.

    **formula** :math:`I_j = \operatorname{Var}[x_j]\, \lVert W_{:j} \rVert^2`; for neurons
    :math:`I_g = \sum_{j\in g} I_j`, summed over consumers, then :math:`(I_g - \bar
    I)/\operatorname{std}(I)` within the width; for heads :math:`I_j^2` is standardised over all inputs
    of the width, and the mean of a head's inputs is its score
    **Shapes** ``(groups,)``
    **Units** none; output squared (to the fourth for heads) without ``standardise``
    **Needs** moments of inputs
    **Source** FLAP's WIFV with its score AL-AM, arXiv 2312.11983
    **Differs** exact moments of all calibration rows in place of a running mean, and on any width,
    not only the inputs of attention and feed-forward outputs

    Args:
        standardise: Compare widths by z-scores, as FLAP's global threshold needs.

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> criterion = ActivationVariance()
        >>> stats = collect_groups(sample.model, sample.groups, criterion.needs, sample.batches)
        >>> abs(float(criterion(sample.groups[0], stats).mean())) < 1e-6
        True
    """

    standardise: bool = True

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({Moments()})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        found = [
            _weighed(part, stats(Moments(), part.weight)[1].double())
            for part in _consumers(self, groups, stats)
        ]
        each = torch.cat([x.to(found[0].device) for x in found], 1)
        if groups.heads:
            squares = each.square()
            return (_standardised(squares).mean(1) if self.standardise else squares.sum(1)).float()
        total = each.sum(1)
        return (_standardised(total) if self.standardise else total).float()


def _consumers(who: GroupCriterion, groups: Groups, stats: Stats) -> list[Part]:
    parts = [part for part in groups.having("in", "channel") if part.seen]
    if not parts:
        raise no_part(type(who).__name__, groups, "sees inputs of (a consuming weight)", "in")
    return measured(parts, who.needs, stats)


def _spread(part: Part, statistic: Tensor) -> Tensor:
    """A statistic of inputs ``(groups, fan_in)``, for every element of the weight."""
    return part.weight.like(part.weight.per_row(statistic))


def _weighed(part: Part, statistic: Tensor) -> Tensor:
    """A statistic of inputs times squared weights, summed over each column: (groups, members)."""
    return part.sum(part.value.double().square() * _spread(part, statistic))


def _standardised(scores: Tensor) -> Tensor:
    centred = scores - scores.mean()
    variance = centred.square().sum() / max(1, scores.numel() - 1)
    return centred / variance.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
