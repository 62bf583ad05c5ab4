"""What is measured does not depend on how sentences are padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from secateur import prune, recipes  # noqa: E402 - only where it is installed
from secateur.frontends import discover  # noqa: E402
from secateur.score import BlockInfluence  # noqa: E402
from secateur.stats import InputNorm, collect  # noqa: E402
from secateur.stats.activations import Gram, Positions, Sketch  # noqa: E402

GIVEN = torch.Generator().manual_seed(0)
LENGTHS = torch.randint(4, 12, (16,), generator=GIVEN).tolist()
SENTENCES = [torch.randint(1, 99, (n,), generator=GIVEN) for n in LENGTHS]


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=99, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def batches(size: int, length: int = 0) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(SENTENCES), size):
        rows = SENTENCES[start : start + size]
        ids = torch.zeros(len(rows), max(length, *map(len, rows), 0), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        labels = torch.zeros(len(rows), dtype=torch.long)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


WAYS = [batches(1), batches(4), batches(8, 40)]


def test_masks_are_the_same_however_sentences_are_padded() -> None:
    found = [prune(model(), recipes.wanda(0.5), data=way).masks for way in WAYS]
    assert found[0] == found[1] == found[2]


def test_a_batch_of_nothing_but_padding_counts_for_nothing() -> None:
    real = batches(4)
    empty = {name: x.clone() for name, x in real[0].items()}
    empty["attention_mask"] = torch.zeros_like(empty["attention_mask"])
    slots = [s for s in discover(model()) if s.prunable and ".layer." in s.name]  # read all tokens
    for need in (InputNorm(), Sketch(), Gram()):
        with_it, without = (collect(model(), slots, [need], way) for way in ([empty, *real], real))
        for slot in slots:
            weight = slot.weight(model())
            assert torch.equal(with_it(need, weight), without(need, weight))


def test_input_norms_and_block_influence_are_those_of_real_tokens() -> None:
    net = model()
    slots = [s for s in discover(net) if s.prunable]
    influence = BlockInfluence(("bert.encoder.layer.0", "bert.encoder.layer.1"))
    norms, moves = [], []
    for way in WAYS:
        stats = collect(net, slots, [InputNorm(), *influence.needs], way)
        norms.append(torch.cat([stats(InputNorm(), s.weight(net)).flatten() for s in slots]))
        moves.append(influence(stats))
    for other in (1, 2):
        torch.testing.assert_close(norms[0], norms[other], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moves[0], moves[other], rtol=1e-3, atol=1e-7)
    # Padding is multiplied all the same.
    slot = next(s for s in slots if s.name.endswith("layer.0.output.dense.weight"))
    stats = collect(net, [slot], [Positions()], WAYS[2])
    assert float(stats(Positions(), slot.weight(net))) == 40
