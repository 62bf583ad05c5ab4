"""Loaders whose workers stay have one iterator, and draw a seed only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import Checkpoints, Data, FineTune, Gradual, Pruned, Recipe, Target, prune, recipes
from secateur.schedule import Linear
from secateur.score import Wanda

X = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def loader(**how: Any) -> Any:
    return DataLoader(TensorDataset(X, Y), 8, num_workers=1, persistent_workers=True, **how)


def prepared(batches: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(batches)


@pytest.mark.parametrize("wrap", [lambda batches: batches, prepared], ids=["torch", "accelerate"])
def test_a_look_at_the_data_does_not_begin_the_epoch_anew(wrap: Any) -> None:
    model, batches = net(), wrap(loader())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = Recipe(Wanda(), target=Target("sparsity", 0.75), schedule=Linear(0, 20, 4))
    pruner = Gradual(model, optimizer, wanted, data=Data(train=batches, calibration=16))
    for _ in range(2):
        seen = []
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            pruner.step()
            seen.append(x)
        assert torch.equal(torch.cat(seen), X)


def test_a_look_at_the_data_of_accelerate_does_not_end_its_epoch() -> None:
    """Gradients are accumulated over 4 batches; the last 2 of the 10 of an epoch make a step, too."""
    accelerate = pytest.importorskip("accelerate")
    host = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, batches = host.prepare(model, sgd, DataLoader(TensorDataset(X, Y), 8))
    wanted = Recipe(Wanda(), target=Target("sparsity", 0.75), schedule=Linear(0, 4, 1))
    pruner = Gradual(model, optimizer, wanted, data=batches)
    stepped = []
    for x, y in batches:
        with host.accumulate(model):
            host.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            if host.sync_gradients:
                pruner.step()
            optimizer.zero_grad()
        stepped.append(host.sync_gradients)
    assert [number for number, last in enumerate(stepped) if last] == [3, 7, 9]


class Killed(BaseException):
    pass


def run(folder: Path, stop: int) -> Pruned:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += model.training and torch.is_grad_enabled()
        if calls[0] > stop:
            raise Killed
        return F.cross_entropy(model(batch[0]), batch[1])

    data = Data(train=loader(shuffle=True), loss=loss)
    recipe = recipes.gmp(0.75, epochs=3)
    assert isinstance(recipe.recovery[-1], FineTune)
    return prune(net(), recipe, data, checkpoint=Checkpoints(folder, every=5))


@pytest.mark.parametrize("stop", [8, 10, 17, 23])
def test_a_killed_run_continues_exactly(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole", 10**6)
    with pytest.raises(Killed):
        run(tmp_path / "part", stop)
    torch.rand(3)  # another process has drawn other numbers
    found = run(tmp_path / "part", 10**6)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name])
