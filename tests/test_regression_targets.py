"""Targets: floats, one for each number of the output; labels of any integer type; one logit or many."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, Recipe, Target, prune
from secateur.core.errors import DataError
from secateur.core.losses import task_loss
from secateur.evaluate import measure
from secateur.score import Snip


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_every_integer_type(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    assert torch.equal(task_loss(logits, labels.to(dtype)), F.cross_entropy(logits, labels))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    data = Data(train=[(logits, labels.to(dtype))], test=[(logits, labels.to(dtype))])
    pruned = prune(net, Recipe(Snip()), data)
    assert pruned.masks == prune(net, Recipe(Snip()), [(logits, labels)]).masks
    assert measure(net, data, latency=False).loss == pytest.approx(
        task_loss(net(logits), labels).item()
    )


@pytest.mark.parametrize(
    ("output", "target"),
    [
        ((6, 1), (6,)),
        ((6,), (6,)),
        ((6, 1), (6, 1)),
        ((6, 3, 1), (6, 3)),
        ((6, 1, 2, 2), (6, 2, 2)),
    ],
)
def test_one_logit_tells_two_classes_apart(
    output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    logits = torch.randn(output)
    labels = torch.arange(logits.numel()) % 2
    expected = F.binary_cross_entropy_with_logits(logits.flatten(), labels.float())
    assert float(task_loss(logits, labels.reshape(target))) == pytest.approx(float(expected))
    with_ignored = torch.cat([logits.flatten(), torch.tensor([9.0])])
    found = task_loss(with_ignored, torch.cat([labels, torch.tensor([-100])]))
    assert float(found) == pytest.approx(float(expected))


def test_a_network_with_one_logit_is_scored_trained_and_measured_alike() -> None:
    x = torch.randn(32, 4)
    data = Data(train=[(x, (x[:, 0] > 0).long())], test=[(x, (x[:, 0] > 0).long())])
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    pruned = prune(net, Recipe(Snip(), recovery=FineTune(30, lr=0.3)), data)
    losses = [record["loss"] for record in pruned.facts.history]
    assert losses[-1] < 0.5 * losses[0]
    found = measure(pruned.model, data, latency=False)
    assert found.accuracy is not None
    assert found.accuracy > 0.9
    assert found.loss == pytest.approx(task_loss(pruned.model(x), data.test[0][1]).item())


def test_labels_beyond_one_logit_are_refused() -> None:
    with pytest.raises(DataError, match="labels reach from 0 to 3"):
        task_loss(torch.zeros(4, 1), torch.arange(4))
