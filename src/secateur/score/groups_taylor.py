"""First-order Taylor expansion of the loss over a gate on each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from secateur.core.groups import Groups
from secateur.score.groups import GroupNeeds, one_of
from secateur.stats import Stats
from secateur.stats.gates import GATES, Gate, GateGradient
from secateur.stats.gradients import require_samples


@dataclass(frozen=True)
class GroupTaylor:
    r"""How much the loss changes, to first order, when the group's gate closes.

    **formula** :math:`I_g = \frac1m \sum_b a_{bg}^2` (``"squared"``) or :math:`|\bar a_g|`
    (``"absolute"``), with :math:`a_{bg} = \sum_{i\in g} w_i\, \partial L_b/\partial w_i`
    **Shapes** ``(groups,)``
    **Units** loss squared, or loss
    **Needs** gradients of gates
    **Source** Molchanov et al. 2019, arXiv 1906.10771 (``gate="norm"``); LLM-Pruner's vector score,
    arXiv 2305.11627 (``gate="group"``, ``"absolute"``)
    **Differs** by default the gate sits on the activation where the consumers read it, which needs
    no BatchNorm

    Args:
        gate: Where the gate sits, see :class:`~secateur.stats.gates.GateGradient`.
        of: ``"squared"`` averages squares of batches, so that effects of opposite sign do not
            cancel (a trained network has almost no mean gradient); ``"absolute"`` is the effect on
            the loss of the whole calibration data.
        samples: Samples per gradient; by default the batches as they come.

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample, criterion = sample_groups("plain"), GroupTaylor()
        >>> stats = collect_groups(sample.model, sample.groups, criterion.needs, sample.batches)
        >>> bool((criterion(sample.groups[0], stats) >= 0).all())
        True
    """

    gate: Gate = "auto"
    of: Literal["squared", "absolute"] = "squared"
    samples: int | None = None

    def __post_init__(self) -> None:
        one_of("GroupTaylor", "gate", self.gate, GATES)
        one_of("GroupTaylor", "of", self.of, ("squared", "absolute"))
        require_samples("GroupTaylor(samples=...)", self.samples)

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({GateGradient(self.gate, self.samples)})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        found = stats.at(GateGradient(self.gate, self.samples), groups.name)
        return (found[1] if self.of == "squared" else found[0].abs()).float()
