"""Criteria against their formulas, computed another way."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from criteria_cases import BATCHES, CONV, X, Y, close, gradient, linear, scores_of, seen, small
from torch import Tensor, nn

from secateur import Scope, prune, recipes
from secateur.core.errors import UsageError
from secateur.core.weight import LINEAR, Weight
from secateur.frontends import discover
from secateur.pattern import Rows
from secateur.score import (
    Grasp,
    Magnitude,
    Movement,
    Random,
    RandomGroups,
    Ria,
    Snip,
    SynFlow,
    Taylor,
    Wanda,
)
from secateur.stats import InputNorm, Stats, SynapticFlow, collect
from secateur.testing import sample_groups


def test_magnitude() -> None:
    weight = linear()
    close(Magnitude()(weight, Stats()), weight.value.abs())
    close(Magnitude(2)(weight, Stats()), weight.value**2)
    # Over groups the mean is the L1 norm, or the squared L2 norm, per element.
    close(
        Rows().fold(Magnitude(2)(weight, Stats()), LINEAR)[0].sum(1), weight.value.norm(dim=1) ** 2
    )


def test_wanda() -> None:
    weight, rows = linear(), torch.randn(1, 30, 6)
    expected = weight.value.numpy() * 0
    for i in range(4):
        for j in range(6):
            norm = math.sqrt(sum(float(x) ** 2 for x in rows[0, :, j]) / 30)
            expected[i, j] = abs(float(weight.value[i, j])) * norm
    close(Wanda()(weight, seen(weight, InputNorm(), rows)), expected)


def test_wanda_uses_the_inputs_of_each_convolution_group() -> None:
    weight = Weight("w", torch.randn(4, 3, 2, 2), CONV)
    rows = torch.randn(2, 9, 12)
    found = Wanda()(weight, seen(weight, InputNorm(), rows))
    for i in range(4):
        norms = rows[i // 2].square().mean(0).sqrt().reshape(3, 2, 2)
        close(found[i], weight.value[i].abs() * norms)


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_ria(a: float) -> None:
    weight, rows = linear(), torch.randn(1, 30, 6)
    w, norms = weight.value.abs().numpy(), rows[0].square().mean(0).sqrt().numpy()
    expected = (w / w.sum(0, keepdims=True) + w / w.sum(1, keepdims=True)) * norms**a
    close(Ria(a)(weight, seen(weight, InputNorm(), rows)), expected)


def test_ria_sums_columns_within_a_convolution_group() -> None:
    weight = Weight("w", torch.randn(4, 3, 2, 2), CONV)
    rows = torch.ones(2, 9, 12)
    found = Ria()(weight, seen(weight, InputNorm(), rows)).reshape(2, 2, 12)
    w = weight.value.abs().reshape(2, 2, 12)
    close(found, w / w.sum(1, keepdim=True) + w / w.sum(2, keepdim=True))


def test_snip() -> None:
    model = small()
    expected = (model[0].weight * gradient(model, "0.weight", X, Y)).abs().detach()
    close(scores_of(Snip(), model, "0.weight", BATCHES), expected, 1e-4)


def test_snip_is_the_gradient_of_the_mask() -> None:
    model = small()
    mask = torch.ones(6, 5, requires_grad=True)
    weight = model[0].weight.detach()
    out = torch.func.functional_call(model, {"0.weight": weight * mask}, (X,))
    (expected,) = torch.autograd.grad(F.cross_entropy(out, Y), [mask])
    close(scores_of(Snip(), model, "0.weight", BATCHES), expected.abs(), 1e-4)


def test_taylor() -> None:
    model = small()
    both = torch.stack([gradient(model, "0.weight", x, y) for x, y in BATCHES])
    expected = (model[0].weight.detach() * both).square().mean(0)
    close(scores_of(Taylor(), model, "0.weight", BATCHES), expected, 1e-4)


def test_movement_has_the_sign_of_the_distance_from_zero() -> None:
    model = small()
    both = sum(gradient(model, "0.weight", x, y) for x, y in BATCHES)
    found = scores_of(Movement(), model, "0.weight", BATCHES)
    close(found, -model[0].weight.detach() * both, 1e-4)
    step = model[0].weight.detach() - 1e-3 * both  # what training does
    away = step.abs() > model[0].weight.detach().abs()
    assert torch.equal(found > 0, away)


def test_grasp_against_functional_hvp() -> None:
    model = small().double()
    names = ["0.weight", "2.weight", "4.weight"]
    frozen = {n: p.detach() for n, p in model.named_parameters()}
    x, t = X.double(), 5.0

    def loss(*values: Tensor) -> Tensor:
        inputs = {**frozen, **dict(zip(names, values, strict=True))}
        return F.cross_entropy(torch.func.functional_call(model, inputs, (x,)) / t, Y)

    values = tuple(frozen[n] for n in names)
    direction = torch.func.grad(loss, argnums=(0, 1, 2))(*values)
    _, products = torch.autograd.functional.hvp(loss, values, direction)
    for name, product in zip(names, products, strict=True):
        found = scores_of(Grasp(t), model, name, [(x, Y)])
        close(found, frozen[name] * product, 1e-4)


def test_grasp_predicts_the_change_of_gradient_flow() -> None:
    """Removing a small weight changes g'g by -2 w (Hg): keep where w (Hg) is large."""
    model = small().double()
    with torch.no_grad():
        model[2].weight[1, 2] = 1e-4
    x = X.double()

    def flow(net: nn.Module) -> float:
        loss = F.cross_entropy(net(x), Y)
        weights = [net[i].weight for i in (0, 2, 4)]
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, weights))

    kept = scores_of(Grasp(1.0), model, "2.weight", [(x, Y)])[1, 2]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight[1, 2] = 0
    assert flow(other) - flow(model) == pytest.approx(-2 * float(kept), rel=1e-2)


