"""Structural pruning from end to end: shrink, shrink_, what goes, repair, saved files, recipes."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from shrink_cases import Residual, batches, build
from torch import nn

import secateur
from secateur.allocate.widths import GivenWidths, RankedWidths
from secateur.core.groups import Groups
from secateur.drive.structural.recipe_file import from_plain, to_plain
from secateur.recover import BatchNorm, Compensation
from secateur.score import GeometricMedian, Grouped, GroupTaylor, Magnitude
from secateur.structure import couple


@dataclass(frozen=True)
class FirstFirst:
    """A criterion of a user's own: the first groups matter most."""

    needs: frozenset[object] = frozenset()

    def __call__(self, groups: Groups, stats: object) -> torch.Tensor:
        return -torch.arange(groups.count, dtype=torch.float32)


@pytest.fixture
def net() -> Residual:
    return build()


def test_the_given_model_is_left_alone(net: Residual) -> None:
    before = copy.deepcopy(net.state_dict())
    secateur.shrink(net, None, torch.zeros(1, 3, 8, 8), batches())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("criterion", [Grouped(Magnitude()), GeometricMedian(), GroupTaylor()])
def test_lowest_groups_go(net: Residual, criterion: object) -> None:
    from secateur.drive.structural.scores import group_scores

    recipe = secateur.ShrinkRecipe(criterion, allocation=GivenWidths({"a.0": 0.25}), recovery=())
    data = secateur.Data(train=batches())
    structure = couple(net, torch.zeros(1, 3, 8, 8))
    scores = group_scores(net, structure.widths, recipe, data)["a.0"]
    small = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8), data).model
    best = scores.topk(4).indices.sort().values
    assert torch.equal(small.a[0].weight, net.a[0].weight[best])
    assert torch.equal(small.a[3].weight, net.a[3].weight[:, best])


def test_compensation_lowers_the_output_error(net: Residual) -> None:
    data = batches(8)
    errors = {}
    for name, recovery in (("cut", ()), ("repaired", (Compensation(),))):
        recipe = secateur.ShrinkRecipe(
            allocation=GivenWidths({"a.0": 0.5, "b.0": 0.5}), recovery=recovery
        )
        small = secateur.shrink(net, recipe, None, data).model.eval()
        x = torch.cat([x for x, _ in data])
        with torch.no_grad():
            errors[name] = float((small(x) - net(x)).square().mean())
    assert errors["repaired"] < 0.7 * errors["cut"]


def test_compensation_is_exact_for_copies(net: Residual) -> None:
    with torch.no_grad():  # the second half of the channels copies the first
        for module in (net.a[0], net.a[1]):
            for value in module.state_dict().values():
                if value.ndim:
                    value[8:] = value[:8]
    recipe = secateur.ShrinkRecipe(
        FirstFirst(),
        allocation=GivenWidths({"a.0": 0.5}),
        recovery=(Compensation(damping=1e-9),),
    )
    data = batches(8)
    small = secateur.shrink(net, recipe, None, data).model.eval()
    assert small.a[0].weight.equal(net.a[0].weight[:8])
    assert torch.allclose(small(data[0][0]), net(data[0][0]), atol=1e-3)


def test_without_data_repair_is_left_out_and_said(net: Residual) -> None:
    pruned = secateur.shrink(net, None, torch.zeros(1, 3, 8, 8))
    left_out = {note.where for note in pruned.facts.notes if note.topic == "skipped"}
    assert left_out == {"Compensation", "BatchNorm"}


@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_training_goes_on_after_a_cut(net: Residual, make: str) -> None:
    optimizer: torch.optim.Optimizer
    if make == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def step() -> None:
        x, y = batches(1)[0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    net.train()
    step()
    slots = {n: dict(optimizer.state[p]) for n, p in net.named_parameters()}
    weights = dict(net.named_parameters())
    recipe = secateur.ShrinkRecipe(allocation=GivenWidths({"a.0": 0.5}), recovery=())
    secateur.shrink_(net, recipe, torch.zeros(1, 3, 8, 8), optimizer=optimizer)
    assert all(weights[n] is p for n, p in net.named_parameters())  # the same objects
    key = "momentum_buffer" if make == "sgd" else "exp_avg"
    kept = [
        i for i in range(16) if i in set(net.secateur_surgery.cuts["a.0.weight"][0].positions())
    ]
    old, new = slots["a.0.weight"][key], optimizer.state[net.a[0].weight][key]
    assert torch.equal(new, old[kept])
    step()
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert net.training


def test_cutting_twice_is_saved_as_one(net: Residual, tmp_path: Path) -> None:
    first = secateur.ShrinkRecipe(allocation=GivenWidths({"a.0": 0.5}), recovery=())
    second = secateur.ShrinkRecipe(allocation=GivenWidths({"a.0": 0.5, "stem.0": 0.5}), recovery=())
    example = torch.zeros(1, 3, 8, 8)
    once = secateur.shrink(net, first, example)
    twice = secateur.shrink(once.model, second, example)
    assert twice.model.a[0].out_channels == 4
    twice.save(tmp_path / "out")
    fresh = Residual()
    restored = secateur.load(fresh, tmp_path / "out").model.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(restored(x), twice.model.eval()(x))


def test_ignored_widths_stay(net: Residual) -> None:
    recipe = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("stem.0",)), recovery=())
    small = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8)).model
    assert small.stem[0].out_channels == 12
    assert small.a[0].out_channels < 16


def test_recipes_round_trip() -> None:
    recipes = [
        secateur.ShrinkRecipe(),
        secateur.ShrinkRecipe(
            GroupTaylor(),
            secateur.Target("latency", 0.5),
            RankedWidths("none", per_cost=True),
            (BatchNorm(),),
            secateur.Scope(ignore=("a",)),
            uniform=True,
            align=8,
            seed=3,
        ),
        secateur.ShrinkRecipe(allocation=GivenWidths({"a": 0.5})),
    ]
    for recipe in recipes:
        assert from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe
    assert len({recipe.fingerprint() for recipe in recipes}) == 3


class Normed(nn.Module):
    """Three widths, each under an operator that sees the kept units only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.first = nn.Linear(4, 8), nn.LayerNorm(8)
        self.two, self.second = nn.Linear(8, 8), nn.GroupNorm(1, 8)
        self.three = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.mean, self.four = Mean(), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.two(self.first(self.one(x)).relu()))
        return self.four(self.mean(self.three(x)))  # type: ignore[no-any-return]


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("cut", "noted"),
    [
        (("one",), ["first"]),
        (("two",), ["second", "three.parametrizations.weight.0"]),
        (("three.parametrizations.weight",), ["mean"]),
        (("one", "two"), ["first", "second", "three.parametrizations.weight.0"]),
    ],
)
def test_only_what_lost_units_is_noted(cut: tuple[str, ...], noted: list[str]) -> None:
    recipe = secateur.ShrinkRecipe(
        allocation=GivenWidths(dict.fromkeys(cut, 0.5)), recovery=(), align=1
    )
    found = secateur.shrink(Normed(), recipe, torch.randn(2, 4))
    assert sorted(note.where for note in found.facts.notes if note.topic == "reduces") == noted
