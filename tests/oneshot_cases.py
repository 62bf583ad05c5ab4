"""Networks and batches of the tests of one-shot runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur import Pruned, Recipe, recipes


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    )


FIXED = torch.Generator().manual_seed(0)
IMAGES = [(torch.randn(8, 3, 8, 8, generator=FIXED), torch.arange(8) % 4) for _ in range(2)]
ROWS = [(torch.randn(16, 12, generator=FIXED), torch.arange(16) % 4)]
CHOSEN = ["3.weight", "6.weight", "11.weight"]


def sound(pruned: Pruned, dense: nn.Module) -> None:
    """What holds for every run: facts, masks and weights agree, and nothing is left behind."""
    assert {layer.name: layer.kept for layer in pruned.facts.layers} == {
        name: int(mask.sum()) for name, mask in pruned.masks.items()
    }
    for name, mask in pruned.masks.items():
        parameter = pruned.model.get_parameter(name)
        assert bool((parameter[~mask] == 0).all())
        assert bool(torch.isfinite(parameter).all())
    assert list(pruned.model.state_dict()) == list(dense.state_dict())
    assert not any(m._forward_hooks for m in pruned.model.modules())
    assert [m.training for m in pruned.model.modules()] == [m.training for m in dense.modules()]


SHORT: dict[str, dict[str, Any]] = {
    "gmp": {"epochs": 4},
    "movement": {"epochs": 4},
    "woodfisher": {"rounds": 2},
    "synflow": {"rounds": 5},
}


def alias(name: str, sparsity: float = 0.5) -> Recipe:
    return recipes.ALIASES[name](sparsity, **SHORT.get(name, {}))
