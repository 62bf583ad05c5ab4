"""Slimming, and the group learning of dynamic structure pruning."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import Data, FineTune, Gradual, Recipe, Scope, Target
from secateur.core.errors import BudgetError, NeedsData, NotYet, UsageError
from secateur.drive.training import ranks
from secateur.drive.training.learn_masks import learn_masks
from secateur.drive.training.learned import Learned
from secateur.learn import GroupLearning, Leap, Slimming, energy_prune
from secateur.learn.energy import branches_at
from secateur.learn.grouping import group_norms, hard, layer_scale, logit_gradients
from secateur.schedule import OneShot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(12)
        self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.last = nn.Conv2d(12, 8, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.conv(x)))
        out: Tensor = self.head(self.drop(self.last(x).mean((2, 3))))
        return out


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    own = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        y = torch.randint(4, (16,), generator=own)
        x = torch.randn(16, 1, 8, 8, generator=own)
        x[torch.arange(16), 0, 2 * (y // 2)] += 2.0 * (2 * (y % 2) - 1)[:, None]
        found.append((x, y))
    return found


def train(net: nn.Module, optimizer: Any, learned: Learned, data: Any) -> None:
    for x, y in data:
        optimizer.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + learned.penalty()).backward()
        optimizer.step()
        learned.step((x, y))


def begin(how: Any) -> tuple[Net, Any, Learned]:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return net, optimizer, Learned(net, optimizer, how)


# -- slimming -------------------------------------------------------------------------------------


def test_scales_shrink_by_rate_times_strength_and_stop_at_zero() -> None:
    net, _, learned = begin(Slimming(strength=2.0))
    with torch.no_grad():
        net.bn1.weight.copy_(torch.tensor([0.3, -0.3, 0.05, -0.05, 0.0, 1.0, 0.1, 0.2]))
    learned.step()
    by_hand = torch.tensor([0.2, -0.2, 0.0, 0.0, 0.0, 0.9, 0.0, 0.1])
    assert torch.allclose(net.bn1.weight.detach(), by_hand, atol=1e-7)
    assert learned.penalty().item() == 0


def test_channels_fall_below_a_global_threshold() -> None:
    net, _, learned = begin(Slimming(sparsity=0.5))
    with torch.no_grad():
        net.bn1.weight.copy_(torch.arange(1, 9) / 100)  # all small: one stays
        net.bn2.weight.copy_(torch.arange(1, 13) / -10)
    learned.steps = 1
    pruned = learned.harden()
    channels = pruned.facts.measures["channels"]
    assert channels["bn1"]["keep"] == [False] * 7 + [True]
    assert channels["bn2"]["keep"] == [False] * 3 + [True] * 9
    assert channels["bn1"]["score"][0] == pytest.approx(0.01)  # from before it was zeroed
    assert pruned.masks.sparsity == pytest.approx(0.5)
    assert net.bn1.weight[:7].abs().sum() == net.bn1.bias[:7].abs().sum() == 0
    net.eval()
    x = net.bn1(net.stem(batches(1)[0][0]))
    assert bool((x[:, :7] == 0).all())


def test_slimming_leaves_frozen_scales_out_with_a_note() -> None:
    net = network()
    net.bn1.requires_grad_(False)
    with torch.no_grad():
        net.bn1.weight.fill_(1e-3)  # smaller than all others
    free = [p for p in net.parameters() if p.requires_grad]
    learned = Learned(net, torch.optim.SGD(free, 0.05), Slimming(sparsity=0.5))
    learned.step()
    pruned = learned.harden()
    assert list(pruned.facts.measures["channels"]) == ["bn2"]
    assert pruned.masks.sparsity == 0.5
    assert bool((net.bn1.weight == 1e-3).all())
    (note,) = (n for n in pruned.facts.notes if n.where == "bn1.weight")
    assert "frozen" in note.text
    net.bn2.requires_grad_(False)
    with pytest.raises(UsageError, match="that is trained"):
        Learned(net, torch.optim.SGD([net.head.weight], 0.05), Slimming())


def test_slimming_goes_with_masks_of_weights() -> None:
    """It moves scales alone: channels and single weights may be pruned in one training."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    recipe = Recipe(target=Target("sparsity", 0.5), schedule=OneShot(1, unit="steps"))
    pruner = Gradual(net, optimizer, recipe)
    learned = Learned(net, optimizer, Slimming(sparsity=0.5))
    pruner.step()
    learned.step()
    assert learned.harden().facts.sparsity == pytest.approx(0.5, abs=0.02)
    assert pruner.finalize().facts.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("how", [Slimming(), GroupLearning(), Leap.short(0.5)])
