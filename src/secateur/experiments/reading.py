"""Accuracy and loss of a network at one moment, without its cost: what is measured many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.core.batches import as_data, evaluating
from secateur.core.errors import NeedsData
from secateur.evaluate.accuracy import answer
from secateur.evaluate.measure import Tally, batches_of, quality


@dataclass(frozen=True)
class Reading:
    """A network measured at one moment.

    Args:
        accuracy: Share of right answers, or the user's metric; ``None`` without targets.
        loss: Mean loss, or ``None``.
        metric: What the accuracy is.
        samples: How many were seen.
        split: ``"test"`` or ``"train"``.

    Example:
        >>> Reading(0.9).metric
        'accuracy'
    """

    accuracy: float | None
    loss: float | None = None
    metric: str = "accuracy"
    samples: int = 0
    split: str = "test"

    @property
    def error(self) -> float:
        """Share of wrong answers; minus the value of a metric of the user's own."""
        if self.accuracy is None:
            raise NeedsData(
                "the errors of a network",
                "the test batches have no classes to be right about",
                "errors are counted over answers that can be right or wrong",
                "yield (inputs, targets), or pass Data(metric=...)",
            )
        return 1 - self.accuracy if self.metric == "accuracy" else -self.accuracy


def read(model: nn.Module, data: Any) -> Reading:
    """Measure a network on the test batches, or on the training batches if there are no others.

    Example:
        >>> import torch
        >>> read(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))]).accuracy
        0.5
    """
    found = as_data(data)
    if found is None:
        raise NeedsData("measuring a network", "no data was given", "", "pass data=")
    tally = Tally()
    split, batches = batches_of(found)
    with evaluating(model):
        for batch in batches:
            tally.add(answer(model, batch, found.loss, judged=found.metric is not None), batch)
    tally.require_samples()
    accuracy, metric = quality(model, found, tally)
    return Reading(accuracy, tally.loss, metric, tally.samples, split)


def require_errors(model: nn.Module, data: Any) -> None:
    """Refuse data on which no errors can be counted, before anything long begins.

    Raises:
        NeedsData: There are no classes to be right about, and no metric.

    Example:
        >>> import torch
        >>> require_errors(nn.Identity(), [(torch.eye(2), torch.eye(2) / 2)])
        Traceback (most recent call last):
            ...
        secateur.core.errors.NeedsData: the errors of a network: the test batches have no classes ...
    """
    _ = read(model, data).error
