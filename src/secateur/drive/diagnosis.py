"""When accuracy falls, say where: which layers suffered, and what usually helps."""

from __future__ import annotations

import math
import statistics

from secateur.core.facts import Facts

_EMPTY = 0.99
_TRAINED_ENOUGH = 0.25


def diagnose(facts: Facts) -> None:
    """Add notes to ``facts`` about what is likely to hurt.

    * layers nearly emptied (over 99 % zeros);
    * the three layers with the highest output error, if it is over 10 % and three times the median;
    * layers pruned well beyond the knee of their error curve;
    * hints after "Pruning for success" (Neural Magic): one-shot pruning beyond 70 % without
      fine-tuning, a pruning window that leaves less than a quarter of training for fine-tuning.

    Example:
        >>> from secateur.core.facts import LayerFacts
        >>> facts = Facts(layers=[LayerFacts("fc.weight", (10, 100), 1000, 5)])
        >>> diagnose(facts)
        >>> facts.notes[0].topic
        'nearly-empty'
    """
    for layer in facts.layers:
        if layer.sparsity > _EMPTY:
            are = "is" if layer.kept == 1 else "are"
            facts.note(
                "nearly-empty",
                layer.name,
                f"only {layer.kept:,} of {layer.total:,} weights {are} left; consider "
                f"{_gentler(facts)}a lower level for it",
            )
    errors = [layer.output_error for layer in facts.layers if layer.output_error is not None]
    if errors:
        bound = max(0.1, 3 * statistics.median(errors))
        worst = sorted(
            (x for x in facts.layers if x.output_error is not None and x.output_error > bound),
            key=lambda x: -(x.output_error or 0),
        )
        for layer in worst[:3]:
            facts.note(
                "output-error",
                layer.name,
                f"its output changed by {layer.output_error:.0%} (squared, relative), "
                f"against a median of {statistics.median(errors):.0%}; prune it less",
            )
    beyond = [x for x in facts.layers if x.knee is not None and x.sparsity > x.knee + 0.1]
    for layer in sorted(beyond, key=lambda x: x.knee or 0)[:3]:
        facts.note(
            "beyond-knee",
            layer.name,
            f"pruned to {layer.sparsity:.0%}, but its error curve bends at about {layer.knee:.0%}",
        )
    _hints(facts)


def _gentler(facts: Facts) -> str:
    """What spares small layers and is not in the recipe yet."""
    known = {"allocation": "erk", "criterion": "lamp"}
    others = [
        f"the {word} '{name}', "
        for word, name in known.items()
        if name not in facts.recipe.get(word, ())
    ]
    return "".join([*others, "or "]) if others else ""


def _floor(share: float) -> str:
    """A share as per cent, never rounded up: 99.9 % is not 100 %."""
    return f"{math.floor(round(1000 * share, 6)) / 10:g}%"


def _hints(facts: Facts) -> None:
    trained = [record for record in facts.history if "loss" in record]
    if facts.sparsity > 0.7 and not trained:
        facts.note(
            "hint",
            "",
            f"{_floor(facts.sparsity)} without fine-tuning usually costs accuracy: prune gradually over a "
            "third to a half of training, then fine-tune for at least a quarter of it",
        )
    updates = [record["step"] for record in facts.history if "dropped" in record]
    if updates and trained:
        share = facts.measures.get("finetune_share")
        if share is not None and share < _TRAINED_ENOUGH:
            facts.note(
                "hint",
                "",
                f"only {share:.0%} of training came after the last mask update; a quarter or more is usual",
            )
