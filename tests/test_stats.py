"""Statistics: against numpy and autograd by hand, and safe to split over data."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.batches import Data, micro_batches
from secateur.core.errors import DataError, NeedsData, NonFinite
from secateur.core.losses import default_loss, logits_of
from secateur.core.slots import Slot
from secateur.core.weight import LINEAR, Weight
from secateur.frontends import discover
from secateur.stats import (
    BlockFisher,
    Gradient,
    GradientFlow,
    Gram,
    InputNorm,
    Moments,
    Positions,
    Sketch,
    SquaredGradient,
    Stats,
    SynapticFlow,
    WeightGradient,
    collect,
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip


def watched(model: nn.Module) -> list[Slot]:
    return [s for s in discover(model) if s.rows is not None]


X, Y = torch.randn(9, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
EVERY: list[Any] = [
    InputNorm(),
    Moments(),
    Gram(),
    Positions(),
    Gradient(),
    SquaredGradient(),
    SquaredGradient(1),
    WeightGradient(),
    BlockFisher(7),
]


@pytest.mark.parametrize("stat", EVERY, ids=repr)
def test_two_halves_merge_to_the_whole(stat: Any) -> None:
    model = net()
    batches = [(X[:2], Y[:2]), (X[2:5], Y[2:5]), (X[5:], Y[5:])]
    whole = collect(model, watched(model), [stat], batches)
    left = collect(model, watched(model), [stat], batches[:1])
    right = collect(model, watched(model), [stat], batches[1:])
    for slot in watched(model):
        weight = slot.weight(model)
        one, joined = whole(stat, weight), left.merge(right)(stat, weight)
        torch.testing.assert_close(joined, one, rtol=1e-5, atol=1e-7)


def test_merging_does_not_change_the_parts() -> None:
    weight = Weight("w", torch.zeros(2, 3), LINEAR)
    a, b = Stats(), Stats()
    a.update(Gram(), weight, torch.ones(1, 4, 3), 4)
    joined = a.merge(b)
    joined.update(Gram(), weight, torch.ones(1, 4, 3) * 5, 4)
    assert torch.equal(a(Gram(), weight), torch.ones(1, 3, 3).double())


def test_gram_moments_and_norm_against_numpy() -> None:
    model = nn.Linear(6, 2)
    x = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) + 3
    weight = watched(model)[0].weight(model)
    stats = collect(
        model, watched(model), [Gram(), Moments(), InputNorm()], list(torch.tensor(x).split(7))
    )
    exact = x.astype(np.float64)
    np.testing.assert_allclose(stats(Gram(), weight)[0], exact.T @ exact / 40, rtol=1e-6)
    mean, variance = stats(Moments(), weight)[:, 0]
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-5)
    np.testing.assert_allclose(
        stats(InputNorm(), weight)[0], np.sqrt((exact**2).mean(0)), rtol=1e-6
    )


def test_gram_of_bfloat16_inputs_is_summed_in_full_precision() -> None:
    weight = Weight("w", torch.zeros(1, 2), LINEAR)
    stats, ones = Stats(), torch.ones(1, 300, 2, dtype=torch.bfloat16)
    for _ in range(40):
        stats.update(Gram(), weight, ones, 300)
    assert torch.equal(stats(Gram(), weight), torch.ones(1, 2, 2).double())


def by_hand(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.get_parameter(name)])
    return found


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradients_by_hand(index: int) -> None:
    model = net()
    slot = watched(model)[index]
    weight = slot.weight(model)
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    needs = [
        Gradient(),
        SquaredGradient(1),
        SquaredGradient(None),
        WeightGradient(),
        BlockFisher(5),
    ]
    stats = collect(model, [slot], needs, batches)
    each = [by_hand(model, slot.name, X[i : i + 1], Y[i : i + 1]) for i in range(9)]
    both = [by_hand(model, slot.name, x, y) for x, y in batches]

    def close(stat: Any, expected: Tensor) -> None:
        torch.testing.assert_close(
            stats(stat, weight).double(), expected.double(), rtol=1e-4, atol=1e-7
        )

    close(Gradient(), by_hand(model, slot.name, X, Y))
    close(SquaredGradient(1), torch.stack(each).square().mean(0))
    close(SquaredGradient(None), torch.stack(both).square().mean(0))
    close(WeightGradient(), weight.value * (both[0] + both[1]))
    flat = torch.stack([F.pad(g.flatten(), (0, -g.numel() % 5)).reshape(-1, 5) for g in each])
    close(BlockFisher(5), torch.einsum("nbi,nbj->bij", flat, flat) / 9)


def test_micro_batches_cut_every_kind_of_batch() -> None:
    x, y = torch.arange(5), torch.arange(5) * 2
    assert [len(b) for b in micro_batches([x], 2)] == [2, 2, 1]
    assert [b[1].tolist() for b in micro_batches([(x, y)], 3)] == [[0, 2, 4], [6, 8]]
    pieces = list(micro_batches([{"x": x, "flag": True}], 4))
    assert [p["x"].tolist() for p in pieces] == [[0, 1, 2, 3], [4]]
    assert all(p["flag"] is True for p in pieces)
    assert next(iter(micro_batches([x], None))) is x
    shared = list(micro_batches([{"x": x, "positions": x[None], "scale": x.sum()}], 2))
    assert [p["positions"].tolist() for p in shared] == [[[0, 1, 2, 3, 4]]] * 3


def test_a_nan_gradient_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(batch).sum() * math.inf

    with pytest.raises(NonFinite, match=r"'0\.weight'.*gradient"):
        collect(model, watched(model), [Gradient()], [torch.ones(3, 2)], loss=loss)


def test_a_nan_activation_in_the_middle_is_named() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0.0

    model = nn.Sequential(nn.Linear(2, 2), Bad(), nn.Linear(2, 2))
    with pytest.raises(NonFinite, match=r"'2\.weight'"):
        collect(model, watched(model), [InputNorm()], [torch.ones(3, 2)])


def test_huge_finite_activations_are_not_taken_for_infinite() -> None:
    model = nn.Linear(2, 2)
    x = torch.full((4, 2), 3e38)
    collect(model, watched(model), [Positions()], [x])


def test_what_was_not_collected_is_asked_for() -> None:
    with pytest.raises(NeedsData, match=r"Gram of 'w'"):
        Stats()(Gram(), Weight("w", torch.zeros(1, 2), LINEAR))


# -- the sketch -----------------------------------------------------------------------------------


def bound(difference: Tensor, rows: Tensor, size: int) -> tuple[float, float]:
    """The exact error and six standard deviations of its estimate.

    For random signs the variance of ``||D X^T R||^2 / k`` is at most ``2 ||D X^T X D^T||_F^2 / k``.
    """
    outputs = rows.double() @ difference.double().T
    exact = float(outputs.square().sum())
    deviation = math.sqrt(2 / size) * float((outputs.T @ outputs).norm())
    return exact, 6 * deviation


def estimate(stats: Stats, weight: Weight, difference: Tensor, size: int) -> float:
    sketch = stats(Sketch(size), weight)[0].double()
    return float((difference.double() @ sketch).square().sum()) / size


@pytest.mark.parametrize("seed", range(5))
def test_sketch_estimates_the_output_error(seed: int) -> None:
    torch.manual_seed(seed)
    weight, difference = Weight("w", torch.zeros(6, 10), LINEAR), torch.randn(6, 10)
    rows, stats = torch.randn(200, 10) @ torch.randn(10, 10), Stats()
    for part in rows.split(50):
        stats.update(Sketch(64), weight, part[None], 50)
    exact, slack = bound(difference, rows, 64)
    assert abs(estimate(stats, weight, difference, 64) - exact) <= slack


@pytest.mark.parametrize("alike", [True, False], ids=["same first row", "other rows"])
def test_merged_sketches_estimate_the_whole(alike: bool) -> None:
    """Parts must not share their signs, also not where all begin with an empty border."""
    size = 512
    weight, difference = Weight("w", torch.zeros(4, 8), LINEAR), torch.randn(4, 8)
    first, second = torch.randn(60, 8) + 1, torch.randn(60, 8) + 1
    if alike:
        first[0] = second[0] = 0.0
    a, b = Stats(), Stats()
    a.update(Sketch(size), weight, first[None], 60)
    b.update(Sketch(size), weight, second[None], 60)
    exact, slack = bound(difference, torch.cat([first, second]), size)
    assert abs(estimate(a.merge(b), weight, difference, size) - exact) <= slack


# -- probes ---------------------------------------------------------------------------------------


def test_gradient_flow_is_hessian_times_gradient() -> None:
    model = net().double()
    slots = watched(model)
    batch = (X.double(), Y)
    temperature = 2.0
    found = GradientFlow(temperature).measure(model, slots, [batch], default_loss)
    names = [s.name for s in slots]
    frozen = {n: p.detach() for n, p in model.named_parameters()}

    def loss(*values: Tensor) -> Tensor:
        inputs = {**frozen, **dict(zip(names, values, strict=True))}
        return F.cross_entropy(
            torch.func.functional_call(model, inputs, (X.double(),)) / temperature, Y
        )

    values = tuple(frozen[n] for n in names)
    gradients = torch.func.grad(loss, argnums=(0, 1, 2))(*values)
    _, products = torch.autograd.functional.hvp(loss, values, gradients)
    for name, product in zip(names, products, strict=True):
        torch.testing.assert_close(found[name], product, rtol=1e-4, atol=1e-9)


class Classifier(nn.Module):
    """A network whose logits come in a form of their own."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.inner, self.form = net(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.inner(x))


