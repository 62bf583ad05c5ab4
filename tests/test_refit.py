"""After a cut all layers are fitted to the uncut network: exact where it can be, better elsewhere."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import Data, ShrinkRecipe, Target
from secateur.allocate.widths import UniformWidths
from secateur.core.facts import Facts
from secateur.drive.structural.compensate import Told
from secateur.drive.structural.layer_inputs import Both
from secateur.drive.structural.refit import refit_
from secateur.frontends import discover
from secateur.recover import BatchNorm, Compensation
from secateur.score import Grouped, Magnitude


class Residual(nn.Module):
    """Convolutions with BatchNorms around a sum, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.outer, self.outer_norm = nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.depthwise(self.inner_norm(self.inner(x)).relu()).relu()
        found: Tensor = self.head((x + self.outer_norm(self.outer(y))).relu().mean((2, 3)))
        return found


def images(count: int = 6) -> list[Tensor]:
    own = torch.Generator().manual_seed(0)
    mixed = torch.randn(3, 8, generator=own)  # inputs with structure, as real ones have
    found = [torch.randn(16, 8, 8, 8, generator=own) for _ in range(count)]
    return [torch.einsum("bcij,kc->bkij", x, mixed) for x in found]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Residual()
    net.train()
    for x in images():
        net(x)
    return net.eval()


def recipe(refit: bool, rounds: int = 3, **changes: Any) -> ShrinkRecipe:
    repair = (Compensation(refit=refit), BatchNorm())
    criterion = Grouped(Magnitude(p=2))
    target = Target("params", 0.5)
    return ShrinkRecipe(criterion, target, recovery=repair, rounds=rounds, align=1, **changes)


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


@pytest.mark.parametrize("seed", range(3))
def test_it_is_nearer_to_the_uncut_network_on_unseen_images(seed: int) -> None:
    net, data = network(seed), images(7)
    errors = [
        error(secateur.shrink(net, recipe(refit), None, Data(train=data[:6])).model, net, data[6])
        for refit in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_copies_go_in_several_rounds_and_nothing_changes() -> None:
    """Positions of later rounds must be counted in the uncut network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 3)).eval()
    data = torch.randn(400, 6).split(100)
    with torch.no_grad():  # the function has rank 6: half of the hidden units are enough
        given = ShrinkRecipe(
            Grouped(Magnitude(p=2)),
            Target("params", 0.5),
            UniformWidths(),
            Compensation(1e-12),
            align=1,
            rounds=3,
        )
        pruned = secateur.shrink(net, given, None, Data(train=list(data)))
    kept = {width.name: width.kept for width in pruned.facts.widths}
    assert 6 <= kept["0"] < 12
    assert 6 <= kept["1"] < 16
    assert error(pruned.model, net, data[0]) < 1e-4


def test_positions_are_those_of_the_uncut_network() -> None:
    net = network()
    first = secateur.shrink(net, recipe(refit=False, rounds=1), None, Data(train=images()))
    # A network that was cut before is the uncut one of the next run.
    data = images(7)
    again, plain = (
        secateur.shrink(first.model, recipe(refit, rounds=2), None, Data(train=data[:6]))
        for refit in (True, False)
    )
    assert again.facts.measures["refitted_layers"] == 4  # without the depthwise convolution
    (note,) = [n for n in again.facts.notes if n.topic == "uncompensated" and not n.where]
    assert note.text.endswith(": depthwise.weight")
    errors = [error(small.model, first.model, data[6]) for small in (again, plain)]
    assert errors[0] < 1.05 * errors[1] < 0.2  # rows of other channels give about 1


def test_statistics_are_those_of_the_uncut_network_moved_by_the_fit() -> None:
    net = network()
    pruned = secateur.shrink(net, recipe(refit=True), None, Data(train=images()))
    assert pruned.surgery is not None
    cut = pruned.surgery.cuts.get("inner_norm.running_var", {})
    left = cut[0].positions() if cut else list(range(24))
    var: Any = pruned.model.get_submodule("inner_norm").running_var
    assert torch.equal(var, net.get_submodule("inner_norm").running_var[left])  # type: ignore[index]
    assert [n.topic for n in pruned.facts.notes if n.where == "BatchNorm"] == ["skipped"]


def test_an_uncut_network_stays_as_it_is() -> None:
    net = network()
    same = copy.deepcopy(net)
    refit_(same, net, None, images(2), how=Compensation(), told=Told(Facts()))
    for name, value in net.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name


def test_more_damping_than_asked_is_told() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), torch.randn(64, 4)
    spoilt = copy.deepcopy(net)
    spoilt[0].weight.data[1] = spoilt[0].weight.data[0]  # fitted back, as its inputs are alike
    x[:, 3] = 0.0
    spoilt[0].register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    told = Told(Facts())
    refit_(spoilt, net, None, [x], how=Compensation(0.0), told=told)
    assert [n.where for n in told.facts.notes if n.topic == "damped"]


def test_layers_that_run_twice_and_depthwise_ones_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.shared(self.shared(x).relu()))
            return found

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(64, 4)
    spoilt = copy.deepcopy(net)
    with torch.no_grad():
        spoilt.shared.weight.mul_(0.5)
    kept = spoilt.shared.weight.clone()
    before = error(spoilt, net, x)
    refit_(spoilt, net, None, [x], how=Compensation(), told=Told(Facts()))
    assert torch.equal(spoilt.shared.weight, kept)
    assert error(spoilt, net, x) < before  # the head is fitted


def test_rows_that_differ_between_the_networks_are_left_out() -> None:
    """An expert reads the tokens that chose it: others in a network that was cut."""

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.head, self.least = nn.Linear(4, 4), nn.Linear(4, 2), 0.0

        def forward(self, x: Tensor) -> Tensor:
            chosen = x[:, 0] > self.least
            found: Tensor = self.head(x.index_put((chosen,), self.expert(x[chosen])))
            return found

    torch.manual_seed(0)
    net, x = Expert().eval(), torch.randn(64, 4)
    spoilt = copy.deepcopy(net)
    spoilt.least = 0.5
    with torch.no_grad():
        spoilt.expert.weight.mul_(0.5)
    kept = spoilt.expert.weight.clone()
    refit_(spoilt, net, None, [x], how=Compensation(), told=Told(Facts()))
    assert torch.equal(spoilt.expert.weight, kept)


class Chosen(nn.Module):
    """Reaches its expert only if it is told to, and then with some of the rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.expert, self.rows = nn.Linear(3, 2), rows

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x[: self.rows]) if self.rows else x