# -- SynFlow --------------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    net = chain()
    with torch.no_grad():
        for layer in (net[1], net[5]):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    batches = [torch.randn(2, 2, 4, 4)]
    slots = [s for s in discover(net) if s.rows is not None]
    stats = collect(net, slots, [SynapticFlow()], batches)
    sums = [float(SynFlow()(s.weight(net), stats).sum()) for s in slots]
    assert len(sums) == 4
    assert sums == pytest.approx([sums[0]] * 4, rel=1e-9)


@pytest.mark.parametrize(
    "kind",
    [
        nn.Tanh,
        nn.Sigmoid,
        nn.GELU,
        nn.SiLU,
        nn.ELU,
        nn.ReLU6,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Softplus,
    ],
)
def test_synflow_is_conserved_by_any_activation(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(8, 32), kind(), nn.Linear(32, 32), kind(), nn.Linear(32, 4))
    slots = [s for s in discover(net) if s.rows is not None]
    stats = collect(net, slots, [SynapticFlow()], [torch.randn(2, 8)])
    sums = [float(SynFlow()(s.weight(net), stats).sum()) for s in slots]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)


def test_synflow_knows_no_biases_wherever_they_are() -> None:
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    slots = [s for s in discover(net) if s.axes is not None]
    x = [torch.randn(2, 5, 16)]
    before = collect(net, slots, [SynapticFlow()], x)
    with torch.no_grad():
        net.self_attn.in_proj_bias.normal_()
    after = collect(net, slots, [SynapticFlow()], x)
    for slot in slots:
        weight = slot.weight(net)
        assert torch.equal(SynFlow()(weight, before), SynFlow()(weight, after))


def test_synflow_reads_inputs_behind_the_labels() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
            return torch.as_tensor(self.inner(pixel_values))

    net, x = Named(), torch.randn(2, 2, 4, 4)
    batch = {"labels": torch.tensor([0, 1]), "pixel_values": x}  # as collators have them
    wanted = scores_of(SynFlow(), net.inner, "8.weight", [x])
    assert torch.equal(scores_of(SynFlow(), net, "inner.8.weight", [batch]), wanted)
    with pytest.raises(UsageError, match=r"type torch\.int64"):
        scores_of(SynFlow(), net, "inner.8.weight", [{"labels": x, "ids": torch.tensor([0, 1])}])


def test_synflow_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    a, b = net[0].weight.detach().abs().double(), net[2].weight.detach().abs().double()
    found = scores_of(SynFlow(), net, "0.weight", [torch.randn(5, 3)])
    close(found, a * b.sum(0)[:, None])
    found = scores_of(SynFlow(), net, "2.weight", [torch.randn(5, 3)])
    close(found, b * a.sum(1)[None])


def test_a_hundred_rounds_of_synflow_at_99_percent_empty_no_layer() -> None:
    net = nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(),
        nn.Linear(40, 10),
    )  # fmt: skip
    recipe = dataclasses.replace(recipes.synflow(0.99), scope=Scope(sensitive=True))
    pruned = prune(net, recipe, [torch.randn(2, 20)])
    assert pruned.facts.sparsity == pytest.approx(0.99, abs=0.001)
    assert min(layer.kept for layer in pruned.facts.layers) > 1
    flow = pruned.model
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.abs_().requires_grad_(False)
    assert float(flow(torch.ones(1, 20)).sum()) > float(flow(torch.zeros(1, 20)).sum())


def test_synflow_reads_batches_of_named_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.inner(pixel_values)

    pruned = prune(Net(), recipes.synflow(0.5, rounds=2), [{"pixel_values": X}])
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.02)


class TwoInputs(nn.Module):
    """Reads an image and numbers beside it, and looks up places that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.place = nn.Linear(4, 8), nn.Linear(3, 8), nn.Embedding(5, 8)
        self.mid, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, beside: Tensor, places: Tensor) -> Tensor:
        both = self.a(x) + self.b(beside) + self.place(places)
        logits: Tensor = self.head(self.mid(both))
        return logits


@pytest.mark.parametrize("named", [False, True])
def test_synflow_of_a_network_with_several_inputs(named: bool) -> None:
    net, places = TwoInputs(), torch.tensor([3])
    given: dict[str, Tensor] = {
        "x": torch.randn(6, 4),
        "beside": torch.randn(6, 3),
        "places": places,
    }
    batch = given if named else (*given.values(), torch.arange(6) % 2)
    found = scores_of(SynFlow(), net, "mid.weight", [batch])
    absolute = {n: p.detach().double().abs() for n, p in net.named_parameters()}
    flow = absolute["a.weight"].sum(1) + absolute["b.weight"].sum(1) + absolute["place.weight"][3]
    close(found, absolute["mid.weight"] * absolute["head.weight"].sum(0)[:, None] * flow, 1e-6)


def test_synflow_refuses_token_ids() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="token ids"):
        prune(net, recipes.synflow(0.5), [torch.zeros(2, 3, dtype=torch.long)])


@pytest.mark.parametrize("seed", [2**62, torch.iinfo(torch.int64).max, -1])
def test_any_seed_will_do(seed: int) -> None:
    """torch's own seeds have 64 bits."""
    weight = Weight("w", torch.ones(3, 5), LINEAR)
    assert torch.equal(Random(seed)(weight, Stats(1)), Random(seed)(weight, Stats(1)))
    groups = sample_groups("plain").groups[0]
    assert torch.equal(RandomGroups(seed)(groups, Stats(1)), RandomGroups(seed)(groups, Stats(1)))
