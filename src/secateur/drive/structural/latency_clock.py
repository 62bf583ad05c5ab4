"""A stopwatch for whole networks: the uncut one and a cut one in turn, in one engine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, evaluating, forward, inputs_of, to_device
from secateur.core.errors import DataError, MissingExtra, UsageError
from secateur.core.facts import Facts
from secateur.core.paired import median_range
from secateur.core.slots import device_of
from secateur.frontends import export_onnx
from secateur.runtime.layer_times import (
    Chain,
    Timer,
    has_onnx,
    onnx_timer,
    stock_session,
    torch_timer,
)
from secateur.runtime.race import Raced, race, runner

# A pair is raced for so long, and again while the range of its ratio is wider than this share of it, or
# the uncut network so many times slower than it was; but not more often than this, nor less than that.
# Each race opens both networks anew: where a session puts its weights changes its times by percents.
_SECONDS, _WIDE, _SLOW, _MOST, _LEAST = 1.0, 0.04, 1.15, 8, 2


@dataclass(frozen=True)
class Paired:
    """Milliseconds of the uncut and the cut network, measured in turn.

    Args:
        dense: Of the uncut one.
        small: Of the cut one.
        ratio: Cut over uncut.
        ratio_range: The 95 % range of the median ratio.
        small_range: That of the median of the cut network.
        busy: The ranges are wide. All three numbers are then lower quartiles of the runs, and their
            ratio; else they are medians, the ratio that over pairs of runs.
    """

    dense: float
    small: float
    ratio: float
    ratio_range: tuple[float, float]
    small_range: tuple[float, float]
    busy: bool = False

    @staticmethod
    def of(raced: Raced, best: float = math.inf) -> Paired:
        """From a race of the uncut network with the cut one.

        Args:
            raced: Its runs.
            best: What the uncut network took before; if it takes much longer now, others run.

        Example:
            >>> Paired.of(Raced(((2.0,) * 9, (1.0,) * 9))).ratio
            0.5
        """
        # Other processes only ever add time. If they take part in most runs, the median says more
        # about them than about a network; a lower quartile is then nearer to the truth.
        spans = raced.ratio_range(1), median_range(raced.times[1])
        narrow = spans[0][1] - spans[0][0] <= _WIDE * raced.ratio(1)
        if narrow and raced.undisturbed(0) <= _SLOW * best:
            return Paired(raced.median(0), raced.median(1), raced.ratio(1), *spans)
        dense, small = raced.undisturbed(0), raced.undisturbed(1)
        return Paired(dense, small, small / dense, *spans, busy=True)


#: Opens a network in an engine, and gives a function that runs it once.
Opener = Callable[[], Callable[[], None]]


class Clock(Protocol):
    """Measures an engine. What it runs a network on is decided when it is made."""

    engine: str
    threads: int

    def layers(self, chains: Sequence[Chain]) -> Sequence[float]:
        """Milliseconds of layers, alone or one after the other."""
        ...

    def dense(self) -> float:
        """Milliseconds of the uncut network."""
        ...

    def pair(self, small: nn.Module) -> Paired:
        """The uncut network and a cut one, in turn."""
        ...


@dataclass
class EngineClock:
    """The real clock.

    Args:
        engine: ``"onnxruntime"`` or ``"torch"``.
        threads: Of a run.
        prepare: Makes a function that opens a network, which gives one that runs it once.
        timer: Measures layers.
        model: The uncut network.
    """

    engine: str
    threads: int
    prepare: Callable[[nn.Module], Opener]
    timer: Timer
    model: nn.Module
    _dense: list[Opener] = field(default_factory=list)
    _best: float = math.inf

    def open(self) -> EngineClock:
        """Prepare the uncut network now; the engine may refuse it."""
        self._dense[:] = [self.prepare(self.model)]
        self._dense[0]()
        return self

    def layers(self, chains: Sequence[Chain]) -> Sequence[float]:
        """Milliseconds of layers, alone or one after the other."""
        return self.timer(chains)

    def dense(self) -> float:
        """Milliseconds of the uncut network."""
        with evaluating(self.model):
            raced = race([self._dense[0]()], seconds=_SECONDS, drop=False)
        self._best = min(self._best, raced.undisturbed(0))
        return raced.undisturbed(0)

    def pair(self, small: nn.Module) -> Paired:
        """The uncut network and a cut one, in turn."""
        with evaluating(self.model), evaluating(small):
            openers = [*self._dense, self.prepare(small)]
            raced = Raced(((), ()))
            for number in range(_MOST):
                if number >= _LEAST and not Paired.of(raced, self._best).busy:
                    break
                again = race([opened() for opened in openers], seconds=_SECONDS, drop=False).times
                raced = Raced((raced.times[0] + again[0], raced.times[1] + again[1]))
        found = Paired.of(raced, self._best)
        self._best = min(self._best, raced.undisturbed(0))
        return found


def clock_for(model: nn.Module, example: Batch, engine: str, facts: Facts) -> Clock:
    """The clock of an engine; an empty name takes ONNX Runtime where it can run the network.

    Args:
        model: The uncut network.
        example: One batch, of the size that counts.
        engine: ``""``, ``"onnxruntime"`` or ``"torch"``.
        facts: Told why, if it is not ONNX Runtime.

    Raises:
        MissingExtra: ONNX Runtime was asked for and is not installed.
        UsageError: It was asked for, and cannot run this network.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> clock_for(net, torch.zeros(1, 4), "torch", Facts()).engine
        'torch'
    """
    threads = torch.get_num_threads()
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if engine != "torch":
        reason = _not_onnx(device, dtype)
        if engine and reason:
            if not has_onnx():
                raise MissingExtra("onnxruntime", "onnx", "a latency target in ONNX Runtime")
            raise UsageError(
                "a latency target in ONNX Runtime",
                reason,
                "it is measured in float32 on the processor",
                "leave the engine out, or write engine: torch",
            )
        if not reason:
            clock = EngineClock(
                "onnxruntime", threads, _Exported(example, threads), onnx_timer(threads), model
            )
            try:
                return clock.open()
            except (UsageError, DataError) as error:
                if engine:
                    raise
                reason = f"{error.asked}: {error.found}"
        if not engine:
            facts.note("latency", "", f"measured in PyTorch, not in ONNX Runtime: {reason}")
    timer = torch_timer(device, dtype)
    return EngineClock("torch", threads, _InTorch(example), timer, model).open()


def _not_onnx(device: torch.device, dtype: torch.dtype) -> str:
    """Why ONNX Runtime cannot measure; empty if it can."""
    if not has_onnx():
        return "it is not installed"
    if device.type != "cpu":
        return f"the network is on {device}"
    return "" if dtype == torch.float32 else f"the network is in {dtype}"


@dataclass(frozen=True)
class _Exported:
    """Writes a network for ONNX Runtime and opens it."""

    example: Batch
    threads: int

    def __call__(self, model: nn.Module) -> Opener:
        with tempfile.TemporaryDirectory(prefix="secateur-") as place:
            path = Path(place) / "model.onnx"
            export_onnx(model, self.example, path)
            written = path.read_bytes()
        return lambda: self._open(written)

    def _open(self, written: bytes) -> Callable[[], None]:
        opened = stock_session(written, self.threads)
        args, kwargs = inputs_of(self.example)
        named = [x for name, x in kwargs.items() if name != "labels"]
        given = [x for x in (*args, *named) if isinstance(x, Tensor)]
        names = [i.name for i in opened.get_inputs()]
        return runner(opened, {n: x.numpy() for n, x in zip(names, given, strict=True)})


@dataclass(frozen=True)
class _InTorch:
    """Runs a network where its weights are."""

    example: Batch

    def __call__(self, model: nn.Module) -> Opener:
        device = device_of(model)
        batch: Any = to_device(self.example, device)

        def run() -> None:
            with torch.inference_mode():
                forward(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return lambda: run
