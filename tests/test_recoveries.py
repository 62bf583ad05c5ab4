"""Recoveries against brute force: least squares, OBS, SparseGPT, GPTQ in a few lines each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur import Recipe, Target, prune
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.select import keep_top
from secateur.core.weight import LINEAR, Axes, Weight
from secateur.drive.layerwise import MaskChoice
from secateur.pattern import NM, Elements, Pattern, PerRow
from secateur.recover import (
    BatchNorm,
    BiasCorrection,
    ColumnSweep,
    ExactObs,
    Integer,
    LeastSquares,
    NoRecovery,
    Repaired,
    row_errors,
)
from secateur.score import Magnitude, ObsSaliency, Wanda
from secateur.stats import Gram, InputNorm, Moments, Stats
from secateur.testing import FixedMask

GROUPED = Axes(("out", "in", "kw"), groups=2)


def correlated(rows: int, size: int, *, decay: float = 0.5) -> Tensor:
    """Gaussian inputs whose covariance has a falling spectrum in a random basis, in float64."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    scale = decay ** torch.arange(size, dtype=torch.float64)
    return torch.randn(rows, size, dtype=torch.float64) @ (basis * (scale + 0.02) @ basis.T)


def measured(weight: Weight, rows: Tensor) -> Stats:
    """All statistics of rows ``(groups, n, fan_in)``."""
    stats = Stats()
    for stat in (Gram(), InputNorm(), Moments()):
        stats.update(stat, weight, rows, rows.shape[1])
    return stats


def error(weight: Weight, rows: Tensor, values: Tensor) -> float:
    """||(W - W') X||^2 / n from the rows themselves."""
    change = (weight.matrix() - values).double().reshape(len(rows), -1, rows.shape[2])
    return float((rows.double() @ change.mT).square().sum()) / rows.shape[1]


def choice(
    weight: Weight, stats: Stats, criterion: Any, pattern: Pattern, sparsity: float
) -> MaskChoice:
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    recipe = Recipe(criterion, pattern, target)
    groups = pattern.fold(criterion(weight, stats), weight.axes).mean(2)
    return MaskChoice(weight, recipe, groups, sparsity)


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


# -- the column sweep -----------------------------------------------------------------------------


