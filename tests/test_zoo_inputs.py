"""Every architecture of the zoo is pruned by its inputs, and what cannot be seen is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from oneshot_cases import alias

from bench.zoo import ZOO
from secateur import prune
from secateur.frontends import discover
from secateur.pattern import PerRow

# One weight of two inputs, and weights that fused code multiplies without calling their modules.
HIDDEN = {
    "SigLIP": {"vision_model.head.attention.in_proj_weight"},
    "mamba": {
        f"backbone.layers.{i}.mixer.{n}.weight" for i in (0, 1) for n in ("conv1d", "dt_proj")
    },
    "mamba2": {f"backbone.layers.{i}.mixer.conv1d.weight" for i in (0, 1)},
}


def batch(example: Any) -> Any:
    """Inputs with a label for each sample, which Wanda does not look at."""
    if isinstance(example, Mapping):
        return example
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    return (*inputs, torch.zeros(len(inputs[0])))


@pytest.mark.parametrize("name", ZOO)
def test_wanda_sees_the_inputs_of_all_weights(name: str) -> None:
    net, example = ZOO[name]()
    pruned = prune(net.eval(), alias("wanda"), [batch(example)])
    notes = [note for note in pruned.facts.notes if note.topic == "left-out"]
    assert {n.where for n in notes if "could not be seen" in n.text} == HIDDEN.get(name, set())
    assert not [n.where for n in notes if n.text.startswith("no rule") and "experts" in n.where]
    axes = {slot.name: slot.axes for slot in discover(net)}
    for weight, mask in pruned.masks.items():
        rows = axes[weight].cube(mask).flatten(1)  # type: ignore[union-attr]
        assert (rows.sum(1) == PerRow().quota(rows.shape[1], 0.5)).all(), weight
