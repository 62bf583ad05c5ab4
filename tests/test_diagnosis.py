"""What the facts say of a layer's error curve."""

import torch
from torch import nn

from secateur import Recipe, prune
from secateur.pattern import NM


def test_no_knee_is_told_of_a_pattern_with_one_level() -> None:
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(0))]
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    pruned = prune(net, Recipe(pattern=NM(1, 4)), batches)
    assert [layer.knee for layer in pruned.facts.layers] == [None]
    assert "beyond-knee" not in {note.topic for note in pruned.facts.notes}
    assert prune(net, Recipe(), batches).facts.layers[0].knee is not None
