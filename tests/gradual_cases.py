"""A small network in gradual pruning: its batches, a recipe, and steps of a training loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur import Gradual, Recipe, Target
from secateur.schedule import Polynomial

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
Y = torch.arange(24) % 3
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
        )


def recipe(schedule: Any = None, sparsity: float = 0.75, **more: Any) -> Recipe:
    return Recipe(
        target=Target("sparsity", sparsity), schedule=schedule or Polynomial(0, 8, 2), **more
    )


def train(model: nn.Module, pruner: Gradual, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        x, y = BATCHES[t % 3]
        pruner.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.optimizer.step()
        pruner.step()
