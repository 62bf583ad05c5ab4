"""Targets of floats: one for each number of the output, never stretched to fit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, Recipe, Target, prune
from secateur.core.errors import DataError
from secateur.core.losses import task_loss
from secateur.evaluate import measure


def regressor() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))


def batches(*axes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(x, x[:, 0].reshape(-1, *axes)) for x in torch.randn(8, 16, 16)]


def test_flat_targets_train_like_a_column() -> None:
    recipe = Recipe(target=Target("sparsity", 0.5), recovery=(FineTune(4, lr=0.02),))
    flat, column = (prune(regressor(), recipe, batches(*axes)) for axes in ((), (1,)))
    assert torch.equal(flat.model[0].weight, column.model[0].weight)
    assert flat.facts.history[-1]["loss"] < flat.facts.history[0]["loss"]


def test_flat_targets_measure_like_a_column() -> None:
    net = regressor()
    found = measure(net, Data(test=batches()), latency=False).loss
    own = torch.stack([F.mse_loss(net(x), y) for x, y in batches(1)]).mean()
    assert found == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("output", "target"),
    [((8, 4), (8, 1)), ((8, 4), (8,)), ((8, 1), (1, 8)), ((8, 1), (4,)), ((8,), ())],
)
def test_other_shapes_are_refused(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="squared error") as error:
        task_loss(torch.zeros(output), torch.zeros(target))
    assert str(output) in error.value.found
    assert str(target) in error.value.found


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3), (1, 1), (1,)])
def test_equal_shapes_are_taken_as_they_are(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    assert torch.equal(task_loss(a, b), F.mse_loss(a, b))
