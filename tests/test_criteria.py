"""Each criterion against a small reference written straight from its formula."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, Recipe, Target, prune, recipes
from secateur.core.errors import NonFinite, UsageError
from secateur.core.weight import LINEAR, Axes, Weight
from secateur.drive.decide import score
from secateur.frontends import discover
from secateur.pattern import Rows
from secateur.recover import FisherUpdate, FixedMask
from secateur.schedule import Cyclic, Polynomial
from secateur.score import (
    Grasp,
    Lamp,
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
    Gram,
    InputNorm,
    Stats,
    SynapticFlow,
    WeightGradient,
    collect,
)

CONV = Axes(("out", "in", "kh", "kw"), groups=2)


def linear(out: int = 4, inn: int = 6) -> Weight:
    return Weight("w", torch.randn(out, inn), LINEAR)


def seen(weight: Weight, stat: Any, rows: Tensor) -> Stats:
    stats = Stats()
    stats.update(stat, weight, rows, rows.shape[1])
    return stats


def close(a: Tensor, b: Any, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        a.double(), torch.as_tensor(np.asarray(b)).double(), rtol=rtol, atol=1e-9
    )


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3


def gradient(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), y), [model.get_parameter(name)])[0]


def scores_of(criterion: Any, model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    slots = [s for s in discover(model) if s.rows is not None]
    stats = collect(model, slots, criterion.needs, batches)
    slot = next(s for s in slots if s.name == name)
    return criterion(slot.weight(model), stats)


BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]


def test_magnitude() -> None:
    weight = linear()
    close(Magnitude()(weight, Stats()), weight.value.abs())
    close(Magnitude(2)(weight, Stats()), weight.value**2)
    # Over groups the mean is the L1 norm, or the squared L2 norm, per element.
    close(
        Rows().fold(Magnitude(2)(weight, Stats()), LINEAR)[0].sum(1), weight.value.norm(dim=1) ** 2
    )


def test_wanda() -> None:
    weight, rows = linear(), torch.randn(1, 30, 6)
    expected = weight.value.numpy() * 0
    for i in range(4):
        for j in range(6):
            norm = math.sqrt(sum(float(x) ** 2 for x in rows[0, :, j]) / 30)
            expected[i, j] = abs(float(weight.value[i, j])) * norm
    close(Wanda()(weight, seen(weight, InputNorm(), rows)), expected)


def test_wanda_uses_the_inputs_of_each_convolution_group() -> None:
    weight = Weight("w", torch.randn(4, 3, 2, 2), CONV)
    rows = torch.randn(2, 9, 12)
    found = Wanda()(weight, seen(weight, InputNorm(), rows))
    for i in range(4):
        norms = rows[i // 2].square().mean(0).sqrt().reshape(3, 2, 2)
        close(found[i], weight.value[i].abs() * norms)


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_ria(a: float) -> None:
    weight, rows = linear(), torch.randn(1, 30, 6)
    w, norms = weight.value.abs().numpy(), rows[0].square().mean(0).sqrt().numpy()
    expected = (w / w.sum(0, keepdims=True) + w / w.sum(1, keepdims=True)) * norms**a
    close(Ria(a)(weight, seen(weight, InputNorm(), rows)), expected)


def test_ria_sums_columns_within_a_convolution_group() -> None:
    weight = Weight("w", torch.randn(4, 3, 2, 2), CONV)
    rows = torch.ones(2, 9, 12)
    found = Ria()(weight, seen(weight, InputNorm(), rows)).reshape(2, 2, 12)
    w = weight.value.abs().reshape(2, 2, 12)
    close(found, w / w.sum(1, keepdim=True) + w / w.sum(2, keepdim=True))


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
    keep = torch.rand(4, 6) < 0.5
    a = stats(BlockFisher(24, 1), weight)[0].double().numpy() + damp * np.eye(24)
    w, k = weight.value.double().numpy().flatten(), keep.numpy().flatten()
    expected = np.zeros(24)
    expected[k] = w[k] + np.linalg.solve(a[np.ix_(k, k)], a[np.ix_(k, ~k)] @ w[~k])
    mask = axes.cube(keep).flatten(1)
    done = FisherUpdate(24, damp)(weight, stats, FixedMask(weight.matrix(), mask))
    close(weight.like(done.values), expected.reshape(4, 6), 1e-4)


def test_snip() -> None:
    model = small()
    expected = (model[0].weight * gradient(model, "0.weight", X, Y)).abs().detach()
    close(scores_of(Snip(), model, "0.weight", BATCHES), expected, 1e-4)


def test_snip_is_the_gradient_of_the_mask() -> None:
    model = small()
    mask = torch.ones(6, 5, requires_grad=True)
    weight = model[0].weight.detach()
    out = torch.func.functional_call(model, {"0.weight": weight * mask}, (X,))
    (expected,) = torch.autograd.grad(F.cross_entropy(out, Y), [mask])
    close(scores_of(Snip(), model, "0.weight", BATCHES), expected.abs(), 1e-4)


def test_taylor() -> None:
    model = small()
    both = torch.stack([gradient(model, "0.weight", x, y) for x, y in BATCHES])
    expected = (model[0].weight.detach() * both).square().mean(0)
    close(scores_of(Taylor(), model, "0.weight", BATCHES), expected, 1e-4)


def test_movement_has_the_sign_of_the_distance_from_zero() -> None:
    model = small()
    both = sum(gradient(model, "0.weight", x, y) for x, y in BATCHES)
    found = scores_of(Movement(), model, "0.weight", BATCHES)
    close(found, -model[0].weight.detach() * both, 1e-4)
    step = model[0].weight.detach() - 1e-3 * both  # what training does
    away = step.abs() > model[0].weight.detach().abs()
    assert torch.equal(found > 0, away)


def test_grasp_against_functional_hvp() -> None:
    model = small().double()
    names = ["0.weight", "2.weight", "4.weight"]
    frozen = {n: p.detach() for n, p in model.named_parameters()}
    x, t = X.double(), 5.0

    def loss(*values: Tensor) -> Tensor:
        inputs = {**frozen, **dict(zip(names, values, strict=True))}
        return F.cross_entropy(torch.func.functional_call(model, inputs, (x,)) / t, Y)

    values = tuple(frozen[n] for n in names)
    direction = torch.func.grad(loss, argnums=(0, 1, 2))(*values)
    _, products = torch.autograd.functional.hvp(loss, values, direction)
    for name, product in zip(names, products, strict=True):
        found = scores_of(Grasp(t), model, name, [(x, Y)])
        close(found, frozen[name] * product, 1e-4)


def test_grasp_predicts_the_change_of_gradient_flow() -> None:
    """Removing a small weight changes g'g by -2 w (Hg): keep where w (Hg) is large."""
    model = small().double()
    with torch.no_grad():
        model[2].weight[1, 2] = 1e-4
    x = X.double()

    def flow(net: nn.Module) -> float:
        loss = F.cross_entropy(net(x), Y)
        weights = [net[i].weight for i in (0, 2, 4)]
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, weights))

    kept = scores_of(Grasp(1.0), model, "2.weight", [(x, Y)])[1, 2]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight[1, 2] = 0
    assert flow(other) - flow(model) == pytest.approx(-2 * float(kept), rel=1e-2)


