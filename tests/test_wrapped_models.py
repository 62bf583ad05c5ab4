"""Networks inside torch.compile or data parallelism are pruned like the plain ones."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur import Recipe, ShrinkRecipe, Target, prune, prune_, recipes, shrink

BATCHES = [(x, x[:, :4].argmax(1)) for x in torch.randn(4, 16, 16, generator=torch.Generator())]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def compiled(net: nn.Module) -> nn.Module:
    wrapper = torch.compile(net, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


WRAPPERS = [compiled, nn.DataParallel]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "gmp"])
def test_a_wrapped_network_is_pruned_like_the_plain_one(
    wrap: Callable[[nn.Module], nn.Module], name: str, tmp_path: Path
) -> None:
    recipe = recipes.ALIASES[name](0.5)
    net = mlp()
    wrapper, before = wrap(net), copy.deepcopy(net.state_dict())
    found, plain = prune(wrapper, recipe, BATCHES), prune(mlp(), recipe, BATCHES)
    assert list(found.masks) == ["0.weight", "2.weight"]
    assert found.masks == plain.masks
    assert type(found.model) is nn.Sequential
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    found.save(tmp_path / "bundle")
    assert secateur.load(mlp(), tmp_path / "bundle").masks == plain.masks


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_prune_in_place_changes_the_network_inside(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    net = mlp()
    assert prune_(wrap(net), Recipe(), BATCHES).model is net
    assert float((net[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_shrunk_like_the_plain_one(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    recipe = ShrinkRecipe(target=Target("params", 0.5))
    found = shrink(wrap(mlp()), recipe, data=BATCHES)
    plain = shrink(mlp(), recipe, data=BATCHES)
    assert [tuple(p.shape) for p in found.model.parameters()] == [
        tuple(p.shape) for p in plain.model.parameters()
    ]
    assert list(found.model.state_dict()) == list(plain.model.state_dict())


def test_the_plan_names_weights_plainly() -> None:
    assert [s.name for s in secateur.plan(compiled(mlp())).chosen] == ["0.weight", "2.weight"]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_network_with_a_compiled_part_is_pruned_like_the_plain_one(name: str, warm: bool) -> None:
    def part() -> nn.Sequential:
        net = mlp()
        net[2] = compiled(nn.Sequential(net[2], net[3]))
        del net[3]
        return net

    recipe = recipes.ALIASES[name](0.5)
    net = part()
    if warm:
        with torch.no_grad():
            net(BATCHES[0][0])
    found, plain = prune(net, recipe, BATCHES), prune(mlp(), recipe, BATCHES)
    assert list(found.masks) == ["0.weight", "2._orig_mod.0.weight"]
    assert [m.tolist() for m in found.masks.values()] == [m.tolist() for m in plain.masks.values()]
