"""How long a forward pass takes, measured fairly: same input, in turn, medians and spread."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.paired import median_range
from secateur.core.slots import device_of

_WARM_UP = 3
_FEWEST = 11
_MOST = 301

#: A ratio nearer to one than this counts as no difference. Two equal networks at different places
#: in memory can differ by a few per cent, however often one measures.
MATTERS = 1.05


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass of one batch.

    Example:
        >>> Latency.of([0.002, 0.001, 0.003], batch=8).median
        2.0
    """

    median: float
    p10: float
    p90: float
    batch: int
    threads: int
    repetitions: int

    @staticmethod
    def of(seconds: Sequence[float], *, batch: int) -> Latency:
        """Summarise single timings."""
        times = sorted(1000 * s for s in seconds)
        return Latency(
            median=quantile(times, 0.5),
            p10=quantile(times, 0.1),
            p90=quantile(times, 0.9),
            batch=batch,
            threads=torch.get_num_threads(),
            repetitions=len(times),
        )


@dataclass(frozen=True)
class Speed:
    """How many times faster the second network is: the median over paired runs, and its 95 % range.

    Example:
        >>> Speed.of([2.0, 2.2, 2.1] * 10, [1.0, 1.1, 1.05] * 10).verdict
        'faster'
        >>> Speed.of([1.0, 1.2, 1.1] * 10, [1.1, 1.0, 1.2] * 10).verdict
        'same'
    """

    ratio: float
    low: float
    high: float

    @staticmethod
    def of(a: Sequence[float], b: Sequence[float]) -> Speed:
        """From timings of ``a`` and ``b`` that were taken side by side.

        The range is that of the median by order statistics, which assumes no distribution.
        """
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        return Speed(quantile(ratios, 0.5), *median_range(ratios))

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"same"`` if it may be by less than 5 %."""
        if self.low > MATTERS:
            return "faster"
        return "slower" if self.high < 1 / MATTERS else "same"

    @property
    def words(self) -> str:
        """The verdict in words that tell a small difference from none.

        Example:
            >>> Speed(1.0, 0.98, 1.02).words, Speed(1.04, 1.03, 1.05).words
            ('same within noise', 'less than 5 % faster')
            >>> Speed(0.8, 0.6, 0.97).words
            'not surely 5 % slower'
        """
        if self.verdict != "same":
            return self.verdict
        if self.low <= 1 <= self.high:
            return "same within noise"
        way = "faster" if self.low > 1 else "slower"
        small = self.low >= 1 / MATTERS and self.high <= MATTERS
        amount = f"{MATTERS - 1:.0%}".replace("%", " %")
        return f"{'less than' if small else 'not surely'} {amount} {way}"


def race(models: Sequence[nn.Module], example: Batch, *, seconds: float = 1.0) -> list[list[float]]:
    """Time models in turn on the same input: a, b, b, a, a, b, ...

    Taking turns keeps a change of the machine's clock or load from favouring one of them, and
    changing the order keeps either from always running on the other's warm caches.

    Args:
        models: Run in evaluation mode; left as they were.
        example: One batch.
        seconds: About how long to measure; at least 11 and at most 301 passes are made each.

    Returns:
        Seconds of each pass, one list per model, in the order in which they were taken.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> len(race([net], torch.zeros(1, 4), seconds=0.0)[0])
        11
    """
    calls = [_call(model, example) for model in models]
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
            # What a network keeps of its first pass (a table of positions) serves training later, which
            # a tensor that was made in inference mode cannot.
            with torch.no_grad():
                forward(model, to_device(example, device_of(model)))
        for call in calls:
            for _ in range(_WARM_UP):
                call()
        start = time.perf_counter()
        for turn in range(_MOST):
            order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
            for index in order:
                times[index].append(_timed(calls[index]))
            if turn + 1 >= _FEWEST and time.perf_counter() - start > seconds:
                break
    return times


def latency_of(model: nn.Module, example: Batch, *, seconds: float = 1.0) -> Latency:
    """Latency of one model alone.

    Example:
        >>> latency_of(nn.Linear(4, 2), torch.zeros(3, 4), seconds=0.0).batch
        3
    """
    return Latency.of(race([model], example, seconds=seconds)[0], batch=size_of(example))


def quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of sorted numbers, between neighbours by straight lines.

    Example:
        >>> quantile([1.0, 2.0, 4.0], 0.75)
        3.0
    """
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _call(model: nn.Module, example: Batch) -> Callable[[], None]:
    device = device_of(model)
    batch = to_device(example, device)

    def call() -> None:
        with torch.inference_mode():
            forward(model, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
