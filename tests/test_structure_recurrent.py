"""Structural pruning of recurrent layers: packed sequences, states, projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from structure_layers import TOKENS, fresh, require_exact
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import secateur
from secateur.structure import apply_, couple, cuts_for, prove

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "projected": {"proj_size": 2, "bidirectional": True, "num_layers": 2},
}
CELLS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CASES = [(c, o) for c in CELLS for o in OPTIONS if c == "LSTM" or o != "projected"]
LENGTHS = {False: torch.tensor([3, 3, 2, 1, 1]), True: torch.tensor([5, 3, 2])}


class Tagger(nn.Module):
    """Packed sequences through a recurrent layer; it answers for each token and for the text."""

    def __init__(self, cell: str, *, ordered: bool = True, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.rnn = CELLS[cell](8, 7, **options)
        self.first = options.get("batch_first", False)
        self.ordered, self.ways = ordered, 1 + options.get("bidirectional", False)
        width = self.ways * (options.get("proj_size") or 7)
        self.tags, self.text = nn.Linear(width, 4), nn.Linear(width, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        packed = pack_padded_sequence(
            x, lengths, batch_first=self.first, enforce_sorted=self.ordered
        )
        steps, state = self.rnn(packed)
        padded, _ = pad_packed_sequence(steps, batch_first=self.first)
        hidden = state[0] if isinstance(state, tuple) else state
        last = torch.cat([hidden[-2], hidden[-1]], 1) if self.ways == 2 else hidden[-1]
        return self.tags(padded), self.text(last)


@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize(("cell", "options"), CASES)
def test_packed_sequences(cell: str, options: str, ordered: bool) -> None:
    chosen = OPTIONS[options]
    lengths = LENGTHS[chosen.get("batch_first", False)]
    lengths = lengths if ordered else lengths.roll(1)
    structure = require_exact(lambda: Tagger(cell, ordered=ordered, **chosen), (TOKENS, lengths))
    assert structure.trace.meta
    widths = {width.name: width.groups for width in structure.widths}
    assert widths == {"embed": 8, "rnn": 7} | ({"rnn#2": 2} if "proj_size" in chosen else {})


@pytest.mark.parametrize(("cell", "options"), [(c, o) for c, o in CASES if o != "projected"])
def test_packed_networks_are_counted_and_repaired(cell: str, options: str) -> None:
    chosen = OPTIONS[options]
    lengths = LENGTHS[chosen.get("batch_first", False)]
    torch.manual_seed(0)
    net = Tagger(cell, **chosen).double()
    batches = [(torch.randn_like(TOKENS), lengths, torch.zeros(3)) for _ in range(4)]
    recipe = secateur.ShrinkRecipe(target=secateur.Target("macs", 0.6))
    pruned = secateur.shrink(net, recipe, (TOKENS, lengths), batches)
    assert pruned.facts.measures["proof"] < 1e-10
    assert pruned.facts.measures["refitted_layers"] >= 4
    layer = pruned.model.rnn
    assert layer.hidden_size < 7 or layer.input_size < 8
    assert (layer.weight_hh_l0.shape[1], layer.weight_ih_l0.shape[1]) == (
        layer.hidden_size,
        layer.input_size,
    )


def test_sizes_of_a_projected_layer_follow() -> None:
    net = Tagger("LSTM", proj_size=2).double()
    example = (TOKENS, LENGTHS[False])
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    layer: Any = secateur.shrink(net, recipe, example).model.rnn
    assert layer.weight_hr_l0.shape == (layer.proj_size, layer.hidden_size)
    assert layer.weight_ih_l0.shape == (4 * layer.hidden_size, layer.input_size)


@pytest.mark.parametrize("kind", [*CELLS, "projected", nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_one_step_is_enough_to_see_the_state(kind: Any) -> None:
    """What the layer gives is what it reads at the next step, which the example does not have."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(6, 8), nn.Linear(2 if kind == "projected" else 7, 4)
            options = {"proj_size": 2} if kind == "projected" else {}
            cell = CELLS.get({"projected": "LSTM"}.get(kind, kind), kind)
            self.rnn: Any = cell(8, 7, **options)

        def forward(self, x: Tensor) -> Any:
            found, state = [], None
            for step in self.embed(x):
                whole = step[None] if isinstance(self.rnn, nn.RNNBase) else step
                made = self.rnn(whole, state)
                y, state = made if isinstance(self.rnn, nn.RNNBase) else (made, made)
                found.append(self.out(y[0] if isinstance(self.rnn, nn.LSTMCell) else y))
            return torch.stack(found)

    structure = require_exact(Net, TOKENS[:1])
    net = fresh(Net)
    keep = {w.name: torch.arange(w.groups) % 4 != 1 for w in structure.widths}
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    assert prove(net, small, structure, keep, TOKENS).error < 1e-10


def test_sequences_of_several_lengths_that_are_padded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.out = nn.Linear(6, 8), nn.GRU(8, 7), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Any:
            x = self.embed(x)
            return self.out(self.rnn(pad_sequence([x[0, :3], x[1], x[2, :1]]))[0])

    structure = require_exact(Net, TOKENS)
    assert {w.name: w.groups for w in structure.widths} == {"embed": 8, "rnn": 7}


def test_a_sequence_that_is_unpacked_is_padded_along_tokens_only() -> None:
    """The padding value has no units of its own: all widths of the layer stay free."""
    net = Tagger("GRU").double()
    structure = couple(net, (TOKENS, LENGTHS[False]))
    assert ("rnn.weight_hh_l0", 1) not in structure.pinned
