"""Allocations: how much of the budget each weight pays. "Global" is an allocation, not a pruner.

A new way to spread the budget is a file here and one line in ``ALLOCATIONS``.
"""

from secateur.allocate.allocation import Allocation, meet
from secateur.allocate.measured import Sensitivity, Tolerance, scan
from secateur.allocate.ranked import Ranked
from secateur.allocate.simple import ErdosRenyi, Given, Uniform

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "global": Ranked,
    "erk": ErdosRenyi,
    "given": Given,
    "sensitivity": Sensitivity,
    "tolerance": Tolerance,
}

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "ErdosRenyi",
    "Given",
    "Ranked",
    "Sensitivity",
    "Tolerance",
    "Uniform",
    "meet",
    "scan",
]
