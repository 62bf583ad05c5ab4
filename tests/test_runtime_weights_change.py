"""Accelerated layers whose weights or biases change, are copied, or run in other contexts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.runtime import accelerate, library, restore
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
