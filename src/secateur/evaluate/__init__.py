"""Proof: what a network can do, what it costs, and whether a pruned one is really better."""

from secateur.evaluate.compare import Comparison, compare
from secateur.evaluate.cost import Cost, cost_of
from secateur.evaluate.latency import Latency, Speed, race
from secateur.evaluate.measure import Measurement, measure
from secateur.evaluate.verdict import Gain

__all__ = [
    "Comparison",
    "Cost",
    "Gain",
    "Latency",
    "Measurement",
    "Speed",
    "compare",
    "cost_of",
    "measure",
    "race",
]
