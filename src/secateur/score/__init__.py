"""Criteria: how much each weight matters. Larger = keep.

A new criterion is a file here and one line in ``CRITERIA``.
"""

from secateur.score.activation import Ria, Wanda
from secateur.score.brain import ObsSaliency
from secateur.score.criterion import Criterion
from secateur.score.fisher import Obd, WoodFisher
from secateur.score.gradient import Movement, Snip, Taylor
from secateur.score.initialisation import Grasp, SynFlow
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
    "wanda": Wanda,
    "ria": Ria,
    "obs": ObsSaliency,
    "lamp": Lamp,
    "normalised": Normalised,
    "weighted": Weighted,
    "smoothed": Smoothed,
}

__all__ = [
    "CRITERIA",
    "Criterion",
    "Grasp",
    "Lamp",
    "Magnitude",
    "Movement",
    "Normalised",
    "Obd",
    "ObsSaliency",
    "Random",
    "Ria",
    "Smoothed",
    "Snip",
    "SynFlow",
    "Taylor",
    "Wanda",
    "Weighted",
    "WoodFisher",
]
