"""Group criteria from data: activations and gates, against numpy and autograd."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from group_cases import BATCHES, X, Y, close, coupled, mlp, scores
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.score import (
    ActivationEnergy,
    ActivationVariance,
    GroupTaylor,
    MeanActivation,
)
from secateur.stats import (
    GateGradient,
    collect_groups,
)
from secateur.testing import check_stat, sample_groups

# -- activations ----------------------------------------------------------------------------------


def hidden(net: Any, x: Tensor, layer: int) -> np.ndarray:
    return net[:layer](x).detach().double().numpy()


def test_activation_criteria_of_neurons_by_numpy() -> None:
    net = mlp()
    groups = coupled(net, X)
    for name, layer in (("0", 2), ("2", 4)):
        h, w = hidden(net, X, layer), net[layer].weight.detach().double().numpy()
        norms = (w**2).sum(0)
        close(scores(MeanActivation(), net, groups, BATCHES)[name], h.mean(0), 1e-4)
        energy = (h**2).mean(0) * norms
        close(scores(ActivationEnergy(), net, groups, BATCHES)[name], energy, 1e-4)
        wifv = h.var(0) * norms
        raw = ActivationVariance(standardise=False)
        close(scores(raw, net, groups, BATCHES)[name], wifv, 1e-4)
        z = (wifv - wifv.mean()) / wifv.std(ddof=1)  # torch.std, as in FLAP's code
        close(scores(ActivationVariance(), net, groups, BATCHES)[name], z, 1e-4)


def test_mean_activation_takes_sizes_where_activations_have_signs() -> None:
    net = mlp(act=nn.Tanh)
    found = scores(MeanActivation(), net, coupled(net, X), BATCHES)["0"]
    close(found, np.abs(hidden(net, X, 2)).mean(0), 1e-4)


def test_activation_criteria_behind_a_flatten_add_the_pixels() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    x = torch.cat([b[0] for b in sample.batches])
    h = hidden(net, x, 8).reshape(-1, 4, 4)
    norms = (net[8].weight.detach().double().numpy() ** 2).sum(0).reshape(4, 4)
    named = {g.name: g for g in sample.groups}
    close(scores(MeanActivation(), net, named, sample.batches)["4"], h.mean((0, 2)), 1e-4)
    expected = (h.var(0) * norms).sum(1)
    raw = ActivationVariance(standardise=False)
    close(scores(raw, net, named, sample.batches)["4"], expected, 1e-4)


def test_activation_criteria_of_a_convolution_see_every_tap() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    x = torch.cat([b[0] for b in sample.batches])
    h = net[:4](x).detach().double()  # (N, 6, 3, 3), read by a 2x2 kernel
    w = net[4].weight.detach().double()
    expected = torch.zeros(6, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(2)):
        window = h[:, :, i : i + 2, j : j + 2].transpose(0, 1).flatten(1)
        expected += window.var(1, unbiased=False) * w[:, :, i, j].square().sum(0)
    raw = ActivationVariance(standardise=False)
    named = {g.name: g for g in sample.groups}
    close(scores(raw, net, named, sample.batches)["0"], expected, 1e-4)


def test_heads_square_the_fluctuation_of_each_column() -> None:
    sample = sample_groups("heads")
    net: Any = sample.model
    rows: list[Tensor] = []
    handle = net.out.register_forward_pre_hook(lambda m, a: rows.append(a[0].flatten(0, 1)))
    for x, _ in sample.batches:
        net(x)
    handle.remove()
    x = torch.cat(rows).detach().double().numpy()
    wifv = x.var(0) * (net.out.weight.detach().double().numpy() ** 2).sum(0)
    named = {g.name: g for g in sample.groups}
    raw = ActivationVariance(standardise=False)
    squares = wifv**2
    close(scores(raw, net, named, sample.batches)["query"], squares.reshape(2, 4).sum(1), 1e-4)
    # FLAP's code standardises all inputs of the layer, and then takes the mean of each head.
    z = (squares - squares.mean()) / squares.std(ddof=1)
    found = scores(ActivationVariance(), net, named, sample.batches)["query"]
    close(found, z.reshape(2, 4).mean(1), 1e-4)


class Gated(nn.Module):
    """A gated layer, its gate and projection in one weight or in two."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both = nn.Linear(5, 12)
        self.gate, self.up = nn.Linear(5, 6), nn.Linear(5, 6)
        for name in ("weight", "bias"):
            rows = getattr(self.both, name).detach().chunk(2)
            getattr(self.gate, name).data.copy_(rows[0])
            getattr(self.up, name).data.copy_(rows[1])
        self.down, self.fused = nn.Linear(6, 3), fused

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


@pytest.mark.parametrize("standardise", [True, False])
def test_neurons_of_a_fused_gate_are_no_heads(standardise: bool) -> None:
    criterion = ActivationVariance(standardise)
    fused, apart = (Gated(fused=kind) for kind in (True, False))
    found = scores(criterion, fused, coupled(fused, X), BATCHES)["both"]
    close(found, scores(criterion, apart, coupled(apart, X), BATCHES)["gate"], 1e-4)


