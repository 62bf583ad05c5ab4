"""Transformers models of several types, and how they generate, are the same after loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.frontends.source import load_model
from secateur.frontends.transformers_save import load_transformers, save_transformers

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
RECIPE = secateur.ShrinkRecipe(target=secateur.Target.parse("params=85%"), recovery=(), align=1)


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=50, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def t5(folder: Path) -> Any:
    """In half precision, but for what the class keeps in single precision."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(folder)
    return load_model(str(folder)).model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    types = {name: x.dtype for name, x in a.items()} == {name: x.dtype for name, x in b.items()}
    return types and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_a_converted_model_with_widths_of_each_layer_is_loaded(dtype: Any, tmp_path: Path) -> None:
    """Whatever type its configuration states, if any."""
    model = llama(dtype=dtype).bfloat16()
    pruned = secateur.shrink(model, RECIPE, {"input_ids": IDS})
    saved = save_transformers(pruned.model, tmp_path / "out", pruned.surgery)
    assert not saved.uniform
    loaded: Any = load_transformers(tmp_path / "out")
    assert same(loaded.state_dict(), pruned.model.state_dict())
    assert loaded.config.dtype == torch.bfloat16


def test_a_model_with_widths_of_each_layer_generates_as_before(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[1, 2], pad_token_id=0, max_new_tokens=5, num_beams=2, do_sample=False
    )
    pruned = secateur.shrink(model, RECIPE, {"input_ids": IDS})
    assert not save_transformers(pruned.model, tmp_path / "out", pruned.surgery).uniform
    loaded: Any = load_transformers(tmp_path / "out")
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    assert torch.equal(loaded.generate(IDS), pruned.model.generate(IDS))
    # So does what is built from that folder for a bundle.
    folder = str(tmp_path / "out")
    again = secateur.shrink(load_model(folder).model, RECIPE, {"input_ids": IDS})
    built: Any = load_model(str(again.save(tmp_path / "bundle")), model=folder).model
    assert built.generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize("uniform", [False, True])
def test_weights_in_single_precision_beside_half_ones_are_loaded(
    uniform: bool, tmp_path: Path
) -> None:
    model = t5(tmp_path / "t5")
    assert {x.dtype for x in model.parameters()} == {torch.float16, torch.float32}
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    pruned = secateur.shrink(model, replace(RECIPE, uniform=uniform), example)
    bundle = load_model(str(pruned.save(tmp_path / "bundle")), model=str(tmp_path / "t5")).model
    assert same(bundle.state_dict(), pruned.model.state_dict())
    saved = save_transformers(pruned.model, tmp_path / "out", pruned.surgery, example=example)
    assert saved.uniform == uniform
    assert same(load_transformers(tmp_path / "out").state_dict(), pruned.model.state_dict())
