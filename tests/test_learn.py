"""Learned masks in a loop: hardening bit for bit, exact resume."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from secateur import Data, FineTune, Scope, load
from secateur.core.errors import FoldError, UsageError
from secateur.core.slots import Slot
from secateur.core.weight import CONV2D
from secateur.drive.training.learn_masks import learn_masks
from secateur.drive.training.learned import Learned
from secateur.frontends import discover
from secateur.learn import LEARNERS, Leap, Learner, SoftMovement, Str
from secateur.learn.masked import MaskedWeights

MASKS: dict[str, Learner] = {
    "leap": Leap.short(0.8),
    "leap-rows": Leap.short(0.8, "row"),
    "leap-blocks": Leap.short(0.5, (4, 8)),
    "movement": SoftMovement(strength=10, ramp=20, lr=0.1),
    "str": Str(start=-3.0),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    own = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 16, generator=own) for _ in range(count)]
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, learned: Learned, data: Any) -> None:
    for x, y in data:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + learned.penalty()).backward()
        optimizer.step()
        learned.step()


def begin(how: Learner, net: nn.Module | None = None) -> tuple[nn.Module, Any, Learned]:
    net = net or network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    return net, optimizer, Learned(net, optimizer, how)


@pytest.mark.parametrize("name", MASKS)
def test_hardened_is_the_last_forward_pass_bit_for_bit(name: str) -> None:
    net, optimizer, learned = begin(MASKS[name])
    plain = set(network().state_dict())
    train(net, optimizer, learned, batches(60))
    x = batches(1)[0][0]
    before, masks = net(x).detach(), learned.masks
    effective = {n: net.get_submodule(n.rpartition(".")[0]).weight.detach() for n in masks}
    pruned = learned.harden()
    assert set(net.state_dict()) == plain
    assert torch.equal(net(x).detach(), before)
    assert pruned.masks == masks
    assert 0 < masks.sparsity < 1
    for layer, value in effective.items():
        weight = net.get_parameter(layer).detach()
        assert torch.equal(weight, value)
        assert torch.equal(weight != 0, masks[layer])
        assert not bool((weight.signbit() & ~masks[layer]).any())  # no -0.0


@pytest.mark.parametrize(
    ("sparsity", "grain"), [(0.8, "element"), (0.9, "element"), (0.75, "row"), (0.75, (8, 8))]
)
def test_leap_reaches_its_target_within_one_point(sparsity: float, grain: Any) -> None:
    how = Leap.short(sparsity, grain, lr=0.05)
    data = Data(train=batches(40))
    before = network()
    pruned = learn_masks(before, data, how, FineTune(15, lr=0.01, optimizer="adamw"))
    # Rows and blocks are rounded up to whole ones in each weight.
    coarse = 0.01 if grain == "element" else 0.02
    assert abs(pruned.facts.sparsity - sparsity) <= coarse
    assert pruned.facts.history[-1]["sparsity"] == pruned.masks.sparsity
    assert len(pruned.facts.history) == 15
    x, y = batches(1)[0]
    assert float((pruned.model(x).argmax(1) == y).float().mean()) > 0.9
    assert all(
        torch.equal(a, b) for a, b in zip(before.parameters(), network().parameters(), strict=True)
    )


@pytest.mark.parametrize("grain", ["element", "row", (8, 8)])
def test_leap_can_start_from_the_masks_of_magnitude(grain: Any) -> None:
    squares = {n: w.detach().square() for n, w in network().named_parameters()}
    masks = begin(Leap(0.75, grain, sigma=math.log(1 / 3), start="magnitude"))[2].masks
    assert masks
    for name, mask in masks.items():
        down, across = {"element": (1, 1), "row": (1, mask.shape[1])}.get(str(grain), (8, 8))
        tiles = squares[name].reshape(mask.shape[0] // down, down, -1, across).sum((1, 3))
        kept = mask.reshape(mask.shape[0] // down, down, -1, across).all(3).all(1)
        assert abs(int(kept.sum()) - 0.25 * kept.numel()) <= 1
        assert float(tiles[kept].min()) >= float(tiles[~kept].max())


def test_another_start_of_leap_is_refused() -> None:
    with pytest.raises(UsageError, match="'zero' or at 'magnitude'"):
        Leap(0.9, start="random")


def test_a_missed_target_is_noted() -> None:
    net, optimizer, learned = begin(Leap(0.9))
    train(net, optimizer, learned, batches(3))
    notes = learned.harden().facts.notes
    assert any(n.topic == "target" and "asked for 90.0%" in n.text for n in notes)


def test_thresholds_that_went_too_far_are_told_as_such() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)  # its steps are as large as the gradient
    learned = Learned(net, optimizer, Leap.short(0.5))
    train(net, optimizer, learned, batches(60))
    pruned = learned.harden()
    assert pruned.masks.sparsity > 0.6
    (said,) = (n.text for n in pruned.facts.notes if n.topic == "target")
    assert "AdamW" in said
    assert "raise" not in said


def test_weights_that_are_as_good_as_gone_are_named() -> None:
    net, optimizer, learned = begin(Str(start=-3.0))
    with torch.no_grad():
        net[2].parametrizations.weight[0].s.fill_(10.0)  # type: ignore[index,union-attr]
    train(net, optimizer, learned, batches(1))
    notes = [n for n in learned.harden().facts.notes if n.topic == "nearly-empty"]
    assert [(n.where, "only 0 of 4096" in n.text) for n in notes] == [("2.weight", True)]


@pytest.mark.parametrize("name", MASKS)
def test_a_parametrized_model_deep_copies(name: str) -> None:
    net, optimizer, learned = begin(MASKS[name])
    train(net, optimizer, learned, batches(5))
    x = batches(1)[0][0]
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    assert list(twin.state_dict()) == list(net.state_dict())
    before = twin(x).detach()
    train(net, optimizer, learned, batches(5))
    assert torch.equal(twin(x).detach(), before)  # nothing is shared


@pytest.mark.parametrize("name", MASKS)
def test_copies_go_on_when_the_masks_of_the_original_are_hardened(name: str) -> None:
    net, optimizer, learned = begin(MASKS[name])
    x = batches(1)[0][0]
    average = AveragedModel(net)
    train(net, optimizer, learned, batches(5))
    average.update_parameters(net)
    best = copy.deepcopy(net)  # the best so far
    best_learned = copy.deepcopy(learned)
    kept, meant = best(x).detach(), average(x).detach()
    train(net, optimizer, learned, batches(5))
    learned.harden()
    assert type(net[0]) is nn.Linear
    assert torch.equal(best(x), kept)
    assert torch.equal(average(x), meant)
    assert torch.equal(copy.deepcopy(best)(x), kept)
    best(x).sum().backward()
    assert best[0].parametrizations.weight.original.grad is not None
    other = best_learned.harden().model  # a copy that has its own masks is hardened by itself
    assert torch.equal(other(x), kept)
    assert sorted(other.state_dict()) == sorted(net.state_dict())
    parametrize.remove_parametrizations(best[0], "weight")
    assert torch.equal(best(x), kept)


def test_copies_go_on_when_masks_are_dropped() -> None:
    net = network()
    slots = [s for s in discover(net) if s.name == "2.weight"]
    masked = MaskedWeights(Str(start=-3.0), net, slots)
    twin, x = copy.deepcopy(net), batches(1)[0][0]
    before = twin(x)
    masked.drop_()
    assert torch.equal(twin(x), before)
    assert not torch.equal(net(x), before)


@pytest.mark.parametrize("name", MASKS)
def test_a_resumed_run_ends_with_the_same_bits(name: str) -> None:
    data = batches(40)
    net, optimizer, learned = begin(MASKS[name])
    train(net, optimizer, learned, data[:25])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), learned.state_dict()))
    train(net, optimizer, learned, data[25:])
    other, again, resumed = begin(MASKS[name])
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(other, again, resumed, data[25:])
    one, two = learned.harden(), resumed.harden()
    assert one.masks == two.masks
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_learner_is_refused() -> None:
    state = begin(Leap(0.8))[2].state_dict()
    with pytest.raises(UsageError, match="Another learner"):
        begin(Leap(0.9))[2].load_state_dict(state)


def test_the_optimizer_gets_groups_and_they_are_empty_afterwards() -> None:
    net, optimizer, learned = begin(Leap.short(0.8, lr=0.123))
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.123, 0.2]
    train(net, optimizer, learned, batches(2))
    learned.harden()
    assert [len(g["params"]) > 0 for g in optimizer.param_groups] == [True, False, False]
    assert set(optimizer.state) == set(net.parameters())
    x, y = batches(1)[0]
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()  # training goes on


def test_an_optimizer_that_knows_names_gets_those_of_the_masks() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    learned = Learned(net, optimizer, Leap.short(0.8))
    masks = [name for group in optimizer.param_groups[1:] for name in group["param_names"]]
    assert masks == [
        f"{i}.parametrizations.weight.0.{what}" for what in ("scores", "sigma") for i in (0, 2)
    ]
    train(net, optimizer, learned, batches(2))
    learned.harden()
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_hardening_untrained_masks_is_refused() -> None:
    net, _, learned = begin(Leap(0.8))
    with pytest.raises(UsageError, match="no step was counted"):
        learned.harden()
    learned.step()
    with pytest.raises(UsageError, match=r"penalty\(\) was never asked for"):
        learned.harden()
    assert learned.harden(early=True).model is net
    with pytest.raises(UsageError, match="called before"):
        learned.step()


def test_the_result_is_saved_and_loaded(tmp_path: Any) -> None:
    net, optimizer, learned = begin(Leap.short(0.8))
    train(net, optimizer, learned, batches(80))
    pruned = learned.harden()
    restored = load(network(), pruned.save(tmp_path / "out"))
    assert restored.masks == pruned.masks
    x = batches(1)[0][0]
    assert torch.equal(restored.model(x), net(x))
    assert restored.facts.recipe["learn"]["Leap"]["sparsity"] == 0.8


def test_scope_is_kept_and_tied_or_recurrent_weights_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.two.weight = self.one.weight
            self.rnn = nn.LSTM(8, 8, batch_first=True)
            self.mid, self.low = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.rnn(self.two(self.one(x)))[0]
            out: Tensor = self.head(self.low(self.mid(x)))
            return out

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    learned = Learned(net, optimizer, Str(), scope=Scope(ignore=("low",)))
    assert list(learned.masks) == ["mid.weight"]
    reasons = {n.where: n.text for n in learned.facts.notes if n.topic == "left-out"}
    assert "tied to two.weight" in reasons["one.weight"]
    assert "recurrent" in reasons["rnn.weight_ih_l0"]
    assert "ignored" in reasons["low.weight"]
    net(torch.randn(2, 3, 8)).sum().backward()


def test_where_nothing_takes_part_the_error_says_why() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two, self.head = self.one, nn.Linear(8, 2)

    for net, scope in ((Shared(), None), (network(), Scope(ignore=("*",)))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(UsageError, match="no weight takes part") as error:
            Learned(net, optimizer, Leap(), scope=scope)
        if scope is None:
            assert error.value.why.startswith("left out are one.weight (tied to two.weight: ")
            assert error.value.why.endswith("; head.weight (the last linear layer (classifier))")
            assert "or prune with Gradual" in error.value.do
        else:
            assert error.value.why.startswith("left out are 0.weight (ignored by '*'); ")
            assert error.value.do == "widen the scope (include=, sensitive=True)"


def test_masks_are_learned_before_the_model_is_wrapped(tmp_path: Path) -> None:
    net = network()
    names = set(net.state_dict())
    place = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with pytest.raises(UsageError, match="Make Learned with the plain model"):
            Learned(wrapped, optimizer, Leap())
        assert set(net.state_dict()) == names
        assert len(optimizer.param_groups) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_that_are_shared_out_are_refused() -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net[2].weight.device_mesh = "cpu"  # as fully_shard leaves them
    with pytest.raises(UsageError, match=r"'2\.weight' is a DTensor"):
        Learned(net, optimizer, Leap(0.5))


def test_nothing_in_scope_is_an_error_and_changes_nothing() -> None:
    net = nn.Sequential(nn.ReLU(), nn.LayerNorm(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="no weight takes part"):
        Learned(net, optimizer, Leap())
    assert len(optimizer.param_groups) == 1
    bad = network()
    with pytest.raises(FoldError):
        Learned(bad, torch.optim.SGD(bad.parameters(), lr=0.1), Leap(grain=(5, 5)))
    assert set(bad.state_dict()) == set(network().state_dict())


def test_a_run_in_one_call_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    data, training = Data(train=batches(10)), FineTune(4, lr=0.01, optimizer="adamw")
    whole = learn_masks(network(), data, Leap.short(0.6), training)

    class Killed(Exception):
        pass

    seen = 0

    def dies(net: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        seen += 1
        if seen > 25:
            raise Killed
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    how = {"checkpoint": tmp_path / "run"}
    with pytest.raises(Killed):
        learn_masks(network(), replace(data, loss=dies), Leap.short(0.6), training, **how)
    again = learn_masks(network(), data, Leap.short(0.6), training, **how)
    assert again.masks == whole.masks
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.facts.history == whole.facts.history
    finished = learn_masks(network(), data, Leap.short(0.6), training, **how)
    assert finished.facts.history == whole.facts.history


def test_the_history_tells_losses_from_penalties() -> None:
    torch.manual_seed(0)
    data, how = batches(5), FineTune(1.4, lr=1e-9, optimizer="adamw")
    pruned = learn_masks(network(), data, SoftMovement(strength=64, ramp=0, lr=0.0), how)
    with torch.no_grad():
        own = [float(nn.functional.cross_entropy(network()(x), y)) for x, y in data]
    losses = [record["loss"] for record in pruned.facts.history]
    assert losses == pytest.approx([sum(own) / 5, sum(own[:2]) / 2], abs=1e-4)
    assert [record["penalty"] for record in pruned.facts.history] == [32.0, 32.0]
    assert "penalty" not in learn_masks(network(), data, Str(), how).facts.history[0]


def test_distillation_does_not_share_out_the_penalty() -> None:
    data = Data(train=batches(20))
    how = Leap.short(0.8)
    training = FineTune(15, lr=0.01, optimizer="adamw", distill=1.0)
    assert abs(learn_masks(network(), data, how, training).facts.sparsity - 0.8) < 0.05


def test_distillation_runs_the_network_once_a_step() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    scope = Scope(sensitive=True)
    pruned = learn_masks(net, batches(6), Str(), FineTune(1, distill=0.5), scope=scope)
    assert int(pruned.model[1].num_batches_tracked) == 6


def test_every_learner_is_in_the_catalogue() -> None:
    for name, kind in LEARNERS.items():
        doc = kind.__doc__ or ""
        for line in ("**formula**", "**Shapes**", "**Units**", "**Needs**", "**Source**"):
            assert line in doc, (name, line)


def test_masks_work_on_convolutions_under_bfloat16() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    learned = begin(Leap.short(0.5, "row"), net)[2]
    with torch.autocast("cpu", torch.bfloat16):
        (net(torch.randn(2, 8, 6, 6)).float().square().mean() + learned.penalty()).backward()
    assert Slot("0.weight", "Conv2d", (8, 8, 3, 3), CONV2D).prunable
    part: Any = net[0].parametrizations.weight[0]  # type: ignore[union-attr, index]
    assert part.scores.shape == (8, 1)
    assert part.scores.grad.dtype == torch.float32
