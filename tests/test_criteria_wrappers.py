"""Criteria that change the scores of others, and errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from criteria_cases import close, linear, small
from torch import Tensor, nn

from secateur import Gradual, Recipe, Scope, Target, prune, recipes
from secateur.allocate import Ranked, Uniform
from secateur.core.errors import NonFinite, UsageError
from secateur.core.weight import LINEAR, Weight
from secateur.drive.decide import score
from secateur.schedule import Cyclic, Exponential, Polynomial
from secateur.score import (
    Grasp,
    Lamp,
    Magnitude,
    Movement,
    Normalised,
    Random,
    Smoothed,
    Wanda,
    Weighted,
)
from secateur.stats import Stats, WeightGradient

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
    recipe = dataclasses.replace(recipes.lamp(0.96), scope=Scope(sensitive=True))
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


@pytest.mark.parametrize("allocation", [Uniform(), Ranked()])
@pytest.mark.parametrize("sequential", [False, True])
def test_averages_move_on_once_in_a_round(
    monkeypatch: pytest.MonkeyPatch, sequential: bool, allocation: Any
) -> None:
    moved = []
    plain = Stats.remember

    def remember(self: Stats, key: object, name: str, value: torch.Tensor) -> None:
        moved.append(name)
        plain(self, key, name, value)

    monkeypatch.setattr(Stats, "remember", remember)
    net = nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    recipe = Recipe(
        Smoothed(Wanda(), 0.5),
        target=Target("sparsity", 0.5),
        allocation=allocation,
        schedule=Exponential(end=3),
        sequential=sequential,
    )
    prune(net, recipe, data=[torch.randn(40, 10)])
    assert sorted(moved) == ["0.weight"] * 3 + ["2.weight"] * 3


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