def factor(gram: np.ndarray, damp: float = 0.01) -> np.ndarray:
    """The upper factor U of inverse(H) = U^T U."""
    h = gram + damp * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def plain_sparsegpt(
    w: np.ndarray, gram: np.ndarray, sparsity: float, nm: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT as in the paper: one block for unstructured, every m columns for N:M."""
    w, u = w.copy(), factor(gram)
    mask = np.ones(w.shape, dtype=bool)
    if nm is None:
        saliency = w**2 / np.diag(u) ** 2
        prune_count = w.size - int(w.size * (1 - sparsity) + 0.5)
        mask.flat[np.argsort(saliency, axis=None)[:prune_count]] = False
    for j in range(w.shape[1]):
        if nm is not None and j % nm[1] == 0:
            part = slice(j, j + nm[1])
            saliency = w[:, part] ** 2 / np.diag(u)[part] ** 2
            drop = np.argsort(saliency, axis=1)[:, : nm[1] - nm[0]]
            np.put_along_axis(mask[:, part], drop, False, axis=1)
        q = w[:, j] * mask[:, j]
        w[:, j + 1 :] -= np.outer((w[:, j] - q) / u[j, j], u[j, j + 1 :])
        w[:, j] = q
    return w, mask


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sweep_is_plain_sparsegpt_in_one_block(sparsity: float) -> None:
    rows = correlated(200, 16, decay=0.9)[None]
    weight = Weight("w", torch.randn(12, 16, dtype=torch.float64), LINEAR)
    stats = measured(weight, rows)
    chosen = choice(weight, stats, ObsSaliency(), Elements(), sparsity)
    values, mask = ColumnSweep()._sweep(
        weight,
        torch.tensor(factor(stats(Gram(), weight)[0].numpy()))[None],
        chosen,
        None,
    )
    expected, kept = plain_sparsegpt(
        weight.value.numpy(), stats(Gram(), weight)[0].numpy(), sparsity
    )
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-10)
    done = ColumnSweep()(weight, stats, choice(weight, stats, ObsSaliency(), Elements(), sparsity))
    np.testing.assert_array_equal(done.mask, kept)
    assert error(weight, rows, done.values) <= error(weight, rows, torch.tensor(expected)) * (
        1 + 1e-9
    )


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("block", [8, 128])
def test_sweep_is_plain_sparsegpt_for_nm(nm: tuple[int, int], block: int) -> None:
    rows = correlated(200, 16, decay=0.9)[None]
    weight = Weight("w", torch.randn(12, 16, dtype=torch.float64), LINEAR)
    stats = measured(weight, rows)
    gram = stats(Gram(), weight)[0].numpy()
    expected, kept = plain_sparsegpt(weight.value.numpy(), gram, 0.0, nm)

    def chosen() -> MaskChoice:
        return choice(weight, stats, ObsSaliency(), NM(*nm), 1 - nm[0] / nm[1])

    sweep = ColumnSweep(block=nm[1])  # the paper decides each run with what came before it applied
    done = sweep(weight, stats, chosen())
    np.testing.assert_array_equal(done.mask, kept)
    same = (done.values.double() - torch.tensor(expected)).abs().amax(1) < 1e-8
    plain = row_errors(weight, stats(Gram(), weight), weight.matrix() * done.mask)
    swept = row_errors(weight, stats(Gram(), weight), torch.tensor(expected))
    assert bool((same | (plain <= swept)).all())
    counts = ColumnSweep(block=block)(weight, stats, chosen()).mask.reshape(12, -1, nm[1]).sum(2)
    assert bool((counts == nm[0]).all())


@pytest.mark.parametrize("block", [1, 3, 5, 128])
def test_blocks_of_columns_do_not_change_a_sweep_with_a_fixed_mask(block: int) -> None:
    rows = correlated(100, 11, decay=0.8)[None]
    weight = Weight("w", torch.randn(4, 11, dtype=torch.float64), LINEAR)
    stats, mask = measured(weight, rows), torch.rand(4, 11) < 0.5
    chosen = FixedMask(weight.matrix(), mask)
    one = ColumnSweep(block=11)(weight, stats, chosen).values
    torch.testing.assert_close(ColumnSweep(block=block)(weight, stats, chosen).values, one)


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("block", [1, 5, 16])
def test_the_count_is_met_to_the_weight_over_blocks(block: int, sparsity: float) -> None:
    rows = correlated(100, 23, decay=0.9)[None]
    weight = Weight("w", torch.randn(7, 23), LINEAR)
    stats = measured(weight, rows)
    chosen = choice(weight, stats, ObsSaliency(), Elements(), sparsity)
    done = ColumnSweep(block=block)(weight, stats, chosen)
    assert int(done.mask.sum()) == Elements().quota(161, sparsity)


def plain_gptq(w: np.ndarray, gram: np.ndarray, bits: int, damp: float = 0.01) -> np.ndarray:
    """GPTQ: round a column, move the error on to the columns not yet rounded."""
    w = w.copy()
    h = gram + damp * np.trace(gram) / len(gram) * np.eye(len(gram))
    top = 2 ** (bits - 1) - 1
    scale = (np.abs(w).max(1) / top).astype(np.float32).astype(np.float64)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.round(w[:, j] / scale), -top, top) * scale
        err = (w[:, j] - q[:, j]) / u[j, j]
        w[:, j + 1 :] -= np.outer(err, u[j, j + 1 :])
    return q


@pytest.mark.parametrize("bits", [4, 8])
def test_sweep_with_rounding_only_is_plain_gptq(bits: int) -> None:
    rows = correlated(100, 12, decay=0.8)[None]
    weight = Weight("w", torch.randn(6, 12), LINEAR)
    stats = measured(weight, rows)
    kept = FixedMask(weight.matrix(), torch.ones(6, 12, dtype=torch.bool))
    done = ColumnSweep(block=5)(weight, stats, kept, Integer(bits))
    expected = plain_gptq(weight.value.double().numpy(), stats(Gram(), weight)[0].numpy(), bits)
    np.testing.assert_allclose(done.values, expected, atol=1e-6)
    nearest = Integer(bits).fit(weight.value)(weight.value, slice(None))
    assert error(weight, rows, done.values) < error(weight, rows, nearest)


def on_grid(values: Tensor, weight: Weight, bits: int) -> bool:
    scale = weight.matrix().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = values / scale
    return bool((steps - steps.round()).abs().max() < 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "recovery", [NoRecovery(), LeastSquares(), ColumnSweep(), ExactObs(), BiasCorrection()],
    ids=lambda r: type(r).__name__,
)  # fmt: skip
def test_pruned_and_rounded_values_are_on_the_grid_and_zeros_stay(recovery: Any, bits: int) -> None:
    rows = correlated(100, 12, decay=0.8)[None]
    weight = Weight("w", torch.randn(6, 12), LINEAR)
    mask = torch.rand(6, 12) < 0.5
    done: Repaired = recovery(
        weight, measured(weight, rows), FixedMask(weight.matrix(), mask), Integer(bits)
    )
    assert bool((done.values[~mask] == 0).all())
    assert on_grid(done.values, weight, bits)


def test_joint_sweep_beats_pruning_first_and_rounding_then() -> None:
    joint = apart = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        rows = correlated(150, 24, decay=0.85)[None]
        weight = Weight("w", torch.randn(12, 24), LINEAR)
        stats = measured(weight, rows)

        def chosen(w: Weight = weight, s: Stats = stats) -> MaskChoice:
            return choice(w, s, ObsSaliency(), NM(2, 4), 0.5)

        done = ColumnSweep()(weight, stats, chosen(), Integer(3))
        assert on_grid(done.values, weight, 3)
        joint += error(weight, rows, done.values)
        pruned = ColumnSweep()(weight, stats, chosen())
        apart += error(weight, rows, Integer(3).fit(weight.matrix())(pruned.values, slice(None)))
    assert joint < apart


def test_sweep_handles_dead_and_repeated_inputs() -> None:
    rows = correlated(50, 8, decay=0.9)[None]
    rows[..., 1] = 0
    rows[..., 4] = rows[..., 3]
    weight = Weight("w", torch.randn(4, 8), LINEAR)
    stats = measured(weight, rows)
    done = ColumnSweep()(weight, stats, choice(weight, stats, ObsSaliency(), Elements(), 0.5))
    assert any("1 inputs are always zero" in note for note in done.notes)
    assert int(done.mask[:, 1].sum()) == 0
    assert bool(torch.isfinite(done.values).all())


# -- bias and BatchNorm ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_bias_correction_keeps_the_mean_output(kind: str) -> None:
    x = torch.randn(16, 8, 6) + torch.randn(8, 1) * 2
    layer: nn.Module = (
        nn.Linear(8, 8)
        if kind == "linear"
        else nn.Conv1d(8, 8, 3, padding=1, groups=2 if kind == "grouped" else 1)
    )
    net = nn.Sequential(layer)
    x = x.transpose(1, 2) if kind == "linear" else x
    recipe = Recipe(target=Target("sparsity", 0.6), recovery=(BiasCorrection(),))
    pruned = prune(net, recipe, [x[:5], x[5:]])
    axes = (0, 1) if kind == "linear" else (0, 2)
    before, after = net(x).detach().mean(axes), pruned.model(x).detach().mean(axes)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    plain = prune(net, Recipe(target=Target("sparsity", 0.6))).model(x).detach().mean(axes)
    assert float((plain - before).abs().max()) > 1e-2


def test_bias_correction_without_a_bias_is_noted() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    recipe = Recipe(target=Target("sparsity", 0.6), recovery=(BiasCorrection(),))
    pruned = prune(net, recipe, [torch.randn(9, 8)])
    assert any(note.topic == "bias" for note in pruned.facts.notes)


def batchnorm_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4, momentum=0.3),
    )  # fmt: skip


def test_batchnorm_by_hand() -> None:
    net = batchnorm_net().eval()
    with torch.no_grad():
        net[1].running_mean.fill_(3.0)
    batches = [torch.randn(5, 8, 6, 6), torch.randn(5, 8, 6, 6) + 1]
    drift = BatchNorm().reestimate_(net, batches)
    first = [net[0](x) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in first]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in first]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net[1].running_var, variance.detach(), atol=1e-5, rtol=1e-4)
    # The second layer saw what the first gives in training mode, without dropout.
    second = [
        net[4](
            torch.relu(nn.functional.batch_norm(y, None, None, net[1].weight, net[1].bias, True))
        )
        for y in first
    ]
    mean = torch.stack([y.mean((0, 2, 3)) for y in second]).mean(0)
    torch.testing.assert_close(net[5].running_mean, mean.detach(), atol=1e-5, rtol=1e-4)
    assert net[5].momentum == 0.3
    assert not net.training
    assert drift["1"] > 1


def test_batchnorm_that_no_data_reach_keeps_its_statistics() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Net()
    net.spare.running_mean.fill_(5.0)
    BatchNorm().reestimate_(net, [torch.randn(4, 2)])
    assert net.spare.running_mean.tolist() == [5.0, 5.0]


def test_batchnorm_keeps_its_statistics_when_the_forward_pass_raises() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    net[0].running_mean.fill_(5.0)
    with pytest.raises(RuntimeError, match="should contain 3"):
        BatchNorm().reestimate_(net, [torch.randn(4, 3)])
    assert net[0].running_mean.tolist() == [5.0, 5.0]
    assert not net[0].training


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


def test_nm_mask_choice_follows_the_updated_weights() -> None:
    """Deciding blocks during the sweep beats deciding everything at the start."""
    live = fixed = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        rows = correlated(150, 24, decay=0.85)[None]
        weight = Weight("w", torch.randn(12, 24), LINEAR)
        stats = measured(weight, rows)
        done = ColumnSweep(block=4)(
            weight, stats, choice(weight, stats, ObsSaliency(), NM(2, 4), 0.5)
        )
        live += error(weight, rows, done.values)
        folded = NM(2, 4).fold(ObsSaliency()(weight, stats), LINEAR)[..., 0]
        mask = NM(2, 4).unfold(keep_top(folded, 2)[..., None], (12, 24), LINEAR)
        done = ColumnSweep(block=4)(weight, stats, FixedMask(weight.matrix(), mask))
        fixed += error(weight, rows, done.values)
    assert live < fixed