@pytest.mark.parametrize(
    ("form", "read"),
    [
        (lambda x: {"logits": x}, lambda out: out["logits"]),
        (lambda x: (x, 2 * x), lambda out: out[0]),
        (lambda x: SimpleNamespace(logits=x), logits_of),
    ],
    ids=["mapping", "tuple", "object"],
)
def test_gradient_flow_with_a_loss_that_reads_the_output(form: Any, read: Any) -> None:
    model = Classifier(form)

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(read(model(batch[0])), batch[1]) / len(model.inner)

    found = GradientFlow().measure(model, watched(model), [(X, Y)], loss)
    wanted = GradientFlow().measure(model.inner, watched(model.inner), [(X, Y)], default_loss)
    for name, product in wanted.items():
        scale = len(model.inner) ** 2
        torch.testing.assert_close(found[f"inner.{name}"] * scale, product, rtol=1e-3, atol=1e-9)


def test_probes_leave_the_model_alone() -> None:
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    collect(model, watched(model), [GradientFlow(), SynapticFlow()], [(X, Y)])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not isinstance(model, torch.nn.modules.lazy.LazyModuleMixin)


# -- data -----------------------------------------------------------------------------------------


def test_calibration_counts_samples_not_batches() -> None:
    data = Data(train=[(X[:4], Y[:4])] * 5, calibration=10)
    assert [len(b[0]) for b in data.sample()] == [4, 4, 2]


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        Data(train=[]).sample()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.ConvTranspose2d(8, 5, 4, stride=2, padding=1), 36.0),
        (nn.Conv2d(8, 5, 3, stride=2), 4.0),
        (nn.ConvTranspose2d(8, 5, 3), 36.0),
    ],
    ids=["transposed stride 2", "convolution", "transposed"],
)
def test_a_target_in_multiply_adds_counts_real_ones(kind: nn.Module, expected: float) -> None:
    """A transposed convolution uses each weight once an *input* position, at its border less."""
    from torch.utils.flop_counter import FlopCounterMode

    from secateur import Recipe, Target, prune

    model = nn.Sequential(kind)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 8, 6, 6))
    assert counter.get_total_flops() / 2 == expected * kind.weight.numel()
    half = expected * kind.weight.numel() * 0.5
    pruned = prune(model, Recipe(target=Target("macs", half)), [torch.randn(2, 8, 6, 6)])
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.15)


