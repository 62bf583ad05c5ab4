"""A layer that the criterion cannot rank is named: another task's head, a BatchNorm as it was made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.allocate import Ranked
from secateur.schedule import Exponential, Polynomial
from secateur.score import BatchNormScale, Criterion, Magnitude, Snip, Taylor

SEED = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(8, 6, generator=SEED), torch.randint(0, 3, (8,), generator=SEED)) for _ in range(2)
]
HALF = secateur.Target.parse("50%")


class TwoHeads(nn.Module):
    """The loss sees one of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen, self.other = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).relu()
        return self.last(self.seen(y).relu() + 0 * self.other(y).detach())


def told(facts: secateur.Facts) -> list[str]:
    return [note.where for note in facts.notes if note.topic == "even-scores"]


@pytest.mark.parametrize(
    ("criterion", "named"),
    [(Snip(), ["other.weight"]), (Taylor(), ["other.weight"]), (Magnitude(), [])],
    ids=["snip", "taylor", "magnitude"],
)
def test_a_head_without_gradient_is_named(criterion: Criterion, named: list[str]) -> None:
    recipe = secateur.Recipe(criterion, target=HALF, allocation=Ranked())
    assert told(secateur.prune(TwoHeads(), recipe, secateur.Data(train=BATCHES)).facts) == named


def test_gradual_names_it_too() -> None:
    net = TwoHeads()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    data = secateur.Data(train=BATCHES)
    when = Polynomial(begin=0, end=1, frequency=1)
    recipe = secateur.Recipe(Snip(), target=HALF, allocation=Ranked(), schedule=when)
    pruner = secateur.Gradual(net, sgd, recipe, data=data, steps=2)
    for x, y in BATCHES:
        sgd.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sgd.step()
        pruner.step()
    assert told(pruner.finalize().facts) == ["other.weight"]


def test_what_was_pruned_before_is_no_score() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4))
    once = secateur.Recipe(target=HALF)
    assert told(secateur.prune(net, once).facts) == []
    twice = secateur.Recipe(target=secateur.Target.parse("75%"), schedule=Exponential(end=2))
    assert told(secateur.prune(net, twice).facts) == ["0.weight"]


def test_widths_of_an_untrained_batchnorm_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    recipe = secateur.ShrinkRecipe(
        criterion=BatchNormScale(), target=secateur.Target.parse("params=80%"), recovery=(), align=1
    )
    example = torch.randn(1, 1, 4, 4)
    assert told(secateur.shrink(net, recipe, example).facts) == ["0"]
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, 0.5, 1.0, 1.0]))
    cut = secateur.shrink(net, recipe, example)
    assert told(cut.facts) == []
    assert cut.model[1].weight.tolist() == [1.0, 1.0, 1.0]
