"""Code that is unusual, but legitimate: frozen sizes, computed weights, rules that fail."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from structure_layers import TOKENS, between, fresh, require_exact
from torch import Tensor, nn

import secateur
from secateur.core.batches import evaluating
from secateur.core.errors import UsageError
from secateur.structure import apply_, couple, cuts_for
from secateur.structure.rules import products
from secateur.structure.running import require_python


@dataclass(frozen=True)
class Frozen:
    n_head: int = 4
    dim: int = 32


Sizes = namedtuple("Sizes", "n_head dim")


class Heads(nn.Module):
    """Attention by hand, whose sizes stand in something that cannot be written to."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(6, config.dim)
        self.qkv, self.last = nn.Linear(config.dim, 3 * config.dim), nn.Linear(config.dim, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        heads = (*x.shape[:2], 3, self.config.n_head, -1)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("config", [Frozen(), Sizes(4, 32)], ids=["dataclass", "tuple"])
def test_sizes_that_are_frozen_follow_a_cut(config: Any) -> None:
    structure = require_exact(lambda: Heads(config), TOKENS)
    assert {w.groups for w in structure.widths} >= {4, 32}
    net = fresh(lambda: Heads(config))
    pruned = secateur.shrink(net, secateur.ShrinkRecipe(recovery=()), TOKENS)
    heads = next(w.kept for w in pruned.facts.widths if w.groups == 4)
    assert pruned.model.config.n_head == heads
    assert (config.n_head, config.dim) == (4, 32), "the one that others may share"


class Called(nn.Module):
    """A layer that is run with another weight than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        x = torch.func.functional_call(self.b, {"weight": self.b.weight * 0.5}, (x,))
        return self.c(x.relu())


def test_a_layer_run_with_a_computed_weight_is_counted_and_repaired() -> None:
    data = [(torch.randn(8, 16), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    pruned = secateur.shrink(Called(), secateur.ShrinkRecipe(), torch.randn(2, 16), data=data)
    told = pruned.facts.measures["target"]
    assert told["dense"] == 16 * 24 + 24 * 24 + 24 * 4
    assert 0 < told["reached"] <= told["limit"]


@pytest.mark.parametrize(
    ("turn", "free"),
    [
        (lambda x: torch.roll(x, 3), False),
        (lambda x: torch.roll(x, (1, 2)[0]), False),
        (lambda x: torch.roll(x, 3, 1), True),
        (lambda x: torch.roll(x, shifts=3, dims=-1), False),
        (lambda x: torch.flip(x, dims=(1,)), True),
    ],
)
def test_what_is_turned_along_the_units_keeps_them(
    turn: Callable[[Tensor], Tensor], free: bool
) -> None:
    structure = require_exact(lambda: between(turn), TOKENS)
    assert {w.name for w in structure.widths} == ({"0"} if free else set())


def test_a_rule_that_fails_pins_what_it_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("planted")

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten())
    net.append(nn.Linear(8 * 16, 12)).append(nn.ReLU()).append(nn.Linear(12, 4))
    monkeypatch.setattr(products, "_grouped", broken)
    structure = couple(net, torch.zeros(1, 3, 8, 8))
    assert [w.name for w in structure.widths] == ["4"]
    reasons = {r for (n, _), r in structure.pinned.items() if n in ("0.weight", "2.weight")}
    assert "the rule for aten.convolution fails (IndexError: planted)" in reasons


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_part_in_torchscript_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 8), torch.jit.script(nn.Linear(8, 4)))
    with pytest.raises(UsageError, match="'1' was compiled to TorchScript"):
        require_python(net)


class Mapped(nn.Module):
    """Layers are called for each sample by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        return torch.vmap(lambda sample: self.b(self.a(sample).relu()))(x)


@pytest.mark.parametrize(
    ("target", "data"),
    [("macs=50%", None), ("params=60%", [(torch.randn(8, 16), torch.zeros(8).long())])],
)
def test_layers_inside_vmap_cannot_be_read_and_can_be_cut(target: str, data: Any) -> None:
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse(target))
    with pytest.raises(UsageError, match=r"calls them inside torch\.vmap"):
        secateur.shrink(Mapped(), recipe, torch.randn(4, 16), data=data)
    plain = secateur.ShrinkRecipe(target=secateur.Target.parse("params=60%"), recovery=())
    assert secateur.shrink(Mapped(), plain, torch.randn(4, 16)).facts.measures["proof"] < 1e-5


class Quantized(nn.Module):
    """A code book for the middle of the network, and how far the two are apart as a second output."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss
        self.before, self.code, self.after = nn.Linear(6, 8), nn.Embedding(7, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        nearest = torch.cdist(x, self.code.weight[None]).argmin(-1)
        return self.after(x), self.loss(x, self.code(nearest).detach())


@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_within_the_network_runs_over_kept_units(name: str, reduction: str) -> None:
    loss = getattr(nn.functional, name)

    def build() -> nn.Module:
        return Quantized(lambda a, b: loss(a, b, reduction=reduction))

    net = fresh(build)
    structure = couple(net, TOKENS)
    if reduction == "none":
        assert not structure.widths, "every number of the width is an output"
        return
    (width,) = structure.widths
    assert width.groups == 8
    given = secateur.allocate.widths.GivenWidths({width.name: 0.5})
    recipe = secateur.ShrinkRecipe(allocation=given, recovery=())
    assert secateur.shrink(net, recipe, TOKENS).facts.measures["proof"] < 1e-10


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.masked_fill(torch.arange(5)[:, None] > 2, torch.tensor(0.5).double()),
        lambda x: (x * (1 + 1j)).conj().real * 2,
        lambda x: (x * (1 + 1j)).conj().imag * 2,
    ],
    ids=["masked_fill", "conj", "negative"],
)
def test_one_value_in_and_one_out_lets_units_through(function: Callable[..., Any]) -> None:
    (width,) = require_exact(lambda: between(function), TOKENS).widths
    assert width.groups == 12


class Remembering(nn.Module):
    """What it computes from its weights it keeps while it evaluates, and forgets when it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.ones(8))
        self.kept: Tensor | None = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        shift = 2 * self.shift if self.training or self.kept is None else self.kept
        self.kept = None if self.training else shift.detach()
        return self.last(self.first(x) + shift)


def test_what_was_kept_for_evaluation_does_not_outlive_a_cut() -> None:
    net = fresh(Remembering)
    net(TOKENS)  # before the trace, as a user would who measures first
    structure = couple(fresh(Remembering), TOKENS)
    (width,) = structure.widths
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, {width.name: torch.arange(8) < 5}))
    assert not small.training
    assert small(TOKENS).shape == (3, 5, 4)


def test_what_was_kept_for_evaluation_does_not_outlive_training() -> None:
    net = fresh(Remembering).train()
    net.last.eval()
    with evaluating(net):
        before = net(TOKENS)
    assert [m.training for m in (net, net.first, net.last)] == [True, True, False]
    with torch.no_grad():
        net.shift += 1
    with evaluating(net):
        assert not torch.equal(net(TOKENS), before)
