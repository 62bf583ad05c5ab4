"""Structural pruning from end to end: shrink, shrink_, budgets, repair, errors, the command line."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur.allocate.widths import GivenWidths, RankedWidths, UniformWidths, WidthItem
from secateur.core.errors import BudgetError, DataError, NeedsData, SelectorError, UsageError
from secateur.core.groups import Groups
from secateur.drive.structural import cutting
from secateur.drive.structural.recipe_file import from_plain, to_plain
from secateur.drive.structural.width_cost import width_cost
from secateur.recover import BatchNorm, Compensation
from secateur.score import GeometricMedian, Grouped, GroupTaylor, Magnitude
from secateur.structure import apply_, couple, cuts_for
from secateur.structure.masked import Proof


class Residual(nn.Module):
    """Two blocks around one residual width, and a head that is pinned by the output."""

    def __init__(self, width: int = 12, inside: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.a = self._block(width, inside)
        self.b = self._block(width, inside)
        self.head = nn.Linear(width, 5)

    def _block(self, width: int, inside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, inside, 3, padding=1, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            nn.Conv2d(inside, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.a(x)
        x = x + self.b(x)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class FirstFirst:
    """A criterion of a user's own: the first groups matter most."""

    needs: frozenset[object] = frozenset()

    def __call__(self, groups: Groups, stats: object) -> torch.Tensor:
        return -torch.arange(groups.count, dtype=torch.float32)


@pytest.fixture
def net() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    return model.eval()


def batches(count: int = 4, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(size, 3, 8, 8, generator=generator)
        found.append((x, (x.mean((1, 2, 3)) > 0).long()))
    return found


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


def test_uniform_widths_are_alike_and_within_the_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(20, 20), nn.ReLU()) for _ in range(4)])
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), uniform=True, recovery=())
    pruned = secateur.shrink(model, recipe, torch.zeros(1, 20))
    told = pruned.facts.measures["target"]
    assert len({block[0].out_features for block in pruned.model[:3]}) == 1
    assert sum(p.numel() for p in pruned.model.parameters()) == told["reached"] <= told["limit"]


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


def test_a_silent_network_is_not_called_proved(net: Residual) -> None:
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    pruned = secateur.shrink(net, secateur.ShrinkRecipe(recovery=()), torch.zeros(1, 3, 8, 8))
    assert "vacuous" in {note.topic for note in pruned.facts.notes}
    assert "vacuous" not in {
        note.topic
        for note in secateur.shrink(
            Residual(), secateur.ShrinkRecipe(recovery=()), torch.zeros(1, 3, 8, 8)
        ).facts.notes
    }


