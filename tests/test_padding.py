"""What is measured does not depend on how sentences are padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from secateur import prune, recipes  # noqa: E402 - only where it is installed
from secateur.frontends import discover  # noqa: E402
from secateur.score import BlockInfluence  # noqa: E402
from secateur.stats import InputNorm, collect  # noqa: E402
from secateur.stats.activations import Gram, Positions, Sketch  # noqa: E402
from secateur.stats.experts import expert_outputs  # noqa: E402

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
PLAIN = [[{k: x for k, x in batch.items() if k != "labels"} for batch in way] for way in WAYS]


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


def test_tokens_of_all_samples_in_one_row_are_told_apart() -> None:
    torch.manual_seed(0)
    net = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=99, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16,
        )
    ).eval()  # fmt: skip
    slots = [s for s in discover(net) if s.rows is not None]
    assert any("fc1" in s.name for s in slots)  # reads (samples * tokens, features)
    found = [collect(net, slots, [InputNorm()], way) for way in PLAIN]
    for slot in slots:
        weight = slot.weight(net)
        for other in found[1:]:
            torch.testing.assert_close(
                found[0](InputNorm(), weight), other(InputNorm(), weight), rtol=1e-4, atol=1e-5
            )


def test_a_decoder_as_long_as_its_encoder_has_tokens_of_its_own() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    net = transformers.T5ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(1, 99, (3, 8)), torch.randint(1, 99, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    influence = BlockInfluence(("decoder.block.0", "decoder.block.1"))
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(1 - torch.cosine_similarity(args[0], output[0], dim=-1).mean())

    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    stats = collect(net, [], influence.needs, [batch])
    for block in net.decoder.block:
        block.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        net(**batch)
    torch.testing.assert_close(influence(stats), torch.stack(seen), rtol=1e-4, atol=1e-5)


class Mixture(nn.Module):
    """Two linear experts, of which a token takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        best = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (best.indices == number).nonzero()[:, 0]
            out = out.index_add(0, own, expert(flat[own]) * best.values[own, None])
        return out.reshape(x.shape)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.moe = nn.Embedding(99, 8), Mixture()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.moe(self.table(input_ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["stacked", "listed"])
def test_experts_are_judged_by_real_tokens(kind: str) -> None:
    torch.manual_seed(0)
    net, path = Mixed().eval(), "moe.experts"
    if kind == "stacked":
        config = transformers.MixtralConfig(
            vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
        )  # fmt: skip
        net = transformers.MixtralForCausalLM(config).eval()
        path = "model.layers.0.mlp.experts"
    found = [expert_outputs(net, path, way) for way in PLAIN]
    assert bool((found[0] > 0).all())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-8)
