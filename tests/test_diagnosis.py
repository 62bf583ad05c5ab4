"""What the facts say of a layer's error curve."""

import pytest
import torch
from torch import nn

from secateur import Recipe, prune, recipes
from secateur.pattern import NM


def test_no_knee_is_told_of_a_pattern_with_one_level() -> None:
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(0))]
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    pruned = prune(net, Recipe(pattern=NM(1, 4)), batches)
    assert [layer.knee for layer in pruned.facts.layers] == [None]
    assert "beyond-knee" not in {note.topic for note in pruned.facts.notes}
    assert prune(net, Recipe(), batches).facts.layers[0].knee is not None


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        (recipes.magnitude(0.999), "the allocation 'erk', the criterion 'lamp', or a lower level"),
        (recipes.erk_magnitude(0.999), "consider the criterion 'lamp', or a lower level"),
        (recipes.lamp(0.999), "consider the allocation 'erk', or a lower level"),
    ],
)
def test_nearly_empty_layers_are_not_advised_what_the_recipe_does(
    recipe: Recipe, advice: str
) -> None:
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    (note,) = (note for note in prune(net, recipe).facts.notes if note.topic == "nearly-empty")
    assert advice in note.text
    assert note.text.startswith("only 2 of 2,048 weights are left")


def test_one_weight_is_left() -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    texts = [note.text for note in prune(net, recipes.magnitude(0.999)).facts.notes]
    assert any(text.startswith("only 1 of 512 weights is left") for text in texts)
