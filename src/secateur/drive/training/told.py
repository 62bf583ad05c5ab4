"""What the facts of a pruner in a training loop tell: changes of the masks, and a missed target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.core.budget import Target
from secateur.core.facts import Facts
from secateur.core.masks import Masks


def tell_change(facts: Facts, step: int, before: Masks, after: Masks, **more: Any) -> None:
    """Add a change of the masks to the history; ``more`` goes beside or over what is counted."""
    dropped, grown = before.diff(after)
    counts = {"dropped": dropped.kept, "grown": grown.kept, **more}
    facts.history.append({"step": step, "sparsity": after.sparsity, **counts})


def tell_unseen(facts: Facts, names: Iterable[str]) -> None:
    """Say of which weights no input was seen when masks changed."""
    for name in names:
        text = "the data of a mask update did not show its inputs: it kept its mask"
        facts.note("unseen", name, text)


def tell_stale(facts: Facts, updated: int) -> None:
    """Say that masks change by the gradients that the last change was made by.

    Args:
        facts: With the history.
        updated: The last step in which the optimizer took gradients.

    Example:
        >>> facts = Facts(history=[{"step": 6}])
        >>> tell_stale(facts, updated=7)
        >>> facts.notes
        []
        >>> tell_stale(facts, updated=6)
        >>> facts.notes[0].topic
        'optimizer'
    """
    if facts.history and updated <= facts.history[-1]["step"]:
        text = (
            "masks changed twice by the same gradients: between them the optimizer that the pruner was given "
            "took no step; another one may have taken its place, or a scaler left its step out"
        )
        facts.note("optimizer", "", text)


def last_sparsity(facts: Facts, found: float) -> float:
    """After the last change of the masks; ``found`` if there was none."""
    return float(facts.history[-1]["sparsity"]) if facts.history else found


def tell_target(facts: Facts, target: Target, share: float, found: float, missed: str) -> None:
    """Say why the target was missed, if it was.

    Args:
        facts: With the history.
        target: What was asked for.
        share: Of the schedule's way that was gone.
        found: The sparsity of the masks.
        missed: What the last update had to say of that.

    Example:
        >>> facts = Facts()
        >>> tell_target(facts, Target("sparsity", 0.5), 0.8, 0.4, "")
        >>> facts.notes[0].text
        'asked for sparsity=0.5, reached sparsity=0.4: the training ended after 80 % of the way'
    """
    why = ""
    if share < 1:
        why = f"the training ended after {100 * share:.0f} % of the way"
    elif found != last_sparsity(facts, found):
        why = "the masks are those of another moment than the last update"
    asked = f"asked for {target.unit}={target.value:g}"
    text = f"{asked}, reached sparsity={found:.4g}: {why}" if why else missed
    if text:
        facts.note("target", "", text)


def so_far(facts: Facts) -> dict[str, Any]:
    """The changes and notes so far, as plain values: a resumed run tells them, too.

    Example:
        >>> facts, later = Facts(history=[{"step": 6}]), Facts()
        >>> facts.note("unseen", "fc.weight", "it kept its mask")
        >>> tell_again(later, so_far(facts))
        >>> later == facts
        True
    """
    notes = [[note.topic, note.where, note.text] for note in facts.notes]
    return {"history": [dict(event) for event in facts.history], "notes": notes}


def tell_again(facts: Facts, state: Mapping[str, Any]) -> None:
    """Take over what :func:`so_far` gave; notes of the start, which are here already, stay single."""
    facts.history = [dict(event) for event in state.get("history", ())]
    for topic, where, text in state.get("notes", ()):
        facts.note(topic, where, text)
