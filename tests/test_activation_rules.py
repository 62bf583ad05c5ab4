"""Every activation of PyTorch has a rule, and widths behind those that work entry by entry can be cut."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.structure import apply_, couple, cuts_for, prove

#: What makes entries depend on one another, or takes other inputs.
OTHERS = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
ARGUMENTS = {"Threshold": (0.1, 2.0)}
NAMES = sorted(set(nn.modules.activation.__all__) - OTHERS)


def activations() -> list[Any]:
    found = []
    for name in NAMES:
        kind = getattr(nn, name)
        places = (
            [{}, {"inplace": True}] if "inplace" in inspect.signature(kind).parameters else [{}]
        )
        found += [pytest.param(name, place, id=f"{name}{'_' * len(place)}") for place in places]
    return found


class Between(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)))
        return y


def error_after_a_cut(net: nn.Module) -> float:
    x = torch.randn(2, 3, 8, 8)
    structure = couple(net, x)
    keep = {"first": torch.arange(6) % 3 > 0}
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    return prove(net, small, structure, keep, x).error


@pytest.mark.parametrize(("name", "place"), activations())
def test_widths_behind_activations_can_be_cut(name: str, place: dict[str, Any]) -> None:
    layer = getattr(nn, name)(*ARGUMENTS.get(name, ()), **place)
    assert error_after_a_cut(Between(layer).eval()) < 1e-5


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: torch.rsub(x, 2),
        lambda x: 1 - x,
        lambda x: x // 0.5,
        lambda x: x.neg_().abs_(),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
        lambda x: x.rot90(1, (2, 3)),
        lambda x: x.rot90(2, (-1, 2)),
    ],
)
def test_widths_behind_other_operators_can_be_cut(middle: Any) -> None:
    net = Between(middle)
    assert error_after_a_cut(net.eval()) < 1e-5


def test_channels_that_are_turned_keep_their_places() -> None:
    net = Between(lambda x: x.rot90(2, (1, 2)))
    assert "turned" in couple(net, torch.randn(2, 3, 8, 8)).pinned["first.weight", 0]


def test_every_activation_has_a_rule() -> None:
    for name in OTHERS - {"MultiheadAttention"}:
        layer = nn.Softmax2d() if name == "Softmax2d" else getattr(nn, name)(dim=1)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.Conv2d(3 if name == "GLU" else 6, 2, 1))
        reasons = couple(net, torch.randn(2, 3, 8, 8)).pinned.values()
        assert not any("no rule" in reason for reason in reasons), reasons
