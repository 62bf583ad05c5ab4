"""A small network in dynamic sparse training: recipes, optimizers, and steps of a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, Masks, Recipe, Target
from secateur.drive.training.regrow import Regrow
from secateur.pattern import NM, Elements

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(5))
Y = torch.arange(24) % 4
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
NAMES = ("0.weight", "2.weight")
TOTAL = 8 * 24 + 24 * 16

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
        )


def recipe(regrow: Any = None, sparsity: float = 0.75, **more: Any) -> Recipe:
    pattern = more.get("pattern", Elements())
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    return Recipe(target=target, regrow=regrow or Regrow(frequency=3), **more)


def start(
    wanted: Recipe, kind: str = "sgd", steps: int | None = 40
) -> tuple[nn.Sequential, Gradual]:
    model = net()
    return model, Gradual(model, OPTIMIZERS[kind](model.parameters()), wanted, steps=steps)


def backward(model: nn.Module, pruner: Gradual, t: int) -> None:
    x, y = BATCHES[t % 3]
    pruner.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, pruner: Gradual, steps: int, first: int = 0) -> None:
    for t in range(first, first + steps):
        backward(model, pruner, t)
        pruner.optimizer.step()
        pruner.step()


def slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state[parameter].values()
    return [v for v in state if isinstance(v, Tensor) and v.shape == parameter.shape]


def kept(masks: Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        values += [v.clone() for v in state.values() if isinstance(v, Tensor)]
    return values
