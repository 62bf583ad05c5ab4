"""Masks that are applied by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import UsageError


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [("2.weight", (4, 16), "no such parameter"), ("1.weight", (4, 4), "its shape there is")],
)
def test_masks_of_another_network_change_nothing(
    name: str, shape: tuple[int, ...], found: str
) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    before = [x.clone() for x in net.parameters()]
    masks = secateur.Masks(
        {"0.weight": torch.zeros(16, 16).bool(), name: torch.zeros(shape).bool()}
    )
    with pytest.raises(UsageError, match=found) as caught:
        masks.apply_(net)
    assert all(caught.value.parts().values())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
