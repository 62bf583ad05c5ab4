"""The law kit over everything in the catalogues, and planted violations that it must catch."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.allocate import (
    ALLOCATIONS,
    ErdosRenyi,
    Given,
    Ranked,
    Sensitivity,
    Tolerance,
    Uniform,
)
from secateur.core.masks import Masks
from secateur.core.weight import Weight
from secateur.formats import LAYOUTS
from secateur.pattern import (
    NM,
    PATTERNS,
    Blocks,
    Columns,
    Elements,
    Kernels,
    PerRow,
    Rows,
)
from secateur.recover import (
    RECOVERIES,
    ROUNDINGS,
    BatchNorm,
    BiasCorrection,
    ColumnSweep,
    ExactObs,
    FisherUpdate,
    Integer,
    LeastSquares,
    NoRecovery,
)
from secateur.schedule import (
    SCHEDULES,
    Alternating,
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    OneShot,
    Polynomial,
)
from secateur.score import (
    CRITERIA,
    ExpectedBatchNorm,
    Grasp,
    Lamp,
    Lookahead,
    Magnitude,
    Movement,
    Normalised,
    Obd,
    ObsSaliency,
    Random,
    Ria,
    Smoothed,
    Snip,
    SynFlow,
    Taylor,
    Wanda,
    Weighted,
    WoodFisher,
)
from secateur.stats import (
    BlockFisher,
    Gradient,
    Gram,
    InputNorm,
    Moments,
    OutputGap,
    Positions,
    SquaredGradient,
    WeightGradient,
)
from secateur.testing import (
    KINDS,
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
    sample_items,
    sample_weight,
)
from secateur.testing import strategies as draw

few = settings(max_examples=12, suppress_health_check=list(HealthCheck))

# What each entry of a catalogue is built with. An entry without a line here fails the first test.
CRITERIA_MADE: dict[str, list[Any]] = {
    "random": [Random(3)],
    "magnitude": [Magnitude(), Magnitude(2)],
    "snip": [Snip()],
    "taylor": [Taylor()],
    "movement": [Movement()],
    "obd": [Obd(), Obd(samples=4)],
    "woodfisher": [WoodFisher(), WoodFisher(block=7, damp=0.0)],
    "grasp": [Grasp()],
    "synflow": [SynFlow()],
    "expected_batchnorm": [ExpectedBatchNorm()],
    "lookahead": [Lookahead()],
    "wanda": [Wanda()],
    "ria": [Ria(), Ria(a=1.0)],
    "obs": [ObsSaliency(), ObsSaliency(damp=0.0)],
    "lamp": [Lamp(Magnitude()), Lamp(Wanda())],
    "normalised": [Normalised(Movement(), by) for by in ("sum", "l2", "mean", "max")],
    "weighted": [Weighted((Magnitude(), Snip()), (1.0, -0.5))],
    "smoothed": [Smoothed(Taylor())],
}
# Random scores belong to positions, and WoodFisher's blocks are runs of neighbouring weights, so a
# permutation of the inputs makes other blocks.
BY_POSITION = {"random", "woodfisher"}

PATTERNS_MADE: dict[str, list[Any]] = {
    "elements": [Elements()],
    "per_row": [PerRow()],
    "nm": [NM(), NM(1, 4), NM(2, 4, rows=2), NM(4, 4)],
    "blocks": [Blocks(4, 1), Blocks(1, 4), Blocks(2, 3)],
    "rows": [Rows()],
    "columns": [Columns()],
    "kernels": [Kernels()],
}
ALLOCATIONS_MADE: dict[str, list[Any]] = {
    "uniform": [Uniform()],
    "global": [Ranked()],
    "erk": [ErdosRenyi(), ErdosRenyi(kernel=False)],
    # Only what is free can meet a budget, so the fixed share is small here.
    "given": [Given({"layer0.*": 0.05}), Given({"layer0.*": 0.05}, rest=Ranked()), Given()],
    "sensitivity": [Sensitivity()],
    "tolerance": [Tolerance(), Tolerance(step="total")],
}
SCHEDULES_MADE: dict[str, list[Any]] = {
    "one_shot": [OneShot(), OneShot(begin=7, unit="steps")],
    "linear": [Linear(3, 40, 5)],
    "cubic": [Polynomial(0, 100, 7), Polynomial(2, 9, 0.4, unit="epochs")],
    "polynomial": [Polynomial(0, 100, 7, power=1)],
    "exponential": [Exponential(0, 5), Exponential(1, 100)],
    "cosine": [Cosine(0, 30, 1)],
    "cyclic": [Cyclic(0, 30, 1), Cyclic(0, 30, 4, cycles=3)],
    "alternating": [Alternating(0, 30, 5), Alternating(5, 85, 5, "epochs")],
}
RECOVERIES_MADE: dict[str, list[Any]] = {
    "none": [NoRecovery()],
    "bias_correction": [BiasCorrection(), BiasCorrection(LeastSquares())],
    "least_squares": [LeastSquares(), LeastSquares(asymmetric=True)],
    "column_sweep": [ColumnSweep(), ColumnSweep(block=4), ColumnSweep(damp=0.0)],
    "exact_obs": [ExactObs()],
    "fisher_update": [FisherUpdate(), FisherUpdate(block=7, damp=0.0)],
    "batchnorm": [BatchNorm()],
}
LEAST_SQUARES = {"least_squares", "column_sweep", "exact_obs"}
ROUNDINGS_MADE: dict[str, list[Any]] = {
    "integer": [Integer(8), Integer(4), Integer(4, group=5), Integer(2), Integer(16)]
}
STATS = [
    InputNorm(),
    Moments(),
    Gram(),
    Positions(),
    OutputGap(),
    Gradient(),
    SquaredGradient(),
    WeightGradient(),
    BlockFisher(7),
]
TABLES: list[tuple[str, Mapping[str, Any], Mapping[str, list[Any]]]] = [
    ("CRITERIA", CRITERIA, CRITERIA_MADE),
    ("PATTERNS", PATTERNS, PATTERNS_MADE),
    ("ALLOCATIONS", ALLOCATIONS, ALLOCATIONS_MADE),
    ("SCHEDULES", SCHEDULES, SCHEDULES_MADE),
    ("RECOVERIES", RECOVERIES, RECOVERIES_MADE),
    ("ROUNDINGS", ROUNDINGS, ROUNDINGS_MADE),
]


def entries(table: Mapping[str, list[Any]]) -> list[Any]:
    return [pytest.param(k, v, id=f"{k}-{i}") for k, vs in table.items() for i, v in enumerate(vs)]


@pytest.mark.parametrize(("name", "catalogue", "made"), TABLES, ids=[t[0] for t in TABLES])
def test_every_entry_is_checked(
    name: str, catalogue: Mapping[str, Any], made: Mapping[str, list[Any]]
) -> None:
    assert set(catalogue) == set(made), f"{name}: add a line to the table of this test"
    for key, values in made.items():
        assert values
        assert all(isinstance(v, catalogue[key]) for v in values)


# -- everything in the catalogues ---------------------------------------------------------------


@pytest.mark.parametrize(("key", "criterion"), entries(CRITERIA_MADE))
def test_criterion(key: str, criterion: Any) -> None:
    for kind in KINDS:
        check_criterion(
            criterion, sample_weight(kind, seed=4), seed=2, equivariant=key not in BY_POSITION
        )


@few
@given(st.data())
def test_criteria_on_random_weights(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(CRITERIA_MADE)))
    criterion = data.draw(st.sampled_from(CRITERIA_MADE[key]))
    weight = data.draw(draw.weights())
    check_criterion(
        criterion, weight, seed=data.draw(st.integers(0, 99)), equivariant=key not in BY_POSITION
    )


def fits(pattern: Any, weight: Weight) -> bool:
    """Whether a pattern is meant for a weight, from its parameters and not from its own check."""
    out, inn, taps = weight.cube().shape
    if isinstance(pattern, NM):
        return inn % pattern.of == 0 and out % pattern.rows == 0
    if isinstance(pattern, Blocks):
        return out % pattern.rows == 0 and inn * taps % pattern.cols == 0
    return not isinstance(pattern, Columns) or weight.axes.groups == 1


@pytest.mark.parametrize(("key", "pattern"), entries(PATTERNS_MADE))
@pytest.mark.parametrize("kind", KINDS)
def test_pattern(kind: str, key: str, pattern: Any) -> None:
    weight = sample_weight(kind)
    if fits(pattern, weight):
        check_pattern(pattern, weight)
    else:
        check_refusal(pattern, weight)


@few
@given(st.data())
def test_patterns_on_awkward_scores(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(PATTERNS_MADE)))
    pattern = data.draw(st.sampled_from(PATTERNS_MADE[key]))
    weight = data.draw(draw.scored())
    assume(fits(pattern, weight))
    check_pattern(pattern, weight, levels=sorted(data.draw(st.lists(st.floats(0, 0.999)))) or [0.5])


@pytest.mark.parametrize(("key", "allocation"), entries(ALLOCATIONS_MADE))
def test_allocation(key: str, allocation: Any) -> None:
    check_allocation(allocation)
    check_allocation(allocation, sample_items([(1, 10, 1)] * 3, seed=5), shares=(0.8, 0.4))


@pytest.mark.parametrize(("key", "allocation"), entries(ALLOCATIONS_MADE))
def test_allocation_with_a_flat_loss(key: str, allocation: Any) -> None:
    """A loss that does not react (a noisy measurement) must not lead past the budget."""
    check_allocation(allocation, probe=lambda levels: 0.0, shares=(0.5,))


@few
@given(st.integers(0, 999), st.floats(0.15, 1.0))
def test_allocations_on_random_items(seed: int, share: float) -> None:
    items = sample_items([(1, 7, 1), (3, 11, 2), (1, 50, 1)], seed)
    for allocation in (Uniform(), Ranked(), ErdosRenyi(), Sensitivity()):
        check_allocation(allocation, items, shares=(share,))


@pytest.mark.parametrize(("key", "schedule"), entries(SCHEDULES_MADE))
def test_schedule(key: str, schedule: Any) -> None:
    check_schedule(schedule)


@few
@given(st.integers(0, 50), st.integers(1, 200), st.integers(1, 60))
def test_schedules_of_any_length(begin: int, length: int, frequency: int) -> None:
    for cls in (Linear, Polynomial, Exponential, Cosine, Cyclic):
        check_schedule(cls(begin, begin + length, frequency))


@pytest.mark.parametrize(
    ("key", "recovery"),
    entries({k: v for k, v in RECOVERIES_MADE.items() if k != "batchnorm"}),
)
@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "grouped", "grouped_transposed"])
def test_recovery(kind: str, key: str, recovery: Any) -> None:
    check_recovery(recovery, sample_weight(kind, seed=1), least_squares=key in LEAST_SQUARES)


def test_batchnorm() -> None:
    for batchnorm in RECOVERIES_MADE["batchnorm"]:
        check_reestimation(batchnorm)


@few
@given(st.data())
def test_recoveries_on_singular_and_dead_inputs(data: st.DataObject) -> None:
    weight = data.draw(draw.weights(("linear", "gpt2_conv1d", "depthwise", "transposed")))
    rows = data.draw(draw.inputs(weight))
    key = data.draw(st.sampled_from(sorted(set(RECOVERIES_MADE) - {"batchnorm"})))
    recovery = data.draw(st.sampled_from(RECOVERIES_MADE[key]))
    check_recovery(recovery, weight, rows=rows, least_squares=key in LEAST_SQUARES, levels=(0.5,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", sorted(LEAST_SQUARES))
def test_least_squares_kinds_in_half_precision(key: str, dtype: torch.dtype) -> None:
    """Inputs that are nearly uncorrelated: what a refit gains is below what rounding loses."""
    for seed in range(5):
        weight = sample_weight("linear", seed, dtype)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.eye(12)[None] + 1e-3 * torch.randn(1, 12, 12, generator=generator)
        check_recovery(RECOVERIES_MADE[key][0], weight, rows=rows, least_squares=True)


@pytest.mark.parametrize(("key", "rounding"), entries(ROUNDINGS_MADE))
def test_rounding(key: str, rounding: Any) -> None:
    check_rounding(rounding)
    check_rounding(rounding, torch.randn(4, 11) * 1e-6)


@given(draw.mask_pairs())
def test_masks(pair: tuple[Masks, Masks]) -> None:
    check_masks(*pair)


def test_fingerprint_is_stable_across_processes() -> None:
    code = (
        "import torch; from secateur.core.masks import Masks;"
        "print(Masks({'b': torch.arange(11) % 3 == 0, 'a': torch.ones(2, 2) > 0}).fingerprint())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = Masks({"a": torch.ones(2, 2) > 0, "b": torch.arange(11) % 3 == 0})
    assert run.stdout.strip() == here.fingerprint()


@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8]),
    st.sampled_from([(1, 1), (3, 5), (8, 2, 3), (2, 300), (9,)]),
    st.floats(0, 1),
    st.integers(0, 999),
)
def test_layout(
    key: str, dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    value = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8).view(dtype)
    mask = torch.rand(shape, generator=generator) < density
    layout = LAYOUTS[key]
    assume(layout.fits(shape, dtype, int(mask.sum())))
    check_layout(layout, value.reshape(shape), mask)


@pytest.mark.parametrize("stat", STATS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_statistic(kind: str, stat: Any) -> None:
    check_stat(stat, sample_weight(kind))


@given(draw.grams())
def test_drawn_grams_are_positive_semidefinite(gram: Tensor) -> None:
    assert torch.equal(gram, gram.mT)
    assert float(torch.linalg.eigvalsh(gram).min()) >= -1e-9 * float(gram.abs().max())
