"""Allocations: by small examples and references; the laws are in test_laws.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur import Recipe, Scope, Target, prune
from secateur.allocate import (
    ErdosRenyi,
    Given,
    Ranked,
    Sensitivity,
    Tolerance,
    Uniform,
    meet,
    scan,
)
from secateur.core.budget import Budget, Item
from secateur.core.errors import BudgetError, NeedsData, SelectorError, UsageError
from secateur.schedule import Exponential
from secateur.score import Random, Taylor


def item(name: str, fans: tuple[int, ...], members: int = 1) -> Item:
    size = math.prod(fans)
    scores = torch.rand(1, size // members, generator=torch.Generator().manual_seed(size))
    return Item(name, "Linear", fans, scores, 1, size // members, members, float)


ITEMS = [item("a", (8, 16)), item("b", (32, 8, 3, 3)), item("c", (4, 32))]
DENSE = sum(i.size for i in ITEMS)


def test_uniform_is_uniform() -> None:
    assert set(Uniform()(ITEMS, Budget(0.3 * DENSE)).values()) == {0.7}


@given(st.floats(0.02, 1.0), st.booleans())
def test_erdos_renyi_against_the_papers_loop(density: float, kernel: bool) -> None:
    """RigL's iteration: layers over density 1 become dense, the rest is solved again."""
    raw = {}
    for i in ITEMS:
        n = i.fans[0] + i.fans[1] + (sum(i.fans[2:]) if kernel else 0)
        raw[i.name] = n / (i.size if kernel else i.fans[0] * i.fans[1])
    full: set[str] = set()
    while True:
        rest = [i for i in ITEMS if i.name not in full]
        if not rest:
            break
        keep = density * DENSE - sum(i.size for i in ITEMS if i.name in full)
        eps = keep / sum(raw[i.name] * i.size for i in rest)
        over = {i.name for i in rest if eps * raw[i.name] > 1}
        if not over:
            break
        full |= over
    expected = {i.name: 1.0 if i.name in full else eps * raw[i.name] for i in ITEMS}
    levels = ErdosRenyi(kernel)(ITEMS, Budget(density * DENSE))
    for i in ITEMS:
        assert abs(i.keep(levels[i.name]) - expected[i.name] * i.size) <= len(ITEMS) + 0.5
    spent = sum(i.keep(levels[i.name]) for i in ITEMS)
    assert abs(spent - density * DENSE) <= 1.0 + 1e-6


def test_given_uses_the_most_specific_selector() -> None:
    items = [item(n, (10, 10)) for n in ("enc.0.weight", "enc.1.weight", "head.weight")]
    levels = Given({"enc.*": 0.3, "enc.1": 0.6, "Linear": 0.1})(items, Budget(200.0))
    assert dict(levels) == {"enc.0.weight": 0.3, "enc.1.weight": 0.6, "head.weight": 0.1}


def test_given_spreads_what_is_left() -> None:
    items = [item(n, (10, 10)) for n in "abc"]
    levels = Given({"a": 0.2})(items, Budget(150.0))
    assert levels["a"] == 0.2
    assert levels["b"] == levels["c"] == pytest.approx(0.65)
    levels = Given({"a": 0.2}, rest=Ranked())(items, Budget(150.0))
    assert sum(i.keep(levels[i.name]) for i in items) == 150


def test_given_refuses_nonsense() -> None:
    with pytest.raises(BudgetError, match=r"1\.5 is not in"):
        Given({"a": 1.5})
    with pytest.raises(BudgetError, match=r"a budget of 50: .* cost 80 alone, beside 1 more"):
        Given({"a": 0.2})([item("a", (10, 10)), item("b", (10, 10))], Budget(50.0))
    with pytest.raises(SelectorError, match="'z'"):
        Given({"z": 0.5})([item("a", (10, 10))], Budget(50.0))


def test_given_is_a_value() -> None:
    assert hash(Recipe(allocation=Given({"0": 0.5}))) == hash(Recipe(allocation=Given({"0": 0.5})))


def curves(levels: Mapping[str, float]) -> float:
    """A soft layer, a hard one, and one in between; smooth and rising."""
    return sum({"a": 1, "b": 5, "c": 25}[n] * s**2 for n, s in levels.items())


@pytest.mark.parametrize("allocation", [Sensitivity(), Tolerance(), Tolerance(step="total")])
def test_measuring_allocations_spare_the_sensitive(allocation: Any) -> None:
    items = [item(n, (10, 40)) for n in "abc"]
    levels = allocation(items, Budget(600.0, curves))
    assert levels["a"] > levels["b"] > levels["c"]
    assert sum(i.keep(levels[i.name]) for i in items) == pytest.approx(600, abs=3)


def test_sensitivity_gives_all_the_same_loss() -> None:
    items = [item(n, (20, 40)) for n in "abc"]
    levels = Sensitivity(tuple(np.linspace(0.02, 0.98, 49).tolist()))(items, Budget(1200.0, curves))
    losses = [curves({n: s}) for n, s in levels.items()]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)


