"""Multiply-adds of weights that are no parameter of a known layer, against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.core.errors import BudgetError
from secateur.stats import product_uses


class Cell(nn.Module):
    """A recurrent cell that is called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(16, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = None
        for step in range(x.shape[1]):
            hidden = self.cell(x[:, step], hidden)
        return self.out(hidden)


class Held(nn.Module):
    """Parameters of the network itself, one of them masked at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.w, self.v = nn.Parameter(torch.randn(64, 16)), nn.Parameter(torch.randn(5, 64))
        self.register_buffer("chosen", torch.ones(5, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() @ self.w.T
        return F.linear(x, self.v * self.chosen)


class Positions(nn.Module):
    """Positions have as many numbers as an input of one sample, and are multiplied by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 6, 16))
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x + self.positions).relu())


def normed() -> nn.Module:
    return nn.Sequential(
        *(weight_norm(nn.Conv1d(a, b, 3)) for a, b in ((4, 64), (64, 64), (64, 4)))
    )


class Projected(nn.Module):
    """A recurrent layer with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(16, 32, proj_size=8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layer(x)[0][:, -1])


class Tied(nn.Module):
    """The table that is looked up is multiplied, too, by no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(self.table(x)).relu()) @ self.table.weight.T


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "weight norm": (normed, torch.randn(2, 4, 32)),
    "cell": (Cell, torch.randn(2, 6, 16)),
    "parameters": (Held, torch.randn(2, 16)),
    "positions": (Positions, torch.randn(1, 6, 16)),
    "projection": (Projected, torch.randn(2, 5, 16)),
    "tied": (Tied, torch.arange(10).reshape(2, 5) % 9),
}


def multiply_adds(net: nn.Module, x: Tensor) -> float:
    """Of one sample."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        net.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


@pytest.mark.filterwarnings("ignore:TF32", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_a_network_and_what_is_left_of_it(name: str) -> None:
    build, x = CASES[name]
    torch.manual_seed(0)
    net = build()
    cost = secateur.measure(net, example=x, latency=False).cost
    assert cost.macs_dense == pytest.approx(multiply_adds(net, x))
    assert not cost.uncounted or name == "positions"
    pruned = secateur.shrink(net, secateur.ShrinkRecipe(recovery=()), x)
    told = pruned.facts.measures["target"]
    assert told["dense"] == pytest.approx(multiply_adds(net, x))
    assert told["reached"] == pytest.approx(multiply_adds(pruned.model, x))
    assert 0.4 * told["dense"] < told["reached"] <= 0.5 * told["dense"]


def test_only_what_is_asked_for_is_counted() -> None:
    net = Held()
    x = torch.randn(2, 16)
    assert product_uses(net, x, ["w"]) == {"w": 1.0}
    assert product_uses(net, x, ["v"]) == {"v": 1.0}
    assert product_uses(net, x, []) == {}


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_network_without_products_has_no_budget_in_them(rounds: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x).relu().sum(-1)

    recipe = secateur.ShrinkRecipe(recovery=(), rounds=rounds)
    with pytest.raises(BudgetError, match="the dense network costs 0"):
        secateur.shrink(Scaled(), recipe, torch.randint(9, (2, 3)))


def test_bilinear_layers_are_counted() -> None:
    """PyTorch's counter lacks them: each weight multiplies one number a row of the inputs."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(4, 32), nn.Bilinear(32, 5, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.o(self.b(self.a(x), y).tanh())

    net, batch = Two(), (torch.randn(2, 7, 4), torch.randn(2, 7, 5))
    dense = 7 * sum(layer.weight.numel() for layer in (net.a, net.b, net.o))
    recipe = secateur.ShrinkRecipe(recovery=(), align=1)
    small = secateur.shrink(net, recipe, batch)
    told = small.facts.measures["target"]
    left = small.model
    reached = 7 * sum(layer.weight.numel() for layer in (left.a, left.b, left.o))
    assert (told["dense"], told["reached"]) == (dense, reached)
    assert 0.4 * dense < reached <= 0.5 * dense
    cost = secateur.measure(net, example=(*batch, None), latency=False).cost
    assert (cost.macs_dense, cost.uncounted) == (dense, ())
