"""The column sweep against brute force: SparseGPT and GPTQ in a few lines each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recovery_cases import choice, correlated, error, measured
from torch import Tensor

from secateur.core.select import keep_top
from secateur.core.weight import LINEAR, Weight
from secateur.drive.layerwise import MaskChoice
from secateur.pattern import NM, Elements
from secateur.recover import (
    BiasCorrection,
    ColumnSweep,
    ExactObs,
    Integer,
    LeastSquares,
    NoRecovery,
    Repaired,
    row_errors,
)
from secateur.score import ObsSaliency
from secateur.stats import Gram, Stats
from secateur.testing import FixedMask


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


def test_the_damping_that_was_used_is_told() -> None:
    """A Gram matrix of one direction, summed in float32, has no factor at λ = 1e-6."""
    weight, row, gram = Weight("w", torch.randn(3, 50), LINEAR), torch.rand(50), torch.zeros(50, 50)
    for _ in range(400):
        x = torch.randn(1) * row
        gram += x[:, None] * x
    stats = Stats()
    stats.put(Gram(), "w", gram[None] / 400)
    mask = FixedMask(weight.value, torch.rand(3, 50) > 0.5)
    (note, *_) = ColumnSweep(damp=0.0)(weight, stats, mask).notes
    assert note == "damping was raised to 1e-05"
