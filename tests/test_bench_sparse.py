"""The studies of sparse training and of overhead: resuming, and the arithmetic of their summaries."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import secateur
from bench import cifar, overhead, record, sparse_training, training


def images(count: int = 64) -> cifar.Augmented:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return cifar.augmented(cifar.Split(pixels, torch.arange(count) % 10), batch=4)


@pytest.mark.parametrize("arm", sparse_training.ARMS[1:])
def test_an_interrupted_arm_ends_like_a_whole_one(arm: str, tmp_path: Path) -> None:
    recipe, batches = training.Recipe(epochs=4, batch=4, warmup=0.5), images(40)
    path, length = tmp_path / "run.safetensors", 4 * len(batches)

    def start() -> tuple[training.Run, secateur.Gradual]:
        run = training.start(recipe, seed=0, depth=8)
        made = sparse_training.recipe_of(arm, length, 3, seed=0)
        return run, secateur.Gradual(run.model, run.optimizer, made, steps=length)

    whole, pruner = start()
    for _ in range(4):
        training.train_epoch(whole, batches, seed=0, after_step=pruner.step)
    expected = pruner.finalize().masks
    for _ in range(4):  # each epoch in a process of its own
        run, pruner = start()
        if path.exists():
            sparse_training.take_up(pruner, training.load(run, path))
        training.train_epoch(run, batches, seed=0, after_step=pruner.step)
        training.save(run, path, more=sparse_training.state_of(pruner))
    assert pruner.finalize().masks == expected
    assert expected.sparsity == pytest.approx(0.9, abs=1e-3)
    for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_arms_start_alike() -> None:
    starts = []
    for arm in ("static", "set", "rigl"):
        run = training.start(training.Recipe(), seed=3, depth=8)
        made = sparse_training.recipe_of(arm, 1000, 100, seed=3)
        starts.append(secateur.Gradual(run.model, run.optimizer, made, steps=1000).masks)
    assert starts[0] == starts[1] == starts[2]


def test_differences_are_counted_image_by_image() -> None:
    labels = torch.arange(200) % 10
    files = {}
    for arm, wrong in (("rigl", [3, 4]), ("set", [4, 5, 6, 7])):
        for seed in (0, 1):
            found = labels.clone()
            found[wrong[: len(wrong) - seed]] += 1
            digits = "".join(str(int(d) % 10) for d in found)
            files[arm, seed] = {"predictions": digits}
    row = sparse_training.difference(files, ("rigl", "set"), labels)
    # Seed 0: three won, one lost. Seed 1: rigl errs on image 3, set on 4, 5 and 6.
    assert row["seeds"] == [1.0, 1.0]
    assert (row["mean"], row["least"], row["most"]) == (1.0, 1.0, 1.0)
    variance = 2 * (4 - 4 / 200)
    assert row["standard_error_of_images"] == pytest.approx(
        100 * math.sqrt(variance) / 200 / 2, abs=1e-4
    )


def test_the_summary_names_the_best_arm(tmp_path: Path) -> None:
    try:
        labels = cifar.training_splits()[1].labels[:500]
    except cifar.DataMissing:
        pytest.skip("the data are not there")
    plan = sparse_training.Plan()
    for place, arm in enumerate(sparse_training.ARMS):
        for seed in (0, 1):
            found = labels.clone()
            wrong = 5 * place + seed
            found[:wrong] = (found[:wrong] + 1) % 10
            result = {
                "test": {"accuracy": 100 * (500 - wrong) / 500, "images": 500},
                "history": [{"seconds": 2.0}, {"seconds": 3.0}],
                "sparsity_of_pruned_weights": 0.9,
                "sparsity_of_whole_model": 0.8,
                "predictions": "".join(map(str, found.tolist())),
            }
            watch = record.Stopwatch()
            record.write(plan.name(arm, seed), result, seeds=[seed], watch=watch, folder=tmp_path)
    (tmp_path / f"{plan.name('dense', 2)}.json").write_text("{}")  # a seed without its other arms
    whole = sparse_training.summarise(plan, folder=tmp_path)
    assert whole["seeds"] == [0, 1]
    assert [a["mean"] for a in whole["result"]["arms"][:2]] == pytest.approx([99.9, 98.9])
    assert whole["result"]["arms"][0]["seconds"] == 5.0
    goals = {g["name"]: (g["found"], g["met"]) for g in whole["goals"]}
    assert goals == {
        "points of rigl above set": (-1.0, False),
        "points of set above static": (-1.0, False),
        "points of the best sparse arm (static) below dense": (1.0, True),
    }
    for arm in ("dense", "acdc", "gradual"):  # not run yet: the rest is judged
        for file in tmp_path.glob(f"{plan.study}-{arm}-*"):
            file.unlink()
    part = sparse_training.summarise(plan, folder=tmp_path)
    assert [a["arm"] for a in part["result"]["arms"]] == ["static", "set", "rigl"]
    assert {g["name"]: (g["found"], g["met"]) for g in part["goals"]} == {
        name: goals[name] for name in list(goals)[:2]
    }
    (tmp_path / f"{plan.name('set', 0)}.json").unlink()
    (tmp_path / f"{plan.name('set', 1)}.json").unlink()
    with pytest.raises(FileNotFoundError, match="No two arms to compare"):
        sparse_training.summarise(plan, folder=tmp_path)


def test_another_depth_is_another_study() -> None:
    names = {sparse_training.plan_of(d, e).study for d in (None, 8, 20) for e in (None, 10, 30)}
    assert names == {
        "sparse_training",
        "sparse_training-resnet8-30epochs",
        "sparse_training-resnet20-10epochs",
        "sparse_training-resnet20-30epochs",
    }


def test_overhead_is_judged_by_its_rows(tmp_path: Path) -> None:
    overhead.run(quick=True, folder=tmp_path)
    whole = record.read("overhead", folder=tmp_path)
    rows = whole["result"]["rows"]
    assert overhead.goals(rows) == whole["goals"]
    assert rows["between updates"]["pairs"] == overhead.QUICK.pairs
    on, between = rows["rigl, on an exchange"], rows["rigl, between exchanges"]
    assert on["pairs"] + between["pairs"] == overhead.QUICK.pairs
    average = rows["rigl, averaged"]["percent"]
    assert average == pytest.approx(0.99 * between["percent"] + 0.01 * on["percent"], abs=1e-5)
    for row in (on, between):
        assert row["interval"][0] <= row["percent"] <= row["interval"][1]