def test_scan_is_monotone_under_noise() -> None:
    noise = iter([0.0, 0.3, 0.1, 0.5, -0.2])
    found = scan([item("a", (2, 2))], lambda levels: next(noise), [0.1, 0.3, 0.5, 0.7])
    assert found["a"] == [0.3, 0.3, 0.5, 0.5]


@pytest.mark.parametrize("allocation", [Sensitivity(), Tolerance()])
def test_measuring_needs_data(allocation: Any) -> None:
    with pytest.raises(NeedsData):
        allocation(ITEMS, Budget(100.0))


@pytest.mark.parametrize(
    "build",
    [lambda: Sensitivity((0.5, 0.2)), lambda: Sensitivity((0.0,)), lambda: Tolerance(step="x")],
)
def test_wrong_arguments(build: Any) -> None:
    with pytest.raises(UsageError):
        build()


@given(st.floats(0.05, 0.99), st.integers(0, 99))
def test_meet_uses_the_budget_up(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slopes = {i.name: float(torch.rand((), generator=generator)) + 0.1 for i in ITEMS}

    def family(t: float) -> dict[str, float]:
        return {n: min(t * s * 10, 1.0) for n, s in slopes.items()}

    levels = meet(ITEMS, Budget(share * DENSE), family)
    spent = sum(i.keep(levels[i.name]) for i in ITEMS)
    assert spent <= share * DENSE + 1e-6
    assert spent > share * DENSE - 1


def test_an_unreachable_budget_names_the_floor() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    scope = Scope(sensitive=True)
    with pytest.raises(BudgetError, match="16"):
        prune(net, Recipe(target=Target("params", 10), scope=scope))


@pytest.mark.parametrize(
    "allocation", [Uniform(), Ranked(), ErdosRenyi(), Sensitivity((0.3, 0.6, 0.9)), Tolerance(3, 4)]
)
def test_in_a_run(allocation: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 3))
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    recipe = Recipe(
        target=Target("sparsity", 0.7), allocation=allocation, scope=Scope(sensitive=True)
    )
    before = {n: t.clone() for n, t in net.state_dict().items()}
    pruned = prune(net, recipe, data)
    assert abs(pruned.masks.kept - 0.3 * 510) <= 3
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    for name, mask in pruned.masks.items():
        kept = pruned.model.get_parameter(name)[mask]
        assert torch.equal(kept, net.get_parameter(name)[mask])


def test_what_is_left_can_be_measured() -> None:
    net = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 3))
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    given = Given({"0": 0.5}, rest=Sensitivity((0.3, 0.6, 0.9)))
    recipe = Recipe(target=Target("sparsity", 0.7), allocation=given, scope=Scope(sensitive=True))
    pruned = prune(net, recipe, data)
    assert abs(pruned.masks.kept - 0.3 * 510) <= 3
    assert int(pruned.masks["0.weight"].sum()) == 90
    with pytest.raises(NeedsData, match="allocation Given: no data"):
        prune(net, recipe)


@pytest.mark.parametrize("rest", [Uniform(), Ranked(), ErdosRenyi(), Sensitivity()])
def test_given_needs_what_spreads_the_rest(rest: Any) -> None:
    given = Given({"a": 0.2}, rest=rest)
    assert given.needs_scores == rest.needs_scores
    assert given.needs_probe == rest.needs_probe


@pytest.mark.parametrize("allocation", [Sensitivity(), Tolerance(), Ranked(), ErdosRenyi()])
@pytest.mark.parametrize("criterion", [Random(), Taylor()], ids=lambda c: type(c).__name__)
def test_later_rounds_keep_nothing_that_is_zero(allocation: Any, criterion: Any) -> None:
    """What a layer lost in one round is gone, even if a later measurement would give it more."""
    net = nn.Sequential(
        nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)
    )
    recipe = Recipe(
        criterion,
        target=Target("sparsity", 0.7),
        allocation=allocation,
        schedule=Exponential(end=4),
        scope=Scope(sensitive=True),
    )
    pruned = prune(net, recipe, [(torch.randn(64, 12), torch.arange(64) % 4)])
    assert abs(pruned.masks.kept - 0.3 * 2240) <= 3
    for name, mask in pruned.masks.items():
        assert bool((pruned.model.get_parameter(name)[mask] != 0).all())


def test_equal_scores_are_priced_once_an_item_and_not_once_for_every_other() -> None:
    def calls(count: int) -> int:
        made = 0

        def cost(kept: int) -> float:
            nonlocal made
            made += 1
            return float(kept)

        tied = torch.ones(1, 16)
        items = [
            Item(
                str(i),
                "Linear",
                (4, 4),
                tied,
                1,
                16,
                1,
                cost,
                quota=lambda _, s: round(16 - 16 * s),
            )
            for i in range(count)
        ]
        levels = Ranked()(items, Budget(8.0 * count))
        # In their order: the first ones keep everything, the others nothing.
        assert list(levels.values()) == [0.0] * (count // 2) + [15 / 16] * (count - count // 2)
        return made

    assert calls(80) < 3 * calls(40)
