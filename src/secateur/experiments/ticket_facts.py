"""What a search for lottery tickets found, as plain facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core.facts import Note
from secateur.core.masks import Masks
from secateur.experiments.stages import Stage
from secateur.formats import read_bundle


@dataclass(frozen=True)
class StageFacts:
    """One finished stage.

    Args:
        name: ``"dense"`` or the name of the level.
        folder: A bundle, like those of ``prune``.
        asked: The sparsity asked for; 0 for the dense training.
        sparsity: Share of zeros among the weights that take part.
        accuracy: After training, on the test data (or the training data if there is none).
        loss: The same.
        accuracy_at_start: Right after pruning and rewinding, before training.
        churn: Jaccard distance between this level's mask and the one before it.
        mask: Fingerprint of the masks.
        seconds: That the stage took when it was computed.
        done: Whether it was found finished.
    """

    name: str
    folder: str
    asked: float
    sparsity: float
    accuracy: float | None
    loss: float | None
    accuracy_at_start: float | None
    churn: float
    mask: str
    seconds: float
    done: bool


@dataclass(frozen=True)
class TicketFacts:
    """What a search for tickets found.

    Args:
        folder: Of the run: one folder a level, each of them a bundle.
        rewind: What happened to the survivors.
        recipe: As plain values.
        plan: What differs from the default plan.
        metric: What the accuracies are.
        dense: The dense training.
        levels: From dense to sparse.
        notes: What a user should know.
        split: What they were measured on, ``"test"`` or ``"train"``.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from secateur.experiments import TicketPlan, Training, find_ticket
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> batches = [(x[:32], x[:32, :2].argmax(1)), (x[32:], x[32:, :2].argmax(1))]
        >>> build = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> how = TicketPlan(levels=(0.36, 0.79), training=Training(epochs=2))
        >>> found = find_ticket(build, data=batches, folder=tempfile.mkdtemp(), plan=how)
        >>> [(level.name[:13], round(level.sparsity, 2)) for level in found.levels]
        [('level-01-0.36', 0.36), ('level-02-0.79', 0.79)]
        >>> dense, sparse = found.masks()
        >>> bool((sparse["0.weight"] & ~dense["0.weight"]).any())  # nested
        False
    """

    folder: str
    rewind: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    metric: str
    dense: StageFacts
    levels: tuple[StageFacts, ...]
    notes: list[Note] = field(default_factory=list)
    split: str = "test"

    def masks(self) -> list[Masks]:
        """The masks of all levels, read from their folders."""
        return [read_bundle(level.folder).masks for level in self.levels]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def facts_of(stage: Stage, done: bool) -> StageFacts:
    """The facts of a stage, as it was written."""
    measures = stage.facts.measures
    return StageFacts(
        name=stage.folder.name,
        folder=str(stage.folder),
        asked=measures["asked"],
        sparsity=stage.masks.sparsity,
        accuracy=measures["accuracy"],
        loss=measures["loss"],
        accuracy_at_start=measures["accuracy_at_start"],
        churn=measures["churn"],
        mask=stage.masks.fingerprint() if stage.masks else "",
        seconds=measures["seconds"],
        done=done,
    )
