"""Accuracy, loss and perplexity of texts: tokens, whatever batches and padding they come in."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.batches import Data
from secateur.evaluate import measure


class Tagger(nn.Module):
    """Looks like a Transformers model: keyword arguments, its own loss, shifted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)
        with torch.no_grad():  # predicts the next number
            self.table.weight.copy_(torch.eye(5).roll(1, 1))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.table(input_ids)
        return SimpleNamespace(logits=logits, loss=None if labels is None else torch.tensor(0.25))


def test_causal_labels_are_shifted_and_others_are_not() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 0]])
    causal = measure(Tagger(), [{"input_ids": ids, "labels": ids}], latency=False)
    assert (causal.accuracy, causal.loss) == (1.0, 0.25)
    tags = (ids + 1) % 5
    tagged = measure(Tagger(), [{"input_ids": ids, "labels": tags}], latency=False)
    assert (tagged.accuracy, tagged.perplexity) == (1.0, None)


@pytest.mark.parametrize("own", [True, False])
def test_perplexity_counts_every_token_alike(own: bool) -> None:
    """Batches of different lengths, tokens that do not count, and a loss that is not cross-entropy."""
    short, long = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    ignored = torch.tensor([[0, 1, -100, -100, -100, -100, -100]])
    losses = iter([1.0, 2.0, 4.0])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.tensor(next(losses))

    net = Tagger()
    torch.nn.init.normal_(net.table.weight)
    batches = [
        {"input_ids": short, "labels": short},
        {"input_ids": long, "labels": long},
        {"input_ids": long, "labels": ignored},
    ]
    found = measure(net, Data(test=batches, loss=None if own else loss), latency=False)
    assert found.loss == (0.25 if own else (1 * 1.0 + 6 * 2.0 + 1 * 4.0) / 8)
    with torch.no_grad():
        logits = net.table(torch.tensor([0, 0, 1, 2, 3, 4, 0, 0]))
    nats = nn.functional.cross_entropy(logits, torch.tensor([1, 1, 2, 3, 4, 0, 1, 1]))
    assert found.perplexity == pytest.approx(math.exp(nats))


class Scored(nn.Module):
    """Computes the mean loss of all labels that count, as models of Transformers do."""

    def __init__(self, shifts: bool) -> None:
        super().__init__()
        self.table, self.shifts = nn.Embedding(5, 5), shifts

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.table(input_ids)
        rows, target = (logits[:, :-1], labels[:, 1:]) if self.shifts else (logits, labels)
        loss = nn.functional.cross_entropy(rows.flatten(0, 1), target.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


@pytest.mark.parametrize("shifts", [True, False])
def test_the_loss_of_texts_does_not_depend_on_how_they_are_batched(shifts: bool) -> None:
    net, ids = Scored(shifts), torch.randint(5, (6, 9))
    length = torch.tensor([2, 9, 3, 9, 5, 1])
    labels = torch.where(torch.arange(9) < length[:, None], ids, -100)
    if not shifts:
        labels = torch.where(labels == -100, labels, (labels + 1 + torch.arange(9)) % 5)
    found = []
    for sizes in ([6], [1] * 6, [2, 3, 1], [5, 1]):
        batches = [
            {"input_ids": x, "labels": y}
            for x, y in zip(ids.split(sizes), labels.split(sizes), strict=True)
        ]
        found.append(measure(net, batches, latency=False))
    with torch.no_grad():
        whole = float(net(ids, labels).loss)
    for one in found:
        assert one.loss == pytest.approx(whole)
        assert one.accuracy == found[0].accuracy
        if shifts:
            assert one.perplexity == pytest.approx(math.exp(whole))
        else:
            assert one.perplexity is None


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "BertForTokenClassification"])
def test_the_loss_of_padded_texts_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(**sizes, n_positions=12, bos_token_id=0, eos_token_id=0)
    else:
        config = transformers.BertConfig(**sizes, intermediate_size=16, num_labels=3)
    net = getattr(transformers, kind)(config)
    ids = torch.randint(20, (4, 12))
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5], [2]])).long()
    labels = ids if kind == "GPT2LMHeadModel" else ids % 3
    whole = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, -100),
    }
    single = [{name: x[i : i + 1] for name, x in whole.items()} for i in range(4)]
    one, each = (measure(net, batches, latency=False) for batches in ([whole], single))
    assert each.loss == pytest.approx(one.loss, rel=1e-5)
    if one.perplexity is not None and one.loss is not None:
        assert math.log(one.perplexity) == pytest.approx(one.loss)
    assert (one.perplexity is None) == (kind == "BertForTokenClassification")
