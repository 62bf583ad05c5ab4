"""Features of one kind written among those of another: pictures and sounds among the words of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from structure_layers import fresh, require_exact
from torch import Tensor, nn

import secateur
from secateur.structure import couple

PICTURE = 9
IDS = torch.tensor([[1, PICTURE, PICTURE, 2, 3], [4, PICTURE, 5, 6, PICTURE]])
BOTH = (IDS, torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(0)).double())


class Mixed(nn.Module):
    """The rows of a projected picture take the places of some words."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.words, self.picture = nn.Embedding(12, 16), nn.Linear(6, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, ids: Tensor, picture: Tensor) -> Tensor:
        x, features = self.words(ids), self.picture(picture)
        mask = (ids == PICTURE).unsqueeze(-1)
        if self.form == "expanded":
            mask = mask.expand_as(x)
        if self.form == "counted" and x[mask.expand_as(x)].numel() != features.numel():
            raise ValueError("too few pictures")
        if self.form == "in place":
            x = x.clone().masked_scatter_(mask, features)
        elif self.form == "flat":
            x = x.masked_scatter(mask, features.flatten())
        elif self.form == "uneven":
            x = x.masked_scatter(mask & (torch.arange(16) % 2 == 0), features)
        else:
            x = x.masked_scatter(mask, features)
        out: Tensor = self.out(x)
        return out


@pytest.mark.parametrize("form", ["broadcast", "expanded", "counted", "in place"])
def test_features_that_take_the_places_of_words_have_their_width(form: str) -> None:
    structure = require_exact(lambda: Mixed(form), BOTH)
    (width,) = structure.widths
    assert width.groups == 16
    assert {"words.weight", "picture.weight", "out.weight"} <= set(width.parameters())


@pytest.mark.parametrize("form", ["flat", "uneven"])
def test_entries_that_are_written_one_by_one_stay(form: str) -> None:
    structure = couple(fresh(lambda: Mixed(form)), BOTH)
    assert not structure.widths
    assert "one by one" in structure.pinned["words.weight", 1]
    assert "one by one" in structure.pinned["picture.weight", 0]


class Picking(nn.Module):
    """Rows that a mask picks, of which the values or only the number is used."""

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.values = values
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        picked = x[x > 0]
        if self.values:
            x = x + picked[0]
        elif not picked.numel():
            raise ValueError("nothing was picked")
        out: Tensor = self.two(x)
        return out


def test_only_values_that_are_picked_one_by_one_keep_a_width() -> None:
    example = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    assert not couple(fresh(lambda: Picking(values=True)), example).widths
    assert require_exact(lambda: Picking(values=False), example).widths


def test_the_text_of_a_model_that_sees_can_be_cut() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    sees = transformers.CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, image_size=16, patch_size=8, **sizes
    )
    reads = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, vocab_size=20, num_key_value_heads=2, **sizes
    )
    config = transformers.LlavaConfig(
        vision_config=sees, text_config=reads, image_token_index=9, vision_feature_layer=-1
    )
    ids = torch.tensor([[9, 9, 9, 9, 1, 2, 3]])
    example = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    model = transformers.LlavaForConditionalGeneration(config)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.6), recovery=())
    facts = secateur.shrink(model, recipe, example).facts
    assert facts.measures["proof"] < 1e-5
    cut = {name for width in facts.widths if width.kept < width.groups for name in width.parameters}
    assert {"model.language_model.embed_tokens.weight", "lm_head.weight"} <= cut
