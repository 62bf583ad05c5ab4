"""Accelerated layers whose weights or biases change, are copied, or run in other contexts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur.runtime import accelerate, library
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
