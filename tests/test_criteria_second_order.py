"""Criteria from curvature: their algebra, and that they predict what a removal costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from criteria_cases import BATCHES, X, Y, close, gradient, linear, scores_of, seen, small
from torch import nn

from secateur.core.weight import LINEAR, Axes, Weight
from secateur.recover import FisherUpdate, FixedMask
from secateur.score import Obd, ObsSaliency, Taylor, WoodFisher
from secateur.stats import BlockFisher, Gram, Stats


@pytest.mark.parametrize("damp", [0.0, 0.01, 0.3])
def test_obs_saliency_against_a_dense_inverse(damp: float) -> None:
    weight, rows = linear(), torch.randn(1, 40, 6).double()
    gram = rows[0].numpy().T @ rows[0].numpy() / 40
    inverse = np.linalg.inv(gram + damp * np.trace(gram) / 6 * np.eye(6))
    expected = weight.value.numpy() ** 2 / np.diag(inverse)[None]
    close(ObsSaliency(damp)(weight, seen(weight, Gram(), rows)), expected)


def test_obs_saliency_is_the_cost_of_the_best_removal() -> None:
    """w_q^2 / [G^-1]_qq is the error left after refitting all other weights."""
    weight, rows = linear(1), torch.randn(1, 40, 6).double()
    x, w = rows[0].numpy(), weight.value[0].double().numpy()
    found = ObsSaliency(0.0)(weight, seen(weight, Gram(), rows))[0]
    for q in range(6):
        rest = [j for j in range(6) if j != q]
        residual = np.linalg.lstsq(x[:, rest], x @ w, rcond=None)[1]
        close(found[q], residual[0] / 40, rtol=1e-4)


def test_obd() -> None:
    model = small()
    each = [gradient(model, "2.weight", X[i : i + 1], Y[i : i + 1]) for i in range(12)]
    weight = model[2].weight.detach()
    fisher = torch.stack(each).square().mean(0)
    close(scores_of(Obd(damp=0.0), model, "2.weight", BATCHES), 0.5 * weight**2 * fisher, 1e-4)
    damped = 0.5 * weight**2 * (fisher + 0.25)
    close(scores_of(Obd(damp=0.25), model, "2.weight", BATCHES), damped, 1e-4)


def test_second_order_scores_of_logistic_regression_in_closed_form() -> None:
    """The gradient of one sample is (p - y) x, whatever batches the data come in."""
    model, damp = nn.Sequential(nn.Linear(5, 2, bias=False)), 0.05
    p = model(X).softmax(1).detach().double().numpy()
    y = (Y == 1).long()
    signal = p - np.eye(2)[y]
    each = (signal[:, :, None] * X.double().numpy()[:, None, :]).reshape(12, 10)
    fisher = each.T @ each / 12
    w = model[0].weight.detach().double().numpy().flatten()
    batches = [(X[:5], y[:5]), (X[5:], y[5:])]
    found = scores_of(Obd(damp=damp), model, "0.weight", batches)
    close(found.flatten(), 0.5 * w**2 * (np.diag(fisher) + damp), 1e-4)
    found = scores_of(WoodFisher(10, damp), model, "0.weight", batches)
    inverse = np.linalg.inv(fisher + damp * np.eye(10))
    close(found.flatten(), w**2 / (2 * np.diag(inverse)), 1e-4)
    taylor = scores_of(Taylor(samples=1), model, "0.weight", batches)
    close(taylor, 2 * scores_of(Obd(damp=0.0), model, "0.weight", batches), 1e-4)


@pytest.mark.parametrize("criterion", [Obd(), WoodFisher(), Taylor(samples=1)], ids=str)
def test_scores_of_a_trained_network_predict_what_removing_a_weight_costs(criterion: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, model = small(), small()
    for net, scale in ((teacher, 2.0), (model, 1.0)):
        for p in net.parameters():
            p.data = scale * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    x = torch.randn(512, 5, generator=generator)
    # Labels with noise: the loss ends far from zero, where the Fisher matrix is the Hessian.
    y = torch.multinomial(teacher(x).softmax(1), 1, generator=generator).squeeze(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    scores = scores_of(criterion, model, "2.weight", [(x, y)]).flatten()
    weight, cost = model[2].weight.data.view(-1), []
    with torch.no_grad():
        before = float(F.cross_entropy(model(x), y))
        for i in range(len(weight)):
            value, weight[i] = float(weight[i]), 0.0
            cost.append(float(F.cross_entropy(model(x), y)) - before)
            weight[i] = value
    ranks = torch.stack([s.argsort().argsort().double() for s in (scores, torch.tensor(cost))])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


@pytest.mark.parametrize(("block", "out"), [(4, 4), (5, 3), (50, 4)])
def test_woodfisher_against_the_rank_one_recursion(block: int, out: int) -> None:
    weight, m = linear(out, 6), 9
    grads = [torch.randn(out, 6) for _ in range(m)]
    stats, stat = Stats(), BlockFisher(block, 1)
    for g in grads:
        stats.update(stat, weight, g, 1)
    damp = 0.1
    found = WoodFisher(block, damp)(weight, stats).flatten()
    flat = torch.stack([g.flatten() for g in grads]).double().numpy()
    w = weight.value.flatten().double().numpy()
    for start in range(0, len(w), block):
        part = flat[:, start : start + block]
        inverse = np.eye(part.shape[1]) / damp
        for g in part:
            fg = inverse @ g
            inverse -= np.outer(fg, fg) / (m + g @ fg)
        expected = w[start : start + block] ** 2 / (2 * np.diag(inverse))
        close(found[start : start + block], expected, 1e-4)


def test_woodfisher_of_a_dead_unit_is_finite_and_last() -> None:
    weight, stats = linear(2, 4), Stats()
    for _ in range(6):
        g = torch.randn(2, 4)
        g[1] = 0
        stats.update(BlockFisher(4, 1), weight, g, 1)
    found = WoodFisher(4)(weight, stats)
    assert bool(torch.isfinite(found).all())
    assert float(found[1].max()) < float(found[0].min())


def test_woodfisher_without_gradients_is_magnitude_whatever_the_layer() -> None:
    """A damping on each layer's own scale would empty the layer with the least gradients."""
    damp = WoodFisher().damp
    for scale in (1e-3, 1e-6):
        weight, stats = linear(), Stats()
        for _ in range(9):
            stats.update(BlockFisher(50, 1), weight, scale * torch.randn(4, 6), 1)
        close(WoodFisher()(weight, stats), damp / 2 * weight.value**2, 0.2)


