"""Networks inside torch.compile or data parallelism are pruned, loaded and measured like plain ones."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur import (
    Recipe,
    ShrinkRecipe,
    Target,
    attach_,
    compare,
    measure,
    prune,
    prune_,
    recipes,
    shrink,
)
from secateur.cli.main import app
from secateur.evaluate.compare import identical

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


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("cut", [False, True])
def test_a_bundle_is_loaded_into_a_wrapped_network(
    wrap: Callable[[nn.Module], nn.Module], cut: bool, tmp_path: Path
) -> None:
    target = Target.parse("params=60%")
    found = shrink(mlp(), ShrinkRecipe(target=target), data=BATCHES) if cut else prune(mlp())
    found.save(tmp_path / "bundle")
    net = mlp()
    loaded = secateur.load(wrap(net), tmp_path / "bundle")
    assert loaded.model is net
    assert identical(net, found.model)
    assert loaded.masks == found.masks


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_measured_like_the_plain_one(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    found = prune(mlp())
    wrapped = wrap(copy.deepcopy(found.model))
    plain = measure(found.model, BATCHES, masks=found.masks, latency=False)
    assert measure(wrapped, BATCHES, masks=found.masks, latency=False) == plain
    both = compare(found, wrapped, BATCHES, masks=(None, found.masks), latency=False)
    assert both.identical
    assert both.a == both.b == plain
    attach_(found.model, found.masks)
    assert measure(wrap(found.model), latency=False).cost.bytes == plain.cost.bytes


@pytest.mark.parametrize("wrap", ["torch.compile(net, backend='eager')", "nn.DataParallel(net)"])
def test_a_function_may_give_a_wrapped_network(wrap: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def plain(): return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))\n"
        f"def build():\n    net = plain()\n    return {wrap}\n"
    )
    for words in (
        ("prune", f"{tmp_path}/net.py:build", "-o", str(tmp_path / "out")),
        ("evaluate", str(tmp_path / "out")),
        ("evaluate", str(tmp_path / "out"), "--model", f"{tmp_path}/net.py:plain"),
    ):
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
