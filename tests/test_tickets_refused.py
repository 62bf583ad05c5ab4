"""Ticket searches: what is refused, and what is left when one is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tickets_cases import RECIPE, SHORT, build, counted, data, plan, search
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur.core.errors import DataError, FormatError, UsageError
from secateur.core.masks import Masks
from secateur.experiments import TicketPlan, Training
from secateur.experiments.ticket import reset_
from secateur.experiments.training import steps_of
from secateur.recover import BatchNorm


def test_another_recipe_has_another_folder(tmp_path: Path) -> None:
    folders = {
        search(tmp_path, how, recipe=recipe).folder
        for how in (plan(levels=(0.5,)), plan(levels=(0.5,), rewind="rate"))
        for recipe in (RECIPE, secateur.Recipe(), secateur.Recipe(seed=1))
    }
    assert len(folders) == 6
    for folder in folders:
        assert Path(folder).name.startswith(
            ("weights-magnitude-elements", "rate-magnitude-elements")
        )


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    one = search(tmp_path, plan(rewind="rate"))
    two = search(tmp_path, plan(rewind="finetune"))
    shutil.rmtree(two.folder)
    shutil.copytree(one.folder, two.folder)
    with pytest.raises(UsageError, match=r"started with plan.*rate.*now.*finetune"):
        search(tmp_path, plan(rewind="finetune"))
    shutil.copy(Path(two.folder) / "run.json", tmp_path / "kept.json")


def test_a_stage_of_another_run_is_refused(tmp_path: Path) -> None:
    one = search(tmp_path, plan(rewind="rate"))
    two = search(tmp_path, plan(rewind="finetune"))
    shutil.rmtree(two.levels[0].folder)
    shutil.copytree(one.levels[0].folder, two.levels[0].folder)
    with pytest.raises(FormatError, match="belongs to another run"):
        search(tmp_path, plan(rewind="finetune"))


def test_a_level_that_came_from_another_network_is_refused(tmp_path: Path) -> None:
    found = search(tmp_path)
    other = search(tmp_path / "other", plan(training=replace(SHORT, seed=1)))
    level, run = Path(found.levels[0].folder), Path(found.folder)
    content = json.loads((level / "stage.json").read_text())
    assert (
        content["parent"]
        != json.loads((Path(other.levels[0].folder) / "stage.json").read_text())["parent"]
    )
    shutil.rmtree(Path(found.dense.folder))
    search(tmp_path)  # the dense training is repeated to the bit, so its children still fit
    shutil.rmtree(level)
    shutil.copytree(run / found.levels[1].name, run / found.levels[0].name)
    with pytest.raises(FormatError, match="stage is"):
        search(tmp_path)


def test_another_network_or_other_first_weights_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    search(tmp_path, model=build())
    with pytest.raises(UsageError, match="another network"):
        search(tmp_path, model=build())

    def narrow() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    with pytest.raises(UsageError, match="shapes"):
        search(tmp_path, model=narrow)


@pytest.mark.parametrize("name", ["model.safetensors", "facts.json", "recipe.yaml", "stage.json"])
@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_an_altered_stage_is_refused(tmp_path: Path, name: str, harm: str) -> None:
    found = search(tmp_path, plan(levels=(0.5,)))
    for stage in (found.dense, found.levels[0]):
        file = Path(stage.folder) / name
        content = file.read_bytes()
        place = len(content) // 2
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(flipped if harm == "bit" else content[:-3])
        with pytest.raises(FormatError):
            search(tmp_path, plan(levels=(0.5,)))
        file.write_bytes(content)
    assert search(tmp_path, plan(levels=(0.5,))).levels[0].done


def test_other_damage_is_refused(tmp_path: Path) -> None:
    found = search(tmp_path, plan(levels=(0.5,)))
    extra = Path(found.levels[0].folder) / "notes.txt"
    extra.write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.txt"):
        search(tmp_path, plan(levels=(0.5,)))
    extra.unlink()
    run = Path(found.folder) / "run.json"
    run.write_text(run.read_text().replace("weights", "Weights", 1))
    with pytest.raises(FormatError, match="altered"):
        search(tmp_path, plan(levels=(0.5,)))
    run.unlink()
    with pytest.raises(UsageError, match=r"no run\.json"):
        search(tmp_path, plan(levels=(0.5,)))


def test_an_exploding_loss_keeps_the_stages_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        factor = float("nan") if len(calls) == 3 else 1.0
        return functional.cross_entropy(model(batch[0]), batch[1]) * factor

    feed = replace(data(), loss=loss)
    with pytest.raises(DataError, match="the loss is nan"):
        search(tmp_path, data=feed)
    found = search(tmp_path, data=feed)
    assert [stage.done for stage in (found.dense, *found.levels)] == [True, True, False]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: plan(rewind="back"), "rewind is one of"),
        (lambda: plan(levels=(0.5, 0.5)), "rising"),
        (lambda: plan(levels=()), "rising"),
        (lambda: plan(levels=(0.5, 1.0)), "rising"),
        (lambda: plan(rewind="reinit", rewind_to=1), "from the start"),
        (lambda: plan(rewind_to=-1), "0 or more"),
        (lambda: plan(rewind_to=1.5, unit="steps"), "whole"),
        (lambda: Training(epochs=0), "positive"),
        (lambda: Training(decay="linear"), "cosine"),
        (lambda: Training(warmup=1), "warmup"),
    ],
)
def test_wrong_plans_are_refused(make: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


def test_what_cannot_be_rewound_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    masked = build()
    secateur.attach_(masked, Masks({"0.weight": torch.ones(32, 8, dtype=torch.bool)}))
    cases: list[tuple[dict[str, Any], TicketPlan, str]] = [
        ({}, plan(rewind_to=3), "something left to train"),
        ({"recipe": secateur.Recipe(recovery=BatchNorm())}, plan(), "repairs"),
        ({"recipe": secateur.recipes.gmp(0.5)}, plan(), "repairs"),
        ({"recipe": secateur.Recipe(target=secateur.Target("params", 0.5))}, plan(), "params"),
        ({"data": None}, plan(), "no training data"),
        ({"data": []}, plan(), "no batches"),
        ({"model": masked}, plan(), "carries masks"),
        ({"recipe": secateur.Recipe(scope=secateur.Scope(ignore="*"))}, plan(), "nothing to prune"),
    ]
    for changes, how, match in cases:
        with pytest.raises((UsageError, DataError), match=match):
            search(tmp_path / "runs", how, **changes)
        assert not (tmp_path / "runs").exists()


def test_reset_refuses_what_it_cannot_draw_again() -> None:
    with pytest.raises(UsageError, match="reset_parameters"):
        reset_(nn.MultiheadAttention(4, 2))


def test_steps_of_a_fraction_of_an_epoch() -> None:
    assert steps_of(data(), Training(epochs=0.5)) == (4, 2)
    assert steps_of(data(), Training(epochs=0.01)) == (4, 1)
