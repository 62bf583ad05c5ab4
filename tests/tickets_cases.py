"""A network, data, and searches for its lottery tickets, some of them broken on purpose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur.allocate import Ranked
from secateur.experiments import TicketFacts, TicketPlan, Training, find_ticket
from secateur.experiments import ticket_search as module

SHORT = Training(epochs=3, lr=0.05)
LEVELS = (0.36, 0.79)
RECIPE = secateur.Recipe(allocation=Ranked())


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 3),
    )


class Shuffled:
    """Batches in an order, and with noise, drawn from PyTorch's own random state."""

    def __init__(self, count: int = 128, batch: int = 32) -> None:
        self.x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
        self.y, self.batch = self.x[:, :3].argmax(1), batch

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.y)).split(self.batch):
            yield self.x[chosen] + 0.1 * torch.randn(len(chosen), 8), self.y[chosen]


def data() -> secateur.Data:
    train = Shuffled()
    return secateur.Data(train=train, test=[(train.x, train.y)])


def plan(**changes: Any) -> TicketPlan:
    return TicketPlan(**{"levels": LEVELS, "training": SHORT, **changes})


def search(folder: Path, how: TicketPlan | None = None, **changes: Any) -> TicketFacts:
    given = {"model": build, "recipe": RECIPE, "data": data(), **changes}
    model = given.pop("model")
    return find_ticket(model, folder=folder, plan=how or plan(), **given)


class Broken(Exception):
    """Training broke down on purpose."""


def breaking(feed: secateur.Data, step: int) -> secateur.Data:
    """Data whose loss breaks down before the given step (counted from 0) is taken."""
    calls = itertools.count()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training and next(calls) == step:
            raise Broken
        return functional.cross_entropy(model(batch[0]), batch[1])

    return replace(feed, loss=loss)


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int = 0, step: int = 0) -> list[int]:
    """Count trainings; optionally break down inside one of them."""
    real, calls = module.train_, []

    def spy(model: nn.Module, feed: secateur.Data, *args: Any, **options: Any) -> Any:
        calls.append(args[1].index)
        return real(
            model, breaking(feed, step) if fail_at == len(calls) else feed, *args, **options
        )

    monkeypatch.setattr(module, "train_", spy)
    return calls