def test_woodfisher_lets_pruned_weights_make_up_for_nothing() -> None:
    """In a second round the first round's weights are zero, and their gradients are not."""
    gradient, damp = torch.ones(1, 2), 0.01
    pruned, alone = Weight("w", torch.tensor([[2.0, 0.0]]), LINEAR), Stats()
    alone.update(BlockFisher(2, 1), pruned, gradient, 1)
    found = WoodFisher(2, damp)(pruned, alone)
    close(found, [[2.0**2 / 2 * (1 + damp), 0.0]])


def test_woodfisher_is_the_cost_of_the_removal_after_the_fisher_update() -> None:
    weight, stats, damp = linear(2, 6), Stats(), 0.02
    for _ in range(20):
        stats.update(BlockFisher(5, 1), weight, torch.randn(2, 6), 1)
    fisher = torch.block_diag(*stats(BlockFisher(5, 1), weight).double())[:12, :12]
    fisher += damp * torch.eye(12)
    scores = WoodFisher(5, damp)(weight, stats).flatten()
    for q in range(12):
        mask = (torch.arange(12) != q).view(2, 6)
        done = FisherUpdate(5, damp)(weight, stats, FixedMask(weight.value, mask))
        change = (done.values - weight.value).flatten().double()
        close(scores[q], 0.5 * change @ fisher @ change, 1e-4)


@pytest.mark.parametrize("axes", [LINEAR, Axes(("in", "out"))], ids=["linear", "conv1d"])
def test_fisher_update_against_dense_algebra(axes: Axes) -> None:
    weight, stats, damp = Weight("w", torch.randn(4, 6), axes), Stats(), 0.02
    for _ in range(20):
        stats.update(BlockFisher(24, 1), weight, torch.randn(4, 6), 1)
    mask = axes.cube(torch.rand(4, 6) < 0.5).flatten(1)
    a = stats(BlockFisher(24, 1), weight)[0].double().numpy() + damp * np.eye(24)
    w, k = weight.matrix().double().numpy().flatten(), mask.numpy().flatten()
    expected = np.zeros(24)
    expected[k] = w[k] + np.linalg.solve(a[np.ix_(k, k)], a[np.ix_(k, ~k)] @ w[~k])
    done = FisherUpdate(24, damp)(weight, stats, FixedMask(weight.matrix(), mask))
    close(done.values, expected.reshape(done.values.shape), 1e-4)


@pytest.mark.parametrize(
    ("axes", "order"), [(Axes(("in", "out")), (1, 0)), (Axes(("in", "out", "kw")), (1, 0, 2))]
)
def test_fisher_blocks_follow_the_matrix_in_any_order_of_axes(
    axes: Axes, order: tuple[int, ...]
) -> None:
    plain = Axes(("out", *axes.names[:1], *axes.names[2:]))
    shape = (5, 6, 2)[: len(order)]
    one = Weight("w", torch.randn(shape), plain)
    two = Weight("w", one.value.permute(order).contiguous(), axes)
    stat, a, b = BlockFisher(4, 1), Stats(), Stats()
    for _ in range(6):
        gradient = torch.randn(shape)
        a.update(stat, one, gradient, 1)
        b.update(stat, two, gradient.permute(order), 1)
    score = WoodFisher(block=4)
    close(score(two, b), score(one, a).permute(order))
    mask = torch.rand(one.matrix().shape) < 0.5
    update = FisherUpdate(block=4)
    found = [update(w, s, FixedMask(w.matrix(), mask)).values for w, s in ((one, a), (two, b))]
    close(found[1], found[0])
