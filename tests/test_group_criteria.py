"""Group criteria: laws, the view they read, element scores over groups, and weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from group_cases import close, coupled, mlp, scores
from torch import Tensor, nn

from secateur.core.errors import NeedsData, UsageError
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
    Reconstruction,
    Snip,
    SynFlow,
    Taylor,
    Wanda,
    WoodFisher,
)
from secateur.stats import (
    Moments,
    Stats,
    collect,
    collect_groups,
)
from secateur.testing import check_group_criterion, sample_groups
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
    "reconstruction": [Reconstruction(), Reconstruction(damping=0.1, steps=2)],
}


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
