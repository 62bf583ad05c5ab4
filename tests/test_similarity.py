"""Similarity of masks: hand cases, chance levels against random masks, and straight lines."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import NeedsData, UsageError
from secateur.core.masks import Masks
from secateur.experiments import (
    Jaccard,
    connectivity,
    emergent_structure,
    hamming,
    mask_churn,
    mask_jaccard,
    overall_structure,
    overlap_coefficient,
    similarity_matrix,
    weight_drift,
)
from secateur.experiments.similarity import chance_level, empty_probability


def masks(**rows: list[int]) -> Masks:
    return Masks({name: torch.tensor(row, dtype=torch.bool) for name, row in rows.items()})


def random_mask(density: float, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Exactly as many kept as the density says, anywhere."""
    size = math.prod(shape)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    flat = torch.zeros(size, dtype=torch.bool)
    flat[order[: round(density * size)]] = True
    return flat.reshape(shape)


A = masks(v=[1, 1, 1, 0, 0, 0], w=[1, 0, 0, 0])
B = masks(v=[1, 0, 0, 1, 0, 0], w=[1, 1, 0, 0])


def test_jaccard_by_hand() -> None:
    found = mask_jaccard(A, B)
    assert found.layers["v"].value == 1 / 4
    assert found.layers["w"].value == 1 / 2
    assert found.whole.value == 2 / 6
    assert found.layers["v"].chance == pytest.approx((3 * 2 / 6) / (3 + 2 - 3 * 2 / 6))
    assert found.whole.chance == pytest.approx(0.4 * 0.4 / (0.8 - 0.16))
    assert found.given_layers.chance == pytest.approx((1 + 0.5) / (4 + 4 - 1.5))
    assert found.whole.corrected == pytest.approx((1 / 3 - 0.25) / 0.75)
    assert mask_jaccard(A, B, per_layer=False).layers == {}


def test_jaccard_of_pruned_entries_by_hand() -> None:
    found = mask_jaccard(A, B, of="pruned")
    assert found.layers["v"].value == 2 / 5
    assert found.layers["w"].value == 2 / 3
    inverted = [Masks({n: ~m for n, m in x.items()}) for x in (A, B)]
    assert found == mask_jaccard(*inverted)


def test_other_measures_by_hand() -> None:
    assert overlap_coefficient(A, B) == 2 / 4
    assert hamming(A, B) == 4 / 10
    assert mask_churn(A, B) == pytest.approx(4 / 6)


def test_equal_empty_and_full_masks() -> None:
    empty, full = masks(w=[0, 0, 0]), masks(w=[1, 1, 1])
    for mask in (empty, full, A):
        assert mask_jaccard(mask, mask).whole.value == 1
        assert mask_jaccard(mask, mask).whole.corrected == 1
        assert (mask_churn(mask, mask), hamming(mask, mask)) == (0, 0)
        assert overlap_coefficient(mask, mask) == 1
    assert mask_jaccard(empty, full).whole == Jaccard(0.0, 0.0)
    assert overlap_coefficient(empty, full) == 1


def test_measures_are_symmetric() -> None:
    for measure in (hamming, overlap_coefficient, mask_churn):
        assert measure(A, B) == measure(B, A)
    assert mask_jaccard(A, B) == mask_jaccard(B, A)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.1, 0.1), (0.2, 0.7), (0.05, 1.0)])
def test_chance_level_is_that_of_random_masks(a: float, b: float) -> None:
    found = []
    for seed in range(60):
        one = Masks({"w": random_mask(a, (40, 50), seed)})
        two = Masks({"w": random_mask(b, (40, 50), 1000 + seed)})
        found.append(mask_jaccard(one, two).whole.value)
    mean = sum(found) / len(found)
    assert mean == pytest.approx(chance_level(a, b), abs=0.004)


def test_layers_of_unlike_density_look_alike_until_it_is_given() -> None:
    found = []
    for seed in range(20):
        one, two = (
            Masks({"v": random_mask(0.9, (50, 20), s), "w": random_mask(0.05, (50, 20), s + 7)})
            for s in (seed, 500 + seed)
        )
        found.append(mask_jaccard(one, two))
    assert sum(x.whole.corrected for x in found) / 20 > 0.3
    assert sum(x.given_layers.corrected for x in found) / 20 == pytest.approx(0, abs=0.02)
    assert all(abs(x.layers["v"].corrected) < 0.15 for x in found)


def test_matrix_is_symmetric_with_ones_on_the_diagonal() -> None:
    found = similarity_matrix({"a": A, "b": B, "c": A})
    assert found.names == ("a", "b", "c")
    assert [row[i] for i, row in enumerate(found.values)] == [1.0] * 3
    assert found.values[0] == (1.0, pytest.approx(1 / 3), 1.0)
    assert found.values[1][0] == found.values[0][1]
    assert found.corrected[0][1] == mask_jaccard(A, B).given_layers.corrected


