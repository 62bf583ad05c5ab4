"""Timing of ONNX Runtime sessions in turn, so that none of them meets a quieter machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.core.paired import median_range
from secateur.runtime.session import session

_WARM_UP = 2
_FEWEST, _MOST = 5, 200
# A turn is at most so many runs, besides the one that does not count.
_LONGEST = 8
#: Seconds of a turn in races of whole models, which users run again and again.
TURN = 0.1
# Rounds after which a runner has lost if its fastest run is so many times slower than the best, and
# by so many milliseconds: a process that is held up loses some ten.
_HOPELESS = {1: (3.0, 20.0), 3: (2.0, 0.0), 8: (1.4, 0.0)}
_LOW = 0.25
# Beyond so many times the time allowed, fewer rounds must do.
_PATIENCE = 3


def open_session(model: Any, threads: int | None) -> Any:
    """A session of a model in memory, whose threads rest when it does not run.

    ONNX Runtime's threads wait for the next run in a busy loop. In a race they would take the
    processor from the one that runs next.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it refuses is said in our words
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return session(model.SerializeToString(), threads, options=options)


def runner(opened: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """A function that runs a session once; inputs and outputs stay where they are."""
    binding = opened.io_binding()
    for item in opened.get_inputs():
        binding.bind_cpu_input(item.name, np.asarray(feeds[item.name], order="C"))
    for item in opened.get_outputs():
        binding.bind_output(item.name)

    def run() -> None:
        opened.run_with_iobinding(binding)

    return run


@dataclass(frozen=True)
class Raced:
    """Milliseconds of every turn; the first runner is the one that others are compared with.

    Example:
        >>> raced = Raced(((2.0, 4.0, 2.2), (1.0, 2.0, 1.1)))
        >>> raced.median(0), raced.ratio(1)
        (2.2, 0.5)
    """

    times: tuple[tuple[float, ...], ...]

    def finished(self, which: int) -> bool:
        """Whether a runner ran in every round."""
        return len(self.times[which]) == len(self.times[0])

    def median(self, which: int) -> float:
        """Of one runner."""
        return statistics.median(self.times[which])

    def ratio(self, which: int) -> float:
        """Time of one runner over that of the first: the median over paired turns."""
        pairs = zip(self.times[which], self.times[0], strict=False)
        return statistics.median(own / first for own, first in pairs)

    def undisturbed(self, which: int) -> float:
        """Milliseconds of a run that nothing disturbs: the lower quartile.

        Other processes only ever add time. On a busy machine they add to more than half of the
        runs, and the median says more about them than about a kernel.
        """
        return float(np.quantile(self.times[which], _LOW))

    def ratio_range(self, which: int) -> tuple[float, float]:
        """The 95 % range of the median ratio."""
        pairs = zip(self.times[which], self.times[0], strict=False)
        return median_range([own / first for own, first in pairs])

    def spread(self, which: int) -> tuple[float, float]:
        """The 10 % and 90 % quantiles."""
        low, high = np.quantile(self.times[which], [0.1, 0.9])
        return float(low), float(high)


def race(
    runners: Sequence[Callable[[], None]],
    *,
    seconds: float,
    most: int = _MOST,
    drop: bool = True,
    turn: float = 0.0,
) -> Raced:
    """Time runners in turn: a, b, b, a, a, b, ...

    Who runs after another finds the caches full of that one's weights, and threads asleep. For a
    layer within a model this is as in use. A whole model is mostly run again and again: with a
    ``turn``, each runs several times in a row, of which the first does not count, and the median
    of the others is its time.

    Args:
        runners: The first is never dropped.
        seconds: About how long; at least 5 rounds are made, 3 if they take much longer.
        most: Rounds at most.
        drop: Leave out those that are hopeless after a few rounds.
        turn: Seconds of the slowest runner's turn, about; the others run equally often. If that is
            one run, it counts.

    Example:
        >>> len(race([lambda: None, lambda: None], seconds=0.0, drop=False).times[1])
        3
    """
    for _ in range(_WARM_UP):
        slowest = max(map(_milliseconds, runners))
    runs = min(_LONGEST, int(1000 * turn / max(slowest, 1e-3)))
    times: list[list[float]] = [[] for _ in runners]
    running = list(range(len(runners)))
    start = time.perf_counter()
    for done in range(1, most + 1):
        for which in running if done % 2 else reversed(running):
            times[which].append(_turn(runners[which], runs))
        elapsed = time.perf_counter() - start
        if drop and done in _HOPELESS:
            factor, margin = _HOPELESS[done]
            limit = factor * min(map(min, times)) + margin
            running = [i for i in running if i == 0 or min(times[i]) <= limit]
        if done >= (_FEWEST if elapsed < _PATIENCE * seconds else 3) and elapsed > seconds:
            break
    return Raced(tuple(map(tuple, times)))


def _turn(run: Callable[[], None], runs: int) -> float:
    if runs < 2:
        return _milliseconds(run)
    run()
    return statistics.median(_milliseconds(run) for _ in range(runs))


def _milliseconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)
