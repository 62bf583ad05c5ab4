"""Accelerated layers whose weights or biases change, are copied, or run in other contexts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.runtime import accelerate, library, restore, torch_packed
from secateur.runtime.race import Raced
from secateur.runtime.torch_layers import SparseLayer

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")


def pruned(layer: nn.Module, sparsity: float = 0.9) -> nn.Sequential:
    """A network of one layer with zeros in its weight."""
    weight = layer.get_parameter("weight")
    weight.data *= torch.rand_like(weight, dtype=torch.float32) >= sparsity
    return nn.Sequential(layer).eval()


def swapped(net: nn.Module, **options: Any) -> SparseLayer:
    layer = accelerate(net, **options).get_submodule("0")
    assert isinstance(layer, SparseLayer)
    return layer


# ---- weights


def test_the_weights_that_were_loaded_last_are_used() -> None:
    stale = 0
    for seed in range(40):  # the allocator gives the same address again in one of five
        torch.manual_seed(seed)
        net, x = pruned(nn.Linear(32, 32)), torch.randn(2, 32)
        kept = net.get_parameter("0.weight").detach() != 0
        loads = [
            {"0.weight": torch.randn(32, 32) * kept, "0.bias": torch.zeros(32)} for _ in range(2)
        ]
        accelerate(net)
        with torch.no_grad():
            net(x)
            for state in loads:
                net.load_state_dict(state)
            wanted = functional.linear(x, loads[-1]["0.weight"])
            stale += not torch.allclose(net(x), wanted, atol=1e-4)
    assert stale == 0


def test_a_copy_does_not_bring_what_the_original_knew() -> None:
    net, x = pruned(nn.Linear(32, 32)), torch.randn(2, 32)
    layer = swapped(net)
    with torch.no_grad():
        wanted = net(x)
        assert layer._known is not None
        copied = copy.deepcopy(net)
        assert copied.get_submodule("0")._known is None
        assert torch.equal(copied(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_keeps_the_type_of_the_layer(dtype: torch.dtype) -> None:
    net = pruned(nn.Linear(64, 64)).to(dtype)
    state, x = copy.deepcopy(net.state_dict()), torch.randn(2, 64, dtype=dtype)
    wanted = net(x).detach()
    accelerate(net)
    for given in (state, {name: value.float() for name, value in state.items()}):
        net.load_state_dict(given)
        assert {value.dtype for value in net.state_dict().values()} == {dtype}
        with torch.no_grad():
            assert torch.allclose(net(x), wanted, atol=0.05)
    assert restore(net).get_parameter("0.weight").dtype == dtype


def test_assigning_a_state_dict_brings_its_type() -> None:
    net = pruned(nn.Linear(64, 64)).bfloat16()
    state = {name: value.float() for name, value in net.state_dict().items()}
    accelerate(net).load_state_dict(state, assign=True)
    with torch.no_grad():
        assert net(torch.randn(2, 64)).dtype == torch.float32


# ---- biases


@pytest.mark.parametrize("choose", ["first", "measured"])
@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(4, 6, 3), nn.Linear(2048, 512)])
def test_a_bias_may_change_in_any_way(layer: nn.Module, choose: Any) -> None:
    net = pruned(copy.deepcopy(layer), 0.99)
    x = (
        torch.randn(1, 4, 9, 9)
        if isinstance(layer, nn.Conv2d)
        else torch.randn(2, layer.in_features)
    )
    held = len(torch_packed._PACKED)
    bias = swapped(net, choose=choose).bias
    assert bias is not None

    def moved() -> float:
        """The size of the output where the weights give nothing."""
        return float(net(0 * x).mean())

    with torch.no_grad():
        for size in (3.0, 5.0, 5.0):
            bias.data.fill_(size)
            assert moved() == size
        bias.fill_(7.0)
        assert moved() == 7.0
    assert len(torch_packed._PACKED) <= held + 1  # one form, however often the bias changes


def test_a_bias_made_in_inference_mode_may_change() -> None:
    with torch.inference_mode():
        net = pruned(nn.Linear(64, 64))
        layer, x = swapped(net, choose="first"), torch.randn(2, 64)
        before = net(x)
        assert layer.bias is not None
        layer.bias.add_(3.0)
        assert torch.allclose(net(x), before + 3.0, atol=1e-5)


def test_a_bias_of_nan_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = pruned(nn.Linear(64, 64)), torch.randn(2, 64)
    bias = swapped(net, choose="first").bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(float("nan"))
        assert net(x).isnan().all()
        monkeypatch.setattr(torch_packed, "_way_of", None)  # packing again would call it
        assert net(x).isnan().all()


@pytest.mark.parametrize("choose", ["first", "measured"])
def test_a_bias_and_a_weight_in_any_order_of_memory(choose: Any) -> None:
    layer = nn.Linear(64, 64)
    layer.bias = nn.Parameter(torch.arange(128.0)[::2])
    strided = pruned(layer), pruned(nn.Linear(64, 64))
    row = torch.randn(64) * (torch.arange(64) < 3)
    strided[1].get_submodule("0").weight = nn.Parameter(row.expand(64, 64))
    for net in strided:
        x = torch.randn(600, 64)
        wanted = net(x).detach()
        accelerate(net, choose=choose)
        with torch.no_grad():
            assert torch.allclose(net(x), wanted, atol=1e-4)
            assert torch.allclose(restore(net)(x), wanted, atol=1e-4)


# ---- threads


def test_restoring_while_other_threads_run() -> None:
    failed: list[str] = []
    done = threading.Event()

    def nets() -> nn.Module:
        layers = [nn.Linear(8, 8) for _ in range(40)]
        for layer in layers:
            layer.weight.data *= torch.rand_like(layer.weight) > 0.8
        return accelerate(nn.Sequential(*layers).eval(), choose="first")

    def until_done(work: Callable[[], object]) -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    work()
            except Exception as error:
                failed.append(repr(error))

    other = nets()
    works = (lambda: nets()(torch.randn(2, 8)), lambda: restore(other))
    threads = [threading.Thread(target=until_done, args=(work,)) for work in works * 2]
    for thread in threads:
        thread.start()
    done.wait(2)
    done.set()
    for thread in threads:
        thread.join()
    assert not failed


# ---- what stands in the way


def test_assigning_the_weight_is_refused_with_a_way_out() -> None:
    net = pruned(nn.Linear(8, 8))
    layer = swapped(net)
    for given in (nn.Parameter(torch.ones(8, 8)), torch.ones(8, 8), None):
        with pytest.raises(UsageError, match=r"restore\(\)") as caught:
            layer.weight = given  # type: ignore[assignment]
        assert all(caught.value.parts().values())
    layer.bias = nn.Parameter(torch.ones(8))
    with torch.no_grad():
        assert torch.equal(net(torch.zeros(1, 8)), torch.ones(1, 8))


@pytest.mark.parametrize("choose", ["first", "measured"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_type_that_dense_layers_give(choose: Any, weights: torch.dtype) -> None:
    for layer, x in (
        (nn.Linear(16, 2048), torch.randn(3, 16)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)),
    ):
        net = pruned(layer).to(weights)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                wanted = restore(net)(given)
                got = accelerate(net, choose=choose)(given)
                assert got.dtype == wanted.dtype == torch.bfloat16
                assert torch.allclose(got, wanted, atol=0.05)


@pytest.mark.parametrize("winner", [0, 1])
def test_an_operator_gives_the_type_of_its_weight_whatever_is_fastest(
    winner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raced(runs: list[object], **_: object) -> Raced:
        return Raced(tuple((float(i != winner),) for i in range(len(runs))))

    monkeypatch.setattr(torch_packed, "race", raced)
    monkeypatch.setattr(torch_packed, "_CHOICES", {})
    linear, conv = swapped(pruned(nn.Linear(9, 7))), swapped(pruned(nn.Conv2d(4, 6, 3)))
    calls = (
        lambda: torch.ops.secateur.sparse_linear(
            torch.ones(3, 9), linear.values, linear.index, None, *linear.shape
        ),
        lambda: torch.ops.secateur.sparse_conv(
            torch.ones(1, 4, 8, 8), conv.values, conv.index, None, conv.shape, *conv.geometry
        ),
    )
    for call in calls:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert call().dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("choose", ["first", "measured"])
def test_tracing(choose: Any) -> None:
    net = pruned(nn.Linear(64, 64))
    accelerate(net, choose=choose)
    with torch.no_grad():
        traced = torch.jit.trace(net, torch.randn(1, 64))
        for tokens in (1, 5):
            x = torch.randn(tokens, 64)
            assert torch.allclose(traced(x), net(x), atol=1e-5)