@pytest.mark.parametrize(
    "other", [masks(v=[1, 1, 1, 0, 0, 0]), masks(v=[1], w=[1, 0, 0, 0]), masks()]
)
def test_masks_of_other_weights_are_refused(other: Masks) -> None:
    for measure in (hamming, overlap_coefficient, mask_churn, mask_jaccard):
        with pytest.raises(UsageError, match="can be compared"):
            measure(A, other)
    with pytest.raises(UsageError, match="there are no masks"):
        hamming(masks(), masks())
    with pytest.raises(UsageError, match="kept"):
        mask_jaccard(A, B, of="both")


def test_what_is_no_mask_is_told_as_such() -> None:
    pruned: Any = secateur.prune(
        nn.Linear(4, 4), secateur.Recipe(scope=secateur.Scope(sensitive=True))
    )
    for measure in (hamming, overlap_coefficient, mask_churn, mask_jaccard):
        with pytest.raises(UsageError, match=r"Write e\.g\. pruned\.masks"):
            measure(pruned.masks, pruned)
    with pytest.raises(UsageError, match=r"Write e\.g\. pruned\.masks"):
        emergent_structure(pruned)


def test_drift_counts_survivors_only_if_asked() -> None:
    before = {"v": torch.tensor([3.0, 4.0]), "w": torch.tensor([0.0]), "n": torch.tensor(3)}
    after = {"v": torch.tensor([3.0, 8.0]), "w": torch.tensor([3.0]), "n": torch.tensor(9)}
    found = weight_drift(before, after)
    assert found == {"": 1.0, "v": pytest.approx(0.8), "w": math.inf}
    assert weight_drift(before, after, masks(v=[1, 0])) == {"": 0.0, "v": 0.0}
    assert weight_drift(before, before)["w"] == 0
    with pytest.raises(UsageError, match="u is not in both"):
        weight_drift(before, after, masks(u=[1]))


# ---- structure


def test_structure_by_hand() -> None:
    mask = torch.ones(3, 2, 1, 2, dtype=torch.bool)
    mask[0] = False  # one filter of three
    mask[1, 1] = False  # one more kernel
    found = emergent_structure(Masks({"conv": mask}))["conv"]
    assert found.filters.share == pytest.approx(1 / 3)
    assert found.channels.share == 0
    assert found.kernels is not None
    assert found.kernels.share == pytest.approx(3 / 6)
    assert (found.filters.groups, found.channels.groups, found.kernels.groups) == (3, 2, 6)
    # 6 of 12 kept; a filter has 4, a channel 6, a kernel 2.
    assert found.filters.expected == pytest.approx(math.comb(8, 6) / math.comb(12, 6))
    assert found.channels.expected == pytest.approx(math.comb(6, 6) / math.comb(12, 6))
    assert found.kernels.expected == pytest.approx(math.comb(10, 6) / math.comb(12, 6))


def test_expected_structure_is_that_of_random_masks() -> None:
    shape, density = (8, 4, 3, 1), 0.15
    sums = torch.zeros(3)
    for seed in range(400):
        found = emergent_structure(Masks({"w": random_mask(density, shape, seed)}))["w"]
        assert found.kernels is not None
        parts = (found.filters, found.channels, found.kernels)
        sums += torch.tensor([part.share for part in parts])
    expected = [part.expected for part in parts]
    assert (sums / 400).tolist() == pytest.approx(expected, abs=0.012)
    assert expected[2] > expected[0] > expected[1] > 0


def test_kernels_of_one_weight_are_no_structure() -> None:
    conv, point = random_mask(0.3, (6, 4, 3, 3), 0), random_mask(0.1, (64, 64, 1, 1), 1)
    found = emergent_structure(Masks({"conv": conv, "point": point, "fc": point[:, :, 0, 0]}))
    assert [each.kernels is None for each in found.values()] == [False, True, True]
    whole = overall_structure(found)
    assert whole["kernels"] == found["conv"].kernels
    filters = [conv.flatten(1).any(1), *[point.flatten(1).any(1)] * 2]
    assert whole["filters"].groups == 6 + 64 + 64
    assert whole["filters"].share == pytest.approx(1 - float(torch.cat(filters).double().mean()))


def test_empty_probability_at_its_edges() -> None:
    assert empty_probability(0, 3, 5) == pytest.approx(1)
    assert empty_probability(5, 0, 5) == pytest.approx(1)
    assert empty_probability(3, 3, 5) == 0
    assert empty_probability(9, 10**5, 10**6) == pytest.approx(0.9**9, rel=1e-4)


