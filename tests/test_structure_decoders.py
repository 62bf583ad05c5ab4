"""Structural pruning where code states sizes by other means than one attribute an axis."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.coverage import random_keep
from bench.zoo.decoders import ZOO, build, example
from secateur.structure import Structure, apply_, couple, cuts_for, prove
from secateur.structure.named import Named, naming

#: Name -> how many groups the attention of the first layer has (heads, or heads that share a key).
HEADS = {
    "gpt-j": 4,
    "gpt-bigcode": 4,
    "falcon": 4,
    "falcon-7b": 4,
    "falcon-40b": 2,
    "phi": 2,
    "stablelm": 2,
    "cohere": 2,
    "glm4": 2,
    "olmo2": 2,
    "starcoder2": 2,
    "gemma3": 2,
    "smollm3": 2,
    "persimmon": 4,
    "qwen3-moe": 2,
    "gpt-oss": 2,
    "modernbert": 4,
}
STAYS = {
    "mpt": "it meets a tensor whose size the code fixes",
    "falcon-7b": "its code gives the size 2 as a number",
    "longformer": "it is read by strides in memory",
}


@cache
def known(name: str) -> tuple[Any, Structure]:
    """Built and coupled once; nobody changes it."""
    model = build(name)
    return model, couple(model, example())


def error(model: Any, structure: Structure, keep: dict[str, Tensor], inputs: Any) -> float:
    small = copy.deepcopy(model)
    apply_(small, cuts_for(model, structure, keep))
    return prove(model, small, structure, keep, inputs).error


@pytest.mark.parametrize("name", ZOO)
def test_the_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    model, structure = known(name)
    for seed in range(3):
        assert error(model, structure, random_keep(structure, seed), example()) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_heads_can_be_cut(name: str) -> None:
    model, structure = known(name)
    groups = {w.name: w.groups for w in structure.widths if (".0." in w.name and "attn" in w.name)
              or (".0." in w.name and "attention" in w.name)}  # fmt: skip
    assert list(groups.values()) == [HEADS[name]]
    keep = {next(iter(groups)): torch.arange(HEADS[name]) < HEADS[name] - 1}
    assert error(model, structure, keep, example()) < 1e-5


@pytest.mark.parametrize(("name", "why"), STAYS.items())
def test_what_stays_says_why(name: str, why: str) -> None:
    _, structure = known(name)
    told = [text for (key, _), text in structure.pinned.items() if ".0." in key and "att" in key]
    assert any(why in text for text in told), told


class Sums(nn.Module):
    """Queries, keys and values in one matrix, taken apart at sums of products of attributes."""

    def __init__(self, heads: int = 4, shared: int = 2, size: int = 4) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, size
        self.inside = nn.Linear(5, 16)
        self.qkv = nn.Linear(16, (heads + 2 * shared) * size)
        self.out = nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.inside(x))
        end = self.heads * self.size
        q = y[..., :end]
        k = y[..., end : end + self.shared * self.size]
        v = y[..., end + self.shared * self.size :]
        q, k, v = (z.view(*x.shape[:-1], -1, self.size).transpose(1, 2) for z in (q, k, v))
        k, v = (z.repeat_interleave(2, 1) for z in (k, v))
        y = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Turned(nn.Module):
    """As many heads as places of each that are turned; the rest of a head goes by."""

    def __init__(self, heads: int = 4, size: int = 6, turned: int = 4) -> None:
        super().__init__()
        self.heads, self.size, self.turned = heads, size, turned
        self.q, self.k, self.v = (nn.Linear(7, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 3)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(self.turned) + 1.0
        head, rest = x[..., : self.turned], x[..., self.turned :]
        pairs = torch.stack((-head[..., 1::2], head[..., ::2]), -1).flatten(-2)
        return torch.cat((head * angles.cos() + pairs * angles.sin(), rest), -1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.heads, self.size)
        q, k, v = (z(x).view(shape).transpose(1, 2) for z in (self.q, self.k, self.v))
        y = (self.turn(q) @ self.turn(k).transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:-1], self.heads * self.size))
        return out


class OneKey(nn.Module):
    """All heads share the key and the value, which are the last two rows of one matrix."""

    def __init__(self, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(7, (heads + 2) * size), nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x).view(*x.shape[:-1], self.heads + 2, self.size)
        q, k, v = y[..., :-2, :], y[..., [-2], :], y[..., [-1], :]
        y = nn.functional.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        out: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:-1], self.heads * self.size))
        return out


class Quotient(nn.Module):
    """Heads in groups: the code computes how many there are in each."""

    def __init__(self, heads: int = 6, groups: int = 3, size: int = 2) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.inside, self.out = nn.Linear(7, heads * size), nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x).view(len(x), -1, self.heads // self.groups, self.size)
        y = (y * torch.tensor([1.0, 2.0])[:, None]).flatten(1, 2)
        out: Tensor = self.out(torch.tanh(y).reshape(len(x), self.heads * self.size))
        return out


class Complex(nn.Module):
    """A part of an axis is read as complex numbers, in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.pairs = 6, 4
        self.inside, self.out = nn.Linear(5, 3 * 10), nn.Linear(3 * 10, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x).view(len(x), 3, self.plain + self.pairs)
        one, two = y.split([self.plain, self.pairs], -1)
        turned = torch.view_as_complex(two.view(len(x), 3, -1, 2)) * (0.6 + 0.8j)
        two = torch.view_as_real(turned).flatten(2)
        out: Tensor = self.out(torch.tanh(torch.cat((one, two), -1)).flatten(1))
        return out


HANDMADE = {
    "sums": (Sums, [2]),
    "turned": (Turned, [4]),
    "one key": (OneKey, [4]),
    "quotient": (Quotient, [3]),
    "complex": (Complex, None),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_sizes_computed_from_attributes(name: str) -> None:
    torch.manual_seed(0)
    kind, groups = HANDMADE[name]
    model = kind().eval()
    inputs = torch.randn(2, 7) if kind is Quotient else torch.randn(2, 5, 7)
    if kind is Complex:
        inputs = torch.randn(2, 5)
    if kind is Sums:
        inputs = torch.randn(2, 6, 5)
    structure = couple(model, inputs)
    if groups is not None:
        attention = [w.groups for w in structure.widths if w.name != "inside" or kind is Quotient]
        assert attention == groups
    for seed in range(5):
        assert error(model, structure, random_keep(structure, seed), inputs) < 1e-5


def test_attributes_are_plain_numbers_again() -> None:
    model = Sums().eval()
    couple(model, torch.randn(2, 6, 5))
    assert {type(value) for value in (model.heads, model.qkv.out_features)} == {int}
    with naming(model):
        assert isinstance(model.heads, Named)
    assert type(model.heads) is int


def test_a_size_that_a_tensor_of_fixed_size_gets_stays() -> None:
    """The residual width names the shape of something that cannot shrink."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            out: Tensor = self.two(torch.tanh(y) + torch.arange(8.0).reshape(1, y.shape[-1]))
            return out

    structure = couple(Fixed(), torch.randn(3, 5))
    assert not structure.widths
    assert (
        structure.pinned["one.weight", 0] == "its code gives their number to a tensor of fixed size"
    )
