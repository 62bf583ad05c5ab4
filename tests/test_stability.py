"""Instruments around pruning events: what is measured, what is struck, what comes back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur
from secateur.core.errors import NeedsData, UsageError
from secateur.experiments import Damage, Disturbance, EventLog, Reading, Watched, targeting
from secateur.experiments.stability import Event
from secateur.pattern import Elements, Rows
from secateur.schedule import Polynomial
from secateur.score import ExpectedBatchNorm, Magnitude, Snip
from secateur.stats import following_norms
from secateur.stats.expected import expected_relu


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x := torch.randn(32, 6), x[:, :3].argmax(1)) for _ in range(count)]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def one_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


# ---- events


def test_instability_is_the_relative_loss_of_accuracy() -> None:
    assert Event("", Reading(0.8), Reading(0.2)).instability == pytest.approx(0.75)
    assert Event("", Reading(0.5), Reading(0.6)).instability == pytest.approx(-0.2)
    assert Event("", Reading(0.0), Reading(0.0)).instability == 0
    assert Event("", Reading(0.0), Reading(0.1)).instability == -math.inf


def test_a_plain_loop_logs_its_events() -> None:
    net, found = build(), batches()
    log = EventLog(net, secateur.Data(test=found))
    assert log.instability == 0
    masks = secateur.prune(net, secateur.recipes.magnitude(0.9)).masks
    with log.event("magnitude"):
        masks.apply_(net)
    assert log.events[0].before != log.events[0].after
    assert log.events[0].after == log.reading()
    assert log.instability == log.events[0].instability
    assert set(log.rows()[0]) == {
        "event",
        "accuracy_before",
        "accuracy_after",
        "loss_before",
        "loss_after",
        "instability",
    }


@pytest.mark.parametrize("target", ["smallest", "random", "largest"])
def test_a_watched_pruner_does_what_the_pruner_alone_does(target: str) -> None:
    """Same weights to the bit; before and after are measured right around each change."""
    found, start = batches(), build()
    recipe = secateur.Recipe(
        targeting(target),
        target=secateur.Target("sparsity", 0.75),
        schedule=Polynomial(2, 8, 3, unit="steps"),
    )
    nets = [copy.deepcopy(start), copy.deepcopy(start)]
    optimizers = [sgd(net) for net in nets]
    alone, inner = (
        secateur.Gradual(net, optimizer, recipe)
        for net, optimizer in zip(nets, optimizers, strict=True)
    )
    log = EventLog(nets[1], secateur.Data(test=found))
    watched = Watched(inner, log)
    expected = []
    for batch in found:
        before_masks = alone.masks
        one_step(nets[0], optimizers[0], batch)
        before_masks.apply_(nets[0])
        before = EventLog(nets[0], secateur.Data(test=found)).reading()
        alone.step()
        if alone.masks != before_masks:
            after = EventLog(nets[0], secateur.Data(test=found)).reading()
            expected.append(Event(f"step {alone.steps}", before, after))
        one_step(nets[1], optimizers[1], batch)
        watched.step()
    assert log.events == expected
    assert [event.label for event in log.events] == ["step 5", "step 8"]
    a, b = (net.state_dict() for net in nets)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_log_of_another_network_is_refused() -> None:
    net = build()
    recipe = secateur.Recipe(schedule=Polynomial(0, 8, 3, unit="steps"))
    with pytest.raises(UsageError, match="two networks"):
        Watched(secateur.Gradual(net, sgd(net), recipe), EventLog(build(), batches()))
    with pytest.raises(NeedsData):
        EventLog(net)
    pruned: Any = secateur.prune(net, secateur.recipes.magnitude(0.5))
    with pytest.raises(UsageError, match=r"Pass its \.model"):
        EventLog(pruned, batches())
    with pytest.raises(NeedsData, match="classes"):
        EventLog(net, [torch.zeros(4, 6)]).reading()


def test_anything_can_be_read_instead() -> None:
    net = build()
    log = EventLog(net, read=lambda model: Reading(float(model[0].weight.detach().abs().sum())))
    with log.event("half"), torch.no_grad():
        net[0].weight.mul_(0.5)
    assert log.instability == pytest.approx(0.5)


# ---- what is struck


def norms(net: nn.Module) -> torch.Tensor:
    return net[2].weight.detach().abs().sum(1)


@pytest.mark.parametrize("target", ["smallest", "random", "largest"])
def test_targets(target: str) -> None:
    net, old = build(), None
    old = norms(net)
    masks = Disturbance(net, None, Damage(share=0.25, target=target)).strike_()
    struck = ~masks["2.weight"].any(1)
    assert int(struck.sum()) == 4
    assert torch.equal(masks["2.weight"].any(1), masks["2.weight"].all(1)), "whole filters"
    assert "4.weight" not in masks, "the classifier is left alone by default"
    order = old.argsort()
    if target == "random":
        assert not torch.equal(struck.nonzero().flatten(), order[:4].sort().values)
    else:
        chosen = order[:4] if target == "smallest" else order[-4:]
        assert torch.equal(struck.nonzero().flatten(), chosen.sort().values)


def test_each_random_strike_is_another_and_can_be_repeated() -> None:
    def strikes(seed: int) -> list[str]:
        disturbance = Disturbance(
            build(), None, Damage(target="random", restore_after=1), seed=seed
        )
        found = []
        for _ in range(3):
            found.append(disturbance.strike_().fingerprint())
            disturbance.step()
        return found

    assert len(set(strikes(0))) == 3
    assert strikes(0) == strikes(0)
    assert strikes(0) != strikes(5)


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("steps", [1, 4])
def test_restoring_is_exact(noise: str, steps: int) -> None:
    net, found = build(), batches()
    optimizer = sgd(net)
    one_step(net, optimizer, found[0])
    damage = Damage(share=0.25, target="largest", noise=noise, restore_after=steps)
    disturbance = Disturbance(net, optimizer, damage)
    old = copy.deepcopy(net.state_dict())
    masks = disturbance.strike_()
    for index in range(steps):
        for name, mask in masks.items():
            now = net.get_parameter(name).detach()
            assert (noise == "zero") == (not now[~mask].any())
            assert not torch.equal(now[~mask], old[name][~mask])
            momentum = optimizer.state[net.get_parameter(name)]["momentum_buffer"]
            assert not momentum[~mask].any()
            assert momentum[mask].any()
        one_step(net, optimizer, found[index + 1])
        disturbance.step()
        assert (disturbance.struck is None) == (index + 1 == steps)
    for name, mask in masks.items():
        now = net.get_parameter(name).detach()
        assert torch.equal(now[~mask], old[name][~mask]), "to the bit"
        assert not torch.equal(now[mask], old[name][mask]), "survivors went on learning"


def test_noise_has_the_spread_of_its_filter() -> None:
    net = nn.Sequential(nn.Linear(4000, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight.mul_(torch.arange(1, 9)[:, None])
    spread = net[0].weight.detach().std(1)
    disturbance = Disturbance(net, None, Damage(0.5, "largest", "gaussian", restore_after=3))
    masks = disturbance.strike_()
    struck = ~masks["0.weight"].any(1)
    first = net[0].weight.detach().clone()
    assert torch.allclose(first.std(1)[struck], spread[struck], rtol=0.05)
    assert float(first[struck].mean().abs()) < 0.05 * float(spread.max())
    disturbance.step()
    assert not torch.equal(net[0].weight[struck], first[struck]), "new noise at every step"
    assert torch.equal(net[0].weight[~struck], first[~struck])


def test_damage_without_an_end_stays_until_it_is_taken_back() -> None:
    net = build()
    old = copy.deepcopy(net.state_dict())
    disturbance = Disturbance(net, None, Damage())
    disturbance.step()  # nothing is struck yet
    disturbance.restore_()
    masks = disturbance.strike_()
    for _ in range(50):
        disturbance.step()
    assert disturbance.struck == masks
    disturbance.restore_()
    assert all(torch.equal(old[n], t) for n, t in net.state_dict().items())


def test_strikes_do_not_overlap() -> None:
    disturbance = Disturbance(build(), None, Damage(restore_after=5))
    disturbance.strike_()
    disturbance.step()
    with pytest.raises(UsageError, match="1 of 5 steps old"):
        disturbance.strike_()


def test_the_random_state_is_left_alone() -> None:
    disturbance = Disturbance(build(), None, Damage(0.2, "random", "gaussian"))
    state = torch.get_rng_state()
    disturbance.strike_()
    disturbance.step()
    assert torch.equal(state, torch.get_rng_state())


def test_other_patterns_and_criteria() -> None:
    net = build()
    damage = Damage(share=0.5, criterion=Snip(), pattern=Elements())
    with pytest.raises(NeedsData):
        Disturbance(net, None, damage).strike_()
    masks = Disturbance(net, None, damage, data=batches()).strike_()
    assert masks.sparsity == pytest.approx(0.5)
    assert masks["2.weight"].any(1).sum() > 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"share": 0}, "between 0 and 1"),
        ({"noise": "pink"}, "gaussian"),
        ({"target": "big"}, "largest"),
        ({"share": "0.1"}, "share is a finite number"),
        ({"restore_after": 0}, "restore_after.*1 or more"),
        ({"restore_after": "3"}, "restore_after.*a str"),
        ({"restore_after": 2.5}, "restore_after.*a float"),
        ({"pattern": "rows"}, "pattern.*a str"),
        ({"criterion": "magnitude"}, "criterion.*a str"),
    ],
)
def test_wrong_damage_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Damage(**changes)


# ---- the expected output behind a BatchNorm


def test_expected_output_is_that_of_many_samples() -> None:
    scale = torch.tensor([1.0, -0.7, 0.3, 2.0, 0.01, 1.5])
    shift = torch.tensor([0.0, 0.5, -0.4, -3.0, 0.2, 4.0])
    z = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    sampled = (scale * z + shift).clamp(min=0)
    error = sampled.std(0) / math.sqrt(len(z))
    found = expected_relu(scale, shift)
    assert bool(((found - sampled.mean(0)).abs() < 5 * error + 1e-7).all())


def test_expected_output_without_a_scale_or_far_below_zero() -> None:
    found = expected_relu(
        torch.tensor([0.0, 0.0, 1.0, 1e-30]), torch.tensor([2.0, -1.0, -60.0, 1.0])
    )
    assert found.tolist() == [2.0, 0.0, 0.0, 1.0]


class Residual(nn.Module):
    """The BatchNorm is not where its name or place in the list would suggest."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = functional.relu(self.first_norm(self.first(x)))
        y = functional.relu(x + self.second_norm(self.second(y)))
        return self.head(y.mean((2, 3)))


