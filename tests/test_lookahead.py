"""Lookahead: by hand, as a distortion, and under rescaling."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from group_cases import BATCHES, X, close, coupled, mlp, scores
from torch import Tensor, nn

import secateur
from secateur.core.errors import NeedsData
from secateur.core.groups import Groups, groups_of
from secateur.core.widths import Slices, Width
from secateur.frontends import discover
from secateur.schedule import OneShot
from secateur.score import (
    Grouped,
    Lookahead,
    Obd,
)
from secateur.stats import (
    Neighbours,
    collect,
    collect_groups,
    wants_data,
)
from secateur.testing import sample_groups

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


def test_lookahead_prunes_single_weights_in_one_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():  # what unit 5 does is thrown away, so its large weights do not matter
        net[0].weight[5] *= 10
        net[2].weight[:, 5] = 1e-4
    pruned = secateur.prune(net, secateur.recipes.lap(0.5), [torch.randn(4, 6)])
    assert not pruned.masks["0.weight"][5].any()
    by_size = secateur.prune(net, secateur.recipes.magnitude(0.5))
    assert by_size.masks["0.weight"][5].all()


def test_lookahead_while_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    recipe = secateur.Recipe(
        Lookahead(), target=secateur.Target("sparsity", 0.5), schedule=OneShot(2, unit="steps")
    )
    pruner = secateur.Gradual(net, sgd, recipe, data=[torch.randn(4, 6)])
    for _ in range(3):
        sgd.zero_grad()
        net(torch.randn(4, 6)).square().mean().backward()
        sgd.step()
        pruner.step()
    assert pruner.finalize().facts.sparsity == 0.5