# -- SynFlow --------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    net = chain()
    with torch.no_grad():
        for layer in (net[1], net[5]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    batches = [torch.randn(2, 2, 4, 4)]
    slots = [s for s in discover(net) if s.rows is not None]
    stats = collect(net, slots, [SynapticFlow()], batches)
    sums = [float(SynFlow()(s.weight(net), stats).sum()) for s in slots]
    assert len(sums) == 4
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-9)


def test_synflow_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    a, b = net[0].weight.detach().abs().double(), net[2].weight.detach().abs().double()
    found = scores_of(SynFlow(), net, "0.weight", [torch.randn(5, 3)])
    close(found, a * b.sum(0)[:, None])
    found = scores_of(SynFlow(), net, "2.weight", [torch.randn(5, 3)])
    close(found, b * a.sum(1)[None])


def test_a_hundred_rounds_of_synflow_at_99_percent_empty_no_layer() -> None:
    net = nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(),
        nn.Linear(40, 10),
    )  # fmt: skip
    recipe = dataclasses.replace(recipes.synflow(0.99), scope=recipes.Scope(sensitive=True))
    pruned = prune(net, recipe, [torch.randn(2, 20)])
    assert pruned.facts.sparsity == pytest.approx(0.99, abs=0.001)
    assert min(layer.kept for layer in pruned.facts.layers) > 1
    flow = pruned.model
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.abs_().requires_grad_(False)
    assert float(flow(torch.ones(1, 20)).sum()) > float(flow(torch.zeros(1, 20)).sum())


