"""Schedules: when how much of the target is reached, and when masks may change.

A schedule maps a time (in steps, epochs or rounds, never mixed) to the share of the target
reached, 0 before ``begin``, 1 from ``end`` on. A new schedule is a dataclass here and one line in
``SCHEDULES``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from secateur.core.arguments import require_count, require_numbers
from secateur.core.errors import UsageError


class Schedule(Protocol):
    """When. Laws: 0 at ``begin``, 1 at ``end``, inside [0, 1]; monotone unless ``cyclic``."""

    @property
    def begin(self) -> float:
        """Where pruning starts."""
        ...

    @property
    def end(self) -> float:
        """Where the target is reached."""
        ...

    @property
    def frequency(self) -> float:
        """Time between two mask updates."""
        ...

    @property
    def unit(self) -> str:
        """What begin, end and frequency count.

        ``"steps"`` or ``"epochs"`` of a training loop, or ``"rounds"`` of measuring and pruning
        without training.
        """
        ...

    @property
    def cyclic(self) -> bool:
        """Whether sparsity may go down again."""
        ...

    def share(self, progress: float, sparsity: float) -> float:
        """Share of the target at ``progress`` in [0, 1] for a final ``sparsity``."""
        ...


def share_at(schedule: Schedule, time: float, sparsity: float) -> float:
    """Share of the target at ``time``.

    Example:
        >>> share_at(Linear(begin=10, end=20), 15, 0.9)
        0.5
    """
    if time >= schedule.end:
        return 1.0
    if time < schedule.begin:
        return 0.0
    span = schedule.end - schedule.begin
    return schedule.share((time - schedule.begin) / span if span else 1.0, sparsity)


def due(schedule: Schedule, time: float) -> bool:
    """Whether masks may change at ``time``: every ``frequency`` from begin on, and at the end.

    Example:
        >>> [t for t in range(12) if due(Linear(begin=2, end=9, frequency=3), t)]
        [2, 5, 8, 9]
    """
    if time < schedule.begin or time > schedule.end:
        return False
    ticks = (time - schedule.begin) / schedule.frequency
    return math.isclose(ticks, round(ticks), abs_tol=1e-6) or math.isclose(time, schedule.end)


def events(schedule: Schedule) -> list[float]:
    """All times at which masks change.

    Example:
        >>> events(Linear(begin=2, end=9, frequency=3))
        [2, 5, 8, 9]
    """
    count = int((schedule.end - schedule.begin) / schedule.frequency + 1e-6)
    times = [schedule.begin + k * schedule.frequency for k in range(count + 1)]
    return times if times and math.isclose(times[-1], schedule.end) else [*times, schedule.end]


@dataclass(frozen=True)
class OneShot:
    """Everything at once, at ``begin``.

    **formula** 1
    **Shapes** scalar
    **Units** ``begin`` in ``unit``
    **Needs** nothing
    **Source** definition

    Example:
        >>> share_at(OneShot(), 0, 0.9)
        1.0
    """

    begin: float = 0
    unit: str = "rounds"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def end(self) -> float:
        return self.begin

    @property
    def frequency(self) -> float:
        return 1

    @property
    def cyclic(self) -> bool:
        return False

    def share(self, progress: float, sparsity: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial:
    r"""Gradual pruning, fast at first and slower towards the end (AGP; cubic by default).

    **formula** :math:`1 - (1 - p)^{\text{power}}`
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** Zhu and Gupta, arXiv 1710.01878

    Example:
        >>> share_at(Polynomial(begin=0, end=100), 50, 0.9)
        0.875
    """

    begin: float = 0
    end: float = 1000
    frequency: float = 100
    power: float = 3
    unit: str = "steps"
    cyclic: bool = False

    def __post_init__(self) -> None:
        _check(self)
        require_numbers(self, ("power",))
        if self.power <= 0:
            raise UsageError(
                f"Polynomial(power={self.power:g})",
                "the power is not positive",
                "sparsity would not rise from 0 to the target",
                "3 is usual",
            )

    def share(self, progress: float, sparsity: float) -> float:
        return float(1 - (1 - progress) ** self.power)


@dataclass(frozen=True)
class Linear:
    """Equal steps.

    **formula** :math:`p`
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** common

    Example:
        >>> share_at(Linear(begin=0, end=100), 25, 0.9)
        0.25
    """

    begin: float = 0
    end: float = 1000
    frequency: float = 100
    unit: str = "steps"
    cyclic: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def share(self, progress: float, sparsity: float) -> float:
        return progress


@dataclass(frozen=True)
class Exponential:
    r"""Levels that each keep the same fraction of what is left, as in iterative pruning.

    ``Exponential(end=5)`` in a one-shot run prunes in five rounds, re-measuring between them.

    **formula** :math:`(1 - (1 - S)^p) / S` for a final sparsity :math:`S`
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** SynFlow (arXiv 2006.05467), lottery tickets (arXiv 1803.03635)

    Example:
        >>> round(share_at(Exponential(begin=0, end=2), 1, 0.75), 4)
        0.6667
    """

    begin: float = 0
    end: float = 10
    frequency: float = 1
    unit: str = "rounds"
    cyclic: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def share(self, progress: float, sparsity: float) -> float:
        if sparsity <= 0:
            return progress
        return float((1 - (1 - sparsity) ** progress) / sparsity)


@dataclass(frozen=True)
class Cosine:
    r"""Slow, fast, slow.

    **formula** :math:`(1 - \cos \pi p) / 2`
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** common

    Example:
        >>> round(share_at(Cosine(begin=0, end=100), 50, 0.9), 4)
        0.5
    """

    begin: float = 0
    end: float = 1000
    frequency: float = 100
    unit: str = "steps"
    cyclic: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def share(self, progress: float, sparsity: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Cyclic:
    r"""Sparsity rises and falls like a wave and ends at the target; weights may come back.

    **formula** :math:`(1 - \cos 2 \pi (c - \tfrac12) p) / 2` for :math:`c` cycles, a whole number
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** common

    Example:
        >>> [round(share_at(Cyclic(begin=0, end=3, cycles=2), t, 0.9), 2) for t in (0, 1, 2, 3)]
        [0.0, 1.0, 0.0, 1.0]
    """

    begin: float = 0
    end: float = 1000
    frequency: float = 100
    cycles: int = 2
    unit: str = "steps"
    cyclic: bool = True

    def __post_init__(self) -> None:
        _check(self)
        what = "a whole number of waves"  # with a part of one it would not come to the target, but jump
        require_count("Cyclic(cycles=...)", self.cycles, what=what, write="cycles=2")

    def share(self, progress: float, sparsity: float) -> float:
        return (1 - math.cos(2 * math.pi * (self.cycles - 0.5) * progress)) / 2


@dataclass(frozen=True)
class Alternating:
    r"""Dense and compressed phases in turn (AC/DC): ``frequency`` is the length of a phase.

    The first phase is dense, so ``begin`` is one phase before the first compression. The last
    phase before ``end`` is dense too, whatever the count, and at ``end`` the network is compressed
    for good.

    **formula** 1 in phases 1, 3, 5, ... except the last one before ``end``, else 0
    **Shapes** scalar
    **Units** ``begin``, ``end`` and ``frequency`` in ``unit``
    **Needs** nothing
    **Source** AC/DC, arXiv 2106.12379

    Args:
        begin: Start of the first dense phase that counts; before it the network is dense anyway.
        end: Last compression.
        frequency: Length of a phase.
        unit: What the three count.
        reset_momentum: Set the optimizer's momenta to zero at each decompression, as AC/DC does.

    Example:
        >>> phases = Alternating(begin=0, end=6, frequency=1)
        >>> [share_at(phases, t, 0.9) for t in range(8)]
        [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """

    begin: float = 0
    end: float = 1000
    frequency: float = 100
    unit: str = "steps"
    reset_momentum: bool = True
    cyclic: bool = True

    def __post_init__(self) -> None:
        _check(self)
        phases = (self.end - self.begin) / self.frequency
        if phases < 1 or not math.isclose(phases, round(phases), abs_tol=1e-6):
            raise UsageError(
                f"Alternating(begin={self.begin:g}, end={self.end:g}, frequency={self.frequency:g})",
                f"{phases:g} phases lie between begin and end",
                "phases are whole and equally long",
                "let end - begin be a multiple of frequency",
            )

    def share(self, progress: float, sparsity: float) -> float:
        if progress >= 1:
            return 1.0
        phases = round((self.end - self.begin) / self.frequency)
        phase = int(progress * phases + 1e-9)
        return float(phase % 2 == 1 and phase < phases - 1)


def _check(schedule: Schedule) -> None:
    name = type(schedule).__name__
    if schedule.unit not in ("steps", "epochs", "rounds"):
        raise UsageError(
            f"{name}(unit={schedule.unit!r})",
            "unknown unit",
            "time is counted in steps, epochs or rounds",
            "choose one of the three",
        )
    require_numbers(schedule, ("begin", "end", "frequency"))
    if not 0 <= schedule.begin <= schedule.end or schedule.frequency <= 0:
        raise UsageError(
            f"{name}(begin={schedule.begin:g}, end={schedule.end:g}, frequency={schedule.frequency:g})",
            "it does not run forward",
            "0 <= begin <= end and frequency > 0 must hold",
            "correct the three numbers",
        )


SCHEDULES: dict[str, type[Schedule]] = {
    "one_shot": OneShot,
    "linear": Linear,
    "cubic": Polynomial,
    "polynomial": Polynomial,
    "exponential": Exponential,
    "cosine": Cosine,
    "cyclic": Cyclic,
    "alternating": Alternating,
}
