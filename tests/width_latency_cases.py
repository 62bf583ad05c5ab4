"""A network with layers of every kind, and clocks that compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from secateur.drive.structural.latency_clock import Paired
from secateur.drive.structural.layer_uses import layers_of
from secateur.runtime.layer_times import Chain, Layer

X = torch.zeros(1, 3, 8, 8)
Rule = Callable[[Layer], float]


class Net(nn.Module):
    """A strided, a residual, a depthwise and a linear layer."""

    def __init__(self, width: int = 64, inside: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.up = nn.Conv2d(width, inside, 1)
        self.deep = nn.Conv2d(inside, inside, 3, padding="same", groups=inside)
        self.down = nn.Conv2d(inside, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.down(self.deep(self.up(x)).relu())
        return self.head(x.mean((2, 3)))


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@dataclass(frozen=True)
class MadeUp:
    """A clock that computes: what a layer alone takes, and what a network takes."""

    model: nn.Module
    alone: Rule
    within: Rule
    fixed: float = 0.0
    engine: str = "made up"
    threads: int = 1

    def layers(self, chains: Sequence[Chain]) -> list[float]:
        return [sum(map(self.alone, chain)) for chain in chains]

    def of(self, model: nn.Module) -> float:
        return self.fixed + sum(self.within(use.layer) for use in layers_of(model, X))

    def dense(self) -> float:
        return self.of(self.model)

    def pair(self, small: nn.Module) -> Paired:
        a, b = self.of(self.model), self.of(small)
        return Paired(a, b, b / a, (b / a, b / a), (b, b))


def macs(layer: Layer) -> float:
    return layer.macs / 1000