def test_synflow_reads_batches_of_named_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.inner(pixel_values)

    pruned = prune(Net(), recipes.synflow(0.5, rounds=2), [{"pixel_values": X}])
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.02)


def test_synflow_refuses_token_ids() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="token ids"):
        prune(net, recipes.synflow(0.5), [torch.zeros(2, 3, dtype=torch.long)])


# -- wrappers -------------------------------------------------------------------------------------


def test_lamp() -> None:
    weight = linear()
    squares = weight.value.double().square().flatten()
    expected = torch.stack([s / squares[squares >= s].sum() for s in squares]).reshape(4, 6)
    found = Lamp(Magnitude())(weight, Stats())
    close(found, expected)
    assert float(found.max()) == 1.0


def test_lamp_counts_earlier_equals_as_larger() -> None:
    weight = Weight("w", torch.tensor([[1.0, 1.0, 1.0]]), LINEAR)
    close(Lamp(Magnitude())(weight, Stats()), [[1.0, 1 / 2, 1 / 3]])


def test_lamp_never_empties_a_layer() -> None:
    net = small()
    with torch.no_grad():
        net[0].weight *= 1e-4
    recipe = dataclasses.replace(recipes.lamp(0.96), scope=recipes.Scope(sensitive=True))
    kept = [layer.kept for layer in prune(net, recipe).facts.layers]
    assert min(kept) >= 1
    assert sum(kept) == round(66 * 0.04)


@pytest.mark.parametrize("inner", [Movement(), Grasp()], ids=["movement", "grasp"])
def test_lamp_keeps_the_order_of_negative_scores(inner: Any) -> None:
    """A criterion may be negative (drop first); scaling must not turn that round."""
    weight, stats = Weight("w", torch.ones(1, 3), LINEAR), Stats()
    stats.update(WeightGradient(), weight, torch.tensor([[5.0, -1.0, 0.5]]), 1)
    for need in Grasp().needs:
        stats.put(need, "w", torch.tensor([[-5.0, 1.0, -0.5]]))  # type: ignore[arg-type]
    scores, scaled = inner(weight, stats), Lamp(inner)(weight, stats)
    best = scores.argmax()
    assert int(scaled.argmax()) == int(best)


@pytest.mark.parametrize("by", ["sum", "l2", "mean", "max"])
@pytest.mark.parametrize("power", [-70, 0, 60])
def test_normalised_does_not_depend_on_the_scale(by: str, power: int) -> None:
    """Products of gradients are often 1e-20 and less: their squares must not vanish."""
    weight = linear()
    scaled = Weight("w", weight.value * 2.0**power, LINEAR)
    w = weight.value.abs().double()
    norm = {"sum": w.sum(), "l2": w.norm(), "mean": w.mean(), "max": w.max()}[by]
    close(Normalised(Magnitude(), by)(scaled, Stats()), w / norm)


