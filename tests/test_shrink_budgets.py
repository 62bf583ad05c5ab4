"""Budgets of structural pruning: targets are met and not overshot, by every allocation."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrink_cases import Residual, batches, build
from torch import nn

import secateur
from secateur.allocate.widths import (
    GivenWidths,
    RankedWidths,
    UniformWidths,
    WidthAllocation,
    WidthItem,
)
from secateur.core.errors import BudgetError, UsageError
from secateur.core.facts import Facts
from secateur.drive.structural.width_cost import width_cost
from secateur.score import GroupTaylor
from secateur.structure import couple


@pytest.fixture
def net() -> Residual:
    return build()


def macs(model: nn.Module) -> float:
    example = torch.zeros(1, 3, 8, 8)
    from secateur.evaluate.cost import cost_of

    found = cost_of(model, example=example).macs_dense
    assert found is not None
    return found


@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
@pytest.mark.parametrize("allocation", [UniformWidths(), RankedWidths()])
def test_target_is_met_and_not_overshot(net: Residual, unit: str, allocation: object) -> None:
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target(unit, 0.5), allocation=allocation, recovery=()
    )
    pruned = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8))
    told = pruned.facts.measures["target"]
    assert told["reached"] <= told["limit"]
    assert told["reached"] > 0.9 * told["limit"]
    assert pruned.facts.measures["proof"] < 1e-5


def test_reported_costs_are_those_of_the_cut_network(net: Residual) -> None:
    recipe = secateur.ShrinkRecipe(target=secateur.Target("macs", 0.5), recovery=())
    pruned = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8))
    assert pruned.facts.measures["target"]["dense"] == macs(net)
    assert pruned.facts.measures["target"]["reached"] == macs(pruned.model)
    before, after = pruned.facts.measures["parameters"]
    assert before == sum(p.numel() for p in net.parameters())
    assert after == sum(p.numel() for p in pruned.model.parameters())
    assert len(pruned.facts.widths) == 3
    assert all(1 <= w.kept <= w.groups for w in pruned.facts.widths)


def test_rounds_reach_the_target_and_replay_as_one_cut(net: Residual, tmp_path: Path) -> None:
    recipe = secateur.ShrinkRecipe(GroupTaylor(), target=secateur.Target("macs", 0.4), rounds=3)
    pruned = secateur.shrink(net, recipe, None, batches())
    told = pruned.facts.measures["target"]
    assert told["dense"] == macs(net)
    assert 0.36 * told["dense"] < macs(pruned.model) <= 0.4 * told["dense"]
    names = [width.name for width in pruned.facts.widths]
    assert len(names) == len(set(names))
    assert next(w.groups for w in pruned.facts.widths if w.name == "a.0") == 16
    pruned.save(tmp_path / "out")
    again = secateur.load(Residual(), tmp_path / "out").model.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), pruned.model.eval()(x))


def test_a_target_that_coarse_rounds_overshoot_is_told_as_it_was_asked(net: Residual) -> None:
    target = secateur.Target("params", 0.9)
    one, three = (
        secateur.shrink(
            net,
            secateur.ShrinkRecipe(target=target, recovery=(), align=8, rounds=rounds),
            torch.zeros(1, 3, 8, 8),
        ).facts
        for rounds in (1, 3)
    )
    assert three.measures["target"] == pytest.approx(one.measures["target"])
    for facts in (one, three):
        (note,) = (n.text for n in facts.notes if n.topic == "target")
        assert note.startswith("asked for 6,682 params, reached 5,681")


@pytest.mark.parametrize("allocation", [UniformWidths(floor=0.5), RankedWidths(floor=0.5)])
def test_a_floor_is_a_share_of_the_uncut_width_in_every_round(
    net: Residual, allocation: WidthAllocation
) -> None:
    def cut(share: float) -> Facts:
        target = secateur.Target("params", share)
        recipe = secateur.ShrinkRecipe(
            target=target, allocation=allocation, recovery=(), rounds=3, align=1
        )
        return secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8)).facts

    assert all(width.kept >= width.groups / 2 for width in cut(0.4).widths)
    with pytest.raises(BudgetError, match="lower the floor"):
        cut(0.2)


def test_shares_that_are_given_are_no_rounds_and_no_target(net: Residual) -> None:
    given_ = GivenWidths({"*": 0.5})
    with pytest.raises(UsageError, match="what the last one left"):
        secateur.ShrinkRecipe(allocation=given_, recovery=(), rounds=3)
    recipe = secateur.ShrinkRecipe(allocation=given_, recovery=())
    facts = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8)).facts
    (note,) = (n.text for n in facts.notes if n.topic == "target")
    assert note.endswith("the allocation gives the widths")


def test_uniform_widths_are_alike_and_within_the_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(20, 20), nn.ReLU()) for _ in range(4)])
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), uniform=True, recovery=())
    pruned = secateur.shrink(model, recipe, torch.zeros(1, 20))
    told = pruned.facts.measures["target"]
    assert len({block[0].out_features for block in pruned.model[:3]}) == 1
    assert sum(p.numel() for p in pruned.model.parameters()) == told["reached"] <= told["limit"]


class Twins(nn.Module):
    """Two like blocks; the second may refuse other widths in its code."""

    def __init__(self, *, fussy: bool) -> None:
        super().__init__()
        self.fussy = fussy
        self.wide = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.fussy or self.wide[1].weight.shape[0] == 32
        for wide, back in zip(self.wide, self.back, strict=True):
            x = x + back(wide(x).relu())
        scores: torch.Tensor = self.two(self.one(x).relu())
        return scores


@pytest.mark.parametrize("fussy", [False, True])
def test_uniform_widths_stay_whole_if_one_of_them_must(fussy: bool) -> None:
    torch.manual_seed(0)
    scope = secateur.Scope() if fussy else secateur.Scope(ignore=("wide.1",))
    target = secateur.Target("params", 0.9)
    recipe = secateur.ShrinkRecipe(target=target, uniform=True, scope=scope, recovery=())
    pruned = secateur.shrink(Twins(fussy=fussy), recipe, torch.zeros(1, 16))
    assert [width.name for width in pruned.facts.widths if width.kept < width.groups] == ["one"]
    (note,) = (n.text for n in pruned.facts.notes if n.where == "wide.0")
    assert note == "it keeps as many groups as 'wide.1', which takes no part"


def test_align(net: Residual) -> None:
    recipe = secateur.ShrinkRecipe(align=4, recovery=())
    small = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8)).model
    assert {small.a[0].out_channels % 4, small.b[0].out_channels % 4} == {0}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    limit=st.floats(0.0, 1.2),
    step=st.integers(1, 5),
    seed=st.integers(0, 100),
)
@pytest.mark.parametrize(
    "allocation", [UniformWidths(), RankedWidths(), RankedWidths(normalise="none", per_cost=True)]
)
def test_allocations_keep_the_budget(
    allocation: object, sizes: list[int], limit: float, step: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = [
        WidthItem(str(i), torch.rand(n, generator=generator), step=min(step, n))
        for i, n in enumerate(sizes)
    ]

    def spend(kept: dict[str, int]) -> float:
        counts = [kept[str(i)] for i in range(len(sizes))]
        return float(sum(a * b for a, b in zip(counts, [*counts[1:], 3], strict=True)))

    most = limit * spend({item.name: item.groups for item in items})
    try:
        kept = allocation(items, spend, most)  # type: ignore[operator]
    except BudgetError:
        assert spend({item.name: item.allowed(0) for item in items}) > 0
        return
    assert spend(kept) <= most
    for item in items:
        assert 1 <= kept[item.name] <= item.groups
        assert kept[item.name] == item.groups or kept[item.name] % item.step == 0


def test_more_budget_never_keeps_less(net: Residual) -> None:
    structure = couple(net, torch.zeros(1, 3, 8, 8))
    cost = width_cost(net, structure, "params")
    items = [WidthItem(w.name, torch.rand(w.groups)) for w in structure.widths]
    kept = [
        sum(RankedWidths()(items, cost, share * cost.dense).values())
        for share in (0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert kept == sorted(kept)


@pytest.mark.parametrize("offset", [0.0, 1e-9, -1e-9])
def test_scores_around_zero_are_ranked_by_their_size(offset: float) -> None:
    """Z-scores, as FLAP's: their mean is rounding, and says nothing of a width."""
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = (scores - scores.mean()) / scores.std()
    items = [WidthItem("a", scores + offset), WidthItem("b", scores.flip(0) - offset)]
    for limit in (20, 41, 60):
        kept = RankedWidths()(items, lambda kept: kept["a"] + kept["b"], limit)
        assert abs(kept["a"] - kept["b"]) <= 1, limit
        assert kept["a"] + kept["b"] == limit


class Tokens(nn.Module):
    """Layers that mix the tokens of each feature: they run as often as there are features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, 32), nn.Linear(32, 4)
        self.mix, self.back = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.back(self.mix(x.mT).relu()).mT
        y: torch.Tensor = self.out(x.mean(1))
        return y


def test_the_multiply_adds_that_are_told_are_those_of_the_cut_network() -> None:
    from secateur.evaluate.cost import cost_of

    net, example = Tokens().eval(), torch.randn(2, 16, 4)
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("macs", 0.5), allocation=UniformWidths(), recovery=()
    )
    pruned = secateur.shrink(net, recipe, example)
    told = pruned.facts.measures["target"]
    counted = cost_of(pruned.model, example=example).macs_dense
    assert told["reached"] == pytest.approx(counted, rel=1e-9)
    assert told["reached"] < 0.9 * told["limit"]
    assert any("do not run as often" in note.text for note in pruned.facts.notes)
