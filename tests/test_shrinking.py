"""Filters removed during training: what goes, what it saves, and exact resume."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.allocate.widths import GivenWidths, RankedWidths, UniformWidths
from secateur.core.errors import BudgetError, DataError, NeedsData, UsageError
from secateur.core.groups import Groups
from secateur.core.masks import Masks
from secateur.drive.structural import cutting
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import Shrinking, train_and_shrink
from secateur.drive.training.finetune import FineTune
from secateur.drive.training.order import Feed, Shuffled
from secateur.drive.training.recorder import Checkpoints
from secateur.drive.training.resume import Training, resume_, save_checkpoint
from secateur.learn import Str
from secateur.schedule import Cyclic, Exponential, Linear, OneShot
from secateur.score import Grouped, GroupTaylor, Magnitude
from secateur.score.groups_activation import MeanActivation
from secateur.structure.masked import Proof

EXAMPLE = torch.zeros(2, 3, 8, 8)
PER_EPOCH = 4


class Net(nn.Module):
    """A stem, a residual block around it, and a head."""

    def __init__(self, width: int = 10, inside: int = 14) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.Conv2d(width, inside, 3, padding=1, bias=False)
        self.middle = nn.BatchNorm2d(inside)
        self.down = nn.Conv2d(inside, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.down(self.middle(self.up(x)).relu())
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(count: int = PER_EPOCH * 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.randint(4, (count,), generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def pace(begin: float = 1, end: float = 4, every: float = 1, **more: Any) -> Pace:
    return Pace(Linear(begin, end, every, unit="epochs"), steps_per_epoch=PER_EPOCH, **more)


def recipe(share: float = 0.5, unit: str = "macs", **more: Any) -> secateur.ShrinkRecipe:
    return secateur.ShrinkRecipe(target=secateur.Target(unit, share), recovery=(), **more)


def shrinking(net: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> Shrinking:
    given = {"pace": pace(), "example_inputs": EXAMPLE, **more}
    return Shrinking(net, optimizer, given.pop("recipe", recipe()), **given)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, epochs: range) -> None:
    net.train()
    for epoch in epochs:
        for x, y in Shuffled(images(), 8).epoch(epoch):
            optimizer.zero_grad()
            # The last loss is alive during the next forward pass, as in most loops.
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            pruner.step()


def by_hand(net: Net) -> float:
    """Multiply-adds of one sample, from the shapes."""
    pixels = 64
    convolutions = sum(c.weight.numel() * pixels for c in (net.stem, net.up, net.down))
    return float(convolutions + net.head.weight.numel())


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("unit", ["macs", "params", "bytes"])
def test_the_target_is_reached_at_the_end_of_the_schedule(make: Any, unit: str) -> None:
    net = network()
    optimizer = make(net)
    parameters, groups = list(net.parameters()), optimizer.param_groups
    pruner = shrinking(net, optimizer, recipe=recipe(unit=unit))
    seen = []
    for epoch in range(5):
        train(net, optimizer, pruner, range(epoch, epoch + 1))
        seen.append(by_hand(net))
        for parameter in net.parameters():
            for slot in optimizer.state[parameter].values():
                assert slot.numel() == 1 or slot.shape == parameter.shape
    assert seen[0] == by_hand(network()), "the warm-up is dense"
    assert seen[0] > seen[1] > seen[2] > seen[3] == seen[4]
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert optimizer.param_groups is groups
    told = pruner.finalize().facts.measures["target"]
    assert 0.8 * told["limit"] < told["reached"] <= told["limit"] == 0.5 * told["dense"]
    if unit == "macs":
        assert (told["dense"], told["reached"]) == (by_hand(network()), by_hand(net))


def test_the_integral_of_multiply_adds_is_that_of_every_step() -> None:
    net = network()
    optimizer = sgd(net)
    pruner, own, counted = shrinking(net, optimizer), 0.0, 0
    for epoch in range(5):
        begin = own
        for x, y in Shuffled(images(), 8).epoch(epoch):
            own, counted = own + by_hand(net), counted + 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            pruner.step()
        pruner.took(float(epoch))
        last = pruner.facts.measures["epochs"][-1]
        assert last["macs"] == pytest.approx((own - begin) / PER_EPOCH)
        assert (last["epoch"], last["step"], last["seconds"]) == (epoch + 1, counted, float(epoch))
    facts = pruner.finalize().facts
    dense = by_hand(network()) * counted
    assert facts.measures["training_macs"] == {"dense": dense, "spent": own, "share": own / dense}
    assert facts.measures["macs"] == [by_hand(network()), by_hand(net)]
    assert len(facts.measures["epochs"]) == 5


def test_the_history_says_what_went_and_the_surgery_replays_it(tmp_path: Path) -> None:
    net = network()
    optimizer = adamw(net)
    pruner = shrinking(net, optimizer)
    train(net, optimizer, pruner, range(5))
    pruned = pruner.finalize()
    history = pruned.facts.history
    assert [event["time"] for event in history] == [2, 3, 4]
    assert [event["share"] for event in history] == pytest.approx([1 / 3, 2 / 3, 1])
    for before, after in itertools.pairwise(history):
        assert before["macs"][1] == after["macs"][0] > after["macs"][1]
    widths = {w.name: w for w in pruned.facts.widths}
    for name, width in widths.items():
        assert sum(e["removed"].get(name, 0) for e in history) == width.groups - width.kept
    assert widths["up"].groups == 14
    assert widths["up"].kept == net.up.out_channels == net.middle.num_features
    before, after = pruned.facts.measures["parameters"]
    assert before == sum(p.numel() for p in network().parameters())
    assert after == sum(p.numel() for p in net.parameters()) < before
    fresh = secateur.load(network(9), pruned.save(tmp_path / "out")).model
    assert torch.equal(fresh.eval()(images()[0]), net.eval()(images()[0]))


def test_survivors_keep_their_values_and_momenta() -> None:
    net = network()
    optimizer = adamw(net)
    pruner = shrinking(net, optimizer, pace=Pace(OneShot(5, unit="steps"), PER_EPOCH))
    train(net, optimizer, pruner, range(1))
    values = {n: p.detach().clone() for n, p in net.named_parameters()}
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in net.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["betas"] = (1.0, 1.0)  # a step that changes nothing
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.step()
    surgery = pruner.finalize().surgery
    assert surgery is not None
    for name, parameter in net.named_parameters():
        own, first = values[name], moments[name]
        for axis, kept in surgery.cuts.get(name, {}).items():
            index = torch.tensor(kept.positions())
            own, first = own.index_select(axis, index), first.index_select(axis, index)
        assert torch.equal(parameter, own)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], first)


def test_removing_filters_that_were_zero_changes_no_output() -> None:
    net = network().eval()
    with torch.no_grad():
        net.up.weight[7:] = 0
        net.middle.weight[7:] = 0
        net.middle.bias[7:] = 0
        net.down.weight[:, 7:] = 0
    x = images()[0]
    wanted = net(x)
    kind = recipe(0.99, scope=secateur.Scope(include=("up",)), allocation=UniformWidths())
    limit = by_hand(net) - 7 * (net.up.weight[0].numel() + 10) * 64
    kind = secateur.ShrinkRecipe(target=secateur.Target("macs", limit), scope=kind.scope)
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer, recipe=kind, pace=Pace(OneShot(1, unit="steps")))
    pruner.step()
    assert net.up.out_channels == 7
    assert torch.allclose(net(x), wanted, atol=1e-6)


def test_no_width_falls_below_one_filter_or_its_floor() -> None:
    bare = by_hand(Net(1, 1))
    for floor, (width, inside) in {0.0: (1, 1), 0.3: (3, 4)}.items():
        net = network()
        least = by_hand(Net(width, inside))
        goal = secateur.Target("macs", max(least, bare) + 1)
        kind = secateur.ShrinkRecipe(target=goal, allocation=RankedWidths(floor=floor))
        optimizer = sgd(net)
        pruner = shrinking(net, optimizer, recipe=kind, pace=pace(0, 3, 0.5))
        train(net, optimizer, pruner, range(3))
        pruner.finalize()
        assert (net.stem.out_channels, net.up.out_channels) == (width, inside)
    net = network()
    kind = secateur.ShrinkRecipe(target=secateur.Target("macs", bare - 1))
    with pytest.raises(BudgetError, match="with every width at its least"):
        shrinking(net, sgd(net), recipe=kind)


@dataclass(frozen=True)
class UpLast:
    """A criterion of a user's own: all filters of ``up`` matter less than all others."""

    needs: frozenset[Any] = frozenset()

    def __call__(self, groups: Groups, stats: object) -> torch.Tensor:
        return torch.arange(groups.count) + (1.0 if groups.name == "up" else 100.0)


