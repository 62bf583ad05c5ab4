"""Layers whose weight is computed before each call stay, with a reason that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import secateur
from secateur.structure import couple

X = torch.randn(4, 8)


def named(layer: nn.Module) -> nn.Module:
    class Noisy:
        def __call__(self, module: Any, _: Any) -> None:
            module.weight = module.raw + 0.1

    weight = layer.weight
    del layer.weight
    layer.register_parameter("raw", weight)
    layer.weight = weight.detach()
    layer.register_forward_pre_hook(Noisy())
    return layer


CASES: Any = [
    (nn.utils.spectral_norm, "remove_spectral_norm"),
    (nn.utils.parametrizations.spectral_norm, "remove_parametrizations"),
    (nn.utils.weight_norm, "parametrizations.weight_norm"),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "prune.remove"),
    (named, "computed before each call"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("wrap", "remedy"), CASES)
def test_layers_with_a_computed_weight_stay(
    wrap: Callable[[nn.Module], nn.Module], remedy: str, place: int
) -> None:
    layers = [nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 16), nn.Linear(16, 4)]
    layers[place] = wrap(layers[place])
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():  # these hooks keep what they computed, and a copy cannot have its graph
        net(X)
    structure = couple(net, X)
    assert [w.name for w in structure.widths] == (["1", "2"] if place == 0 else ["2"])
    assert any(remedy in text for text in structure.pinned.values())
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("params", 0.9), recovery=(), scope=secateur.Scope(include=("2",))
    )
    assert secateur.shrink(net, recipe, X).facts.measures["proof"] < 1e-5