def test_channels_of_convolution_groups_are_no_heads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4 * 9, 3)
    )
    x = torch.randn(20, 2, 3, 3)
    wifv = hidden(net, x, 3).var(0) * (net[3].weight.detach().double().numpy() ** 2).sum(0)
    # The first channel of each convolution group goes with that of the other.
    expected = wifv.reshape(2, 2, 9).sum((0, 2))
    batches, raw = [(x, torch.zeros(20).long())], ActivationVariance(standardise=False)
    close(scores(raw, net, coupled(net, x), batches)["1"], expected, 1e-4)


def test_a_constant_unit_has_no_fluctuation() -> None:
    net = mlp()
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].bias[3] = 5
    found = scores(ActivationVariance(standardise=False), net, coupled(net, X), BATCHES)["0"]
    assert float(found[3]) < 1e-6 * float(found.max())
    energy = scores(ActivationEnergy(), net, coupled(net, X), BATCHES)["0"]
    assert int(energy.argmax()) == 3


def test_the_law_of_input_size() -> None:
    from secateur.stats import InputSize

    check_stat(InputSize())


# -- Taylor ---------------------------------------------------------------------------------------


def gated(net: nn.Module, layer: int, gate: Tensor, x: Tensor) -> Tensor:
    """The network with its activations in front of ``layer`` multiplied by a gate."""
    mods = list(net.children())
    h = nn.Sequential(*mods[:layer])(x) * gate
    out: Tensor = nn.Sequential(*mods[layer:])(h)
    return out


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU])
def test_taylor_is_the_derivative_by_a_gate_on_the_activation(act: Any) -> None:
    net = mlp(act=act)
    per_batch = []
    for x, y in BATCHES:
        gate = torch.ones(6, requires_grad=True)
        loss = F.cross_entropy(gated(net, 2, gate, x), y)
        per_batch.append(torch.autograd.grad(loss, [gate])[0])
    groups = coupled(net, X)
    stacked = torch.stack(per_batch)
    found = scores(GroupTaylor(), net, groups, BATCHES)["0"]
    close(found, stacked.square().mean(0), 1e-4)
    mean = (stacked * torch.tensor([[5.0], [7.0]])).sum(0) / 12
    close(scores(GroupTaylor(of="absolute"), net, groups, BATCHES)["0"], mean.abs(), 1e-4)


def test_taylor_at_the_producers_includes_their_bias() -> None:
    net = mlp(act=nn.Tanh)
    gate = torch.ones(6, requires_grad=True)
    loss = F.cross_entropy(net[1:](net[0](X) * gate), Y)
    expected = torch.autograd.grad(loss, [gate])[0].abs()
    found = scores(GroupTaylor("out", "absolute"), net, coupled(net, X), [(X, Y)])["0"]
    close(found, expected, 1e-4)


def test_a_gate_at_the_producers_leaves_the_norm_alone() -> None:
    groups = sample_groups("plain").groups[0]
    assert [p.parameter for p in GateGradient("out").parts(groups)] == ["0.weight", "0.bias"]


def test_taylor_at_the_batchnorm() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    expected = []
    for x, y in sample.batches:
        loss = F.cross_entropy(net(x), y)
        a, b = torch.autograd.grad(loss, [net[1].weight, net[1].bias])
        expected.append((net[1].weight * a + net[1].bias * b).detach())
    named = {g.name: g for g in sample.groups}
    found = scores(GroupTaylor("norm"), net, named, sample.batches)["0"]
    close(found, torch.stack(expected).square().mean(0), 1e-4)
    heads = sample_groups("heads")
    with pytest.raises(UsageError, match="'norm' of the width 'embed'"):
        collect_groups(heads.model, heads.groups, GroupTaylor("norm").needs, heads.batches)


def test_taylor_predicts_what_removing_a_small_group_costs() -> None:
    net = mlp(act=nn.Tanh).double()
    with torch.no_grad():
        net[2].weight[:, 4] *= 1e-4
    x = X.double()
    groups = coupled(net, x)
    stats = collect_groups(net, list(groups.values()), [GateGradient()], [(x, Y)])
    mean = stats.at(GateGradient(), "0")[0]
    small = copy.deepcopy(net)
    with torch.no_grad():
        small[0].weight[4] = 0
        small[0].bias[4] = 0
        small[2].weight[:, 4] = 0
    change = float((F.cross_entropy(small(x), Y) - F.cross_entropy(net(x), Y)).detach())
    assert change == pytest.approx(-float(mean[4]), rel=1e-3)
    score = float(scores(GroupTaylor(of="absolute"), net, groups, [(x, Y)])["0"][4])
    assert abs(change) == pytest.approx(score, rel=1e-3)


def test_taylor_of_single_samples() -> None:
    net = mlp()
    each = []
    for i in range(12):
        gate = torch.ones(6, requires_grad=True)
        loss = F.cross_entropy(gated(net, 2, gate, X[i : i + 1]), Y[i : i + 1])
        each.append(torch.autograd.grad(loss, [gate])[0].square())
    found = scores(GroupTaylor(samples=1), net, coupled(net, X), BATCHES)["0"]
    close(found, torch.stack(each).mean(0), 1e-4)