def test_a_floor_is_a_share_of_the_uncut_width() -> None:
    net = network()
    kind = recipe(0.2, criterion=UpLast(), allocation=RankedWidths("none", floor=0.5))
    optimizer = sgd(net)
    with pytest.raises(BudgetError):
        shrinking(net, optimizer, recipe=kind)
    kind = recipe(0.4, criterion=UpLast(), allocation=RankedWidths("none", floor=0.5))
    pruner = shrinking(net, optimizer, recipe=kind, pace=pace(0, 4, 0.5))
    train(net, optimizer, pruner, range(4))
    assert net.up.out_channels == 7
    assert 5 <= net.stem.out_channels < 10


def test_a_learning_rate_schedule_runs_on() -> None:
    net = network()
    optimizer = sgd(net)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    pruner = shrinking(net, optimizer)
    for epoch in range(5):
        train(net, optimizer, pruner, range(epoch, epoch + 1))
        rate.step()
        assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5 ** ((epoch + 1) // 3)


@pytest.mark.parametrize("stop", [3, 9, 16])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_resumed_run_ends_with_the_same_bits(make: Any, stop: int, tmp_path: Path) -> None:
    kind = recipe(criterion=GroupTaylor(), allocation=RankedWidths(normalise="none"))
    data = Shuffled(images(), 8)

    def start() -> Training:
        net = network()
        optimizer = make(net)
        pruner = Shrinking(net, optimizer, kind, pace=pace(0, 4, 0.5), data=data)
        return Training(net.train(), optimizer, pruner, feed=Feed(data))

    def go(loop: Training, steps: int) -> None:
        while True:
            assert isinstance(loop.feed, Feed)
            for x, y in loop.feed.rest():
                if loop.pruner.steps == steps:
                    return
                loop.optimizer.zero_grad()
                nn.functional.cross_entropy(loop.model(x), y).backward()
                loop.optimizer.step()
                loop.pruner.step()
                if loop.pruner.steps == stop and not (tmp_path / "a").exists():
                    save_checkpoint(tmp_path / "a", loop, step=stop)

    whole, again = start(), start()
    go(whole, 20)
    assert resume_(tmp_path / "a", again) == stop
    go(again, 20)
    assert_same(whole, again)


def assert_same(a: Training, b: Training) -> None:
    for (name, x), (_, y) in zip(a.model.state_dict().items(), b.model.state_dict().items(),
                                 strict=True):  # fmt: skip
        assert torch.equal(x, y), name
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        for key, slot in a.optimizer.state[x].items():
            assert torch.equal(slot, b.optimizer.state[y][key])
    first, second = a.pruner.finalize(), b.pruner.finalize()
    assert first.surgery == second.surgery
    assert first.facts.history == second.facts.history
    for key in ("epochs", "training_macs", "target", "parameters"):
        assert first.facts.measures[key] == second.facts.measures[key]


def test_states_by_hand_in_the_documented_order() -> None:
    net = network()
    optimizer = adamw(net)
    pruner = shrinking(net, optimizer)
    train(net, optimizer, pruner, range(3))
    saved = copy.deepcopy((pruner.state_dict(), net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, pruner, range(3, 5))
    other = network(5)
    second = adamw(other)
    again = shrinking(other, second)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(other, second, again, range(3, 5))
    assert_same(Training(net, optimizer, pruner), Training(other, second, again))
    with pytest.raises(UsageError, match="do not come back"):
        pruner.load_state_dict(saved[0])
    elsewhere = network()
    with pytest.raises(UsageError, match="Another recipe or pace would"):
        shrinking(elsewhere, sgd(elsewhere), pace=pace(0)).load_state_dict(saved[0])


def test_one_call_trains_shrinks_and_continues(tmp_path: Path) -> None:
    data, net = Shuffled(images(), 8), network()
    how, when = FineTune(epochs=4, lr=0.05), Pace(Linear(0, 3, 1, unit="epochs"))
    whole = train_and_shrink(net, data, recipe(), how=how, pace=when)
    assert by_hand(net) == by_hand(network())

    def stopped(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    calls: list[int] = []
    keep = Checkpoints(tmp_path, every=3)
    broken = secateur.Data(train=data, loss=stopped)
    with pytest.raises(KeyboardInterrupt):
        train_and_shrink(net, broken, recipe(), how=how, pace=when, checkpoint=keep)
    again = train_and_shrink(net, data, recipe(), how=how, pace=when, checkpoint=keep)
    for x, y in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert again.surgery == whole.surgery is not None
    epochs = whole.facts.measures["epochs"]
    assert [e["macs"] for e in epochs] == [e["macs"] for e in again.facts.measures["epochs"]]
    assert len(epochs) == 4
    assert all(e["loss"] > 0 for e in epochs)
    assert all(e["seconds"] > 0 for e in epochs[1:])
    with pytest.raises(UsageError, match="rollback"):
        train_and_shrink(net, data, how=FineTune(on_nan="rollback"))


def test_it_goes_on_from_a_network_that_had_been_cut() -> None:
    net = network()
    secateur.shrink_(net, recipe(0.8), EXAMPLE)
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer)
    train(net, optimizer, pruner, range(5))
    pruned = pruner.finalize()
    fresh = network(3)
    assert pruned.surgery is not None
    secateur.frontends.surgery.replay_(fresh, pruned.surgery)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in net.parameters()]


@pytest.mark.parametrize("criterion", [MeanActivation(), Grouped(Magnitude(), of="out")])
def test_criteria_allocations_and_the_random_state(criterion: Any) -> None:
    net = network()
    optimizer = sgd(net)
    kind = recipe(criterion=criterion, allocation=UniformWidths(), align=2)
    pruner = shrinking(
        net, optimizer, recipe=kind, data=Shuffled(images(), 8), pace=pace(0, 1, 0.25)
    )
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train(net, optimizer, pruner, range(1))
    assert torch.equal(torch.rand(3), wanted)
    assert net.training
    assert all(w.kept % 2 == 0 for w in pruner.finalize().facts.widths)


def test_each_cut_is_proved_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer, pace=pace(0, 2, 1, prove_each=True))
    train(net, optimizer, pruner, range(1))
    assert pruner.facts.history[0]["proof"] < 1e-5
    shapes = [p.shape for p in net.parameters()]
    monkeypatch.setattr(cutting, "prove", lambda *_: Proof(0.5, 1))
    with pytest.raises(DataError, match="Two runs of the uncut network differ"):
        train(net, optimizer, pruner, range(1, 2))
    assert shapes == [p.shape for p in net.parameters()]