@pytest.mark.parametrize(("dense", "cut", "count"), [(4, 4, 4), (4, 3, 0), (4, 0, 0), (0, 4, 0)])
def test_only_rows_of_the_same_samples_are_compared(dense: int, cut: int, count: int) -> None:
    nets, x = (Chosen(dense), Chosen(cut)), torch.randn(5, 3)
    slot = discover(nets[0])[0]
    moments = Both(*nets, [slot], [x]).moments(slot, (3, torch.arange(3)), 1000)
    assert moments.count == count


@pytest.mark.parametrize("recovery", [(Compensation(),), (Compensation(refit=False),), ()])
def test_zeros_that_a_repair_fills_are_told_and_counted(recovery: tuple[Any, ...]) -> None:
    net, data = network(), [(x, torch.arange(16) % 5) for x in images(2)]
    sparse = secateur.prune(net, secateur.Recipe(target=Target("sparsity", 0.8))).model
    how = ShrinkRecipe(target=Target("params", 0.5), recovery=recovery)
    facts, small = (found := secateur.shrink(sparse, how, None, data)).facts, found.model
    left = secateur.shrink(sparse, replace(how, recovery=()), None, data).model
    pairs = [
        (o, n) for o, n in zip(left.parameters(), small.parameters(), strict=True) if o.ndim > 1
    ]
    zeros = sum(int((old == 0).sum()) for old, _ in pairs)
    filled = sum(int((new[old == 0] != 0).sum()) for old, new in pairs)
    told = [note.text for note in facts.notes if note.topic == "filled"]
    if recovery:
        assert told[0].startswith(f"{filled:,} of the {zeros:,} weights that were zero")
    else:
        assert zeros
        assert not told
        assert not filled
    assert not any(n.topic == "filled" for n in secateur.shrink(net, how, None, data).facts.notes)