def test_the_norm_is_the_one_that_reads_the_output() -> None:
    net = Residual().train()
    old = copy.deepcopy(net.state_dict())
    found = following_norms(net, torch.randn(2, 3, 8, 8), has="weight")
    assert found == {"first": "first_norm", "second": "second_norm"}
    assert net.training
    assert all(torch.equal(old[n], t) for n, t in net.state_dict().items())


def test_filters_with_little_output_go_first() -> None:
    net = Residual()
    with torch.no_grad():
        net.first_norm.bias.copy_(torch.tensor([-3.0, 1, -3, 1, 1, 1]))
        net.second_norm.bias.copy_(torch.tensor([1.0, 1, 1, 1, -3, -3]))
    recipe = secateur.Recipe(
        ExpectedBatchNorm(),
        Rows(),
        secateur.Target("sparsity", 2 / 6),
        scope=secateur.Scope(ignore="stem.*"),
    )
    data = secateur.Data(train=[torch.randn(4, 3, 8, 8)])
    masks = secateur.prune(net, recipe, data).masks
    gone = {
        name: (~mask.flatten(1).any(1)).nonzero().flatten().tolist() for name, mask in masks.items()
    }
    assert gone == {"first.weight": [0, 2], "second.weight": [4, 5]}


def test_a_layer_without_a_norm_is_refused() -> None:
    recipe = secateur.Recipe(ExpectedBatchNorm(), Rows())
    with pytest.raises(UsageError, match="no BatchNorm reads"):
        secateur.prune(build(), recipe, secateur.Data(train=[torch.randn(4, 6)]))


def test_the_default_size_is_magnitude() -> None:
    assert targeting("smallest") == Magnitude()
    with pytest.raises(UsageError, match="one of"):
        targeting("biggest")
