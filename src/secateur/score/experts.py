"""Which experts of a mixture matter."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.groups import Groups
from secateur.score.groups import GroupNeeds
from secateur.stats import Stats
from secateur.stats.experts import RoutedOutput


@dataclass(frozen=True)
class ExpertSaliency:
    r"""What an expert adds to its layer's output where it is chosen.

    **formula** :math:`I_j = \frac{1}{|X_j|} \sum_{x\in X_j} g_j(x)\, \lVert f_j(x) \rVert_2`
    **Shapes** ``(groups,)``
    **Units** those of the layer's output
    **Needs** routed outputs; the groups are experts
    **Source** REAP, arXiv 2510.13999

    Example:
        >>> import torch
        >>> from secateur.testing import sample_groups
        >>> groups, stats = sample_groups("plain").groups[0], Stats()
        >>> stats.put(RoutedOutput(), groups.name, torch.arange(6.0))
        >>> ExpertSaliency()(groups, stats)
        tensor([0., 1., 2., 3., 4., 5.])
    """

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({RoutedOutput()})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        return stats.at(RoutedOutput(), groups.name).float()
