"""Experiments over many trainings: lottery tickets, how alike masks are, how stable pruning is."""

from secateur.experiments.connectivity import Connectivity, connectivity, level_lines
from secateur.experiments.damage import Damage, Disturbance
from secateur.experiments.reading import Reading, read
from secateur.experiments.similarity import (
    Emptiness,
    Jaccard,
    Matrix,
    Similarity,
    Structure,
    emergent_structure,
    hamming,
    mask_churn,
    mask_jaccard,
    overall_structure,
    overlap_coefficient,
    similarity_matrix,
    weight_drift,
)
from secateur.experiments.stability import (
    Event,
    EventLog,
    Opposite,
    Watched,
    targeting,
)
from secateur.experiments.terms import TicketPlan, Training
from secateur.experiments.ticket import StageFacts, TicketFacts, find_ticket, load_ticket

__all__ = [
    "Connectivity",
    "Damage",
    "Disturbance",
    "Emptiness",
    "Event",
    "EventLog",
    "Jaccard",
    "Matrix",
    "Opposite",
    "Reading",
    "Similarity",
    "StageFacts",
    "Structure",
    "TicketFacts",
    "TicketPlan",
    "Training",
    "Watched",
    "connectivity",
    "emergent_structure",
    "find_ticket",
    "hamming",
    "level_lines",
    "load_ticket",
    "mask_churn",
    "mask_jaccard",
    "overall_structure",
    "overlap_coefficient",
    "read",
    "similarity_matrix",
    "targeting",
    "weight_drift",
]
