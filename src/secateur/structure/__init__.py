"""Structural pruning: what can be removed from a network, removing it, and the proof."""

from secateur.core.widths import Slices, Width
from secateur.structure.coupling import Structure, couple
from secateur.structure.cut import Cuts, apply_, cuts_for
from secateur.structure.masked import Proof, mask_, prove
from secateur.structure.opaque import opaque
from secateur.structure.rules import rule
from secateur.structure.trace import Trace, trace

__all__ = [
    "Cuts",
    "Proof",
    "Slices",
    "Structure",
    "Trace",
    "Width",
    "apply_",
    "couple",
    "cuts_for",
    "mask_",
    "opaque",
    "prove",
    "rule",
    "trace",
]
