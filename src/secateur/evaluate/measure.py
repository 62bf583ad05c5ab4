"""One network, measured: accuracy, loss, cost and latency."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.core.batches import (
    Batch,
    Data,
    Metric,
    as_data,
    evaluating,
    narrow,
    size_of,
    to_device,
)
from secateur.core.errors import DataError, SecateurError, UsageError, first_line
from secateur.core.masks import Masks
from secateur.core.slots import bare, device_of
from secateur.drive.network import require_values
from secateur.drive.pruned import Pruned
from secateur.drive.training.held import masks_of
from secateur.evaluate.accuracy import Answers, answer
from secateur.evaluate.cost import Cost, cost_of
from secateur.evaluate.latency import Latency, latency_of

#: Answers from which on it is odd that the right ones are all of one class.
_SEVERAL = 20
_LARGE = 700.0  # e to the power of more is infinite in double precision


@dataclass(frozen=True)
class Measurement:
    """What a network can do and what it costs.

    Args:
        cost: Parameters, non-zeros, multiply-adds, bytes.
        accuracy: Share of right answers (0 to 1), or the value of the user's metric (larger is
            better); ``None`` without targets.
        metric: ``"accuracy"``, or the name of the user's metric.
        loss: Mean loss over what has a label (samples, tokens, pixels), else over the samples; or
            ``None``.
        samples: How many samples were seen.
        split: Where they came from: ``"test"``, ``"train"``, or ``""`` without data.
        latency: Of one batch, or ``None`` if it was not asked for.
        perplexity: Of a causal language model: e to the mean cross-entropy of a token, whatever
            else is in its loss; else ``None``.
        one_class: Whether the right answers, 20 or more, are all of one class: sorted data, as a
            rule, and a network that always answers it is right.
    """

    cost: Cost
    accuracy: float | None = None
    metric: str = "accuracy"
    loss: float | None = None
    samples: int = 0
    split: str = ""
    latency: Latency | None = None
    perplexity: float | None = None
    one_class: bool = False


def measure(
    model: nn.Module | Pruned,
    data: Any = None,
    *,
    masks: Masks | None = None,
    example: Batch | None = None,
    latency: bool = True,
) -> Measurement:
    """Measure one network. It is left as it was.

    Args:
        model: Any torch module, or the result of a pruning run.
        data: :class:`~secateur.core.batches.Data` (its ``test``, or else its ``train`` batches are
            used), or an iterable of batches.
        masks: The weights that were pruned; they are what the file stores sparse. By default those
            that the model carries.
        example: The batch to time and to count multiply-adds with; by default the first sample of
            the data, or the first batch where samples cannot be taken out of it (a graph, say).
        latency: Whether to time it.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> found = measure(net, [(x, torch.tensor([0, 0]))], latency=False)
        >>> found.accuracy, found.cost.nonzeros
        (0.5, 2)
    """
    network, masks = opened(model, masks)
    data = as_data(data)
    tally = Tally()
    if data is not None:
        split, batches = batches_of(data)
        with evaluating(network):
            for batch in batches:
                tally.add(answer(network, batch, data.loss, judged=data.metric is not None), batch)
        tally.require_samples()
        example = tally.example if example is None else example
    else:
        split = ""
    accuracy, metric = quality(network, data, tally)
    return Measurement(
        cost=cost_of(network, masks, example),
        accuracy=accuracy,
        metric=metric,
        loss=tally.loss,
        samples=tally.samples,
        split=split,
        latency=latency_of(network, example) if latency and example is not None else None,
        perplexity=tally.perplexity,
        one_class=tally.one_class,
    )


@dataclass
class Tally:
    """Running sums over batches."""

    samples: int = 0
    right: int = 0
    units: int = 0
    losses: float = 0.0
    weighed: int = 0
    nats: float = 0.0
    tokens: int = 0
    example: Batch | None = None
    judged: bool = field(default=False)
    classes: set[int] = field(default_factory=set)

    def add(self, answers: Answers, batch: Batch) -> None:
        """Count one batch."""
        if self.example is None and answers.samples:
            self.example = narrow(batch, 1)
        self.samples += answers.samples
        if answers.right is not None:
            self.judged = True
            self.right += int(answers.right.sum())
            self.units += len(answers.right)
            self.classes.update(answers.classes or ())
        # The mean over nothing is NaN: a batch without any label that counts says nothing.
        if answers.loss is not None and answers.counted:
            self.losses += answers.loss * answers.counted
            self.weighed += answers.counted
        if answers.nats is not None:
            self.nats += answers.nats * answers.counted
            self.tokens += answers.counted

    @property
    def accuracy(self) -> float | None:
        """Share of right answers."""
        return self.right / self.units if self.units else None

    @property
    def one_class(self) -> bool:
        """Whether there are many right answers, and all of one class."""
        return self.units >= _SEVERAL and len(self.classes) == 1

    @property
    def loss(self) -> float | None:
        """Mean loss over the units that have a label, or else over the samples."""
        return self.losses / self.weighed if self.weighed else None

    @property
    def perplexity(self) -> float | None:
        """Of a causal language model."""
        if not self.tokens or self.tokens != self.units:
            return None
        return math.exp(min(self.nats / self.tokens, _LARGE))

    def require_samples(self) -> None:
        """Raise if nothing was seen."""
        if not self.samples:
            raise DataError(
                "measuring a network",
                "the loader yielded no samples",
                "there is nothing to measure on",
                "check the loader, and whether it can be iterated more than once",
            )


def opened(model: nn.Module | Pruned, masks: Masks | None) -> tuple[nn.Module, Masks | None]:
    """The module itself and its masks."""
    if isinstance(model, Pruned):
        return model.model, masks or model.masks
    require_values("measuring", model)
    return model, masks or (masks_of(bare(model)) or None)


def batches_of(data: Data) -> tuple[str, Iterable[Batch]]:
    """The batches to measure on, and their name. Training batches stand in for missing test ones."""
    if data.test is not None:
        return "test", data.test
    if data.train is not None:
        return "train", data.train
    raise UsageError(
        "measuring on data",
        "it has neither test nor train batches",
        "accuracy is counted over batches",
        "pass Data(test=...)",
    )


def quality(model: nn.Module, data: Data | None, tally: Tally) -> tuple[float | None, str]:
    """Value and name of the metric."""
    if data is None or data.metric is None:
        return tally.accuracy, "accuracy"
    device = device_of(model)
    _, batches = batches_of(data)
    name = getattr(data.metric, "__name__", type(data.metric).__name__)
    if name == "accuracy":  # may count otherwise than ours, whose error is known
        name = "own accuracy"
    filled = (to_device(b, device) for b in batches if size_of(b))
    with evaluating(model), torch.no_grad():
        return _judged(name, data.metric, model, filled), name


def _judged(name: str, metric: Metric, model: nn.Module, batches: Iterable[Batch]) -> float:
    """The value of a metric of the user's own; the network alone was run on the batches before."""
    found = ""
    try:
        value = metric(model, batches)
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"it fails ({first_line(error)})"
        cause: Exception = error
    else:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            found, cause = f"it returned {value!r:.60}, which is no number", error
    raise DataError(
        f"the metric {name!r}",
        found,
        "it is called as metric(model, batches) and returns a number; larger is better",
        "correct the metric, or leave it out to count right answers",
    ) from cause
