"""A network without some of its layers can be saved and loaded, whatever its configuration states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.drive.structural.depth import drop_blocks
from secateur.frontends.transformers_save import load_transformers, save_transformers

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("drop", [1, 2])
def test_layers_that_are_stated_in_a_nest_of_lists(drop: int, tmp_path: Path) -> None:
    """GPT-Neo refuses a configuration with another number of kinds of attention than of layers."""
    config = transformers.GPTNeoConfig(
        hidden_size=16, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        vocab_size=50, window_size=4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    small = drop_blocks(transformers.GPTNeoForCausalLM(config).eval(), drop, [IDS])
    model: Any = small.model
    model.save_pretrained(tmp_path / "plain")  # its configuration is one that can be written
    saved = save_transformers(model, tmp_path / "ours", small.surgery)
    for loaded in (
        load_transformers(tmp_path / "ours"),
        *[type(model).from_pretrained(tmp_path / "ours").eval()] * saved.uniform,
    ):
        with torch.no_grad():
            assert torch.equal(loaded(**IDS).logits, model(**IDS).logits)
