"""Examples are moved to where the network is: a batch of a loader is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur.drive.structural.layer_uses import layers_of
from secateur.structure import couple, cuts_for
from secateur.structure.cut import apply_
from secateur.structure.masked import call, run_masked

# The one device that every machine has beside its processor: it has shapes and no values.
META = torch.device("meta")


class Named(nn.Sequential):
    def forward(self, x: Any, scale: Any = None) -> Any:
        x = super().forward(x)
        return x if scale is None else {"out": x * scale["by"]}


def net() -> Named:
    return Named(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).to(META)


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(3, 2),
        (torch.ones(3, 2),),
        {"x": torch.ones(3, 2), "scale": {"by": torch.ones(1)}},
        (torch.ones(3, 2), {"by": torch.ones(1)}),
    ],
)
def test_a_network_runs_on_an_example_of_another_device(example: Any) -> None:
    whole = net()
    structure, keep = couple(whole, example), {"0": torch.arange(8) < 5}
    outputs = [call(whole, example), run_masked(whole, structure, keep, example)]
    apply_(whole, cuts_for(whole, structure, keep))
    outputs.append(call(whole, example))
    for found in outputs:
        x = found["out"] if isinstance(found, dict) else found
        assert (x.device, x.shape) == (META, (3, 1))


def test_layers_are_counted_on_an_example_of_another_device() -> None:
    found = layers_of(net(), torch.ones(3, 2))
    assert [(use.layer.inputs, use.layer.outputs, use.layer.rows) for use in found] == [
        (2, 8, 3),
        (8, 1, 3),
    ]
