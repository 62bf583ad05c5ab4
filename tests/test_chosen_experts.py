"""Experts that are modules of their own: which of them a batch reaches is up to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur import prune, recipes
from secateur.core.batches import Data
from secateur.frontends import discover
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


def test_what_no_batch_reaches_is_left_out() -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("0.gate.bias")[3] = -1e3
    pruned = prune(net, recipes.wanda(0.5), FEW)
    left = [note.where for note in pruned.facts.notes if "could not be seen" in note.text]
    assert left == ["0.experts.3.0.weight", "0.experts.3.2.weight"]
    assert len(pruned.masks) == 2 * 4 * 2 - 2


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
