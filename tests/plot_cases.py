"""Facts of every kind that plots are drawn from, and the plots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.core.facts import Facts, LayerFacts, WidthFacts
from secateur.evaluate.robustness import Curve, RobustnessFacts
from secateur.report.plots import layers_plot, training_plot, widths_plot
from secateur.report.plots_curves import robustness_plot, similarity_plot, tickets_plot
from secateur.report.plots_style import Plot

HISTORY: list[dict[str, Any]] = [
    {"step": 10, "sparsity": 0.3, "dropped": 30, "grown": 0},
    {"step": 20, "sparsity": 0.5, "dropped": 20, "grown": 0},
    {"step": 30, "sparsity": 0.5, "dropped": 0, "grown": 0},
    {"epoch": 1.0, "loss": 2.0, "lr": 0.1, "sparsity": 0.3},
    {"epoch": 2.0, "loss": 1.0, "lr": 0.1, "sparsity": 0.5},
]
FACTS = Facts(
    layers=[LayerFacts("a", (2, 5), 10, 4), LayerFacts("b$1", (3, 5), 15, 15)],
    widths=[WidthFacts("conv", 16, 12, ("conv.weight",))],
    history=HISTORY,
)
CURVES = RobustnessFacts(
    (
        Curve("dense", "Fgsm", (0.1, 0.2), (0.5, 0.1), 0.9),
        Curve("pruned", "Fgsm", (0.1, 0.2), (0.6, 0.3), 0.88),
        Curve("dense", "Pgd", (0.1, 0.2), (0.4, 0.05), 0.9),
    ),
    units=100,
)
MATRIX = [[1.0, 0.25, -0.01], [0.25, 1.0, 0.5], [-0.01, 0.5, 1.0]]


def run_of(rewind: str, seed: int, *accuracies: float, **recipe: str) -> dict[str, Any]:
    """Facts of a ticket search: dense, then levels at 50 %, 75 %, ..."""
    stages = [
        {"name": str(i), "asked": 1 - 0.5**i, "sparsity": 1 - 0.5**i, "accuracy": a}
        for i, a in enumerate(accuracies)
    ]
    plan = {"training": {"seed": seed}}
    head = {"rewind": rewind, "metric": "accuracy", "recipe": recipe, "plan": plan}
    return {**head, "dense": stages[0], "levels": stages[1:]}


RUNS = [
    run_of("rate", 0, 0.90, 0.89, 0.86),
    run_of("rate", 1, 0.92, 0.91, 0.80),
    run_of("reinit", 0, 0.90, 0.85, 0.70),
]

ALL: dict[str, Callable[[], Plot]] = {
    "training": lambda: training_plot(HISTORY, steps_per_epoch=10),
    "layers": lambda: layers_plot(FACTS),
    "widths": lambda: widths_plot(FACTS),
    "tickets": lambda: tickets_plot(RUNS),
    "similarity": lambda: similarity_plot(MATRIX, ["x", "y", "z"]),
    "robustness": lambda: robustness_plot(CURVES),
}
