"""Heads that a model cannot do without are not taken from it, and the error says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from secateur.core.errors import UsageError
from secateur.drive.structural.heads import prune_heads

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))


def codegen() -> Any:
    """Its code takes the heads in four parts."""
    config = transformers.CodeGenConfig(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, rotary_dim=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.CodeGenForCausalLM(config)


def t5() -> Any:
    """Its first layer has a bias of positions for the heads of all layers."""
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50
    )
    return transformers.T5EncoderModel(config)


@pytest.mark.parametrize(
    ("build", "numbers", "match"),
    [
        (codegen, [0], "does not run without them .RuntimeError: shape .* is invalid"),
        (t5, [1, 2], r"go together with those of encoder.block.1.layer.0.SelfAttention.q"),
    ],
)
def test_nothing_is_changed_where_heads_cannot_go(build: Any, numbers: Any, match: str) -> None:
    torch.manual_seed(0)
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=match) as caught:
        prune_heads(model, {0: numbers})
    assert "nothing was changed" in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert model(IDS)[0].isfinite().all()


def test_the_proof_is_told() -> None:
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        intermediate_size=4,
    )
    pruned = prune_heads(transformers.BertModel(config), {0: [2]})
    assert 0 <= pruned.facts.measures["proof"] < 1e-5
