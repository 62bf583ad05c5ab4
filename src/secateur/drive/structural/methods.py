"""Published methods of structural pruning, assembled from the parts.

What they publish is a criterion and how its budget is shared. What happens to the survivors is our
default for all of them: inputs refitted by least squares, BatchNorms measured again. Give
``recovery=()`` with ``dataclasses.replace`` for the cut alone.
"""

from __future__ import annotations

from secateur.allocate.widths import RankedWidths, UniformWidths
from secateur.core.budget import Target
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.score import (
    ActivationVariance,
    BatchNormScale,
    GeometricMedian,
    Grouped,
    GroupTaylor,
    Magnitude,
)

_HALF = Target("macs", 0.5)


def filters(target: Target = _HALF) -> ShrinkRecipe:
    """Filters by their own L1 norm, the same share everywhere (arXiv 1608.08710)."""
    return ShrinkRecipe(Grouped(Magnitude(), of="out"), target, UniformWidths())


def fpgm(target: Target = _HALF) -> ShrinkRecipe:
    """Filters near the geometric median of their layer, the same share everywhere (arXiv 1811.00250)."""
    return ShrinkRecipe(GeometricMedian(), target, UniformWidths())


def slimming(target: Target = _HALF) -> ShrinkRecipe:
    """Channels by their BatchNorm scale, ranked globally (arXiv 1708.06519)."""
    return ShrinkRecipe(BatchNormScale(), target, RankedWidths(normalise="none"))


def taylor(target: Target = _HALF) -> ShrinkRecipe:
    """Groups by what closing their gate costs to first order, ranked globally (arXiv 1906.10771)."""
    return ShrinkRecipe(GroupTaylor(), target, RankedWidths(normalise="none"))


def flap(target: Target = _HALF) -> ShrinkRecipe:
    """Groups by the fluctuation of their activations, ranked globally (FLAP, arXiv 2312.11983)."""
    return ShrinkRecipe(ActivationVariance(), target, RankedWidths(normalise="none"))


def depgraph(target: Target = _HALF) -> ShrinkRecipe:
    """Groups by their normalised squared weights, ranked globally (arXiv 2301.12900)."""
    return ShrinkRecipe(Grouped(Magnitude(p=2)), target, RankedWidths())


#: By the name that recipe files and ``secateur shrink --method`` use.
SHRINK_ALIASES = {
    alias.__name__: alias for alias in (filters, fpgm, slimming, taylor, flap, depgraph)
}