class Picky(Net):
    """Its code divides by a size that no operator shows, or wants the inner width whole."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__(inside=24)
        self.scaled = scaled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.scaled or self.up.weight.shape[0] == 24, "not as built"
        x = self.norm(self.stem(x)).relu()
        inner = self.middle(self.up(x)).relu()
        scores: torch.Tensor = self.head((x + self.down(inner)).mean((2, 3)))
        return scores / (self.up.weight.shape[0] if self.scaled else 1)


@pytest.mark.parametrize("scaled", [False, True])
def test_widths_that_break_the_network_are_left_and_told(scaled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = "differs from the masked one" if scaled else "raises AssertionError: not as built"

    def begin() -> tuple[Any, Shrinking]:
        net = Picky(scaled=scaled)
        how = {"pace": pace(0, 3, 1, prove_each=scaled), "recipe": recipe(0.6)}
        return net, shrinking(net, sgd(net), **how)

    net, pruner = begin()
    train(net, pruner.optimizer, pruner, range(2))
    place = save_checkpoint(
        tmp_path / "a.safetensors", Training(net, pruner.optimizer, pruner), step=8
    )
    again, later = begin()
    resume_(place, Training(again, later.optimizer, later))
    for model, part in ((net, pruner), (again, later)):
        train(model, part.optimizer, part, range(2, 3))
        facts = part.finalize().facts
        assert [w.name for w in facts.widths] == ["stem"]
        (note,) = (n for n in facts.notes if n.where == "up")
        assert note.topic == "pinned"
        assert "of 24 the network" in note.text
        assert words in note.text
        assert part.macs <= 0.6 * 64 * (3 * 10 * 9 + 2 * 10 * 24 * 5) + 40
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_target_that_such_widths_make_impossible_is_an_error() -> None:
    net = Picky(scaled=False)
    pruner = shrinking(net, sgd(net), pace=pace(0, 3, 1), recipe=recipe(0.02))
    with pytest.raises(BudgetError):
        train(net, pruner.optimizer, pruner, range(3))


def test_an_early_end_is_refused_unless_asked() -> None:
    net = network()
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer)
    with pytest.raises(UsageError, match="no epoch has ended"):
        pruner.took(1.0)
    train(net, optimizer, pruner, range(2))
    with pytest.raises(UsageError, match="33 % of the way"):
        pruner.finalize()
    (note,) = (n for n in pruner.finalize(early=True).facts.notes if n.topic == "target")
    assert note.text.endswith("the training ended after 33 % of the way")


@pytest.mark.parametrize("early", [False, True])
def test_a_result_is_complete_after_finalize(early: bool) -> None:
    net = network()
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer)
    if not early:
        with pytest.raises(UsageError, match="0 % of the way"):
            pruner.finalize()  # that was no end
    train(net, optimizer, pruner, range(2 if early else 5))
    pruned = pruner.finalize(early=early)
    facts, steps = copy.deepcopy(pruned.facts), pruner.steps
    for act in (pruner.finalize, lambda: pruner.finalize(early=True), pruner.step):
        with pytest.raises(UsageError, match=rf"called before, at step {steps}") as error:
            act()
        assert all(error.value.parts().values())
    assert pruner.steps == steps
    assert pruned.facts == facts


def test_what_cannot_be_is_refused() -> None:
    net = network()
    optimizer = sgd(net)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"pace": Pace(Linear(1, 4, 1, unit="epochs"))}, "steps_per_epoch"),
        ({"pace": Pace(Exponential(0, 4, 1))}, "rounds"),
        ({"pace": Pace(Cyclic(1, 9, 1))}, "cyclic"),
        ({"pace": Pace(OneShot(0, unit="steps"))}, "before the first step"),
        ({"pace": pace(steps=15)}, "after 15 steps"),
        ({"recipe": recipe(10.0, "latency")}, "latency"),
        ({"recipe": recipe(allocation=GivenWidths({"up": 0.5}))}, "GivenWidths"),
        ({"example_inputs": None}, "example"),
        ({"recipe": recipe(scope=secateur.Scope(ignore=("stem", "up")))}, "0|none"),
    ]
    for given, text in refused:
        with pytest.raises(UsageError, match=text):
            shrinking(net, optimizer, **given)
    with pytest.raises(UsageError, match="none of its parameters"):
        shrinking(net, sgd(network()))
    with pytest.raises(NeedsData):
        shrinking(net, optimizer, recipe=recipe(criterion=GroupTaylor()))


@pytest.mark.parametrize("learned", [False, True])
def test_masks_that_came_later_are_refused_before_anything_is_cut(learned: bool) -> None:
    net = network()
    optimizer = sgd(net)
    pruner = shrinking(net, optimizer)
    if learned:
        other = secateur.Learned(net, optimizer, Str())
    else:
        secateur.attach_(net, Masks({"up.weight": net.up.weight.detach() > 0}))
    with pytest.raises(UsageError, match=r"at step 8: the network carries (learned )?masks"):
        train(net, optimizer, pruner, range(2))
    for refused in (
        lambda: secateur.shrink(net, recipe(), EXAMPLE),
        lambda: shrinking(net, optimizer),
    ):
        with pytest.raises(UsageError, match="carries"):
            refused()
    _ = other.harden(early=True) if learned else secateur.detach_(net)
    assert [p.shape for p in net.parameters()] == [p.shape for p in Net().parameters()]
    train(net, optimizer, pruner, range(2, 4))
    assert pruner.finalize().facts.measures["target"]["reached"] <= 0.5 * by_hand(Net())


def test_factored_state_is_cut_along() -> None:
    net = network()
    adafactor = torch.optim.Adafactor(net.parameters())
    pruner = shrinking(net, adafactor)
    before = sum(p.numel() for p in net.parameters())
    train(net, adafactor, pruner, range(3))
    assert sum(p.numel() for p in net.parameters()) < before
    for parameter in net.parameters():
        state = adafactor.state[parameter]
        if parameter.ndim > 1:
            assert state["row_var"].shape[:-1] == parameter.shape[:-1]
            assert state["col_var"].shape[-1] == parameter.shape[-1]


def test_what_is_not_used_of_the_recipe_is_said() -> None:
    net = network()
    pruner = shrinking(net, sgd(net), recipe=secateur.ShrinkRecipe())
    left = {note.where for note in pruner.facts.notes if note.topic == "skipped"}
    assert left == {"Compensation", "BatchNorm"}
