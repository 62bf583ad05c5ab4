"""Learned masks: formulas by hand, gradients by autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from secateur.core.errors import FoldError, UsageError
from secateur.core.weight import CONV2D, LINEAR, Axes, Weight
from secateur.learn import Leap, SoftMovement
from secateur.learn.grain import Tiling
from secateur.learn.leap import LeapMask
from secateur.learn.movement import MovementMask
from secateur.learn.soft_threshold import SoftThreshold


def test_soft_threshold_is_continuous_with_exact_zeros() -> None:
    part = SoftThreshold(-1.0)
    limit = float(torch.sigmoid(torch.tensor(-1.0)))
    w = torch.linspace(-1, 1, 4001)
    found = part(w).detach()
    assert bool(((found == 0) == (w.abs() <= limit)).all())
    assert not bool((found.signbit() & (found == 0)).any())  # no -0.0
    assert float((found[1:] - found[:-1]).abs().max()) <= 2 / 4000 + 1e-6
    assert torch.allclose(found, w.sign() * (w.abs() - limit).clamp(min=0))
    assert torch.equal(part.mask(w), found != 0)


def test_leap_penalty_and_strength_by_hand() -> None:
    how = Leap(sparsity=0.75, lambda_max=3000, lambda_min=50, lambda_rest=10)
    # 100 and 300 entries at shares 0.5 and 0.9: R = 0.8, over the target by 0.55.
    parts = []
    for rows, share in ((10, 0.5), (30, 0.9)):
        tiling = Tiling(Weight("w", torch.zeros(rows, 10), LINEAR), "row")
        parts.append(LeapMask(tiling, sigma=math.log(share / (1 - share))))
    excess = 0.55**2
    strength = 3000 * excess / 0.75**2
    found = how.penalty(parts, 0)
    assert found.item() == pytest.approx(strength * excess, rel=1e-4)
    found.backward()  # no gradient through the strength
    for part, weight, share in zip(parts, (0.25, 0.75), (0.5, 0.9), strict=True):
        by_hand = strength * 2 * 0.55 * weight * share * (1 - share)
        assert part.sigma.grad.item() == pytest.approx(by_hand, rel=1e-4)
    assert how.strength(0.25 + math.sqrt(2.9e-4)) == 10
    assert how.strength(0.25 + math.sqrt(3.1e-4)) == 50
    assert how.penalty(parts[:1], 0) > 0
    low = LeapMask(Tiling(Weight("w", torch.zeros(4, 4), LINEAR)), sigma=-3.0)
    assert how.penalty([low], 0).item() == 0  # below the target: nothing pulls


def test_leap_gradients_are_the_formula_on_two_by_two() -> None:
    tiling = Tiling(Weight("w", torch.zeros(2, 2), LINEAR))
    part = LeapMask(tiling, sigma=0.2)
    part.scores.data.copy_(torch.tensor([[0.4, -0.1], [0.3, 0.2]]))
    w = torch.tensor([[1.0, 2.0], [-3.0, 4.0]], requires_grad=True)
    g = torch.tensor([[0.5, 0.25], [1.0, -2.0]])
    out = part(w)
    # k = sigmoid(0.2) = 0.55: ceil(2.2) = 3 of 4 stay, all but the score -0.1.
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert torch.equal(out.detach(), w.detach() * mask)
    (out * g).sum().backward()
    dm = g * w.detach()
    k = torch.sigmoid(torch.tensor(0.2))
    assert torch.equal(w.grad, g * mask)
    assert torch.equal(part.scores.grad, dm)
    assert part.sigma.grad.item() == pytest.approx(float(k * (1 - k) * (dm * mask).sum()))


def test_row_and_block_scores_sum_the_gradient_of_their_members() -> None:
    for grain, sums in (("row", (1,)), ((2, 3), None)):
        part = MovementMask(Tiling(Weight("w", torch.zeros(4, 6), LINEAR), grain))
        w = torch.randn(4, 6, requires_grad=True)
        g = torch.randn(4, 6)
        (part(w) * g).sum().backward()
        dm = g * w.detach()
        by_hand = dm.sum(1, keepdim=True) if sums else dm.reshape(2, 2, 2, 3).sum((1, 3))
        assert torch.allclose(part.scores.grad, by_hand, atol=1e-6)


def test_soft_movement_by_hand() -> None:
    how = SoftMovement(strength=8, ramp=4, tau=0.2)
    parts = [MovementMask(Tiling(Weight("w", torch.zeros(n, 2), LINEAR)), 0.2) for n in (1, 3)]
    parts[0].scores.data.copy_(torch.tensor([[-5.0, 1.0]]))
    means = [float(torch.sigmoid(p.scores.detach()).mean()) for p in parts]
    by_hand = 6.0 * (2 * means[0] + 6 * means[1]) / 8
    assert how.penalty(parts, 3).item() == pytest.approx(by_hand)
    assert how.penalty(parts, 0).item() == 0
    assert how.at(4) == how.at(400) == 8
    assert parts[0].mask(torch.ones(1, 2)).tolist() == [[False, True]]


@pytest.mark.parametrize(("rows", "least"), [(1, 1), (199, 1), (200, 2), (1000, 6)])
def test_soft_movement_leaves_half_a_per_cent_of_each_weight(rows: int, least: int) -> None:
    weight = torch.ones(rows, 1)
    part = MovementMask(Tiling(Weight("w", weight, LINEAR)))
    part.scores.data.copy_(torch.arange(rows)[:, None] / rows - 9)  # all far below the threshold
    kept = part.mask(weight)[:, 0]
    assert kept.tolist() == [False] * (rows - least) + [True] * least
    part(weight).sum().backward()
    assert bool((part.scores.grad == 1).all())  # straight through, wherever the threshold is
    part.scores.data[:] = 0.0
    assert bool(part.mask(weight).all())


@pytest.mark.parametrize(
    ("shape", "axes", "grain", "count"),
    [
        ((6, 4, 3, 3), CONV2D, "row", 6),
        ((6, 4, 3, 3), CONV2D, (2, 9), 12),
        ((4, 6), Axes(("in", "out")), "row", 6),
        ((4, 6, 2), Axes(("in", "out", "kw")), (3, 0), 2),
        ((4, 6), LINEAR, (2, 0), 2),
    ],
)
def test_a_tile_is_a_rectangle_of_the_matrix(
    shape: tuple[int, ...], axes: Axes, grain: Any, count: int
) -> None:
    weight = Weight("w", torch.zeros(shape), axes)
    tiling = Tiling(weight, grain)
    assert tiling.tiles == count
    assert tiling.tiles * tiling.members == weight.value.numel()
    numbers = torch.arange(count, dtype=torch.float32).reshape(tiling.shape)
    spread = tiling.spread(numbers)
    assert spread.shape == shape
    matrix = Weight("w", spread, axes).matrix()
    down, across = tiling.sides
    for i in range(tiling.shape[0]):
        for j in range(tiling.shape[1]):
            tile = matrix[i * down : (i + 1) * down, j * across : (j + 1) * across]
            assert bool((tile == numbers[i, j]).all())


def test_a_grain_that_does_not_divide_does_the_arithmetic() -> None:
    with pytest.raises(FoldError, match=r"10 .* not a multiple of 4"):
        Tiling(Weight("fc.weight", torch.zeros(8, 10), LINEAR), (4, 4))


@pytest.mark.parametrize("grain", ["column", (0, 0), (-1, 4), (1.5, 2), ("4", "4"), (4,), 4, None])
def test_what_is_no_grain_is_refused(grain: Any) -> None:
    for kind in (Leap, SoftMovement):
        with pytest.raises(UsageError, match="a grain is"):
            kind(grain=grain)
