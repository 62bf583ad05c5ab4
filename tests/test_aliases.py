"""Every published method by its name, on three kinds of networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oneshot_cases import CHOSEN, IMAGES, alias, convnet, sound
from torch import nn

from secateur import prune, recipes
from secateur.core.errors import UsageError


@pytest.mark.parametrize("name", sorted(recipes.ALIASES))
def test_alias_on_a_convolutional_network(name: str) -> None:
    net = convnet()
    pruned = prune(net, alias(name), IMAGES)
    sound(pruned, net)
    assert list(pruned.masks) == CHOSEN
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, list[Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.arange(6) % 3,
    }
    return model.eval(), [batch, batch]


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, list[Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(0))
    return model.eval(), [{"input_ids": ids, "labels": ids}] * 2


@pytest.mark.parametrize("name", sorted(recipes.ALIASES))
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_alias_on_a_transformer(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    model, batches = request.getfixturevalue(kind)
    if name == "synflow":  # an input of ones means nothing for token ids
        with pytest.raises(UsageError, match="token ids"):
            prune(model, alias(name), batches)
        return
    pruned = prune(model, alias(name), batches)
    sound(pruned, model)
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.02)
    assert not any("wte" in n or "embedding" in n for n in pruned.masks)
    expected = 2 * (4 if kind == "gpt2" else 6)
    assert len([n for n in pruned.masks if ".h." in n or "encoder.layer" in n]) == expected
    out = pruned.model(**batches[0])
    assert bool(torch.isfinite(out.logits).all())


def test_gpt2_rows_are_outputs(gpt2: tuple[nn.Module, list[Any]]) -> None:
    model, batches = gpt2
    pruned = prune(model, recipes.wanda(0.5), batches)
    mask = pruned.masks["transformer.h.0.attn.c_attn.weight"]  # (in, out)
    assert mask.sum(0).tolist() == [8] * 48


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "magnitude"])
def test_torch_transformer_layers(name: str) -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    pruned = prune(net.eval(), alias(name), [torch.randn(4, 5, 16)])
    sound(pruned, net)
    assert [n.where for n in pruned.facts.notes if n.topic == "left-out"] == ["1.weight"]
    if name != "magnitude":
        for weight in ("in_proj_weight", "out_proj.weight"):
            assert pruned.masks[f"0.self_attn.{weight}"].float().mean() == 0.5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_torch_transformer_layers_with_padding() -> None:
    """PyTorch makes nested tensors of padded inputs, of which no rows can be read."""

    class Padded(nn.TransformerEncoder):
        def forward(self, x: Any, padding: Any) -> Any:  # type: ignore[override]
            return super().forward(x, src_key_padding_mask=padding)

    net = Padded(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    batch = torch.randn(2, 5, 16), padding, torch.zeros(2)
    pruned = prune(net, alias("wanda"), [batch])
    assert pruned.masks["layers.0.linear1.weight"].float().mean() == 0.5
