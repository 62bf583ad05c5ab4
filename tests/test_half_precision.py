"""Networks in half precision: what is computed from them does not vanish, overflow or turn NaN."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from oneshot_cases import ROWS, alias, mlp
from torch import Tensor, nn

from secateur import Recipe, prune
from secateur.core.groups import groups_of
from secateur.core.masks import Masks
from secateur.frontends import discover
from secateur.recover import Integer
from secateur.schedule import OneShot
from secateur.score import GroupTaylor
from secateur.stats import GateGradient, Gram, collect, collect_groups
from secateur.structure import couple


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_empty_row_stays_empty_when_rounded(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    with torch.no_grad():
        net[0].weight[3] = 0
    pruned = prune(net, Recipe(rounding=Integer(8)))
    weight = pruned.model.get_parameter("0.weight").detach()
    assert not weight[3].any()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_half_precision_is_rounded_as_finely_as_single(bits: int) -> None:
    values = (torch.rand(4, 8) * 1e-3).half()
    single = Integer(bits).fit(values.float())(values.float(), slice(None))
    half = Integer(bits).fit(values)(values, slice(None))
    assert half.dtype == torch.float16
    assert torch.equal(half, single.half())


def test_gates_of_a_network_in_half_precision() -> None:
    """Weights of 1e-6 and gradients of 1e-2: their product has no place in float16."""

    def scores(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)
        with torch.no_grad():
            net[2].weight.mul_(1e-5)
        widths = couple(net, (torch.randn(2, 8).to(dtype),)).widths
        groups = groups_of(net, widths, discover(net))
        batch = (torch.randn(16, 8).to(dtype), torch.arange(16) % 4)
        stats = collect_groups(net, groups, [GateGradient()], [batch])
        return GroupTaylor(of="absolute")(groups[0], stats)

    half, single = scores(torch.float16), scores(torch.float32)
    assert torch.allclose(half, single, rtol=0.1, atol=0)


class Mixed(nn.Module):
    """Runs under autocast by itself, as Accelerate and Lightning make a network do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)  # type: ignore[no-any-return]


def test_second_moments_are_not_summed_in_the_precision_of_autocast() -> None:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    exact = x.double().T @ x.double() / len(x)
    net = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 2))
    mixed, outside = Mixed(net), torch.autocast("cpu", torch.bfloat16)
    for model, around in ((mixed, nullcontext()), (net, outside)):
        slot = discover(model)[0]
        with around:
            stats = collect(model, [slot], [Gram()], [x])
        assert torch.allclose(stats(Gram(), slot.weight(model))[0], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wanda", "woodfisher"])
def test_a_run_inside_autocast_sees_each_cut(name: str) -> None:
    """Autocast keeps copies of weights, which are not those that were pruned since."""
    net, recipe = mlp().eval(), alias(name, 0.8)
    alone = prune(Mixed(net), recipe, ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = prune(net, recipe, ROWS)
    masks = {key.removeprefix("inner."): mask for key, mask in alone.masks.items()}
    assert Masks(masks) == inside.masks
    for key, value in inside.model.state_dict().items():
        assert torch.equal(alone.model.state_dict()[f"inner.{key}"], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "static_sparse"])
def test_the_default_type_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Scripts for language models set it before they load one."""
    net, recipe = mlp(), alias(name)
    recipe = dataclasses.replace(recipe, schedule=OneShot(), recovery=recipe.repairs)
    wanted = prune(net, recipe, ROWS)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = prune(net, recipe, ROWS)
    finally:
        torch.set_default_dtype(before)
    assert found.masks == wanted.masks
    for key, value in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value)
    errors = [[layer.output_error for layer in each.facts.layers] for each in (found, wanted)]
    assert errors[0] == errors[1]
