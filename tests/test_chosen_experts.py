"""Which modules a batch calls, and how often, is up to its samples: experts, and loops over samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur import prune, recipes
from secateur.core.batches import Data
from secateur.frontends import discover
from secateur.schedule import Exponential, OneShot
from secateur.stats import in_order


class Mixture(nn.Module):
    """Each token goes to one of several experts."""

    def __init__(self, width: int = 8, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        choice, found = self.gate(x).argmax(-1), x.clone()
        for number in choice.unique().tolist():
            places = (choice == number).nonzero()[:, 0]
            found = found.index_add(0, places, self.experts[number](x[places]))
        return found


class TwoChoices(Mixture):
    """The second choices of all tokens come after the first ones."""

    def forward(self, x: Tensor) -> Tensor:
        found = x.clone()
        for choice in self.gate(x).topk(2).indices.T:
            for number in choice.unique().tolist():
                places = (choice == number).nonzero()[:, 0]
                found = found.index_add(0, places, self.experts[number](x[places]))
        return found


class OneByOne(nn.Module):
    """Goes through the samples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)), nn.Linear(8, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.body(row) for row in x])


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Mixture(), Mixture(), nn.Linear(8, 4)).eval()


TOKENS = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
FEW = list(TOKENS.split(4))  # batches, none of which reaches every expert


def test_weights_take_part_whichever_batch_reaches_them() -> None:
    whole = prune(network(), recipes.wanda(0.5), Data(train=[TOKENS]))
    parts = prune(network(), recipes.wanda(0.5), Data(train=FEW))
    assert len(whole.masks) == 2 * 4 * 2
    assert parts.masks == whole.masks
    assert not [note for note in parts.facts.notes if "could not be seen" in note.text]


@pytest.mark.parametrize(
    "build", [OneByOne, lambda: nn.Sequential(TwoChoices(), TwoChoices(), nn.Linear(8, 2))]
)
def test_modules_that_are_called_again_and_again_count_each_time(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    net = build().eval()
    tokens = TOKENS[:48] * torch.logspace(-2, 0, 48)[:, None]  # the first are small
    masks = [
        prune(net, recipes.wanda(0.5), list(tokens.split(size))).masks.fingerprint()
        for size in (1, 16, 48)
    ]
    assert len(set(masks)) == 1


def test_what_no_batch_reaches_is_left_out() -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("0.gate.bias")[3] = -1e3
    pruned = prune(net, recipes.wanda(0.5), FEW)
    left = [note.where for note in pruned.facts.notes if "could not be seen" in note.text]
    assert left == ["0.experts.3.0.weight", "0.experts.3.2.weight"]
    assert len(pruned.masks) == 2 * 4 * 2 - 2


class Closing(nn.Module):
    """Its last layer only runs while the gain, which is pruned before it, is large."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.last, self.out = (nn.Linear(8, n) for n in (1, 8, 2))
        with torch.no_grad():
            self.gain.weight.fill_(1.0)
            self.gain.bias.fill_(0.0)

    def forward(self, x: Tensor) -> Tensor:
        large = self.gain(x).mean() > self.least
        return self.out(self.last(x) if large else x)

    least = 5.5


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_earlier_cuts_close_off_stays_as_it_is(rounds: int) -> None:
    net = Closing().eval()
    # Of the eight ones of the gain, the first of two rounds leaves six.
    recipe = dataclasses.replace(
        recipes.wanda(0.5), schedule=Exponential(begin=0, end=rounds) if rounds > 1 else OneShot()
    )
    pruned = prune(net, recipe, [torch.ones(4, 8)])
    left = [note.where for note in pruned.facts.notes if "earlier weights pruned" in note.text]
    assert left == ["last.weight"]
    assert [layer.name for layer in pruned.facts.layers] == list(pruned.masks)
    kept = pruned.model.get_parameter("last.weight") != 0
    if rounds == 1:
        assert list(pruned.masks) == ["gain.weight"]
        assert bool(kept.all())
    else:
        assert 0.2 < pruned.masks["last.weight"].float().mean() < 0.95
        assert torch.equal(kept, pruned.masks["last.weight"])


def test_the_order_is_that_of_all_batches() -> None:
    net = network()
    slots = [slot for slot in discover(net) if "experts" in slot.name and slot.axes is not None]
    found = [slot.name for slot in in_order(net, slots[::-1], FEW)]
    assert sorted(found) == sorted(slot.name for slot in slots)
    blocks = [name.split(".")[0] for name in found]
    assert blocks == sorted(blocks)
    layers = [name.rpartition(".")[0] for name in found]
    for layer in (name for name in layers if name.endswith(".0")):
        assert layers.index(layer) < layers.index(f"{layer[:-1]}2")
