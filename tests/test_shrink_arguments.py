"""Arguments of structural pruning that cannot be meant so are refused before anything is done."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.core.errors import DataError, UsageError
from secateur.drive.structural.depth import drop_blocks
from secateur.drive.structural.heads import prune_heads


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({0: 1}, r"the heads of layer 0: 1, an int, was given.*Write heads=\{0: \[1\]\}"),
        ({0: "1"}, r"the heads of layer 0: '1', a str, was given"),
        ({0: ["1"]}, r"a head of layer 0: '1', a str, was given.*It should be an integer"),
        ({0: [True]}, r"a head of layer 0: True, a bool, was given"),
        ({"0": [1]}, r"a layer: '0', a str, was given. It should be an integer"),
        ([0], r"heads: \[0\], a list, was given"),
    ],
)
def test_heads_are_numbers_of_numbered_layers(heads: Any, match: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        vocab_size=9,
        num_attention_heads=2,
        intermediate_size=4,
    )
    model = transformers.BertModel(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=match):
        prune_heads(model, heads)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_numbers_of_other_libraries_name_heads() -> None:
    transformers = pytest.importorskip("transformers")
    numpy = pytest.importorskip("numpy")
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        vocab_size=9,
        num_attention_heads=2,
        intermediate_size=4,
    )
    model = transformers.BertModel(config)
    prune_heads(model, {numpy.int64(0): (n for n in numpy.array([1]))})
    assert model.encoder.layer[0].attention.self.query.weight.shape == (4, 8)


def test_data_without_a_batch_is_told() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(DataError, match="no samples"):
        secateur.shrink(net, None, None, [])
    with pytest.raises(DataError, match="no samples"):
        drop_blocks(net, 1, [])


def test_a_network_that_cannot_be_copied_is_told() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"a copy of the model: .*cannot pickle '_thread.lock'"):
        secateur.shrink(net, None, torch.zeros(1, 8))
