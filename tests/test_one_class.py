"""Right answers that are all of one class are told: such data cannot show what was lost."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from secateur import compare, measure
from secateur.report import measurement_table

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def batches(labels: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(X[: len(labels)].split(8), labels.split(8), strict=True))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.full((40,), 2), True),
        (torch.full((20,), 2), True),
        (torch.full((19,), 2), False),  # so few may be alike by chance
        (torch.arange(40) // 39, False),
        (torch.full((40,), 2).index_fill(0, torch.arange(9), -100), True),  # -100 does not count
    ],
    ids=["all", "enough", "few", "one other", "one that counts"],
)
def test_one_class_is_told(labels: torch.Tensor, told: bool) -> None:
    net, other = nn.Linear(4, 3), nn.Linear(4, 3)
    one = measure(net, batches(labels), latency=False)
    assert one.one_class is told
    assert ("one only" in shown(measurement_table(one))) is told
    found = compare(net, other, batches(labels), latency=False)
    assert (found.a.one_class, found.b.one_class) == (told, told)
    assert ("of one class only" in found.gain("accuracy").text) is told


def test_without_classes_there_is_not_one() -> None:
    numbers = [(X, torch.zeros(40, 3))]
    assert not measure(nn.Linear(4, 3), numbers, latency=False).one_class
    assert not measure(nn.Linear(4, 3), [X], latency=False).one_class
