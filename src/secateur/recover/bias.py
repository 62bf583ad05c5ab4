"""Bias correction: keep the mean of every output where it was."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.core.weight import Weight
from secateur.recover.recovery import Choose, NoRecovery, Recovery, Repaired, Rounding
from secateur.stats import Moments, Stat, Stats, gap_of


@dataclass(frozen=True)
class BiasCorrection:
    r"""Add the lost mean of the pruned inputs to the bias.

    **formula** :math:`b' = b + (W - W')\,\mu,\quad \mu = E[x]`; beside an asymmetric repair the mean is
    that of the dense network, :math:`E[\hat W \hat x] - W'\mu`
    **Shapes** one number per output
    **Units** those of the output
    **Needs** input means
    **Source** FLAP (arXiv 2312.11983), CaP (arXiv 2108.13728)

    A layer without a bias is left as it is, and the facts say so; a BatchNorm behind it is better
    served by ``batchnorm``. A recurrent layer has a bias for its inputs and one for its hidden states.

    Args:
        inner: What repairs the values first.

    Example:
        >>> BiasCorrection().needs
        frozenset({Moments()})
    """

    inner: Recovery | None = None

    @property
    def needs(self) -> frozenset[Stat]:
        more = self.inner.needs if self.inner is not None else frozenset()
        return frozenset({Moments()}) | more

    def __call__(
        self, weight: Weight, stats: Stats, choose: Choose, rounding: Rounding | None = None
    ) -> Repaired:
        inner: Recovery = self.inner if self.inner is not None else NoRecovery()
        done = inner(weight, stats, choose, rounding)
        mean = weight.per_row(stats(Moments(), weight)[0]).double()
        shift = ((weight.matrix().double() - done.values.double()) * mean).sum(1)
        gap = gap_of(weight, stats)
        if gap is not None:
            shift += gap[:, weight.fan_in]
        return done._replace(shift=shift.to(weight.value.dtype))
