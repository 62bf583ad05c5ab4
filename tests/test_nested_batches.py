"""Batches whose parts are mappings, tuples or lists of tensors themselves."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import secateur
from secateur.core.batches import narrow, size_of, to_device
from secateur.evaluate import compare


class Featured(nn.Module):
    """Takes all its inputs in one mapping, as Sentence Transformers do, and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.out = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, features: Any) -> torch.Tensor:
        found = self.body(self.table(features["ids"])) * features["mask"].unsqueeze(-1)
        features["embedding"] = found.mean(1)
        return self.out(torch.relu(features["embedding"]))  # type: ignore[no-any-return]


class Paired(Featured):
    """Takes a pair."""

    def forward(self, features: Any) -> torch.Tensor:
        return super().forward({"ids": features[0], "mask": features[1]})


def parts(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, (count, 5), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones(count, 5), torch.arange(count) % 4


def mapping() -> Any:
    ids, mask, labels = parts()
    return {"ids": ids, "mask": mask}, labels


def pair() -> Any:
    ids, mask, labels = parts()
    return [[ids, mask], labels]  # as default_collate gives it


@pytest.mark.parametrize(("model", "batch"), [(Featured, mapping), (Paired, pair)])
def test_a_model_with_nested_inputs_is_pruned_measured_and_trained(model: Any, batch: Any) -> None:
    net, given = model(), batch()
    data = {"train": [given], "test": [given]}
    for recipe in (secateur.recipes.wanda(0.5), secateur.recipes.sparsegpt(0.5)):
        pruned = secateur.prune(net, recipe, {**data, "calibration": 4})
        assert pruned.masks.sparsity == 0.5
    assert secateur.prune(net, secateur.recipes.wanda(0.5), [given[:1]]).masks.sparsity == 0.5
    assert secateur.prune(net, secateur.recipes.gmp(0.5, epochs=2), data).masks.sparsity == 0.5
    assert compare(net, pruned, data, latency=False).verdict
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse("params=70%"), recovery=())
    assert secateur.shrink(net, recipe, (given[0],)).facts.measures["proof"] < 1e-5
    assert list(mapping()[0]) == ["ids", "mask"]


def test_parts_keep_their_class() -> None:
    ids, mask, labels = parts()
    packed = pack_padded_sequence(mask, torch.full((6,), 5), batch_first=True)
    batch = (UserDict(ids=ids, size=5), [ids, (mask,)], packed, None, labels)
    assert size_of(batch) == 6
    moved = to_device(batch, torch.device("cpu"))
    assert moved[2] is packed
    short = narrow((*batch[:2], None, labels), 2, 1)
    for found in (moved, short):
        assert isinstance(found[0], UserDict)
        assert found[0]["size"] == 5
        assert found[-2] is None
    assert torch.equal(short[0]["ids"], ids[1:3])
    assert torch.equal(short[1][1][0], mask[1:3])
    assert len(batch[0]["ids"]) == len(ids)
    meta = to_device(batch, torch.device("meta"))
    assert meta[0]["ids"].is_meta
    assert meta[1][1][0].is_meta