def test_the_optimizer_of_a_copy_is_refused(how: Any) -> None:
    net, before = network(), copy.deepcopy(network())
    with pytest.raises(UsageError, match="from the parameters of this model"):
        Learned(net, torch.optim.SGD(before.parameters(), 0.05), how)
    assert list(net.state_dict()) == list(before.state_dict())


def test_slimming_separates_channels_and_stays_in_scope() -> None:
    data = Data(train=batches(10))
    how = Slimming(sparsity=0.4, strength=0.03)
    pruned = learn_masks(network(), data, how, FineTune(8, lr=0.05))
    assert abs(pruned.facts.sparsity - 0.4) < 0.03
    only = learn_masks(network(), data, how, FineTune(1), scope=Scope(ignore=("bn2",)))
    assert set(only.facts.measures["channels"]) == {"bn1"}
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="no batch normalisation"):
        Learned(plain, torch.optim.SGD(plain.parameters(), lr=0.1), Slimming())


# -- group learning -------------------------------------------------------------------------------


def test_the_regulariser_is_the_double_loop() -> None:
    w, p = torch.randn(6, 5, 3, 3), torch.rand(3, 6)
    total = 0.0
    for g in range(3):
        size = sum(math.sqrt(float(p[g, i])) for i in range(6)) ** 2
        for c in range(5):
            squares = [float((p[g, i] * w[i, c]).square().sum()) for i in range(6)]
            total += size * math.sqrt(sum(squares))
    scale = math.sqrt(5 * 8 * 8 / (16 * 32 * 32)) * 3 * (3 / 6) ** 1.5
    assert layer_scale(w, 3, 64) == pytest.approx(scale)
    assert float(group_norms(w, p, scale)) == pytest.approx(scale * total, rel=1e-5)


def test_gradients_of_the_regulariser_are_finite_at_zero() -> None:
    w = torch.zeros(4, 3, 1, 1, requires_grad=True)
    p = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    for grad in torch.autograd.grad(group_norms(w, p), (w, p)):
        assert bool(torch.isfinite(grad).all())


def test_the_second_order_term_is_the_derivative_through_the_virtual_step() -> None:
    """Against finite differences of loss and penalty at the weights that the steps reach."""
    torch.manual_seed(0)
    start = torch.randn(4, 3, 1, 1, dtype=torch.float64)
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    pull = torch.randn_like(start)  # the loss is linear: its Hessian, which is ignored, is 0
    rate, strength = 0.1, 1e-3

    def slope(w: Tensor, p: Tensor) -> Tensor:
        free = w.detach().requires_grad_()
        return torch.autograd.grad(group_norms(free, p), free)[0]

    def reached(p: Tensor) -> tuple[Tensor, Tensor]:
        shrunk = start - rate * strength * slope(start, p)
        return shrunk, shrunk - rate * pull

    def whole(a: Tensor) -> float:
        p = a.softmax(0)
        shrunk, after = reached(p)
        return float((pull * shrunk).sum() + strength * group_norms(after, p))

    p = logits.softmax(0)
    shrunk, after = reached(p.detach())
    moved = after - rate * strength * slope(after, p.detach()) - shrunk
    (found,) = logit_gradients(
        {"c": p},
        [logits],
        before={"c": start},
        after={"c": after},
        moved={"c": moved},
        scales={"c": 1.0},
    )
    step = 1e-5
    for i, j in itertools.product(range(2), range(4)):
        ahead, behind = logits.detach().clone(), logits.detach().clone()
        ahead[i, j] += step
        behind[i, j] -= step
        numeric = (whole(ahead) - whole(behind)) / (2 * step) / strength
        assert float(found[i, j]) == pytest.approx(numeric, rel=1e-5)


