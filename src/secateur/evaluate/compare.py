"""Two networks on the same batches and the same clock: what was really gained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, as_data, evaluating, size_of
from secateur.core.losses import IGNORED
from secateur.core.masks import Masks
from secateur.core.randomness import own_random
from secateur.core.slots import bare
from secateur.drive.pruned import Pruned
from secateur.evaluate.accuracy import Answers, answer, choices, divergence
from secateur.evaluate.cost import cost_of
from secateur.evaluate.latency import Latency, Speed, race
from secateur.evaluate.measure import Measurement, Tally, batches_of, opened, quality
from secateur.evaluate.verdict import Gain, verdict
from secateur.formats import same_bits
from secateur.runtime.torch_layers import is_accelerated


@dataclass(frozen=True)
class Comparison:
    """What changes from ``a`` to ``b``.

    Args:
        a: The first network, as a rule the dense one.
        b: The second network, as a rule the pruned one.
        identical: Whether every tensor has the same bits.
        difference: Accuracy (or metric) of ``b`` minus that of ``a``.
        difference_error: Its standard error, paired over samples; ``None`` for a user's metric.
        agreement: Share of units for which both choose the same class.
        kl: Mean KL(a || b) of the predicted distributions, in nats.
        speed: How many times faster ``b`` is; ``None`` if it was not timed.
        verdict: Which gains are real, in plain words.
    """

    a: Measurement
    b: Measurement
    identical: bool
    difference: float | None
    difference_error: float | None
    agreement: float | None
    kl: float | None
    speed: Speed | None
    verdict: tuple[Gain, ...]

    @property
    def size_ratio(self) -> float:
        """How many times smaller the file of ``b`` is."""
        return self.a.cost.bytes / self.b.cost.bytes

    def gain(self, name: str) -> Gain | None:
        """The verdict on ``"smaller"``, ``"faster"`` or ``"accuracy"``."""
        return next((gain for gain in self.verdict if gain.name == name), None)


def compare(
    a: nn.Module | Pruned,
    b: nn.Module | Pruned,
    data: Any = None,
    *,
    masks: tuple[Masks | None, Masks | None] = (None, None),
    example: Batch | None = None,
    latency: bool = True,
) -> Comparison:
    """Compare two networks: paired on the same batches, timed in turn on the same input.

    Random numbers that the networks draw, as a variational autoencoder does, are the same for both.

    Args:
        a: The first network, as a rule the dense one.
        b: The second network.
        data: As in :func:`~secateur.evaluate.measure.measure`.
        masks: Masks of the two, where they are not on the models.
        example: The batch to time; by default the first sample of the data.
        latency: Whether to time them.

    Example:
        >>> import secateur
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
        >>> pruned = secateur.prune(net, secateur.recipes.magnitude(0.9))
        >>> found = compare(net, pruned, [torch.randn(32, 64)], latency=False)
        >>> found.identical, found.gain("smaller").real
        (False, True)
    """
    data = as_data(data)
    (first, masks_a), (second, masks_b) = opened(a, masks[0]), opened(b, masks[1])
    tallies, pairs, split = (Tally(), Tally()), _Pairs(), ""
    if data is not None:
        split, batches = batches_of(data)
        judged = data.metric is not None
        with evaluating(first), evaluating(second):
            for batch in batches:
                with own_random(first):  # a network that draws random numbers draws the same twice
                    one = answer(first, batch, data.loss, judged=judged)
                both = one, answer(second, batch, data.loss, judged=judged)
                for tally, answers in zip(tallies, both, strict=True):
                    tally.add(answers, batch)
                pairs.add(*both)
        tallies[0].require_samples()
        example = tallies[0].example if example is None else example
    latencies, speed = _race(first, second, example) if latency else ((None, None), None)
    found = []
    for network, own, tally, taken in zip(
        (first, second), (masks_a, masks_b), tallies, latencies, strict=True
    ):
        with own_random(network):
            value, metric = quality(network, data, tally)
            cost = cost_of(network, own, example)
        found.append(
            Measurement(
                cost,
                value,
                metric,
                tally.loss,
                tally.samples,
                split,
                latency=taken,
                perplexity=tally.perplexity,
                one_class=tally.one_class,
            )
        )
    values = found[0].accuracy, found[1].accuracy
    difference = None if values[0] is None or values[1] is None else values[1] - values[0]
    error = pairs.error if found[0].metric == "accuracy" else None
    return Comparison(
        a=found[0],
        b=found[1],
        identical=identical(first, second),
        difference=difference,
        difference_error=error,
        agreement=pairs.agreement,
        kl=pairs.kl,
        speed=speed,
        verdict=verdict(found[0], found[1], difference, error, speed, skips=is_accelerated(second)),
    )


def identical(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same tensors, bit for bit, under the same names.

    Wrappers of ``torch.compile`` and data parallelism are passed over.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> other = nn.Linear(2, 2)
        >>> identical(net, net), identical(net, other)
        (True, False)
    """
    left, right = bare(a).state_dict(), bare(b).state_dict()
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape
        and left[n].dtype == right[n].dtype
        and same_bits(left[n].cpu(), right[n].cpu())
        for n in left
    )


class _Pairs:
    """Sums over units that both networks answered."""

    def __init__(self) -> None:
        self._units = self._equal = 0
        self._kl = 0.0
        self._per_sample: list[Tensor] = []

    def add(self, a: Answers, b: Answers) -> None:
        if a.logits is not None and b.logits is not None and a.logits.shape == b.logits.shape:
            left, right = a.logits, b.logits.to(a.logits.device)
            self._units += len(left)
            chosen = choices(left)
            self._equal += int(((chosen == choices(right)) & (chosen != IGNORED)).sum())
            self._kl += float(divergence(left, right).sum())
        if a.right is not None and b.right is not None and len(a.right) == len(b.right):
            change = b.right.cpu().double() - a.right.cpu().double()
            sums = torch.zeros(a.samples, 2, dtype=torch.float64)
            sums[:, 0].index_add_(0, a.sample, change)
            sums[:, 1].index_add_(0, a.sample, torch.ones_like(change))
            self._per_sample.append(sums)

    @property
    def agreement(self) -> float | None:
        return self._equal / self._units if self._units else None

    @property
    def kl(self) -> float | None:
        return self._kl / self._units if self._units else None

    @property
    def error(self) -> float | None:
        """Standard error of the difference of accuracy, with samples as the independent units.

        The tokens of one text are not independent, so their changes are summed per sample first:
        the usual error of a ratio of sums.
        """
        if not self._per_sample:
            return None
        change, count = torch.cat(self._per_sample).T
        n, total = int((count > 0).sum()), float(count.sum())
        if n < 2:
            return None
        residual = change - float(change.sum()) / total * count
        return math.sqrt(float(residual.square().sum()) * n / (n - 1)) / total


def _race(
    a: nn.Module, b: nn.Module, example: Batch | None
) -> tuple[tuple[Latency | None, Latency | None], Speed | None]:
    if example is None:
        return (None, None), None
    first, second = race([a, b], example, seconds=2.0)
    batch = size_of(example)
    both = Latency.of(first, batch=batch), Latency.of(second, batch=batch)
    return both, Speed.of(first, second)
