"""Metrics of the user's own, and networks that draw random numbers, in measure and compare."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_evaluate import labelled, network
from torch import Tensor, nn

from secateur.core.batches import Data
from secateur.core.errors import DataError
from secateur.evaluate import compare, measure


def test_own_metric_and_its_name() -> None:
    def f1(model: nn.Module, batches: Iterable[Any]) -> float:
        assert not model.training
        return float(sum(len(x) for x, _ in batches))

    net = network()
    found = measure(net.train(), Data(test=labelled(net), metric=f1), latency=False)
    assert (found.metric, found.accuracy) == ("f1", 200.0)
    assert net.training


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode, too, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y + torch.randn_like(y)


def test_both_networks_draw_the_same_random_numbers() -> None:
    net = Noisy()
    drawn = []

    def spread(model: nn.Module, batches: Iterable[Any]) -> float:
        drawn.append(float(torch.stack([model(x).mean() for x, _ in batches]).sum()))
        return drawn[-1]

    batches = labelled(net.body)
    found = compare(net, copy.deepcopy(net), batches, latency=False)
    assert (found.agreement, found.kl, found.difference) == (1.0, 0.0, 0.0)
    assert found.a.loss == found.b.loss
    found = compare(net, copy.deepcopy(net), Data(test=batches, metric=spread), latency=False)
    assert found.difference == 0
    first, second = (measure(net, batches, latency=False).loss for _ in range(2))
    assert first != second  # the numbers are random still


def test_an_own_metric_keeps_its_name_and_is_not_taken_for_ours() -> None:
    def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
        return 0.5

    def mAP(model: nn.Module, batches: Iterable[Any]) -> float:  # noqa: N802
        return 0.5

    net = network()
    for metric, name in ((accuracy, "Own accuracy"), (mAP, "mAP")):
        found = compare(net, net, Data(test=labelled(net), metric=metric), latency=False)
        assert found.difference_error is None
        gain = found.gain("accuracy")
        assert gain is not None
        assert gain.text == f"{name} changed by +0."


def fails(model: nn.Module, batches: Iterable[Any]) -> float:
    return 1 / 0


def takes_one(model: nn.Module) -> float:
    return 1.0


def gives_none(model: nn.Module, batches: Iterable[Any]) -> None:
    return None


def gives_many(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    return torch.zeros(3)


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (fails, r"it fails \(ZeroDivisionError: division by zero\)"),
        (takes_one, r"it fails \(TypeError: takes_one\(\) takes 1 positional argument but 2"),
        (gives_none, "it returned None, which is no number"),
        (gives_many, r"it returned tensor\(\[0\., 0\., 0\.\]\), which is no number"),
    ],
)
def test_a_metric_that_is_none_is_blamed(metric: Any, told: str) -> None:
    net = network()
    data = Data(test=labelled(net), metric=metric)
    with pytest.raises(DataError, match=f"the metric '{metric.__name__}': {told}") as found:
        measure(net, data, latency=False)
    assert "metric(model, batches)" in found.value.why
    with pytest.raises(DataError, match="the metric"):
        compare(net, net, data, latency=False)