def test_a_step_is_the_hard_penalty_and_leaves_all_else() -> None:
    how = GroupLearning(count=2, strength=0.1, ramp=10)
    net, _, learned = begin(how)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    learned.step(batches(1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    groups: Any = learned._learning
    for name, value in net.state_dict().items():
        if name not in ("conv.weight", "last.weight"):
            assert torch.equal(value, before[name]), name
    # Strength 0.1 at the first of ten steps, learning rate 0.05, input 8 x 8.
    free = before["conv.weight"].clone().requires_grad_()
    member = hard(groups._logits["conv.weight"].detach())
    own = group_norms(free, member, layer_scale(free, 2, 64))
    (slope,) = torch.autograd.grad(own, free)
    by_hand = before["conv.weight"] - 0.05 * 0.01 * slope
    assert torch.allclose(net.conv.weight.detach(), by_hand, atol=1e-7)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_networks_of_other_types_are_shrunk_alike(kind: torch.dtype) -> None:
    moved = []
    for dtype in (torch.float32, kind):
        net = network().to(dtype)
        before = net.conv.weight.detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        learned = Learned(net, optimizer, GroupLearning(strength=5.0, ramp=1))
        x, y = batches(1)[0]
        learned.step((x.to(dtype), y))
        moved.append((net.conv.weight.detach() - before).float())
    assert float(moved[0].abs().max()) > 0.05
    near = 1e-6 if kind is torch.float64 else 0.01  # a weight of 1 is kept to 0.004
    assert torch.allclose(moved[0], moved[1], atol=near)


def test_a_convolution_may_have_no_part_in_the_loss() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Conv2d(8, 6, 3)

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.aside(self.stem(x))

    torch.manual_seed(0)
    net = Auxiliary()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    learned = Learned(net, sgd, GroupLearning(strength=1.0, ramp=1), scope=Scope(sensitive=True))
    before = net.aside.weight.detach().clone()
    learned.step(batches(1)[0])
    assert "aside.weight" in learned.masks
    assert bool((net.aside.weight.abs() <= before.abs() + 1e-6).all())  # the penalty alone
    assert not torch.equal(net.aside.weight, before)


def test_planted_groups_are_found() -> None:
    """Filters 0 to 5 read channels 0 to 3, the others channels 4 to 7."""
    net, optimizer, learned = begin(GroupLearning(count=2, strength=0.5, ramp=1, lr=0.02))
    with torch.no_grad():
        net.conv.weight[:6, 4:] *= 0.02
        net.conv.weight[6:, :4] *= 0.02
    kept = net.conv.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for batch in batches(1) * 300:
        learned.step(batch)
        net.conv.weight.data.copy_(kept)
    groups: Any = learned._learning
    ids = groups.groups_of_filters()["conv.weight"]
    assert ids.shape == (12,)
    assert len(ids[:6].unique()) == len(ids[6:].unique()) == 1
    assert ids[0] != ids[6]


def test_hardening_cuts_the_cost_by_groups() -> None:
    how = GroupLearning(count=2, target=0.5, strength=0.05, ramp=80, lr=0.05)
    net, optimizer, learned = begin(how)
    train(net, optimizer, learned, batches(80))
    masks = learned.masks
    pruned = learned.harden()
    assert pruned.masks == masks
    assert list(masks) == ["conv.weight", "last.weight"]  # the stem reads the image
    found = pruned.facts.measures["groups"]
    costs = {"conv.weight": 12 * 8 * 9 * 16, "last.weight": 8 * 12 * 9 * 16}
    left = sum(costs[n] * float(m.float().mean()) for n, m in masks.items())
    assert 0.5 <= 1 - left / sum(costs.values()) <= 0.56  # within one channel of a group
    for name, mask in masks.items():
        weight = net.get_parameter(name).detach()
        ids, keep = torch.tensor(found[name]["groups"]), torch.tensor(found[name]["keep"])
        assert bool((weight[~mask] == 0).all())
        assert torch.equal(mask[:, :, 0, 0], keep[ids])
    assert 0 < pruned.facts.measures["beta"] < 1


def test_frozen_convolutions_are_left_out_with_a_note() -> None:
    net = network()
    net.conv.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    learned = Learned(net, optimizer, GroupLearning(target=0.3))
    frozen = net.conv.weight.clone()
    train(net, optimizer, learned, batches(2))
    pruned = learned.harden()
    assert list(pruned.masks) == ["last.weight"]
    assert torch.equal(net.conv.weight, frozen)
    (note,) = (n.text for n in pruned.facts.notes if n.where == "conv.weight")
    assert note == "it is frozen, and GroupLearning reads its gradient"


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    net = network()
    with pytest.raises(NotYet, match="one of 2 processes"):
        Learned(net, torch.optim.SGD(net.parameters(), 0.1), GroupLearning())
    Learned(net, torch.optim.SGD(net.parameters(), 0.1), Slimming())


def test_a_step_without_its_batch_is_refused() -> None:
    learned = begin(GroupLearning())[2]
    with pytest.raises(NeedsData, match=r"step\(batch\)"):
        learned.step()


def test_group_learning_resumes_exactly() -> None:
    data = batches(12)
    how = GroupLearning(count=3, strength=0.05, ramp=12, lr=0.05)
    net, optimizer, learned = begin(how)
    torch.manual_seed(5)
    train(net, optimizer, learned, data[:7])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), learned.state_dict()))
    random = torch.get_rng_state()
    train(net, optimizer, learned, data[7:])
    other, again, resumed = begin(how)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    torch.set_rng_state(random)
    train(other, again, resumed, data[7:])
    assert learned.harden().masks == resumed.harden().masks
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# -- stage 2 --------------------------------------------------------------------------------------


