"""Batches of one sample: BatchNorm may have no variance there, or may have one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import FineTune, Recipe, TicketPlan, find_ticket, prune
from secateur.core.errors import DataError
from secateur.experiments import Training
from secateur.recover import BatchNorm

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4)
    )


def conv(last: int = 8) -> nn.Module:
    """Its second normalisation sees ``last`` x ``last`` positions of each sample."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(last),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * last * last, 4),
    )  # fmt: skip


def odd(count: int = 9, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 16)
    y = torch.randint(4, (count,))
    return list(zip(x.split(batch), y.split(batch), strict=True))


TRAININGS: dict[str, Callable[[Path], Any]] = {
    "finetune": lambda _: prune(flat(), Recipe(recovery=FineTune(1)), odd()),
    "ticket": lambda place: find_ticket(
        flat,
        data=odd(),
        plan=TicketPlan(levels=(0.5,), training=Training(epochs=1)),
        folder=place,
    ),
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_last_batch_of_one_is_explained(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training Sequential on a batch of one sample") as caught:
        TRAININGS[kind](tmp_path / "t")
    assert "drop_last=True" in caught.value.do
    assert all(caught.value.parts().values())


def test_other_failures_keep_their_reason() -> None:
    data = [(x, y + 9) for x, y in odd(8)]
    with pytest.raises(DataError, match="its own loss fails"):
        prune(flat(), Recipe(recovery=FineTune(1)), data)


def test_one_image_has_statistics() -> None:
    net = conv().eval()
    drifts = BatchNorm().reestimate_(net, [image[None] for image in IMAGES])
    assert set(drifts) == {"1", "5"}
    with torch.no_grad():
        means = net[0](IMAGES).mean((0, 2, 3))
    torch.testing.assert_close(net[1].running_mean, means)


@pytest.mark.parametrize("net", [flat(), conv(last=1)], ids=["1d", "2d"])
def test_where_one_sample_has_none_nothing_changes_and_the_facts_say_so(net: nn.Module) -> None:
    inputs = torch.randn(3, 16) if isinstance(net[0], nn.Linear) else IMAGES[:3]
    before = {n: x.clone() for n, x in net.named_buffers()}
    assert BatchNorm().reestimate_(net, list(inputs.split(1))) == {}
    assert all(torch.equal(before[n], x) for n, x in net.named_buffers())
    assert all(
        m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    )
    data = [(x, torch.zeros(1, dtype=torch.long)) for x in inputs.split(1)]
    pruned = secateur.prune(net, Recipe(recovery=BatchNorm()), data)
    (note,) = (n for n in pruned.facts.notes if n.topic == "batchnorm")
    assert note.text.startswith("nothing was measured")


def test_single_samples_among_batches_are_left_out_only_where_they_must() -> None:
    mixed, without = flat().eval(), flat().eval()
    inputs = torch.randn(9, 16)
    BatchNorm().reestimate_(mixed, list(inputs.split(4)))
    BatchNorm().reestimate_(without, list(inputs[:8].split(4)))
    torch.testing.assert_close(mixed[1].running_mean, without[1].running_mean)
    torch.testing.assert_close(mixed[1].running_var, without[1].running_var)