def test_a_failed_proof_returns_nothing(net: Residual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "prove", lambda *_: Proof(0.5, 10))
    before = copy.deepcopy(net.state_dict())
    recipe = secateur.ShrinkRecipe(recovery=())
    with pytest.raises(DataError, match=r"differs from the masked one by 0\.5"):
        secateur.shrink_(net, recipe, torch.zeros(1, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_error_does_not_hide_behind_half_precision(
    net: Residual, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 1 % would, if the proof ran in the type of the weights."""
    example, recipe = torch.randn(2, 3, 8, 8).to(dtype), secateur.ShrinkRecipe(recovery=())
    pruned = secateur.shrink(net.to(dtype), recipe, example)
    assert pruned.facts.measures["proof"] < 1e-5
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}

    def spoilt(model: nn.Module, cuts: Any) -> None:
        apply_(model, cuts)
        model.get_submodule("head").weight.data.mul_(1.01)

    monkeypatch.setattr(cutting, "apply_", spoilt)
    with pytest.raises(DataError, match=r"differs from the masked one by 0\.0"):
        secateur.shrink(net, recipe, example)


def test_errors(net: Residual) -> None:
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(BudgetError, match="its targets are params, macs, bytes and latency"):
        secateur.ShrinkRecipe(target=secateur.Target("sparsity", 0.5))
    with pytest.raises(BudgetError, match="remain"):
        secateur.shrink(net, secateur.ShrinkRecipe(target=secateur.Target("params", 10.0)), example)
    with pytest.raises(UsageError, match="its own forward fails"):
        secateur.shrink(net, None, torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="neither example_inputs nor data"):
        secateur.shrink(net)
    with pytest.raises(NeedsData, match="GroupTaylor"):
        secateur.shrink(net, secateur.ShrinkRecipe(GroupTaylor()), example)
    unknown = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("nothing.*",)))
    with pytest.raises(SelectorError):
        secateur.shrink(net, unknown, example)
    nothing = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("*",)))
    with pytest.raises(UsageError, match="none of 3 widths takes part"):
        secateur.shrink(net, nothing, example)
    structure = couple(net, example)
    with pytest.raises(UsageError, match="nothing would be left"):
        cuts_for(net, structure, {"a.0": torch.zeros(16, dtype=torch.bool)})
    with pytest.raises(UsageError, match="none has this name"):
        cuts_for(net, structure, {"z": torch.ones(16, dtype=torch.bool)})


def test_ignored_widths_stay(net: Residual) -> None:
    recipe = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("stem.0",)), recovery=())
    small = secateur.shrink(net, recipe, torch.zeros(1, 3, 8, 8)).model
    assert small.stem[0].out_channels == 12
    assert small.a[0].out_channels < 16


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


_NET = """
import torch
from torch import Tensor, nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
        nn.Linear(96, 3),
    )

def data():
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = (x, (x.mean((1, 2, 3)) > 0).long())
    return {"train": [batch], "test": [batch]}
"""


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "secateur", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NET)
    done = _run(tmp_path, "shrink", "net.py:build", "-o", "out", "--data", "net.py:data",
                "--target", "params=50%", "--criterion", "geometric_median", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["proof"] < 1e-5
    assert told["target"]["reached"] <= told["target"]["limit"]
    assert told["recipe"]["criterion"] == {"geometric_median": {}} or told["recipe"]["criterion"]
    again = _run(tmp_path, "evaluate", "out", "--data", "net.py:data", "--json")
    assert again.returncode == 0, again.stderr
    refused = _run(tmp_path, "shrink", "net.py:build", "-o", "more", "--input", "1x1x8x8",
                   "--target", "params=10", "--json")  # fmt: skip
    assert refused.returncode == 2
    assert "remain" in json.loads(refused.stdout)["error"]["found"]
    assert not (tmp_path / "more").exists()


def test_inspect_structure(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NET)
    done = _run(tmp_path, "inspect", "net.py:build", "--structure", "--input", "1x1x8x8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [w["name"] for w in told["widths"]] == ["0", "3"]
    assert all(row["width"] or row["pinned"] for row in told["parameters"])
    assert 0.5 < told["removable"] < 1


class Fours(nn.Module):
    """Its code wants a number of units that no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 16), nn.Linear(16, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.one.out_features % 16:
            raise ValueError("one must have sixteen units\nor more of them")
        found: Tensor = self.three(self.two(self.one(x).relu()).relu())
        return found


def test_a_width_that_the_code_cannot_do_without_is_pinned_and_told() -> None:
    torch.manual_seed(0)
    net, x = Fours().eval(), torch.randn(4, 6)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    pruned = secateur.shrink(net, recipe, x)
    assert pruned.model.get_submodule("one").out_features == 16
    assert (
        pruned.facts.measures["target"]["reached"] <= 0.5 * pruned.facts.measures["target"]["dense"]
    )
    (note,) = [n for n in pruned.facts.notes if n.topic == "pinned" and n.where == "one"]
    assert "of 16 the network raises ValueError: one must have sixteen units" in note.text
    assert pruned.model(x).shape == (4, 3)


def test_a_network_in_which_nothing_can_be_cut_says_why() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features != 16:
                raise ValueError("sixteen units")
            found: Tensor = self.two(self.one(x))
            return found

    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    with pytest.raises(UsageError, match="the network raises ValueError: sixteen units"):
        secateur.shrink(Stubborn().eval(), recipe, torch.randn(4, 6))


def test_cuts_that_only_fail_together_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features != 16 and self.two.out_features != 16:
                raise ValueError("both")
            found: Tensor = self.three(self.two(self.one(x).relu()).relu())
            return found

    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.3), recovery=())
    with pytest.raises(UsageError, match="does with each cut alone"):
        secateur.shrink(Tied().eval(), recipe, torch.randn(4, 6))
