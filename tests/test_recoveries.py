"""Recoveries against brute force: least squares and exact OBS in a few lines each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recovery_cases import choice, correlated, error, measured
from torch import nn

from secateur import Recipe, Target, prune
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.weight import LINEAR, Axes, Weight
from secateur.pattern import Elements, Pattern, PerRow
from secateur.recover import BiasCorrection, ColumnSweep, ExactObs, LeastSquares, NoRecovery
from secateur.score import Magnitude, ObsSaliency, Wanda
from secateur.stats import Gram
from secateur.testing import FixedMask

GROUPED = Axes(("out", "in", "kw"), groups=2)


def lstsq(w: np.ndarray, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The best row with these weights only."""
    best = np.zeros_like(w)
    best[kept] = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    return best


# -- exact OBS ------------------------------------------------------------------------------------


def test_a_single_removal_is_the_best_of_all() -> None:
    rows = correlated(60, 7, decay=0.8)[None]
    weight = Weight("w", torch.randn(1, 7, dtype=torch.float64), LINEAR)
    stats, x, w = measured(weight, rows), rows[0].numpy(), weight.value[0].numpy()
    errors = []
    for q in range(7):
        kept = np.arange(7) != q
        errors.append(float(((x @ (w - lstsq(w, x, kept))) ** 2).sum()) / 60)
    chosen = choice(weight, stats, ObsSaliency(0.0), Elements(), 1 / 7)
    done = ExactObs(damp=0.0)(weight, stats, chosen)
    assert int((~done.mask).sum()) == 1
    assert int((~done.mask[0]).nonzero()) == int(np.argmin(errors))
    assert error(weight, rows, done.values) == pytest.approx(min(errors), rel=1e-5)
    first = ExactObs(damp=0.0).trace(weight.value, stats(Gram(), weight)[0])
    assert float(first.min()) == pytest.approx(min(errors), rel=1e-5)


def greedy(w: np.ndarray, gram: np.ndarray) -> tuple[list[int], list[float]]:
    """Textbook OBS on one row: the order of removals and the cost of each."""
    w, inverse, order, costs = w.copy(), np.linalg.inv(gram), [], []
    alive = list(range(len(w)))
    while alive:
        cost = {q: w[q] ** 2 / inverse[q, q] for q in alive}
        q = min(cost, key=lambda j: cost[j])
        w -= inverse[:, q] * (w[q] / inverse[q, q])
        inverse = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1.0
        w[q] = 0.0
        alive.remove(q)
        order.append(q)
        costs.append(cost[q])
    return order, costs


def test_the_trace_is_textbook_obs() -> None:
    rows = correlated(80, 8, decay=0.8)[None]
    weight = Weight("w", torch.randn(3, 8, dtype=torch.float64), LINEAR)
    gram = measured(weight, rows)(Gram(), weight)[0]
    trace = ExactObs(damp=0.0).trace(weight.value, gram)
    for i in range(3):
        order, costs = greedy(weight.value[i].numpy(), gram.numpy())
        expected = np.empty(8)
        expected[order] = np.maximum.accumulate(costs)
        np.testing.assert_allclose(trace[i], expected, rtol=1e-4)


@pytest.mark.parametrize("removed", [1, 3, 6, 8])
def test_the_costs_of_the_trace_add_up_to_the_output_error(removed: int) -> None:
    rows = correlated(80, 8, decay=0.8)[None]
    weight = Weight("w", torch.randn(1, 8, dtype=torch.float64), LINEAR)
    gram = measured(weight, rows)(Gram(), weight)[0]
    order, costs = greedy(weight.value[0].numpy(), gram.numpy())
    kept = np.ones(8, dtype=bool)
    kept[order[:removed]] = False
    best = lstsq(weight.value[0].numpy(), rows[0].numpy(), kept)
    total = error(weight, rows, torch.tensor(best)[None])
    assert sum(costs[:removed]) == pytest.approx(total, rel=1e-5)
    trace = ExactObs(damp=0.0).trace(weight.value, gram)[0]
    rank = trace.argsort(stable=True)[:removed]
    assert float(trace[rank].sum()) >= total * (1 - 1e-6)  # made monotone, so never too small


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "criterion", [Magnitude(), Wanda(), ObsSaliency()], ids=["mag", "wanda", "obs"]
)
def test_exact_obs_beats_every_greedy_choice_without_update(criterion: Any, seed: int) -> None:
    torch.manual_seed(seed)
    rows = correlated(100, 10, decay=0.7)[None]
    weight = Weight("w", torch.randn(6, 10), LINEAR)
    stats = measured(weight, rows)
    exact = ExactObs()(weight, stats, choice(weight, stats, ObsSaliency(), PerRow(), 0.5))
    plain = NoRecovery()(weight, stats, choice(weight, stats, criterion, PerRow(), 0.5))
    assert exact.mask.sum(1).tolist() == plain.mask.sum(1).tolist() == [5] * 6
    assert error(weight, rows, exact.values) <= error(weight, rows, plain.values)


