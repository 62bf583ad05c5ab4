"""Repair with data of layers whose weight or bias is not simply called so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import Data, ShrinkRecipe
from secateur.allocate.widths import GivenWidths
from secateur.core.facts import Facts
from secateur.drive.structural.compensate import Told, compensate_
from secateur.drive.structural.refit import refit_
from secateur.recover import Compensation, Moments
from secateur.structure import couple, mask_

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [(torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 4)
           for i in range(4)]  # fmt: skip
CELLS: Any = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS: Any = [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}]


class Reader(nn.Module):
    """A recurrent layer that reads a width which can be cut."""

    def __init__(self, cell: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.cell = cell(32, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if "bidirectional" in options else 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(self.embed(x).relu())[0][:, -1])
        return y


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_are_repaired(cell: Any, options: dict[str, Any]) -> None:
    net = Reader(cell, options)
    target = secateur.Target("params", 0.5)
    pruned = secateur.shrink(net, secateur.ShrinkRecipe(target=target), X, BATCHES)
    assert pruned.facts.measures["proof"] < 1e-5
    assert pruned.facts.measures["refitted_layers"] >= 3
    assert all(bool(p.isfinite().all()) for p in pruned.model.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_constant_unit_gave_moves_into_the_bias_of_the_gates(cell: Any) -> None:
    """Its column goes, and what it added to each gate goes into the bias of these products."""
    net = Reader(cell, {}).eval()
    net.embed.weight.data[0] = 0
    net.embed.bias.data[0] = 2
    keep = {"embed": torch.arange(32) > 0}
    small = copy.deepcopy(net)
    compensate_(
        small,
        couple(net, X),
        keep,
        [x for x, _ in BATCHES],
        how=Compensation(1e-9),
        told=Told(Facts()),
    )
    moved = small.cell.bias_ih_l0 - net.cell.bias_ih_l0
    torch.testing.assert_close(moved, 2 * net.cell.weight_ih_l0[:, 0], rtol=1e-3, atol=1e-4)
    assert torch.equal(small.cell.bias_hh_l0, net.cell.bias_hh_l0)
    torch.testing.assert_close(small(X), net(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_refitting_finds_the_biases_of_the_gates(cell: Any) -> None:
    net = Reader(cell, {}).eval()
    spoilt = copy.deepcopy(net)
    spoilt.embed.bias.data += 1
    spoilt.cell.bias_ih_l0.data += 1
    refit_(spoilt, net, None, [x for x, _ in BATCHES], how=Compensation(1e-9), told=Told(Facts()))
    torch.testing.assert_close(spoilt(X), net(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normed", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_layers_with_a_weight_norm_are_repaired(normed: int, dim: int | None) -> None:
    layers = [nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 4)]
    layers[normed] = nn.utils.parametrizations.weight_norm(layers[normed], dim=dim)
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5))
    pruned = secateur.shrink(net, recipe, X, BATCHES)
    assert pruned.facts.measures["proof"] < 1e-5
    assert all(bool(p.isfinite().all()) for p in pruned.model.parameters())


def test_a_masked_weight_norm_gives_zeros() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 2))
    structure = couple(net, X)
    mask_(net, structure, {structure.widths[0].name: torch.arange(6) > 1})
    weight: Any = net[0].weight
    assert torch.equal(weight.isfinite().all(1) & (weight != 0).any(1), torch.arange(6) > 1)
    assert net(X).isfinite().all()


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("kind", ["normed", "normed transposed", "bilinear", "cell", "projected"])
def test_a_reader_that_is_only_cut_is_told(kind: str) -> None:
    """Nothing refits these; the facts say so, and only of those that lost inputs."""
    norm = nn.utils.parametrizations.weight_norm

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 32)
            self.reader: Any = {
                "normed": lambda: norm(nn.Linear(32, 6)),
                "normed transposed": lambda: norm(nn.ConvTranspose1d(32, 6, 1)),
                "bilinear": lambda: nn.Bilinear(32, 8, 6),
                "cell": lambda: nn.GRUCell(32, 6),
                "projected": lambda: nn.LSTM(32, 6, proj_size=4),
            }[kind]()
            self.untouched = norm(nn.Linear(4 if kind == "projected" else 6, 4))

        def forward(self, x: Tensor) -> Any:
            z = self.embed(x).relu()
            if kind == "normed transposed":
                y = self.reader(z.mT).mT
            elif kind == "bilinear":
                y = self.reader(z, x)
            elif kind == "cell":
                y = self.reader(z[:, 0])
            else:
                y = self.reader(z)
            return self.untouched(y[0] if kind == "projected" else y)

    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("params", 0.7), scope=secateur.Scope(include=("embed",))
    )
    pruned = secateur.shrink(Net(), recipe, X, BATCHES)
    assert pruned.facts.measures["proof"] < 1e-5
    told = {n.where for n in pruned.facts.notes if n.topic == "uncompensated" and n.where}
    assert told == {
        {
            "cell": "reader.weight_ih",
            "projected": "reader.weight_ih_l0",
        }.get(kind, "reader.weight")
    }


@pytest.mark.parametrize("refit", [False, True])
def test_a_norm_without_statistics_has_none_to_move(refit: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    ).eval()
    repair = Compensation(refit=refit)
    recipe = ShrinkRecipe(allocation=GivenWidths({"0": 0.5}), recovery=repair, align=1)
    data = Data(train=[torch.randn(16, 3, 8, 8) for _ in range(4)])
    pruned = secateur.shrink(net, recipe, None, data)
    assert pruned.model[0].out_channels == 4  # type: ignore[index]
    x = torch.randn(8, 3, 8, 8)
    assert torch.isfinite(pruned.model(x)).all()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_moments_are_those_of_double_precision_however_large_the_means(
    mean: float, centred: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [mean + torch.randn(2, 64, 5, generator=generator) for _ in range(4)]
    moments = Moments(2, 5, 3)
    for x in batches:
        moments.add(x, x[..., 1:4])
    x = torch.cat(batches, 1).double()
    z = x[..., 1:4]
    if centred:
        x, z = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    cross, own = moments.covariances(centred=centred)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(cross, x.mT @ z / x.shape[1], **close)
    torch.testing.assert_close(own, z.mT @ z / x.shape[1], **close)


def test_inputs_that_differ_by_a_constant_are_not_alike() -> None:
    x, moments = torch.arange(6.0).reshape(1, 3, 2), Moments(1, 2, 2)
    moments.add(x, x + 1)
    assert not moments.alike


def test_a_bias_reads_nothing_so_nothing_is_told_of_it() -> None:
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 8, 2), nn.Conv1d(8, 2, 3))
    recipe = ShrinkRecipe(allocation=GivenWidths({"*": 0.5}), recovery=(Compensation(),))
    batches = [(torch.randn(4, 3, 9), torch.zeros(4).long())]
    notes = secateur.shrink(net, recipe, None, batches).facts.notes
    assert [n.where for n in notes if n.topic == "uncompensated"] == ["1.weight", ""]
