"""Every law is broken once on purpose, and the kit must notice."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from secateur import testing
from secateur.allocate import (
    Uniform,
)
from secateur.core.budget import Budget, Item
from secateur.core.errors import MissingExtra
from secateur.core.masks import Masks
from secateur.core.select import quota
from secateur.core.weight import Axes, Weight
from secateur.formats import LAYOUTS
from secateur.pattern import (
    Elements,
)
from secateur.recover import (
    BatchNorm,
    Repaired,
)
from secateur.stats import (
    InputNorm,
    Sketch,
    Stats,
)
from secateur.testing import (
    check_allocation,
    check_criterion,
    check_layout,
    check_masks,
    check_pattern,
    check_recovery,
    check_reestimation,
    check_refusal,
    check_rounding,
    check_schedule,
    check_stat,
    sample_weight,
)

few = settings(max_examples=12, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Broken:
    """A criterion made of a function, for planting errors."""

    score: Callable[[Weight, Stats], Tensor]
    needs: frozenset[Any] = frozenset()

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return self.score(weight, stats)


def writes_weight(weight: Weight, stats: Stats) -> Tensor:
    weight.value[0] *= 2
    return weight.value.abs()


def writes_statistic(weight: Weight, stats: Stats) -> Tensor:
    return weight.value.abs() * stats(InputNorm(), weight).add_(1).mean()


BROKEN_CRITERIA: list[tuple[str, Broken]] = [
    ("shape of the weight", Broken(lambda w, s: w.value.abs().sum(0))),
    ("finite", Broken(lambda w, s: w.value.abs().log() / 0.0)),
    ("write the weight", Broken(writes_weight)),
    ("write the statistics", Broken(writes_statistic, frozenset({InputNorm()}))),
    ("deterministic", Broken(lambda w, s: torch.rand(w.value.shape))),
    ("it declares", Broken(lambda w, s: w.value * s(InputNorm(), w))),
    (
        "permutes scores",
        Broken(lambda w, s: w.value * torch.arange(w.value.numel()).view_as(w.value)),
    ),
]


@pytest.mark.parametrize(("law", "criterion"), BROKEN_CRITERIA, ids=[b[0] for b in BROKEN_CRITERIA])
def test_broken_criterion_is_caught(law: str, criterion: Broken) -> None:
    with pytest.raises(AssertionError, match=law):
        check_criterion(criterion)


class Whole:
    """Elements, from which broken patterns are made by replacing one function."""

    def __init__(self, **changes: Callable[..., Any]) -> None:
        for name in ("fold", "unfold", "quota", "span"):
            setattr(self, name, changes.get(name, getattr(Elements(), name)))

    fold: Callable[..., Tensor]
    unfold: Callable[..., Tensor]
    quota: Callable[..., int]
    span: Callable[..., int]


def overlapping(x: Tensor, axes: Axes) -> Tensor:
    flat = x.reshape(1, -1, 1)
    return torch.cat([flat[:, :-1], flat[:, :1]], 1)


def pairs(x: Tensor, axes: Axes) -> Tensor:
    return x.reshape(1, -1, 2)


def torn(folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
    """Right for values, wrong for masks: gives back a mask with one member of a group missing."""
    x = folded.reshape(shape).clone()
    if x.dtype == torch.bool and not bool(x.all()):
        x.view(-1)[int(x.view(-1).nonzero()[0])] = False
    return x


def leaky(folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
    x = folded.reshape(shape).clone()
    if x.dtype == torch.bool and not bool(x.all()):
        x.view(-1)[int((~x.view(-1)).nonzero()[0])] = True
    return x


def unnested(folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
    """The mask of a sparse level is moved to the other end."""
    x = folded.reshape(shape)
    return x.flatten().flip(0).view(shape) if x.dtype == torch.bool and x.sum() == 10 else x


def cubes(x: Tensor, axes: Axes) -> Tensor:
    return x.reshape(8, 6, 2).transpose(0, 1).reshape(1, 6, 16)


def uncubes(folded: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
    return folded.reshape(6, 8, 2).transpose(0, 1).reshape(shape)


BROKEN_PATTERNS: list[tuple[str, Whole]] = [
    ("every entry once", Whole(fold=overlapping)),
    ("pools, groups, members", Whole(fold=lambda x, axes: x.reshape(1, -1))),
    (r"unfold\(fold", Whole(unfold=lambda f, shape, axes: f.flatten().flip(0).reshape(shape))),
    ("kept at sparsity 0", Whole(quota=lambda g, s: quota(g, s) - 1)),
    ("from 1 to the number", Whole(quota=lambda g, s: int(g * (1 - s)))),
    ("pruned whole", Whole(fold=pairs, unfold=torn)),
    ("exactly quota", Whole(unfold=leaky)),
    ("nested", Whole(unfold=unnested)),
    ("span of columns", Whole(fold=cubes, unfold=uncubes, span=lambda taps: 1)),
]


@pytest.mark.parametrize(("law", "pattern"), BROKEN_PATTERNS, ids=[b[0] for b in BROKEN_PATTERNS])
def test_broken_pattern_is_caught(law: str, pattern: Whole) -> None:
    with pytest.raises(AssertionError, match=law):
        check_pattern(pattern)  # type: ignore[arg-type]


def test_pattern_that_folds_anything_is_caught() -> None:
    with pytest.raises(AssertionError, match="refuses a shape"):
        check_refusal(Elements(), sample_weight())


def test_refusal_without_numbers_is_caught() -> None:
    from secateur.core.errors import FoldError

    def vague(x: Tensor, axes: Axes) -> Tensor:
        raise FoldError("Mine()", "it does not fit", "no", "go away")

    with pytest.raises(AssertionError, match="no size of an axis"):
        check_refusal(Whole(fold=vague), sample_weight())  # type: ignore[arg-type]


@dataclass(frozen=True)
class BrokenAllocation:
    levels: Callable[[list[Item], Budget], dict[str, float]]
    needs_scores: ClassVar[bool] = True
    needs_probe: ClassVar[bool] = False

    def __call__(self, items: Any, budget: Budget) -> dict[str, float]:
        return self.levels(items, budget)


def even(items: list[Item], budget: Budget) -> dict[str, float]:
    return dict(Uniform()(items, budget))


def absolute(items: list[Item], budget: Budget) -> dict[str, float]:
    """Moves one group from a weight to another when a score is larger than a constant."""
    levels = even(items, budget)
    if float(items[0].scores.max()) > 100 and budget.limit < 300:
        levels[items[0].name] = min(0.99, levels[items[0].name] + 1 / items[0].groups)
    return levels


def scribbling(items: list[Item], budget: Budget) -> dict[str, float]:
    items[0].scores[0, 0] = 0.5
    return even(items, budget)


BROKEN_ALLOCATIONS = [
    ("within one group", lambda i, b: {k: v * 0.5 for k, v in even(i, b).items()}),
    (r"lies in \[0, 1\)", lambda i, b: {**even(i, b), i[0].name: 1.0}),
    ("exactly the given", lambda i, b: {**even(i, b), "other": 0.5}),
    ("scaling all scores", absolute),
    ("write the scores", scribbling),
]


@pytest.mark.parametrize(
    ("law", "levels"), BROKEN_ALLOCATIONS, ids=[b[0] for b in BROKEN_ALLOCATIONS]
)
def test_broken_allocation_is_caught(law: str, levels: Any) -> None:
    with pytest.raises(AssertionError, match=law):
        check_allocation(BrokenAllocation(levels))


@dataclass(frozen=True)
class BrokenSchedule:
    curve: Callable[[float], float] = float
    begin: float = 0
    end: float = 10
    frequency: float = 1
    unit: str = "steps"
    cyclic: bool = False

    def share(self, progress: float, sparsity: float) -> float:
        return self.curve(progress)


BROKEN_SCHEDULES = [
    (r"lie in \[0, 1\]", BrokenSchedule(lambda p: p if p in (0, 1) else 1.5)),
    ("1 from the end", BrokenSchedule(lambda p: 0.9 * p)),
    ("0 at the beginning", BrokenSchedule(lambda p: 0.1 + 0.9 * p)),
    ("never falls", BrokenSchedule(lambda p: p if p < 0.5 or p > 0.9 else 0.2)),
    ("steps, epochs or rounds", BrokenSchedule(unit="fortnights")),
    ("events rise", BrokenSchedule(end=-5.0, begin=-9.0, frequency=-1.0)),
]


@pytest.mark.parametrize(
    ("law", "schedule"), BROKEN_SCHEDULES, ids=[b[0] for b in BROKEN_SCHEDULES]
)
def test_broken_schedule_is_caught(law: str, schedule: BrokenSchedule) -> None:
    with pytest.raises(AssertionError, match=law):
        check_schedule(schedule)


@dataclass(frozen=True)
class BrokenRecovery:
    change: Callable[[Tensor, Tensor, Weight], tuple[Tensor, Tensor]]
    needs: frozenset[Any] = frozenset()

    def __call__(self, weight: Weight, stats: Stats, choose: Any, rounding: Any = None) -> Repaired:
        mask = choose()
        values, mask = self.change(choose.values.masked_fill(~mask, 0), mask, weight)
        return Repaired(values, mask)


def writing(values: Tensor, mask: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    if not bool(mask.all()):
        weight.value.mul_(2)
    return values, mask


def wobbling(values: Tensor, mask: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    return (values if bool(mask.all()) else values * torch.rand(()) * mask), mask


BROKEN_RECOVERIES: list[tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = [
    ("exactly 0", lambda v, m, w: (v + 1e-30 * ~m, m)),
    ("mask is the one", lambda v, m, w: (v, m if m.all() else m.roll(1, 1))),
    ("identity", lambda v, m, w: (v * 1.0001, m)),
    ("finite", lambda v, m, w: (torch.where(m & ~m.all(), torch.inf, v), m)),
    ("deterministic", wobbling),
    ("never above", lambda v, m, w: (v if m.all() else v * -1.0 * m, m)),
    ("write the weight", writing),
]


@pytest.mark.parametrize(
    ("law", "change"), BROKEN_RECOVERIES, ids=[b[0] for b in BROKEN_RECOVERIES]
)
def test_broken_recovery_is_caught(law: str, change: Any) -> None:
    with pytest.raises(AssertionError, match=law):
        check_recovery(BrokenRecovery(change), least_squares=law == "never above")


def test_broken_reestimation_is_caught() -> None:
    class Lazy:
        def reestimate_(self, model: nn.Module, batches: Any) -> None:
            model.train()
            for batch in batches:
                model(batch)
            model.eval()

    class Careless(BatchNorm):
        def reestimate_(self, model: nn.Module, batches: Any) -> dict[str, float]:
            found = super().reestimate_(model, batches)
            model.train()
            return found

    with pytest.raises(AssertionError, match="those of all values"):
        check_reestimation(Lazy())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="modes"):
        check_reestimation(Careless())


@dataclass(frozen=True)
class BrokenRounding:
    change: Callable[[Tensor, slice], Tensor]

    def fit(self, matrix: Tensor) -> Callable[[Tensor, slice], Tensor]:
        return self.change


def clobber(values: Tensor, columns: slice) -> Tensor:
    grid = (values * 4).round() / 4
    values.mul_(0.5)
    return grid


BROKEN_ROUNDINGS: list[tuple[str, Callable[[Tensor, slice], Tensor]]] = [
    ("zero stays", lambda v, c: v.round() + 0.5),
    ("twice", lambda v, c: v * 0.5),
    ("alone as together", lambda v, c: (v / v.abs().max().clamp(min=1)).round()),
    ("sign", lambda v, c: v.floor()),
    ("finite", lambda v, c: torch.where(v == 0, v, torch.nan)),
]


@pytest.mark.parametrize(("law", "change"), BROKEN_ROUNDINGS, ids=[b[0] for b in BROKEN_ROUNDINGS])
def test_broken_rounding_is_caught(law: str, change: Any) -> None:
    with pytest.raises(AssertionError, match=law):
        check_rounding(BrokenRounding(change))  # type: ignore[arg-type]


def test_rounding_that_writes_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_rounding(BrokenRounding(clobber))  # type: ignore[arg-type]


class BrokenMasks(Masks):
    """Masks with one thing broken."""

    broken = ""

    def __and__(self, other: Masks) -> Masks:
        if self.broken == "commutative":
            return BrokenMasks(dict(self))
        if self.broken == "idempotent":
            return BrokenMasks({n: m.roll(1, -1) & other[n].roll(1, -1) for n, m in self.items()})
        return super().__and__(other)

    def diff(self, new: Masks) -> tuple[Masks, Masks]:
        dropped, grown = super().diff(new)
        return (grown, dropped) if self.broken == "what left" else (dropped, grown)

    def fingerprint(self) -> str:
        return "0" if self.broken == "fingerprint follows" else super().fingerprint()


@pytest.mark.parametrize("law", ["commutative", "idempotent", "what left", "fingerprint follows"])
def test_broken_masks_are_caught(law: str) -> None:
    def masks(bits: list[int]) -> BrokenMasks:
        made = BrokenMasks({"w": torch.tensor(bits) > 0})
        made.broken = law
        return made

    with pytest.raises(AssertionError, match=law):
        check_masks(masks([1, 1, 0, 0]), masks([1, 0, 1, 0]))


@dataclass(frozen=True)
class BrokenLayout:
    broken: str
    inner: Any = LAYOUTS["bitmask"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def nbytes(self, shape: Any, dtype: Any, kept: int) -> int:
        return int(self.inner.nbytes(shape, dtype, kept)) + (self.broken == "nbytes")

    def pack(self, value: Tensor, mask: Tensor) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.inner.pack(value, mask)
        if self.broken == "write":
            value.mul_(2)
        if self.broken == "announced":
            parts["values"] = parts["values"].double()
        return parts

    def unpack(self, parts: Any, shape: Any, dtype: Any) -> tuple[Tensor, Tensor]:
        value, mask = self.inner.unpack(parts, shape, dtype)
        if self.broken == "bit-exact":
            value = value * 1.0000001 - 0.0 * ~mask
        return value, (~mask if self.broken == "mask back" else mask)


@pytest.mark.parametrize("law", ["write", "announced", "nbytes", "mask back", "bit-exact"])
def test_broken_layout_is_caught(law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_layout(BrokenLayout(law), torch.randn(5, 7), torch.rand(5, 7) > 0.5)


@dataclass(frozen=True)
class BrokenStat:
    """The mean of the means of parts is not the mean."""

    writes: bool = False
    source: ClassVar[str] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> dict[str, Tensor]:
        return {"sum": torch.zeros(weight.fan_in), "parts": torch.zeros(())}

    def update(self, state: Any, weight: Weight, seen: Tensor, samples: int) -> dict[str, Tensor]:
        new = state["sum"] + seen.mean((0, 1))
        if self.writes:
            seen.zero_()
        last = state["sum"] * 0.5 + new if not self.writes else new
        return {"sum": last, "parts": state["parts"] + 1}

    def value(self, state: Any, weight: Weight) -> Tensor:
        return state["sum"] / state["parts"]


@pytest.mark.parametrize(("law", "writes"), [("merge to the whole", False), ("write", True)])
def test_broken_statistic_is_caught(law: str, writes: bool) -> None:
    with pytest.raises(AssertionError, match=law):
        check_stat(BrokenStat(writes))  # type: ignore[arg-type]


def test_sketch_breaks_the_merge_law_to_the_bit_but_not_in_the_mean() -> None:
    """Signs are drawn per row, so parts draw others than the whole; test_stats bounds the error."""
    with pytest.raises(AssertionError, match="merge to the whole"):
        check_stat(Sketch())


def test_the_kit_names_everything_it_ships() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert dataclasses.is_dataclass(testing.FixedMask)


def test_hypothesis_is_only_needed_for_the_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, secateur.testing; print('hypothesis' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "secateur.testing.strategies")
    with pytest.raises(MissingExtra, match=r"secateur\[dev\]"):
        importlib.import_module("secateur.testing.strategies")