def test_what_was_read_goes_when_something_new_is_seen() -> None:
    weight = Weight("w", torch.zeros(1, 2), LINEAR)
    stats, mean = Stats(), Gradient()
    stats.update(mean, weight, torch.tensor([[2.0, 4.0]]), 1)
    stats.begin_anew([mean])
    assert stats(mean, weight).tolist() == [[2.0, 4.0]]
    again = Stats()
    again.load_state_dict(stats.state_dict(), [(mean, "w")])
    for each in (stats, again):
        each.update(mean, weight, torch.tensor([[0.0, 1.0]]), 1)
        each.update(mean, weight, torch.tensor([[1.0, 1.0]]), 1)
        assert each(mean, weight).tolist() == [[0.5, 1.0]]


def test_gradients_of_a_batch_are_gone_before_the_next_one() -> None:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    made: list[Any] = []
    living: list[int] = []

    class Watching(Gradient):
        def update(self, state: Any, weight: Weight, seen: Tensor, samples: int) -> Any:
            made.append(weakref.ref(seen))
            return super().update(state, weight, seen, samples)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        living.append(sum(each() is not None for each in made))
        return cast(Tensor, model(batch).square().mean())

    slots = [slot for slot in discover(net) if slot.axes is not None]
    collect(net, slots, [Watching()], [torch.rand(2, 3) for _ in range(3)], loss=loss)
    assert len(living) == 3
    assert max(living) <= 1


def test_what_is_taken_over_is_not_copied() -> None:
    net, batches = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), [torch.rand(4, 3)]
    slots = [slot for slot in discover(net) if slot.axes is not None]
    one, other = (collect(net, slots, [need], batches) for need in (Sketch(), Gram()))
    weight = slots[0].weight(net)
    state = other._states[(Gram(), weight.name)]
    assert one.take(other)._states[(Gram(), weight.name)] is state
    assert one.names() == [slot.name for slot in slots]
    assert (Sketch(), weight.name) in one
