"""The law kit: what must hold for every criterion, pattern, allocation and so on, as functions.

Each ``check_...`` raises :class:`AssertionError` that says which law failed. The project runs them
over its own catalogues; run them on yours:

    >>> from secateur.score import Magnitude
    >>> from secateur.testing import check_criterion, sample_weight
    >>> check_criterion(Magnitude(), sample_weight("conv2d"))

``secateur.testing.strategies`` draws inputs with Hypothesis; nothing else here needs it.
"""

from secateur.recover import FixedMask
from secateur.testing.allocations import check_allocation, sample_items
from secateur.testing.criteria import check_criterion
from secateur.testing.evidence import evidence, sample_pairs, sample_rows
from secateur.testing.groups import SampleGroups, check_group_criterion, sample_groups
from secateur.testing.layouts import check_layout
from secateur.testing.masks import check_masks
from secateur.testing.patterns import check_pattern, check_refusal
from secateur.testing.recoveries import check_recovery, check_reestimation
from secateur.testing.roundings import check_rounding
from secateur.testing.samples import KINDS, sample_weight
from secateur.testing.schedules import check_schedule
from secateur.testing.statistics import check_stat

__all__ = [
    "KINDS",
    "FixedMask",
    "SampleGroups",
    "check_allocation",
    "check_criterion",
    "check_group_criterion",
    "check_layout",
    "check_masks",
    "check_pattern",
    "check_recovery",
    "check_reestimation",
    "check_refusal",
    "check_rounding",
    "check_schedule",
    "check_stat",
    "evidence",
    "sample_groups",
    "sample_items",
    "sample_pairs",
    "sample_rows",
    "sample_weight",
]
