"""Group criteria against references written straight from their formulas."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.core.groups import Groups, groups_of
from secateur.core.widths import Slices, Width
from secateur.frontends import discover
from secateur.score import (
    GROUP_CRITERIA,
    ActivationEnergy,
    ActivationVariance,
    BatchNormScale,
    BlockInfluence,
    ExpertSaliency,
    GeometricMedian,
    Grasp,
    Grouped,
    GroupTaylor,
    Lookahead,
    Magnitude,
    MeanActivation,
    Movement,
    Obd,
    ObsSaliency,
    RandomGroups,
    Snip,
    SynFlow,
    Taylor,
    Wanda,
    WoodFisher,
)
from secateur.stats import (
    GateGradient,
    Moments,
    Neighbours,
    Stats,
    collect,
    collect_groups,
    wants_data,
)
from secateur.stats.experts import expert_outputs
from secateur.structure import couple
from secateur.testing import SampleGroups, check_group_criterion, check_stat, sample_groups
from secateur.testing.groups import _Heads

MADE: dict[str, list[Any]] = {
    "grouped": [
        Grouped(Magnitude()),
        Grouped(Magnitude(2), "l2", "width"),
        Grouped(Magnitude(2), "sum", "none", "out"),
        Grouped(Wanda(), "max"),
        Grouped(Snip(), biases=True),
        Grouped(Taylor()),
        Grouped(Obd()),
        Grouped(Grasp()),
        Grouped(Movement()),
        Grouped(WoodFisher()),
        Grouped(ObsSaliency(), of="in"),
        Grouped(Lookahead(), "sum", "none", "out"),
        Grouped(Lookahead(Obd())),
    ],
    "random_groups": [RandomGroups(2)],
    "batchnorm_scale": [BatchNormScale(otherwise=GeometricMedian())],
    "geometric_median": [GeometricMedian()],
    "mean_activation": [MeanActivation()],
    "activation_energy": [ActivationEnergy(), ActivationEnergy(standardise=True)],
    "activation_variance": [ActivationVariance(), ActivationVariance(standardise=False)],
    "group_taylor": [
        GroupTaylor(),
        GroupTaylor("group", "absolute"),
        GroupTaylor("out", samples=1),
    ],
    "expert_saliency": [ExpertSaliency()],
}


def close(a: Tensor, b: Any, rtol: float = 1e-5) -> None:
    expected = torch.as_tensor(np.asarray(b)).double()
    torch.testing.assert_close(a.detach().double(), expected, rtol=rtol, atol=1e-9)


def coupled(model: nn.Module, example: Any) -> dict[str, Groups]:
    found = groups_of(model, couple(model, example).widths, discover(model))
    return {groups.name: groups for groups in found}


def scores(criterion: Any, model: nn.Module, groups: dict[str, Groups], batches: Any) -> Any:
    stats = collect_groups(model, list(groups.values()), criterion.needs, batches)
    return {name: criterion(g, stats) for name, g in groups.items()}


def mlp(sizes: tuple[int, ...] = (5, 6, 4, 3), act: Any = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]


# -- laws -----------------------------------------------------------------------------------------


def test_every_group_criterion_is_checked() -> None:
    assert MADE.keys() == GROUP_CRITERIA.keys()


@pytest.mark.parametrize("kind", ["plain", "heads"])
@pytest.mark.parametrize(
    "criterion",
    [c for name, made in MADE.items() for c in made if name != "expert_saliency"],
    ids=repr,
)
def test_laws(criterion: Any, kind: Any) -> None:
    ordered = isinstance(criterion, RandomGroups)
    check_group_criterion(criterion, sample_groups(kind), equivariant=not ordered)


def test_laws_of_synflow_on_groups() -> None:
    check_group_criterion(Grouped(SynFlow()))


def test_the_hand_made_sample_widths_are_those_of_coupling() -> None:
    for kind, model, example in [
        ("plain", sample_groups("plain").model, torch.zeros(1, 3, 6, 6)),
        ("heads", _Heads().eval(), torch.zeros(1, 5, 6)),
    ]:
        made = {g.name: g for g in sample_groups(kind).groups}  # type: ignore[arg-type]
        found = coupled(model, example)
        assert {n: g.count for n, g in made.items()} == {n: g.count for n, g in found.items()}
        for name, groups in made.items():
            other = {(s.parameter, s.axis): s.index for s in found[name].width.slices}
            mine = {(s.parameter, s.axis): s.index for s in groups.width.slices}
            assert other.keys() == mine.keys()
            assert all(torch.equal(other[k], mine[k]) for k in mine)


@dataclass(frozen=True)
class Broken:
    """A criterion that breaks one law."""

    law: str

    @property
    def needs(self) -> Any:
        return frozenset({Moments()}) if self.law == "statistics" else frozenset()

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        found = Grouped(Magnitude())(groups, stats)
        part = groups.parts[-1] if groups.parts[-1].trained else groups.parts[0]
        if self.law == "shape":
            return found[:-1]
        if self.law == "finite":
            return found / 0 * 0
        if self.law == "writes":
            part.value.mul_(1.5)
        if self.law == "statistics":
            for p in groups.having("in"):
                stats(Moments(), p.weight).add_(1)
        if self.law == "random":
            return found + torch.rand(len(found))
        if self.law == "undeclared":
            return MeanActivation()(groups, stats)
        if self.law == "position":
            return found * torch.arange(1, len(found) + 1)
        return found


@pytest.mark.parametrize(
    ("law", "told"),
    [
        ("shape", "one score for every group"),
        ("finite", "finite"),
        ("writes", "does not write the network"),
        ("statistics", "does not write the statistics"),
        ("random", "deterministic"),
        ("undeclared", "declares"),
        ("position", "another order"),
    ],
)
def test_the_law_kit_catches_planted_violations(law: str, told: str) -> None:
    check_group_criterion(Broken("none"))
    with pytest.raises(AssertionError, match=told):
        check_group_criterion(Broken(law))


# -- the view -------------------------------------------------------------------------------------


def test_parts_take_and_sum_their_slices() -> None:
    for kind in ("plain", "heads"):
        for groups in sample_groups(kind).groups:  # type: ignore[arg-type]
            for part in groups.parts:
                taken = part.take(part.value)
                for g, row in enumerate(part.index):
                    for m, place in enumerate(row):
                        own = part.value.select(part.axis, int(place))
                        assert torch.equal(taken[g, m].sort().values, own.flatten().sort().values)
                        close(part.sum(part.value)[g, m], own.double().sum())
                        close(part.mean(part.value)[g, m], own.double().mean())


def test_roles() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    )
    one = torch.arange(4)[:, None]
    names = [("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("2.weight", 0)]
    names += [("2.running_var", 0), ("3.weight", 1)]
    width = Width("0", tuple(Slices(n, a, one) for n, a in names), torch.arange(4))
    (groups,) = groups_of(net, [width], discover(net))
    roles = [part.role for part in groups.parts]
    assert roles == ["out", "vector", "channel", "vector", "vector", "buffer", "in"]
    assert [p.batch_norm for p in groups.parts] == [False] * 4 + [True] * 2 + [False]
    assert not groups.heads
    assert sample_groups("heads").groups[1].heads


# -- Grouped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("normalise", ["slices", "width", "none"])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "l2"])
def test_grouped_magnitude_by_hand(reduce: Any, normalise: Any, p: int) -> None:
    sample = sample_groups("plain")
    net: Any = sample.model.requires_grad_(False)
    expected = []
    for c in range(4):
        rows = (net[4].weight[c].abs() ** p).sum()
        columns = (net[8].weight[:, 4 * c : 4 * c + 4].abs() ** p).sum()
        scale = net[5].weight[c].abs() ** p
        expected.append([float(rows), float(scale), float(columns)])
    table = np.array(expected)
    if normalise == "slices":
        table = table / table.mean(0)
    result = {
        "sum": table.sum(1),
        "mean": table.mean(1),
        "max": table.max(1),
        "l2": np.sqrt((table**2).sum(1)),
    }[reduce]
    if normalise == "width":
        result = result / result.mean()
    close(Grouped(Magnitude(p), reduce, normalise)(sample.groups[1], Stats()), result)


def test_depgraph_is_the_sum_over_all_slices_divided_by_its_mean() -> None:
    groups = sample_groups("heads").groups[0]
    found = Grouped(Magnitude(2), "mean", "width")(groups, Stats())
    total = torch.zeros(8, dtype=torch.float64)
    for part in groups.trained:
        if "bias" not in part.parameter:
            for c in range(8):
                total[c] += part.value.double().select(part.axis, c).square().sum()
    close(found, total / total.mean())


def test_grouped_takes_producers_or_consumers_alone() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    norm = net[0].weight.abs().sum((1, 2, 3))
    close(Grouped(Magnitude(), "sum", "none", "out")(sample.groups[0], Stats()), norm.detach())
    read = net[4].weight.abs().sum((0, 2, 3))
    close(Grouped(Magnitude(), "sum", "none", "in")(sample.groups[0], Stats()), read.detach())


def test_biases_count_if_asked() -> None:
    sample = sample_groups("plain")
    groups = sample.groups[0]
    net: Any = sample.model
    plain = Grouped(Magnitude(), "sum", "none")(groups, Stats())
    more = Grouped(Magnitude(), "sum", "none", biases=True)(groups, Stats())
    close(more - plain, (net[0].bias.abs() + net[1].bias.abs()).detach(), 1e-4)


def test_a_global_ranking_does_not_see_the_scale_of_a_layer() -> None:
    sample = sample_groups("plain")
    before = Grouped(Magnitude(2))(sample.groups[0], Stats())
    with torch.no_grad():
        sample.model[4].weight.mul_(100.0)  # type: ignore[index, operator, union-attr]
    close(Grouped(Magnitude(2))(sample.groups[0], Stats()), before)
    close(before.mean(), 1.0)


def test_gradient_criteria_reach_vectors_embeddings_and_scales() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Flatten(), nn.Linear(18, 3)
    )
    groups = coupled(net, torch.zeros(2, 3, dtype=torch.long))["0"]
    assert {p.parameter for p in groups.parts} >= {"0.weight", "1.weight", "1.bias", "2.weight"}
    batches = [(torch.arange(12).reshape(4, 3) % 7, torch.tensor([0, 1, 2, 0]))]
    criterion = Grouped(Snip(), "sum", "none", biases=True)
    found = scores(criterion, net, {"0": groups}, batches)["0"]
    parameters = dict(net.named_parameters())
    loss = F.cross_entropy(net(batches[0][0]), batches[0][1])
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for part in groups.trained:
        s = (parameters[part.parameter] * gradients[part.parameter]).abs().detach().double()
        for c in range(6):
            expected[c] += s.select(part.axis, c).sum()
    close(found, expected, 1e-4)


def test_what_cannot_be_scored_is_left_out_and_an_empty_rest_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    groups = coupled(net, torch.zeros(2, 3, dtype=torch.long))
    batches = [torch.arange(6).reshape(2, 3)]
    criterion = Grouped(Wanda(), "sum", "none")
    found = scores(criterion, net, groups, batches)["0"]
    stats = collect(net, [s for s in discover(net) if s.rows], Wanda().needs, batches)
    slot = next(s for s in discover(net) if s.name == "2.weight")
    close(found, Wanda()(slot.weight(net), stats).sum(0))
    with pytest.raises(UsageError, match=r"'0'.*'out'"):
        scores(Grouped(Wanda(), of="out"), net, groups, batches)
    with pytest.raises(NeedsData, match="not collected"):
        criterion(groups["0"], Stats())


def test_a_stack_of_experts_is_scored_by_its_weights() -> None:
    stack = nn.ParameterDict({"up": torch.randn(3, 4, 5), "down": torch.randn(3, 5, 4)})
    one = torch.arange(4)[:, None]
    width = Width("up", (Slices("up", 1, one), Slices("down", 2, one)), torch.arange(4))
    (groups,) = groups_of(stack, [width], discover(stack))
    assert [p.role for p in groups.parts] == ["other", "other"]
    expected = stack["up"].square().sum((0, 2)) + stack["down"].square().sum((0, 1))
    close(Grouped(Magnitude(2), "sum", "none")(groups, Stats()), expected.detach())


# -- weights --------------------------------------------------------------------------------------


def test_batchnorm_scale_and_its_refusal() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    close(BatchNormScale()(sample.groups[1], Stats()), net[5].weight.abs().detach())
    heads = sample_groups("heads").groups
    with pytest.raises(UsageError, match=r"'embed'.*BatchNorm"):
        BatchNormScale()(heads[0], Stats())
    fallback = BatchNormScale(otherwise=Grouped(Wanda()))
    assert fallback.needs == Wanda().needs
    expected = GeometricMedian()(heads[0], Stats())
    assert torch.equal(BatchNormScale(GeometricMedian())(heads[0], Stats()), expected)


def test_coupled_batchnorms_are_averaged() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.na(self.a(x)) + self.nb(self.b(x)))
            return out

    net = Residual().eval()
    nn.init.normal_(net.na.weight)
    nn.init.normal_(net.nb.weight)
    (groups,) = coupled(net, torch.zeros(1, 3, 4, 4)).values()
    expected = (net.na.weight.abs() + net.nb.weight.abs()) / 2
    close(BatchNormScale()(groups, Stats()), expected.detach())


@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_geometric_median_against_a_double_loop(kind: Any) -> None:
    groups = sample_groups(kind).groups[1]
    expected = [0.0] * groups.count
    for part in groups.having("out"):
        w = part.value.double().numpy()
        for i in range(groups.count):
            for j in range(groups.count):
                d = w[part.index[i].numpy()] - w[part.index[j].numpy()]
                expected[i] += math.sqrt(float((d**2).sum()))
    close(GeometricMedian()(groups, Stats()), expected)


def test_a_filter_at_the_geometric_median_goes_first() -> None:
    net = mlp((3, 5, 2))
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight * 3)
        net[0].weight[2] = net[0].weight[[0, 1, 3, 4]].mean(0)
    groups = coupled(net, torch.zeros(1, 3))["0"]
    assert int(GeometricMedian()(groups, Stats()).argmin()) == 2


def test_random_groups_follow_seed_name_and_run() -> None:
    a, b = sample_groups("plain").groups[0], sample_groups("heads").groups[0]
    assert torch.equal(RandomGroups(1)(a, Stats()), RandomGroups(1)(a, Stats()))
    assert not torch.equal(RandomGroups(1)(a, Stats()), RandomGroups(2)(a, Stats()))
    assert not torch.equal(RandomGroups(1)(a, Stats()), RandomGroups(1)(a, Stats(seed=5)))
    assert not torch.equal(RandomGroups(1)(a, Stats())[:6], RandomGroups(1)(b, Stats())[:6])


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
        z = (wifv - wifv.mean()) / wifv.std()
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
    expected = (wifv**2).reshape(2, 4).sum(1)
    named = {g.name: g for g in sample.groups}
    raw = ActivationVariance(standardise=False)
    close(scores(raw, net, named, sample.batches)["query"], expected, 1e-4)


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


# -- lookahead ------------------------------------------------------------------------------------


def lap(net: nn.Module, groups: dict[str, Groups]) -> dict[str, Tensor]:
    stats = collect_groups(net, list(groups.values()), Lookahead().needs, [])
    parts = {p.parameter: p for g in groups.values() for p in g.trained if p.known}
    return {name: Lookahead()(part.weight, stats) for name, part in parts.items()}


def test_lookahead_by_hand() -> None:
    net = mlp().double()
    found = lap(net, coupled(net, X.double()))
    a, b, c = (net[i].weight.detach() for i in (0, 2, 4))
    close(found["0.weight"], a**2 * (b**2).sum(0)[:, None])
    close(found["2.weight"], b**2 * (c**2).sum(0)[:, None] * (a**2).sum(1)[None])
    close(found["4.weight"], c**2 * (b**2).sum(1)[None])


def test_lookahead_is_the_distortion_of_three_linear_layers() -> None:
    net = mlp().double()
    found = lap(net, coupled(net, X.double()))["2.weight"]
    a, b, c = (net[i].weight.detach() for i in (0, 2, 4))
    for j, i in itertools.product(range(4), range(6)):
        other = b.clone()
        other[j, i] = 0
        close(found[j, i], (c @ (b - other) @ a).square().sum())


def test_lookahead_ignores_a_rescaling_of_hidden_neurons() -> None:
    net = mlp((5, 6, 7, 4, 3)).double()
    other = copy.deepcopy(net)
    c = torch.rand(7, dtype=torch.float64) * 5 + 0.1
    with torch.no_grad():
        other[2].weight.mul_(c[:, None])
        other[2].bias.mul_(c)
        other[4].weight.div_(c)
    x = X.double()
    torch.testing.assert_close(net(x), other(x))
    before, after = lap(net, coupled(net, x)), lap(other, coupled(other, x))
    for name in ("2.weight", "4.weight"):
        close(after[name], before[name])
    for name in ("0.weight", "6.weight"):
        assert not torch.allclose(after[name], before[name], rtol=1e-3)
    assert not torch.allclose(other[2].weight ** 2, net[2].weight ** 2, rtol=1e-3)
    grouped = Grouped(Lookahead(), "sum", "none", "out")
    one, two = (scores(grouped, n, coupled(n, x), []) for n in (net, other))
    close(two["2"], one["2"])


def test_lookahead_ignores_a_rescaling_of_channels_behind_a_batchnorm() -> None:
    sample = sample_groups("plain")
    other = sample_groups("plain")
    c = torch.rand(6) * 5 + 0.1
    net: Any = other.model
    with torch.no_grad():  # gamma and beta times c, the reader's kernels divided by it
        net[1].weight.mul_(c)
        net[1].bias.mul_(c)
        net[4].weight.div_(c[:, None, None])
    torch.testing.assert_close(net(sample.batches[0][0]), sample.model(sample.batches[0][0]))
    named = [{g.name: g for g in s.groups} for s in (sample, other)]
    before, after = lap(sample.model, named[0]), lap(other.model, named[1])
    close(after["0.weight"], before["0.weight"], 1e-4)
    close(after["4.weight"], before["4.weight"], 1e-4)


def test_lookahead_through_batchnorm_and_flatten_by_hand() -> None:
    sample = sample_groups("plain")
    net: Any = sample.model
    found = lap(net, {g.name: g for g in sample.groups})
    w0, w4, w8 = (net[i].weight.detach().double() for i in (0, 4, 8))
    gains = [
        net[i].weight.detach().double() ** 2 / (net[i].running_var.double() + net[i].eps)
        for i in (1, 5)
    ]
    before = w0.square().sum((1, 2, 3)) * gains[0]
    after = w8.square().sum(0).reshape(4, 4).sum(1) * gains[1]
    close(found["0.weight"], w0**2 * (w4.square().sum((0, 2, 3)) * gains[0])[:, None, None, None])
    close(found["4.weight"], w4**2 * before[None, :, None, None] * after[:, None, None, None])
    repeated = (w4.square().sum((1, 2, 3)) * gains[1]).repeat_interleave(4)
    close(found["8.weight"], w8**2 * repeated[None], 1e-4)


def test_lookahead_ranks_like_magnitude_where_neighbours_are_equal() -> None:
    net = mlp((4, 4, 4, 4)).double()
    with torch.no_grad():
        for i in (0, 4):
            net[i].weight.copy_(torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])
    found = lap(net, coupled(net, torch.zeros(1, 4).double()))["2.weight"]
    close(found, net[2].weight.detach() ** 2)


def test_a_depthwise_convolution_stands_between_its_neighbours() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    ).double()
    one = torch.arange(4)[:, None]
    names = (("0.weight", 0), ("2.weight", 0), ("4.weight", 1))
    width = Width("0", tuple(Slices(n, a, one) for n, a in names), torch.arange(4))
    (groups,) = groups_of(net, [width], discover(net))
    found = lap(net, {"0": groups})
    e0, e2, e4 = (net[i].weight.detach().square() for i in (0, 2, 4))
    close(found["0.weight"], e0 * e2.sum((1, 2, 3))[:, None, None, None])
    close(found["4.weight"], e4 * e2.sum((1, 2, 3))[None, :, None, None])
    both = e0.sum((1, 2, 3)) * e4.sum((0, 2, 3))
    close(found["2.weight"], e2 * both[:, None, None, None])


def test_what_lies_beyond_a_depthwise_convolution_is_hidden() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList(
        [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)]
    ).double()
    one = torch.arange(4)[:, None]
    names = (("0.weight", 0), ("1.weight", 0), ("2.weight", 0), ("3.weight", 1))
    width = Width("0", tuple(Slices(n, a, one) for n, a in names), torch.arange(4))
    found = lap(net, {"0": groups_of(net, [width], discover(net))[0]})
    e2, e3 = (net[i].weight.detach().square() for i in (2, 3))
    close(found["3.weight"], e3 * e2.sum((1, 2, 3))[None, :, None, None])
    close(found["2.weight"], e2 * e3.sum((0, 2, 3))[:, None, None, None])


def test_lookahead_sees_only_producers_before_and_consumers_behind() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 4)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.b(self.a(x).relu())
            out: Tensor = self.head(x)
            return out

    net = Residual().double()
    groups = coupled(net, torch.zeros(1, 3).double())
    found = lap(net, groups)
    stem, a, b, head = (m.weight.detach().square() for m in (net.stem, net.a, net.b, net.head))
    close(found["stem.weight"], stem * (a.sum(0) + head.sum(0))[:, None])
    close(found["a.weight"], a * b.sum(0)[:, None] * stem.sum(1)[None])
    close(found["b.weight"], b * head.sum(0)[:, None] * a.sum(1)[None])
    close(found["head.weight"], head * (stem.sum(1) + b.sum(1))[None])


def test_lookahead_needs_the_widths_but_no_data() -> None:
    assert not wants_data(Lookahead().needs)
    assert wants_data(Lookahead(Obd()).needs)
    net = mlp()
    slots = [s for s in discover(net) if s.rows is not None]
    with pytest.raises(NeedsData, match="widths"):
        collect(net, slots, [Neighbours()], BATCHES)


# -- blocks ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.size * self.fc(x)
        return out


def test_block_influence_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(0.1), Block(0.0), Block(2.0), nn.Linear(5, 3))
    criterion = BlockInfluence(("0", "1", "2"))
    found = criterion(collect(net, [], criterion.needs, BATCHES))
    expected, x = [], X
    for block in list(net)[:3]:
        y = block(x).detach()
        cosines = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for a, b in zip(x.double(), y.double(), strict=True)
        ]
        expected.append(1 - sum(cosines) / 12)
        x = y
    close(found[[0, 2]], [expected[0], expected[2]], 1e-4)
    assert float(found[1].abs()) < 1e-12
    assert not any(m._forward_hooks for m in net.modules())
    two = BlockInfluence(("0", "1", "2"), span=2, measure="angle")
    angles = two(collect(net, [], two.needs, BATCHES))
    assert angles.shape == (2,)
    close(angles[0], math.acos(1 - expected[0]) / math.pi, 1e-3)
    start, end = net[0](X), net[:3](X)
    cosine = F.cosine_similarity(start, end, dim=-1).mean().detach()
    close(angles[1], cosine.arccos() / math.pi, 1e-3)
    wide, last = BlockInfluence(("0", "1"), span=3), BlockInfluence(("3",))
    with pytest.raises(UsageError, match="span"):
        collect(net, [], wide.needs, BATCHES)
    with pytest.raises(UsageError, match="keeps the shape"):
        collect(net, [], last.needs, BATCHES)


def test_a_block_that_does_not_run_is_named() -> None:
    net = nn.Sequential(nn.Linear(5, 5))
    net.extra = nn.Linear(5, 5)
    net.forward = net[0].forward  # type: ignore[method-assign]
    criterion = BlockInfluence(("extra",))
    with pytest.raises(DataError, match="'extra'"):
        collect(net, [], criterion.needs, BATCHES)


# -- experts --------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two of four experts for each token; the last one is never chosen."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4)
        with torch.no_grad():
            self.router.weight[3], self.router.bias[3] = 0, -100
        self.experts = (
            Stack() if stacked else nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))
        )
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gates, index = self.router(flat).softmax(-1).topk(2)
        if self.stacked:
            mixed: Tensor = self.experts(flat, index, gates)
            return mixed.reshape(x.shape)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):  # type: ignore[arg-type]
            token, place = torch.where(index == i)
            out.index_add_(0, token, expert(flat[token]) * gates[token, place, None])
        return out.reshape(x.shape)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, states: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        made = torch.einsum("eoi,ti->teo", self.weight, states)
        chosen = made.gather(1, index[..., None].expand(-1, -1, 5))
        return (chosen * gates[..., None]).sum(1)


@torch.no_grad()
def reap(net: Mixture, x: Tensor) -> list[float]:
    flat = x.reshape(-1, 5)
    gates, index = net.router(flat).softmax(-1).topk(2)
    found = []
    for e in range(4):
        expert: Any = net.experts
        w = (expert.weight[e] if net.stacked else expert[e].weight).double()
        values = [
            float(gates[t, k]) * float((w @ flat[t].double()).norm())
            for t in range(len(flat))
            for k in range(2)
            if int(index[t, k]) == e
        ]
        found.append(sum(values) / len(values) if values else 0.0)
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stack"])
def test_expert_saliency_by_hand(stacked: bool) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 5), Mixture(stacked), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(6, 3, 5)
    expected = reap(net[1], net[0](x))  # type: ignore[arg-type]
    assert expected[3] == 0
    path = "1.experts"
    close(expert_outputs(net, path, [x[:2], x[2:]]), expected, 1e-4)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    one = torch.arange(4)[:, None]
    slices = [Slices("1.router.weight", 0, one), Slices("1.router.bias", 0, one)]
    slices += [Slices("1.experts.weight", 0, one)] if stacked else []
    groups = groups_of(net, [Width("1", tuple(slices), torch.arange(4))], discover(net))
    sample = SampleGroups(net, groups, [x])
    check_group_criterion(ExpertSaliency(), sample)
    close(scores(ExpertSaliency(), net, {"1": groups[0]}, [x])["1"], expected, 1e-4)


def test_experts_that_run_on_every_token_count_where_they_are_chosen() -> None:
    class Dense(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 5)
            gates, index = self.router(flat).softmax(-1).topk(2)
            full = torch.zeros(len(flat), 4).scatter(1, index, gates)
            made = torch.stack([e(flat) for e in self.experts], 1)  # type: ignore[union-attr]
            return (made * full[..., None]).sum(1).reshape(x.shape)

    torch.manual_seed(1)
    net, x = Dense(False), torch.randn(6, 3, 5)
    close(expert_outputs(net, "experts", [x]), reap(net, x), 1e-4)


def test_experts_that_no_mixture_is_linear_in_are_refused() -> None:
    torch.manual_seed(1)

    class Bent(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    with pytest.raises(UsageError, match="not linear"):
        expert_outputs(nn.Sequential(Bent(False)), "0.experts", [torch.randn(4, 5)])
    sample = sample_groups("plain")
    with pytest.raises(UsageError, match="no experts"):
        collect_groups(sample.model, sample.groups, ExpertSaliency().needs, sample.batches)


def test_expert_saliency_of_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, vocab_size=50, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5)
    ids = torch.randint(0, 50, (3, 8))
    block = net.model.layers[0].mlp
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        net(ids)
    handle.remove()
    x = seen[0].reshape(-1, 16)
    expected = [0.0] * 4
    counts = [0] * 4
    with torch.no_grad():
        _, gates, index = block.gate(x)
        for t, k in itertools.product(range(len(x)), range(2)):
            e = int(index[t, k])
            gate, up = F.linear(x[t], block.experts.gate_up_proj[e]).chunk(2)
            out = F.linear(F.silu(gate) * up, block.experts.down_proj[e])
            expected[e] += float(gates[t, k]) * float(out.norm())
            counts[e] += 1
    means = [s / max(1, c) for s, c in zip(expected, counts, strict=True)]
    found = expert_outputs(net, "model.layers.0.mlp.experts", [{"input_ids": ids}])
    close(found, means, 1e-4)


# -- on real coupling -----------------------------------------------------------------------------


def test_a_transformer_is_scored_by_everything() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=50,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    groups = coupled(net, {"input_ids": ids})
    batches = [{"input_ids": ids, "labels": ids}]
    made = [
        Grouped(Magnitude(2)), Grouped(Wanda(), of="in"), Grouped(Taylor()), GroupTaylor(),
        ActivationVariance(), MeanActivation(), GeometricMedian(), Grouped(Lookahead()),
    ]  # fmt: skip
    for criterion in made:
        for name, found in scores(criterion, net, groups, batches).items():
            assert found.shape == (groups[name].count,)
            assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    "build",
    [
        lambda: Grouped(Magnitude(), "median"),  # type: ignore[arg-type]
        lambda: Grouped(Magnitude(), normalise="layer"),  # type: ignore[arg-type]
        lambda: Grouped(Magnitude(), of="bias"),  # type: ignore[arg-type]
        lambda: GroupTaylor("bn"),  # type: ignore[arg-type]
        lambda: GroupTaylor(of="cubed"),  # type: ignore[arg-type]
        lambda: BlockInfluence(("0",), measure="sine"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(build: Any) -> None:
    with pytest.raises(UsageError, match="unknown"):
        build()


def test_collecting_leaves_the_network_and_its_gradients_alone() -> None:
    sample = sample_groups("plain")
    sample.model.train()
    before = copy.deepcopy(sample.model.state_dict())
    needs = GroupTaylor().needs | MeanActivation().needs | Grouped(Snip()).needs
    collect_groups(sample.model, sample.groups, needs, sample.batches, seed=3)
    assert sample.model.training
    assert all(p.grad is None for p in sample.model.parameters())
    after = sample.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert collect_groups(sample.model, sample.groups, [], [], seed=3).seed == 3


def test_groups_listed_elsewhere_read_the_same_slices() -> None:
    groups = sample_groups("plain").groups[0]
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    parts = tuple(replace(p, index=p.index[order]) for p in groups.parts)
    other = Groups(groups.width, parts)
    close(GeometricMedian()(other, Stats()), GeometricMedian()(groups, Stats())[order])
