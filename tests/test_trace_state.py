"""A trace leaves a network as it is, also one that stores what it computes in its modules."""

import copy

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.structure import couple

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Remembers(nn.Module):
    """Its forward pass stores tensors, numbers and sizes, in attributes, lists and buffers."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.i, self.c, self.o = nn.Linear(8, 24), nn.GRUCell(24, 32), nn.Linear(32, 4)
        self.looks = looks
        self.h: Tensor | None = None
        self.width, self.seen, self.past = 0, [], {"last": None}
        self.plain = torch.zeros(32)
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 32) if self.h is None else self.h
        self.h = self.c(self.i(x).relu(), h)
        self.width, self.past["last"] = self.h.shape[-1], self.h
        self.seen.append(self.h.mean(0))
        self.mean = 0.9 * self.mean + 0.1 * self.h.detach().mean(0)
        self.count.add_(1)
        if self.looks and bool(self.h.sum() > 1e9):  # so that it cannot run without values
            return x
        self.plain.add_(self.h.detach().mean(0))
        return self.o(self.h)


@pytest.mark.parametrize("looks", [False, True])
def test_a_trace_leaves_nothing_behind(looks: bool) -> None:
    net = Remembers(looks=looks)
    twin = copy.deepcopy(net)
    couple(net, X)
    assert net.h is None
    assert (net.width, net.seen, net.past) == (0, [], {"last": None})
    assert type(net.width) is int
    for name in ("plain", "mean", "count"):
        assert torch.equal(getattr(net, name), torch.zeros_like(getattr(net, name))), name
    assert torch.equal(net(X), twin(X))


def test_what_training_left_behind_is_no_hindrance() -> None:
    net = Remembers(looks=False)
    net(X)  # its attributes are parts of a graph now
    assert couple(net, X).widths


def test_a_network_with_a_state_is_cut() -> None:
    torch.manual_seed(0)
    net = Remembers(looks=False)
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse("params=80%"), recovery=())
    pruned = secateur.shrink_(net, recipe, X)
    assert pruned.facts.measures["proof"] < 1e-5
    assert not [n for n in pruned.facts.notes if "raises" in n.text]
    assert net(X).shape == net.eval()(X).shape == (4, 4)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_changes_nothing(made_inside: bool) -> None:
    """Operators come whole in it, and those have no rules."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    net, x = build(), torch.randn(2, 3, 5, 5)
    wanted = [(width.name, width.groups) for width in couple(net, x).widths]
    recipe = secateur.ShrinkRecipe(recovery=())
    with torch.inference_mode():
        net, x = (build(), torch.randn(2, 3, 5, 5)) if made_inside else (net, x)
        assert [(width.name, width.groups) for width in couple(net, x).widths] == wanted
        small = secateur.shrink(net, recipe, x).model
    small(torch.randn(2, 3, 5, 5)).sum().backward()  # it can be trained
    assert small[0].weight.grad.shape == small[0].weight.shape
