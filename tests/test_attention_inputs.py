"""PyTorch's attention, whose queries, keys and values no layer of its own makes, pruned by its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oneshot_cases import alias
from torch import Tensor, nn

from secateur import (
    Data,
    Gradual,
    Recipe,
    Regrow,
    Scope,
    ShrinkRecipe,
    Target,
    TopKast,
    prune,
    shrink,
)
from secateur.allocate.widths import GivenWidths
from secateur.schedule import OneShot, Polynomial
from secateur.score import (
    ActivationEnergy,
    ActivationVariance,
    Grouped,
    MeanActivation,
    Reconstruction,
    Wanda,
)

WIDTH = 16


class Explicit(nn.Module):
    """The same self-attention with a layer for every product."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.heads = like.num_heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        packed = {"weight": like.in_proj_weight, "bias": like.in_proj_bias}
        self.qkv.load_state_dict(packed)
        self.out.load_state_dict(like.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        three = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        found = nn.functional.scaled_dot_product_attention(*three)
        return self.out(found.transpose(1, 2).flatten(2))


class Attends(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        if isinstance(self.inner, Explicit):
            return self.last(self.inner(x))
        keys, values = others or (x, x)
        return self.last(self.inner(x, keys, values, need_weights=False)[0])


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "ria"])
def test_it_is_pruned_as_if_its_products_were_layers(name: str) -> None:
    """In order, too: with sparsegpt the output projection is fitted behind pruned queries and keys."""
    torch.manual_seed(0)
    stock = Attends(nn.MultiheadAttention(WIDTH, 2, batch_first=True)).eval()
    nn.init.normal_(stock.inner.in_proj_bias)  # type: ignore[arg-type]
    layers = Attends(Explicit(stock.inner)).eval()
    layers.last.load_state_dict(stock.last.state_dict())
    batches = [torch.randn(4, 5, WIDTH) for _ in range(8)]
    found, wanted = (prune(net, alias(name), batches) for net in (stock, layers))
    pairs = {
        "inner.in_proj_weight": "inner.qkv.weight",
        "inner.out_proj.weight": "inner.out.weight",
    }
    assert set(found.masks) == set(pairs)
    for one, other in pairs.items():
        assert torch.equal(found.masks[one], wanted.masks[other])
        own, theirs = found.model.get_parameter(one), wanted.model.get_parameter(other)
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    told = [[layer.output_error for layer in p.facts.layers] for p in (found, wanted)]
    assert told[0] == pytest.approx(told[1], rel=1e-3)
    assert all(told[0])


def test_the_output_projection_is_fitted_to_what_it_reads_afterwards() -> None:
    """With dense queries and keys before it, it comes out otherwise: the order above matters."""
    torch.manual_seed(0)
    stock = Attends(nn.MultiheadAttention(WIDTH, 2, batch_first=True)).eval()
    batches = [torch.randn(4, 5, WIDTH) for _ in range(8)]
    recipe = alias("sparsegpt")
    whole = prune(stock, recipe, batches).model
    alone = prune(stock, replace(recipe, scope=Scope(ignore="*.in_proj_weight")), batches).model
    name = "inner.out_proj.weight"
    assert not torch.allclose(whole.get_parameter(name), alone.get_parameter(name), atol=1e-4)


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["packed", "apart"])
def test_cross_attention(widths: dict[str, int]) -> None:
    """Weights of their own are pruned by their own inputs; one weight of two inputs is left out."""
    torch.manual_seed(0)
    net = Attends(nn.MultiheadAttention(WIDTH, 2, batch_first=True, **widths)).eval()
    keys, values = (torch.randn(4, 7, widths.get(width, WIDTH)) for width in ("kdim", "vdim"))
    batch = torch.randn(4, 5, WIDTH), keys, values, torch.zeros(4)
    pruned = prune(net, alias("wanda"), [batch])
    told = {note.where: note.text for note in pruned.facts.notes if note.topic == "left-out"}
    if not widths:
        assert told["inner.in_proj_weight"] == "its inputs could not be seen on the data"
        assert set(pruned.masks) == {"inner.out_proj.weight"}
        return
    read = {"q": batch[0], "k": keys, "v": values}
    assert set(pruned.masks) == {"inner.out_proj.weight", *(f"inner.{x}_proj_weight" for x in read)}
    for letter, rows in read.items():
        name = f"inner.{letter}_proj_weight"
        scores = net.get_parameter(name).detach().abs() * rows.flatten(0, 1).norm(dim=0)
        least = scores.kthvalue(scores.shape[1] // 2, dim=1, keepdim=True).values
        assert torch.equal(pruned.masks[name], scores > least)


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.inner = nn.TransformerDecoderLayer(WIDTH, 2, 24, batch_first=True)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x), self.first(memory)))


@pytest.mark.parametrize(
    "criterion",
    [
        ActivationEnergy(),
        ActivationVariance(),
        MeanActivation(),
        Reconstruction(),
        Grouped(Wanda()),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_widths_are_scored_and_repaired_by_what_can_be_seen(criterion: Any) -> None:
    torch.manual_seed(0)
    net = Decodes().eval()
    batches = [(torch.randn(4, 5, 3), torch.randn(4, 7, 3), torch.zeros(4)) for _ in range(4)]
    recipe = ShrinkRecipe(criterion, allocation=GivenWidths({"first": 0.75}), align=1)
    pruned = shrink(net, recipe, None, Data(train=batches))
    assert [(w.name, w.kept) for w in pruned.facts.widths if w.kept < w.groups] == [("first", 12)]
    told = {n.where: n.text for n in pruned.facts.notes if n.topic == "uncompensated"}
    assert (
        told["inner.multihead_attn.in_proj_weight"]
        == "its inputs could not be seen in both networks"
    )
    assert "inner.self_attn.in_proj_weight" not in told


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": Polynomial(0, 4, 1)},
        {"regrow": Regrow("random", frequency=2), "schedule": OneShot(unit="steps")},
        {"regrow": TopKast()},
    ],
    ids=["gradual", "regrow", "topkast"],
)
def test_in_training_a_weight_that_cannot_be_seen_keeps_its_mask(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Attends(nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    batches = [
        (torch.randn(4, 5, WIDTH), *torch.randn(2, 4, 7, WIDTH), torch.zeros(4)) for _ in range(8)
    ]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    recipe = Recipe(Wanda(), target=Target("sparsity", 0.5), **changes)
    pruner = Gradual(net, optimizer, recipe, data=Data(train=batches), steps=8)
    for batch in batches:
        optimizer.zero_grad()
        net(*batch[:3]).square().mean().backward()
        optimizer.step()
        pruner.step()
    pruned = pruner.finalize()
    random_start = "regrow" in changes and isinstance(changes["regrow"], Regrow)
    sparse = {name: 1 - float(mask.float().mean()) for name, mask in pruned.masks.items()}
    assert sparse["inner.out_proj.weight"] == 0.5
    assert sparse["inner.in_proj_weight"] == (0.5 if random_start else 0.0)
    told = [note.where for note in pruned.facts.notes if note.topic == "unseen"]
    assert told == ["inner.in_proj_weight"]
