"""Structural pruning of the standard layers: what can be cut is exact, what cannot says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structure_layers import IMAGE, TOKENS, between, convolved, require_exact
from torch import nn

from secateur.structure.kept_units import run_on_kept
from secateur.structure.labels import along
from secateur.structure.trace import Call, Tracer

#: What lies between two layers, an example, and what of it can be cut.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "RMSNorm": (lambda: between(nn.RMSNorm(12)), TOKENS, {"0": 12}),
    "RMSNorm over two axes": (lambda: between(nn.RMSNorm((5, 12))), TOKENS, {"0": 12}),
    "RMSNorm without weight": (
        lambda: between(nn.RMSNorm(12, elementwise_affine=False)),
        TOKENS,
        {"0": 12},
    ),
    "rms_norm of its input's shape": (
        lambda: between(lambda x: F.rms_norm(x, x.shape[-1:])),
        TOKENS,
        {"0": 12},
    ),
    "CircularPad1d": (lambda: convolved(nn.CircularPad1d(1), 1), IMAGE[:, :, 0], {"0": 12}),
    "CircularPad2d": (lambda: convolved(nn.CircularPad2d(1)), IMAGE, {"0": 12}),
    "CircularPad3d": (
        lambda: convolved(nn.CircularPad3d(1), 3),
        IMAGE[:, :, None].expand(2, 3, 8, 8, 8),
        {"0": 12},
    ),
    "circular convolution": (
        lambda: convolved(nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")),
        IMAGE,
        {"0": 12, "1": 12},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cuts_around_a_layer_are_exact(name: str) -> None:
    build, example, widths = CASES[name]
    structure = require_exact(build, example)
    assert {width.name: width.groups for width in structure.widths} == widths
    assert not [text for text in structure.pinned.values() if "no rule" in text]


def test_the_fused_rms_norm_of_accelerators_sees_kept_units_only() -> None:
    """On processors PyTorch takes it apart, so the operator is called by its name here."""
    x, weight = torch.randn(3, 12), torch.randn(12)
    tracer = Tracer(nn.Linear(1, 1))
    ids = tracer.ledger.new(12)
    tracer.put(x, [along(ids, 1, (3, 12))])
    alive = torch.arange(12) % 3 != 1
    x[:, ~alive] = 0
    call = Call(torch.ops.aten._fused_rms_norm.default, (x, [12], weight, None), {}, None)
    found, _ = run_on_kept(tracer, call, alive)
    wanted = F.rms_norm(x[:, alive], (8,), weight[alive])
    torch.testing.assert_close(found[:, alive], wanted)
    assert not bool(found[:, ~alive].any())
