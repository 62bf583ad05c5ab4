"""A uniform cut of a Transformers model is one that some configuration states, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.core.errors import BudgetError

transformers = pytest.importorskip("transformers")

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def bert() -> Any:
    """Its pooler has a width of its own, which no configuration states."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
        intermediate_size=128, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    """Its residual width is stated only together with its heads."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def shrunk(model: Any, target: str, **settings: Any) -> secateur.Pruned:
    settings = {"uniform": True, "recovery": (), **settings}
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse(target), **settings)
    return secateur.shrink(model, recipe, {"input_ids": IDS})


@pytest.mark.parametrize(
    ("build", "target", "rounds"), [(bert, "params=70%", 1), (bert, "params=80%", 2), (gpt2, "params=65%", 1)]
)  # fmt: skip
def test_uniform_loads_with_plain_from_pretrained(
    build: Any, target: str, rounds: int, tmp_path: Path
) -> None:
    small = shrunk(build(), target, rounds=rounds)
    saved = secateur.save_transformers(small.model, tmp_path / "out", small.surgery)
    assert saved.uniform
    again = type(small.model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, small.model(IDS).logits)
    pinned = [n.where for n in small.facts.notes if "configuration builds" in n.text]
    assert ("bert.pooler.dense" if build is bert else "transformer.wte") in pinned


def test_without_uniform_all_widths_take_part() -> None:
    cut = {w.name for w in shrunk(bert(), "params=80%", uniform=False).facts.widths}
    assert "bert.pooler.dense" in cut


def test_a_target_that_needs_what_no_configuration_states_says_so() -> None:
    with pytest.raises(
        BudgetError, match="no BertForSequenceClassification configuration"
    ) as caught:
        shrunk(bert(), "params=40%")
    assert "remain" in caught.value.found
    assert "leave uniform out" in caught.value.do
