"""Cut encoder-decoders of Transformers: saved without an example, and uniform ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.allocate.widths import GivenWidths
from secateur.core.errors import UsageError
from secateur.frontends.transformers_example import example_for

transformers = pytest.importorskip("transformers")

IDS = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
EXAMPLE = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


def t5() -> Any:
    """One ``d_ff`` states the widths of its encoder and of its decoder."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def halved(model: Any) -> secateur.Pruned:
    widths = secateur.structure.couple(model, EXAMPLE).widths
    half = GivenWidths({w.name: 0.5 for w in widths if "Dense" in w.name})
    target = secateur.Target.parse("params=85%")
    recipe = secateur.ShrinkRecipe(allocation=half, target=target, recovery=())
    return secateur.shrink(model, recipe, EXAMPLE)


def test_inputs_for_both_halves_are_made_up(tmp_path: Path) -> None:
    model = t5()
    with torch.no_grad():
        assert model(**example_for(model)).logits.shape == (2, 5, 100)
    small = halved(model)
    saved = secateur.save_transformers(small.model, tmp_path / "out", small.surgery)
    assert saved.uniform
    assert saved.changed == {"d_ff": 32}
    again = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**EXAMPLE).logits, small.model(**EXAMPLE).logits)


def test_an_example_on_which_it_does_not_run_is_refused(tmp_path: Path) -> None:
    small = halved(t5())
    with pytest.raises(UsageError, match=r"it does not run on the example \(ValueError") as caught:
        secateur.save_transformers(
            small.model, tmp_path / "out", small.surgery, example={"input_ids": IDS}
        )
    assert caught.value.do == "pass example=: inputs on which it runs"
    assert not (tmp_path / "out").exists()


def test_uniform_evens_the_encoder_with_the_decoder(tmp_path: Path) -> None:
    target = secateur.Target.parse("params=80%")
    scope = secateur.Scope(ignore=("shared", "re:.*Attention.*"))
    recipe = secateur.ShrinkRecipe(uniform=True, scope=scope, target=target, recovery=())
    small = secateur.shrink(t5(), recipe, EXAMPLE)
    kept = {w.kept for w in small.facts.widths if "Dense" in w.name}
    assert len(kept) == 1
    saved = secateur.save_transformers(small.model, tmp_path / "out", small.surgery)
    assert saved.uniform
    assert saved.changed == {"d_ff": kept.pop()}
