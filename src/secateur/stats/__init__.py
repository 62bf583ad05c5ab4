"""Evidence from data: streamable, mergeable statistics, and the one engine that collects them."""

from secateur.stats.activations import Gram, InputNorm, Moments, Positions, Sketch
from secateur.stats.attention import projection_uses
from secateur.stats.blocks import BlockCosine
from secateur.stats.engine import Stats, collect
from secateur.stats.experts import RoutedOutput
from secateur.stats.gates import GateGradient
from secateur.stats.gradients import BlockFisher, Gradient, SquaredGradient, WeightGradient
from secateur.stats.groups import GroupProbe, collect_groups, wants_data
from secateur.stats.neighbours import Neighbours
from secateur.stats.order import calls_in_order, following_norms, in_order
from secateur.stats.pairs import Beside, OutputGap, gap_of
from secateur.stats.probes import GradientFlow, SynapticFlow
from secateur.stats.products import product_uses
from secateur.stats.replay import Replay
from secateur.stats.size import InputSize
from secateur.stats.stat import Probe, Stat, State
from secateur.stats.steps import stream_gradients

__all__ = [
    "Beside",
    "BlockCosine",
    "BlockFisher",
    "GateGradient",
    "Gradient",
    "GradientFlow",
    "Gram",
    "GroupProbe",
    "InputNorm",
    "InputSize",
    "Moments",
    "Neighbours",
    "OutputGap",
    "Positions",
    "Probe",
    "Replay",
    "RoutedOutput",
    "Sketch",
    "SquaredGradient",
    "Stat",
    "State",
    "Stats",
    "SynapticFlow",
    "WeightGradient",
    "calls_in_order",
    "collect",
    "collect_groups",
    "following_norms",
    "gap_of",
    "in_order",
    "product_uses",
    "projection_uses",
    "stream_gradients",
    "wants_data",
]