# -- order of the methods, over seeds -------------------------------------------------------------


def test_on_correlated_inputs_sparsegpt_beats_wanda_beats_magnitude() -> None:
    sums = {"exact": 0.0, "sparsegpt": 0.0, "wanda": 0.0, "magnitude": 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        scale = torch.logspace(-1, 1, 24, dtype=torch.float64)[torch.randperm(24)]
        rows = (correlated(200, 24, decay=0.85) * scale)[None]
        weight = Weight("w", torch.randn(16, 24), LINEAR)
        stats = measured(weight, rows)
        whole = error(weight, rows, torch.zeros(16, 24))
        runs: dict[str, tuple[Any, Any, Pattern]] = {
            "exact": (ExactObs(), ObsSaliency(), Elements()),
            "sparsegpt": (ColumnSweep(), ObsSaliency(), Elements()),
            "wanda": (NoRecovery(), Wanda(), PerRow()),
            "magnitude": (NoRecovery(), Magnitude(), Elements()),
        }
        for name, (recovery, criterion, pattern) in runs.items():
            done = recovery(weight, stats, choice(weight, stats, criterion, pattern, 0.5))
            sums[name] += error(weight, rows, done.values) / whole
    assert sums["exact"] <= sums["sparsegpt"] <= sums["wanda"] <= sums["magnitude"]


# -- least squares --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.6])
def test_least_squares_is_numpys(decay: float) -> None:
    rows = correlated(120, 12, decay=decay)[None]
    weight = Weight("w", torch.randn(5, 12, dtype=torch.float64), LINEAR)
    mask = torch.rand(5, 12) < 0.5
    done = LeastSquares()(weight, measured(weight, rows), FixedMask(weight.matrix(), mask))
    for i in range(5):
        best = lstsq(weight.value[i].numpy(), rows[0].numpy(), mask[i].numpy())
        np.testing.assert_allclose(done.values[i], best, atol=1e-6 * np.abs(best).max())


def test_least_squares_with_a_singular_gram_matrix() -> None:
    rows = (torch.randn(3, 8, dtype=torch.float64))[None]  # three samples, eight inputs
    rows[..., 2] = 0.0
    weight = Weight("w", torch.randn(4, 8, dtype=torch.float64), LINEAR)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, [0, 5]] = False
    done = LeastSquares()(weight, measured(weight, rows), FixedMask(weight.matrix(), mask))
    assert bool(torch.isfinite(done.values).all())
    assert error(weight, rows, done.values) < 1e-9 * error(weight, rows, weight.matrix() * mask)
    # An input that the data never show gives no reason to move its weights.
    assert torch.equal(done.values[:, 2], weight.value[:, 2])


def test_least_squares_keeps_convolution_groups_apart() -> None:
    weight = Weight("w", torch.randn(6, 4, 2, dtype=torch.float64), GROUPED)
    rows = torch.stack([correlated(60, 8, decay=0.8), 3 * correlated(60, 8, decay=0.8)])
    mask = torch.rand(6, 8) < 0.6
    done = LeastSquares()(weight, measured(weight, rows), FixedMask(weight.matrix(), mask))
    for i in range(6):
        best = lstsq(weight.matrix()[i].numpy(), rows[i // 3].numpy(), mask[i].numpy())
        np.testing.assert_allclose(done.values[i], best, atol=1e-5 * np.abs(best).max())


# -- in a run -------------------------------------------------------------------------------------


def test_steps_follow_each_other() -> None:
    """A sweep, then a refit on its mask, then the bias: each starts where the last one ended."""
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(80, 12) @ torch.randn(12, 12) + 1
    errors = []
    steps = (ColumnSweep(), LeastSquares(), BiasCorrection())
    masks: list[Masks] = []
    for count in range(1, 4):
        recipe = Recipe(ObsSaliency(), target=Target("sparsity", 0.5), recovery=steps[:count])
        pruned = prune(net, recipe, [x])
        masks.append(pruned.masks)
        first = (net[0](x) - pruned.model[0](x)).square().sum()
        errors.append(float(first.detach()))
    assert masks[0] == masks[1] == masks[2]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("listed", [True, False])
def test_recovery_may_be_given_as_a_list(listed: bool) -> None:
    steps: Any = [LeastSquares(), BiasCorrection()] if listed else LeastSquares()
    try:
        recipe = Recipe(recovery=steps)
    except UsageError:  # a clear refusal is as good
        return
    assert isinstance(recipe.recovery, tuple)
    assert all(hasattr(step, "needs") for step in recipe.recovery)
    assert len(recipe.recovery) == (2 if listed else 1)


def test_the_output_error_of_huge_activations_is_a_number() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    x = torch.randn(16, 6)
    small, huge = (prune(net, Recipe(), [x * scale]).facts.layers[0] for scale in (1.0, 1e18))
    assert small.output_error is not None
    assert huge.output_error == pytest.approx(small.output_error, rel=0.5)
