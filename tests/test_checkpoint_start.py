"""A checkpoint folder belongs to the weights that its run began with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from restless import X, Y, net
from torch import nn

from secateur import Data, FineTune, Recipe, Target, finetune, prune, recipes
from secateur.core.errors import FileError, UsageError
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import train_and_shrink
from secateur.drive.training.learn_masks import learn_masks
from secateur.learn import Leap
from secateur.schedule import Linear
from secateur.score import Wanda

BATCHES = [(X[:20], Y[:20]), (X[20:], Y[20:])]
HALF = Target("sparsity", 0.5)
TRAINED = FineTune(2)
PACE = Pace(Linear(begin=0, end=1, frequency=1, unit="epochs"))


def plain(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


RUNS: dict[str, Any] = {
    "gradual": lambda m, f: prune(m, recipes.gmp(0.5, epochs=2), BATCHES, checkpoint=f),
    "one-shot": lambda m, f: prune(
        m, Recipe(target=HALF, recovery=(TRAINED,)), BATCHES, checkpoint=f
    ),
    "finetune": lambda m, f: finetune(m, Data(train=BATCHES), TRAINED, checkpoint=f),
    "learned": lambda m, f: learn_masks(m, BATCHES, Leap.short(0.5), TRAINED, checkpoint=f),
    "shrink": lambda m, f: train_and_shrink(m, BATCHES, how=TRAINED, pace=PACE, checkpoint=f),
}


@pytest.mark.parametrize("kind", RUNS)
def test_another_network_of_the_same_shape_is_refused(kind: str, tmp_path: Path) -> None:
    run = RUNS[kind]
    run(plain(0), tmp_path)
    run(plain(0), tmp_path)  # the same call goes on, and is done
    other = plain(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UsageError, match=r"its start is .* started from other weights"):
        run(other, tmp_path)
    if kind != "finetune":  # that one works in place
        assert all(torch.equal(before[n], v) for n, v in other.state_dict().items())


OTHERS: dict[str, Any] = {
    "finetune": lambda m, f, how: finetune(m, Data(train=BATCHES), how, checkpoint=f),
    "learned": lambda m, f, how: learn_masks(m, BATCHES, Leap.short(0.5), how, checkpoint=f),
    "shrink": lambda m, f, how: train_and_shrink(m, BATCHES, how=how, pace=PACE, checkpoint=f),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("how", [FineTune(2, lr=0.5), FineTune(3), FineTune(2, optimizer="adamw")])
def test_other_settings_are_refused(kind: str, how: FineTune, tmp_path: Path) -> None:
    run, network = OTHERS[kind], plain(0)
    run(plain(0), tmp_path, TRAINED)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UsageError, match=r"begun with .*, and now .* is asked for|optimizer"):
        run(network, tmp_path, how)
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_masks_go_on_learning_with_the_same_distillation_only(
    distill: float, tmp_path: Path
) -> None:
    """Their loss distils by itself: the loop, which compares settings, is told of none."""
    how = dataclasses.replace(TRAINED, distill=distill)
    OTHERS["learned"](plain(0), tmp_path, how)
    OTHERS["learned"](plain(0), tmp_path, how)
    with pytest.raises(UsageError, match=rf"begun with distill={distill:g}.* now distill=0\.9"):
        OTHERS["learned"](plain(0), tmp_path, dataclasses.replace(how, distill=0.9))


def test_a_run_may_go_on_with_another_answer_to_nan(tmp_path: Path) -> None:
    finetune(plain(0), Data(train=BATCHES), TRAINED, checkpoint=tmp_path)
    calmer = dataclasses.replace(TRAINED, on_nan="rollback")
    assert len(finetune(plain(0), Data(train=BATCHES), calmer, checkpoint=tmp_path)) == 2


def test_masks_are_those_of_the_weights_when_other_data_chose_others(tmp_path: Path) -> None:
    recipe = Recipe(Wanda(), target=HALF, recovery=(TRAINED,))
    scaled = [(x * torch.tensor([9.0, 1, 1, 1, 1, 1]), y) for x, y in BATCHES]
    first = prune(net(), recipe, BATCHES, checkpoint=tmp_path)
    second = prune(net(), recipe, scaled, checkpoint=tmp_path)
    alone = prune(net(), recipe, scaled)
    assert alone.masks != first.masks  # so the question arises
    assert second.masks == first.masks
    for name, mask in second.masks.items():
        assert not second.model.get_parameter(name)[~mask].any()
    kept = {layer.name: layer.kept for layer in second.facts.layers}
    assert kept == {name: int(mask.sum()) for name, mask in second.masks.items()}
    assert [n.topic for n in second.facts.notes].count("checkpoint") == 1
    assert "checkpoint" not in [n.topic for n in first.facts.notes]


@pytest.mark.parametrize("kind", RUNS)
def test_a_place_that_cannot_be_written_is_found_before_the_training(
    kind: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    net = plain(0)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += torch.is_grad_enabled()

    net.register_forward_hook(count)
    with pytest.raises(FileError, match="nothing can be written"):
        RUNS[kind](net, taken)
    assert steps == 0
    assert taken.read_text() == "a file"