def test_normalised_of_zeros_is_zero() -> None:
    weight = Weight("w", torch.zeros(2, 3), LINEAR)
    assert float(Normalised(Magnitude())(weight, Stats()).abs().max()) == 0


def test_weighted() -> None:
    weight = linear()
    a, b = weight.value.abs(), weight.value**2
    expected = 0.25 * a / a.mean() - 2 * b / b.mean()
    found = Weighted((Magnitude(1), Magnitude(2)), (0.25, -2.0))(weight, Stats())
    close(found, expected)


def test_random_follows_the_seed_and_the_name() -> None:
    weight = linear()
    other = Weight("other", weight.value, LINEAR)
    assert torch.equal(Random(1)(weight, Stats()), Random(1)(weight, Stats()))
    assert not torch.equal(Random(1)(weight, Stats()), Random(2)(weight, Stats()))
    assert not torch.equal(Random(1)(weight, Stats()), Random(1)(other, Stats()))


def test_the_seed_of_a_recipe_reaches_random_scores() -> None:
    net = small()
    one, two = (prune(net, Recipe(Random(), seed=seed)).masks for seed in (1, 2))
    assert one != two


@dataclass(frozen=True)
class Recorder:
    """Hands scores through and remembers them outside."""

    inner: Any
    log: tuple[list[Tensor], ...] = ([],)

    @property
    def needs(self) -> Any:
        return self.inner.needs

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        scores = self.inner(weight, stats)
        self.log[0].append(scores.clone())
        return scores

    def __hash__(self) -> int:
        return hash(self.inner)

    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize(
    "wrap", [lambda c: c, lambda c: Normalised(c, "max")], ids=["top", "inner"]
)
def test_smoothed_over_updates_of_a_gradual_run(wrap: Any) -> None:
    """Also inside another wrapper the average of the last update must be there."""
    net = nn.Linear(4, 3, bias=False)
    raw, log = Recorder(Magnitude(), ([],)), Recorder(wrap(Magnitude()), ([],))
    smooth = Smoothed(raw, beta=0.5)
    criterion = dataclasses.replace(log, inner=wrap(smooth), log=([],))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = Polynomial(begin=1, end=3, frequency=1)
    pruner = Gradual(
        net, optimizer, Recipe(criterion, target=Target("sparsity", 0.5), schedule=schedule)
    )
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        pruner.step()
    first, second = raw.log[0][0], raw.log[0][-1]
    expected = 0.5 * first + 0.5 * second
    assert len(criterion.log[0]) == 2
    found = criterion.log[0][1]
    close(found, expected if wrap(1) == 1 else expected / expected.max())


def test_movement_keeps_the_score_of_a_pruned_weight() -> None:
    """Its value is zero, so weight times gradient adds nothing, also under a large learning rate."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    recorder = Recorder(Movement(), ([],))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    schedule = Cyclic(begin=2, end=8, frequency=3, cycles=1)
    pruner = Gradual(
        net, optimizer, Recipe(recorder, target=Target("sparsity", 0.5), schedule=schedule)
    )
    holes = []
    for _ in range(8):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        pruner.step()
        holes.append(~pruner.masks["0.weight"].clone())
    earlier, later = recorder.log[0][-2:]
    still = holes[4] & holes[5] & holes[6]
    assert bool(still.any())
    torch.testing.assert_close(later[still], earlier[still])


def test_scores_that_are_not_finite_are_named() -> None:
    weight = Weight("fc.weight", torch.full((1, 2), 1e30), LINEAR)
    with pytest.raises(NonFinite, match=r"'fc\.weight'.*2 of 2"):
        score(weight, Recipe(Magnitude(2)), Stats())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Magnitude(3),
        lambda: Normalised(Magnitude(), "median"),
        lambda: Weighted((Magnitude(),), (1.0, 2.0)),
        lambda: Weighted((), ()),
    ],
)
def test_wrong_arguments_are_refused(build: Any) -> None:
    with pytest.raises(UsageError):
        build()
