"""A small training whose data draw random numbers of every kind."""

import random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from secateur.drive.training.order import Shuffled

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(40) % 3
STEPS = 15  # three epochs of five batches


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 8),
            nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip


class Restless(TensorDataset):
    """Augments with three kinds of random numbers."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        import numpy as np

        return x + 0.01 * (torch.rand(6) + random.random() + np.random.rand()), y


def loader(kind: str) -> Any:
    if kind == "own":  # a generator of its own
        generator = torch.Generator().manual_seed(8)
        return DataLoader(Restless(X, Y), 8, shuffle=True, generator=generator)
    if kind == "derived":
        return Shuffled((X, Y), 8, seed=4)
    if kind == "numbered":  # by the number of the epoch
        data = Restless(X, Y)
        return DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    if kind == "accelerate":  # also by the number
        import accelerate

        how = accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
        host = accelerate.Accelerator(cpu=True, dataloader_config=how)
        return host.prepare(DataLoader(Restless(X, Y), 8, shuffle=True))
    return DataLoader(Restless(X, Y), 8, shuffle=True)  # torch's global numbers