def test_channels_go_while_their_energy_is_below_beta() -> None:
    energy = torch.tensor([[0.4, 0.1, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]])
    w = energy.sqrt()[:, :, None, None]
    ids = torch.tensor([0, 1])
    for beta, first, second in (
        (0.0, [1, 1, 1, 1], [1, 1, 1, 1]),
        (0.1001, [1, 0, 1, 1], [1, 1, 1, 1]),
        (0.3001, [1, 0, 1, 0], [1, 1, 1, 0]),
        (1.0, [1, 0, 0, 0], [1, 0, 0, 0]),
    ):
        found = branches_at(w, ids, count=3, beta=beta)
        assert found.keep.int().tolist() == [first, second, [0, 0, 0, 0]]


@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_bisection_meets_the_cost(target: float) -> None:
    torch.manual_seed(2)
    weights = {"a": torch.randn(32, 48, 3, 3), "b": torch.randn(64, 32, 3, 3) * 7}
    ids = {n: torch.randint(4, (len(w),)) for n, w in weights.items()}
    costs = {"a": 3e6, "b": 1e6}
    found, beta = energy_prune(weights, ids, costs, target=target, count=4)
    left = sum(costs[n] * float(b.kernels().double().mean()) for n, b in found.items())
    assert target <= 1 - left / 4e6 < target + 0.02
    less = energy_prune(weights, ids, costs, target=target - 0.1, count=4)[1]
    assert less < beta


def test_whole_filters_may_go_as_well() -> None:
    torch.manual_seed(2)
    w = {"a": torch.randn(16, 16, 3, 3)}
    w["a"][3] *= 0.01
    ids = {"a": torch.arange(16) % 2}
    found, _ = energy_prune(w, ids, {"a": 1.0}, target=0.5, count=2, filters=frozenset({"a"}))
    assert not bool(found["a"].filters[3])
    assert float(found["a"].kernels().double().mean()) <= 0.5
    with pytest.raises(UsageError, match="take no part"):
        begin(GroupLearning(filters=("stem.weight",)))


def test_an_impossible_cost_is_refused_with_numbers() -> None:
    w = {"a": torch.randn(4, 4, 1, 1)}
    with pytest.raises(BudgetError, match=r"75\.0%"):
        energy_prune(w, {"a": torch.arange(4) % 2}, {"a": 1.0}, target=0.9, count=2)
