"""Modules with zeros, and how an accelerated copy is held against them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.runtime.native import Spec
from secateur.runtime.torch_layers import SparseLayer, accelerate
from secateur.runtime.torch_packed import Operands


def prune_(module: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """Random zeros in every weight of two axes and more."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    return module.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def same(module: nn.Module, *inputs: Tensor, limit: float = 1e-5, swaps: int = 1) -> nn.Module:
    """Check an accelerated copy against the module itself; gives the copy."""
    ours = accelerate(copy.deepcopy(module), choose="first")
    assert sum(isinstance(m, SparseLayer) for m in ours.modules()) >= swaps
    with torch.inference_mode():
        for x in inputs:
            assert relative(ours(x), module(x)) <= limit, x.shape
    return ours


def operands(layer: SparseLayer) -> Operands:
    """What the operator is given of a linear layer."""
    bias = None if layer.bias is None else layer.bias.detach()
    outputs, inputs = layer.shape
    return Operands(Spec("linear", outputs, inputs), layer.values, layer.index, bias)


def net() -> nn.Sequential:
    """A small network with a few kinds of layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 8 * 8, 10),
    )
