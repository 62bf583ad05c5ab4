"""Layers that share a weight count like one layer that is called as often."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import Recipe, Target
from secateur.frontends import discover
from secateur.recover import BiasCorrection, ColumnSweep, Compensation, LeastSquares
from secateur.score import Magnitude, ObsSaliency, Wanda
from secateur.stats.activations import Positions
from secateur.stats.engine import collect

HALF = Target("sparsity", 0.5)


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def second(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.tanh(self.a(x)) * 10)))


class Tied(Twice):
    """The same function: two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight

    def second(self, x: Tensor) -> Tensor:
        return self.b(x)


def both() -> tuple[Twice, Tied]:
    torch.manual_seed(0)
    twice, tied = Twice(), Tied()
    tied.load_state_dict({**twice.state_dict(), "b.weight": twice.a.weight})
    return twice, tied


def samples() -> Tensor:
    # Of low rank, as real inputs are: what the first call alone sees is little.
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(200, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    return few + 0.01 * torch.randn(200, 16, generator=generator)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Wanda(), target=HALF),
        Recipe(ObsSaliency(), target=HALF, recovery=(ColumnSweep(),)),
        Recipe(Magnitude(), target=HALF, recovery=(LeastSquares(),)),
        Recipe(Magnitude(), target=Target("macs", 0.5)),
    ],
    ids=["wanda", "sweep", "least squares", "multiply-adds"],
)
def test_tied_layers_are_pruned_like_one_that_is_called_twice(
    recipe: Recipe, sequential: bool
) -> None:
    recipe = replace(recipe, sequential=sequential)
    x = samples()
    wanted, found = (secateur.prune(net, recipe, data=[x[:100], x[100:]]) for net in both())
    assert torch.equal(wanted.masks["a.weight"], found.masks["a.weight"])
    torch.testing.assert_close(wanted.model(x), found.model(x), rtol=1e-6, atol=1e-6)


def test_a_module_of_two_names_is_seen_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8))
    net.add_module("again", net[0])
    (slot, *_) = discover(net)
    assert slot.aliases
    weight = slot.weight(net)
    stats = collect(net, [slot], [Positions()], [torch.randn(4, 8)])
    assert float(stats(Positions(), weight)) == 2


def test_layers_of_different_kinds_that_share_a_weight_have_no_rows() -> None:
    net = nn.Sequential(nn.RNNCell(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    net[1].weight = net[0].weight_ih
    assert discover(net)[0].aliases == ("1.weight",)
    assert discover(net)[0].rows is None


def test_biases_of_their_own_are_not_corrected_together() -> None:
    _, tied = both()
    tied.a.bias, tied.b.bias = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.ones(16))
    recipe = Recipe(Magnitude(), target=HALF, recovery=(BiasCorrection(),))
    pruned = secateur.prune(tied, recipe, data=[samples()])
    assert torch.equal(pruned.model.b.bias, torch.ones(16))
    assert any(n.topic == "bias" and "a bias each" in n.text for n in pruned.facts.notes)
    # One bias for both takes the mean of both.
    tied.b.bias = tied.a.bias
    pruned = secateur.prune(tied, recipe, data=[samples()])
    assert float(pruned.model.a.bias.detach().abs().sum()) > 0


def test_a_tied_consumer_is_cut_and_says_that_it_was_not_refitted() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)
            self.a, self.b = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(torch.relu(self.first(x)))
            return self.b(torch.relu(self.second(y)))

    net = Shared()
    recipe = secateur.ShrinkRecipe(target=Target("params", 0.7), recovery=(Compensation(),))
    cut = secateur.shrink(copy.deepcopy(net), recipe, torch.randn(4, 6), data=[torch.randn(64, 6)])
    assert any(n.topic == "uncompensated" and "share" in n.text for n in cut.facts.notes)
    assert cut.model.b.weight is cut.model.a.weight
