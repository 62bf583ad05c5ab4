"""Evidence from data: streamable, mergeable statistics, and the one engine that collects them."""

from secateur.stats.activations import Gram, InputNorm, Moments, Positions, Sketch
from secateur.stats.engine import Stats, collect, stream_gradients
from secateur.stats.gradients import BlockFisher, Gradient, SquaredGradient, WeightGradient
from secateur.stats.probes import GradientFlow, SynapticFlow
from secateur.stats.stat import Probe, Stat, State

__all__ = [
    "BlockFisher",
    "Gradient",
    "GradientFlow",
    "Gram",
    "InputNorm",
    "Moments",
    "Positions",
    "Probe",
    "Sketch",
    "SquaredGradient",
    "Stat",
    "State",
    "Stats",
    "SynapticFlow",
    "WeightGradient",
    "collect",
    "stream_gradients",
]
