"""What a user may get wrong in front of a structural cut, and what is said about it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import BudgetError, UsageError
from secateur.structure import couple

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(10, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.e(x)).relu())
        return out


@pytest.mark.parametrize(
    ("model", "example", "told"),
    [
        (Words(), torch.tensor([[1, 2, 99]]), r"running Words .*its own forward fails .*range"),
        (net().double(), X, r"its own forward fails .*its parameters are torch.float64"),
        (net(), X[:0], r"its outputs are empty.*at least one sample"),
        (net(), (X, X), r"its own forward fails"),
    ],
)
def test_an_example_that_does_not_run_is_told_as_such(
    model: nn.Module, example: Any, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        secateur.shrink(model, None, example)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrapped_and_compiled_networks() -> None:
    with pytest.raises(UsageError, match=r"wraps a Sequential .*Pass its \.module"):
        couple(nn.DataParallel(net()), X)
    wrapped = secateur.shrink(nn.DataParallel(net()), None, X)  # looks through the wrapper
    assert isinstance(wrapped.model, nn.Sequential)
    for check in (couple, lambda model, x: secateur.shrink(model, None, x)):
        for scripted in (torch.jit.script(net()), torch.jit.trace(net(), X)):
            with pytest.raises(UsageError, match="TorchScript"):
                check(scripted, X)


@pytest.mark.parametrize("text", ["params=100%", "macs=150%", "bytes=1x", "latency=0.5x"])
def test_the_whole_is_no_target(text: str) -> None:
    with pytest.raises(BudgetError, match="Nothing would be removed"):
        secateur.Target.parse(text)
    unit, _, value = text.partition("=")
    with pytest.raises(BudgetError, match="Nothing would be removed"):
        secateur.Target.parse({unit: value})


def test_counts_and_shares_are_read() -> None:
    assert secateur.Target.parse("params=20000") == secateur.Target("params", 20000)
    assert secateur.Target.parse("macs=99%") == secateur.Target("macs", 0.99)
    assert secateur.Target.parse("latency=2x") == secateur.Target("latency", 0.5)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.used = net(), nn.Parameter(torch.tensor(2.0))
        self.idle = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x) * self.used
        return out


def test_a_single_number_that_is_used_is_not_called_unreached() -> None:
    assert couple(Scaled(), X).unreached == ("idle",)


def test_a_network_without_parameters_has_nothing_to_cut() -> None:
    assert couple(nn.ReLU(), X).widths == ()
    with pytest.raises(UsageError, match="none of 0 widths"):
        secateur.shrink(nn.Sequential(nn.ReLU()), None, X)
