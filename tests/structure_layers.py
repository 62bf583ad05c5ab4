"""Small networks around one layer each, and what every cut of them must fulfil."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.formats import parse_surgery, surgery_text
from secateur.frontends.surgery import replay_, surgery_for
from secateur.structure import Cuts, Structure, apply_, couple, cuts_for, mask_, prove
from secateur.structure.masked import call, predictions

TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)).double()
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def between(layer: nn.Module | Callable[..., Any], width: int = 12, after: int = 0) -> nn.Module:
    """``Linear, layer, Linear`` on (batch, tokens, features)."""
    middle = layer if isinstance(layer, nn.Module) else Apply(layer)
    return nn.Sequential(nn.Linear(6, width), middle, nn.Linear(after or width, 4))


def convolved(layer: nn.Module | Callable[..., Any], dims: int = 2, after: int = 12) -> nn.Module:
    """``Conv, layer, Conv``."""
    middle = layer if isinstance(layer, nn.Module) else Apply(layer)
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(3, 12, 3, padding=1), middle, conv(after, 4, 1))


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in double precision whose vectors are no zeros and ones."""
    torch.manual_seed(0)
    net = build().double().eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return net


def require_exact(build: Callable[[], nn.Module], example: Any) -> Structure:
    """Every choice of groups computes and trains as the masked network does, also when replayed."""
    net = fresh(build)
    structure = couple(net, example)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for width in structure.widths:
            flags = torch.rand(width.groups, generator=generator) > 0.4
            flags[int(torch.randint(width.groups, (1,), generator=generator))] = True
            keep[width.name] = flags
        cuts = cuts_for(net, structure, keep)
        small, masked, again = copy.deepcopy(net), copy.deepcopy(net), fresh(build)
        apply_(small, cuts)
        proof = prove(net, small, structure, keep, example)
        assert proof.error < 1e-10, (seed, proof)
        assert proof.outputs
        mask_(masked, structure, keep)
        for model in (small, masked):
            losses = [x.abs().square().mean() for x in predictions(call(model, example))]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        _require_same_gradients(small, masked, structure, cuts)
        replay_(again, parse_surgery(surgery_text(surgery_for(net, cuts)).encode()))
        again.load_state_dict(small.state_dict())
        with torch.no_grad():
            pairs = zip(*(predictions(call(m, example)) for m in (again, small)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    return structure


def _require_same_gradients(
    small: nn.Module, masked: nn.Module, structure: Structure, cuts: Cuts
) -> None:
    wanted = dict(masked.named_parameters())
    for name, parameter in small.named_parameters():
        if parameter.grad is None:
            continue
        assert parameter.grad.shape == parameter.shape
        assert bool(parameter.grad.isfinite().all())
        reference = wanted[name].grad
        assert reference is not None
        for axis, positions in cuts.kept.get(name, {}).items():
            reference = reference.index_select(axis, torch.tensor(positions))
        if not structure.trace.reductions:
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-8, atol=1e-10)