def test_structure_follows_the_axes_of_the_model() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.Linear(3, 3))
    mask = torch.ones(4, 6, 2, 2, dtype=torch.bool)
    mask[:, 1] = False  # a transposed convolution has its outputs on the second axis
    given = Masks({"0.weight": mask, "0.bias": torch.ones(6, dtype=torch.bool)})
    found = emergent_structure(given, net)
    assert list(found) == ["0.weight"]
    assert found["0.weight"].filters.share == pytest.approx(1 / 6)
    assert emergent_structure(given)["0.weight"].channels.share == pytest.approx(1 / 6)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_convolution_group_has_inputs_of_its_own(kind: Any) -> None:
    layer = kind(8, 12, 3, groups=4, bias=False)
    every = torch.ones(1, 8, 5, 5, requires_grad=True)
    layer.weight.data.fill_(1.0)
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    mask[(slice(0, 3), 0) if kind is nn.Conv2d else 0] = False  # all that reads the first channel
    layer.weight.data[~mask] = 0
    layer(every).sum().backward()
    assert every.grad is not None
    assert (every.grad[0].amax((1, 2)) > 0).tolist() == [False] + [True] * 7
    found = emergent_structure(Masks({"weight": mask}), layer)["weight"]
    assert (found.channels.groups, found.channels.share) == (8, 1 / 8)
    assert (found.filters.groups, found.filters.share) == (12, 0)
    members = mask.numel() // 8
    kept = int(mask.sum())
    assert found.channels.expected == pytest.approx(empty_probability(members, kept, mask.numel()))


# ---- straight lines


def classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()


def examples(net: nn.Module) -> secateur.Data:
    x = torch.randn(256, 4)
    with torch.no_grad():
        batch = (x, net(x).argmax(1))
    return secateur.Data(train=[batch], test=[batch])


def test_a_network_is_connected_with_itself() -> None:
    net = classifier(0)
    found = connectivity(net, net, copy.deepcopy(net).state_dict(), examples(net), points=5)
    assert found.barrier == 0
    assert found.loss_barrier == pytest.approx(0, abs=1e-6)
    assert found.connected()
    assert found.shares == (0, 0.25, 0.5, 0.75, 1)
    assert found.errors == (0,) * 5


def test_a_planted_barrier_is_found() -> None:
    """The same function with hidden units swapped: both ends are right, the middle is not."""
    net = classifier(0)
    order = torch.arange(15, -1, -1)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(other[0], name).copy_(getattr(net[0], name)[order])
        other[3].weight.copy_(net[3].weight[:, order])
    before = copy.deepcopy(net.state_dict())
    found = connectivity(net, net, other, examples(net))
    assert found.errors[0] == found.errors[-1] == 0
    assert found.barrier == max(found.errors) > 0.1
    assert not found.connected()
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_barrier_is_measured_from_the_mean_of_the_ends() -> None:
    x = torch.eye(2)
    net = nn.Linear(2, 2, bias=False)
    good, bad = {"weight": torch.eye(2)}, {"weight": -torch.eye(2)}
    found = connectivity(net, good, bad, [(x, torch.tensor([0, 1]))], points=3)
    assert found.errors[0] == 0
    assert found.errors[-1] == 1
    assert found.barrier == max(0, found.errors[1] - 0.5, 0.5)


def test_reestimation_removes_a_barrier_of_statistics() -> None:
    """Two networks that differ in sign before BatchNorm: only its statistics fail in between."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)).eval()
    x = torch.randn(512, 4) + torch.tensor([0.0, 1.0, 2.0, 3.0])
    nn.init.eye_(net[0].weight)
    secateur.recover.BatchNorm().reestimate_(net, [x])
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.mul_(9)
    other[1].running_mean *= 9
    other[1].running_var *= 81
    other[1].running_mean += 5 * torch.tensor([1.0, -1.0, 1.0, -1.0])  # wrong on purpose
    with torch.no_grad():
        data = secateur.Data(train=[x], test=[(x, net(x).argmax(1))])
    plain = connectivity(net, net, other, data, points=3)
    again = connectivity(net, net, other, data, points=3, reestimate=True)
    assert plain.errors[1] > 0.05
    assert again.errors[1] < 0.01
    assert again.errors[0] == plain.errors[0], "the ends are measured as they are"
    assert again.errors[2] == plain.errors[2]


def test_the_ends_are_the_networks_themselves_whole_numbers_too() -> None:
    class Turned(nn.Module):
        def __init__(self, order: list[int]) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("order", torch.tensor(order))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x[:, self.order]

    right, wrong = Turned([0, 1]), Turned([1, 0])
    found = connectivity(right, right, wrong, [(torch.eye(2), torch.tensor([0, 1]))], points=2)
    assert found.errors == (0.0, 1.0)


def test_connectivity_refuses_what_cannot_be_mixed() -> None:
    net = classifier(0)
    with pytest.raises(UsageError, match="one architecture"):
        connectivity(net, net, nn.Linear(2, 2), examples(net))
    with pytest.raises(UsageError, match="2 points"):
        connectivity(net, net, net, examples(net), points=1)
    with pytest.raises(NeedsData):
        connectivity(net, net, net, None)
    with pytest.raises(NeedsData, match="classes"):
        connectivity(net, net, net, [torch.zeros(4, 4)])
