"""Recoveries: what happens to the survivors.

A new reconstruction is a file here and one line in ``RECOVERIES``. Fine-tuning and distillation need
a training loop and live in ``drive/training/finetune.py``.
"""

from secateur.recover.batchnorm import BatchNorm
from secateur.recover.bias import BiasCorrection
from secateur.recover.compensation import Compensation, Moments
from secateur.recover.exact import ExactObs
from secateur.recover.fisher import FisherUpdate
from secateur.recover.least_squares import LeastSquares
from secateur.recover.recovery import (
    Choose,
    FixedMask,
    Grid,
    NoRecovery,
    Recovery,
    Repaired,
    Rounding,
)
from secateur.recover.rounding import ROUNDINGS, Integer
from secateur.recover.sweep import ColumnSweep, row_errors

RECOVERIES: dict[str, type] = {
    "none": NoRecovery,
    "bias_correction": BiasCorrection,
    "least_squares": LeastSquares,
    "column_sweep": ColumnSweep,
    "exact_obs": ExactObs,
    "fisher_update": FisherUpdate,
    "batchnorm": BatchNorm,
}

__all__ = [
    "RECOVERIES",
    "ROUNDINGS",
    "BatchNorm",
    "BiasCorrection",
    "Choose",
    "ColumnSweep",
    "Compensation",
    "ExactObs",
    "FisherUpdate",
    "FixedMask",
    "Grid",
    "Integer",
    "LeastSquares",
    "Moments",
    "NoRecovery",
    "Recovery",
    "Repaired",
    "Rounding",
    "row_errors",
]
