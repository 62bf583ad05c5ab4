"""Criteria: how much each weight matters. Larger = keep.

A new criterion is a file here and one line in ``CRITERIA``; a criterion of groups (structural
pruning) one line in ``GROUP_CRITERIA``.
"""

from secateur.score.activation import Ria, Wanda
from secateur.score.blocks import BlockInfluence
from secateur.score.brain import ObsSaliency
from secateur.score.criterion import Criterion
from secateur.score.expected_batchnorm import ExpectedBatchNorm
from secateur.score.experts import ExpertSaliency
from secateur.score.fisher import Obd, WoodFisher
from secateur.score.gradient import Movement, Snip, Taylor
from secateur.score.groups import GroupCriterion, Grouped, GroupNeeds, RandomGroups
from secateur.score.groups_activation import ActivationEnergy, ActivationVariance, MeanActivation
from secateur.score.groups_reconstruction import Reconstruction
from secateur.score.groups_taylor import GroupTaylor
from secateur.score.groups_weights import BatchNormScale, GeometricMedian
from secateur.score.initialisation import Grasp, SynFlow
from secateur.score.lookahead import Lookahead
from secateur.score.magnitude import Magnitude
from secateur.score.random import Random
from secateur.score.wrappers import Lamp, Normalised, Smoothed, Weighted

CRITERIA: dict[str, type[Criterion]] = {
    "random": Random,
    "magnitude": Magnitude,
    "snip": Snip,
    "taylor": Taylor,
    "movement": Movement,
    "obd": Obd,
    "woodfisher": WoodFisher,
    "grasp": Grasp,
    "synflow": SynFlow,
    "expected_batchnorm": ExpectedBatchNorm,
    "wanda": Wanda,
    "ria": Ria,
    "obs": ObsSaliency,
    "lamp": Lamp,
    "normalised": Normalised,
    "weighted": Weighted,
    "smoothed": Smoothed,
    "lookahead": Lookahead,
}

#: Criteria of groups, for structural pruning: one score per group of a width.
GROUP_CRITERIA: dict[str, type[GroupCriterion]] = {
    "grouped": Grouped,
    "random_groups": RandomGroups,
    "batchnorm_scale": BatchNormScale,
    "geometric_median": GeometricMedian,
    "mean_activation": MeanActivation,
    "activation_energy": ActivationEnergy,
    "activation_variance": ActivationVariance,
    "group_taylor": GroupTaylor,
    "reconstruction": Reconstruction,
    "expert_saliency": ExpertSaliency,
}

__all__ = [
    "CRITERIA",
    "GROUP_CRITERIA",
    "ActivationEnergy",
    "ActivationVariance",
    "BatchNormScale",
    "BlockInfluence",
    "Criterion",
    "ExpectedBatchNorm",
    "ExpertSaliency",
    "GeometricMedian",
    "Grasp",
    "GroupCriterion",
    "GroupNeeds",
    "GroupTaylor",
    "Grouped",
    "Lamp",
    "Lookahead",
    "Magnitude",
    "MeanActivation",
    "Movement",
    "Normalised",
    "Obd",
    "ObsSaliency",
    "Random",
    "RandomGroups",
    "Reconstruction",
    "Ria",
    "Smoothed",
    "Snip",
    "SynFlow",
    "Taylor",
    "Wanda",
    "Weighted",
    "WoodFisher",
]
