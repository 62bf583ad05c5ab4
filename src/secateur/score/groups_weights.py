"""Group criteria from weights alone: BatchNorm scales and the geometric median."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.groups import Groups
from secateur.score.criterion import NOTHING
from secateur.score.groups import GroupCriterion, GroupNeeds, no_part
from secateur.stats import Stats


@dataclass(frozen=True)
class BatchNormScale:
    r"""The size of the BatchNorm scale that a channel is multiplied with.

    Scores of different widths are compared as they are (the paper's global threshold). A width
    without any BatchNorm raises an error that names it, unless ``otherwise`` says how to score it;
    scores of the two kinds are then not comparable, so such a run goes with an allocation that
    treats widths apart.

    **formula** :math:`I_g = \operatorname{mean} |\gamma|` over the members of the group, and over
    its BatchNorms where several layers are coupled
    **Shapes** ``(groups,)``
    **Units** those of the scale
    **Needs** a BatchNorm in the group
    **Source** network slimming, arXiv 1708.06519 (there after training with an L1 penalty on γ)

    Args:
        otherwise: Criterion for widths without a BatchNorm.

    Example:
        >>> from secateur.testing import sample_groups
        >>> groups = sample_groups("plain").groups[0]
        >>> gamma = groups.parts[2].value
        >>> torch.equal(BatchNormScale()(groups, Stats()), gamma.abs())
        True
    """

    otherwise: GroupCriterion | None = None

    @property
    def needs(self) -> GroupNeeds:
        return NOTHING if self.otherwise is None else self.otherwise.needs

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        scales = [p for p in groups.having("vector") if p.batch_norm and not p.bias]
        if not scales:
            if self.otherwise is not None:
                return self.otherwise(groups, stats)
            raise no_part("BatchNormScale", groups, "reads (the scale of a BatchNorm)")
        sizes = [part.sum(part.value.double().abs()).mean(1) for part in scales]
        return torch.stack(sizes).mean(0).float()


@dataclass(frozen=True)
class GeometricMedian:
    r"""Distance to all other filters: what lies near the geometric median can be replaced by them.

    **formula** :math:`I_i = \sum_j \lVert W_i - W_j \rVert_2` over the producer's filters; several
    producers are added
    **Shapes** ``(groups,)``
    **Units** those of the weights
    **Needs** nothing
    **Source** FPGM, arXiv 1811.00250
    **Differs** a group with several members (a head) is one long filter

    Example:
        >>> from secateur.testing import sample_groups
        >>> groups = sample_groups("plain").groups[0]
        >>> w = groups.parts[0].value.flatten(1).double()
        >>> found = GeometricMedian()(groups, Stats())
        >>> torch.allclose(found[0].double(), (w - w[0]).norm(dim=1).sum())
        True
    """

    @property
    def needs(self) -> GroupNeeds:
        return NOTHING

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        made = groups.having("out", "channel")
        if not made:
            raise no_part("GeometricMedian", groups, "compares (rows of a producing weight)", "out")
        total = made[0].value.new_zeros(groups.count, dtype=torch.float64)
        for part in made:
            filters = part.take(part.value).flatten(1).double()
            # Products of matrices are exact enough in float64, and differences would not fit.
            total += torch.cdist(filters, filters).sum(1)
        return total.float()
