"""Two processes decide the same masks as one, notice when they differ, and continue exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import secateur
from secateur import Data, FineTune, Gradual, Recipe, Target
from secateur.core.errors import DataError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.slots import bare
from secateur.drive.training import ranks
from secateur.drive.training.order import Feed, Shuffled
from secateur.drive.training.resume import Training, resume_, save_checkpoint
from secateur.pattern import NM
from secateur.schedule import Polynomial
from secateur.score import Magnitude, Movement, Smoothed, Taylor, Wanda
from secateur.stats import InputNorm, collect

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
Y = (X[:, :3].argmax(1) + 1) % 3
TARGET = Target("sparsity", 0.75)
RECIPES = {
    "magnitude": Recipe(Magnitude(), target=TARGET, schedule=Polynomial(0, 9, 3)),
    "wanda": Recipe(Wanda(), target=TARGET, schedule=Polynomial(0, 9, 3)),
    "movement": Recipe(Smoothed(Movement()), target=TARGET, schedule=Polynomial(0, 9, 3)),
    "taylor 2:4": Recipe(Taylor(), NM(2, 4), schedule=Polynomial(2, 9, 7)),
}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))


def start(recipe: Recipe, share: tuple[int, int] = (0, 1), *, dropout: float = 0.0) -> Training:
    model: nn.Module = net()
    if dropout:
        model = nn.Sequential(nn.Dropout(dropout), *model)  # type: ignore[misc]
    if share[1] > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    order = Shuffled((X, Y), 16, seed=2, share=share)
    data = Data(train=order, calibration=64)
    pruner = Gradual(model, optimizer, recipe, data=data)
    return Training(model, optimizer, pruner, feed=Feed(order))


def train(training: Training, steps: int) -> None:
    feed: Any = training.feed
    while steps:
        for x, y in feed.rest():
            training.optimizer.zero_grad()
            nn.functional.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
            training.pruner.step()
            steps -= 1
            if not steps:
                break


def facts(training: Training) -> dict[str, Any]:
    model = bare(training.model)
    return {
        "masks": training.pruner.masks.fingerprint(),
        "sparsity": training.pruner.masks.sparsity,
        "weights": {name: p.detach().flatten().tolist() for name, p in model.named_parameters()},
    }


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except SecateurError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# -- what the processes do ---------------------------------------------------------------------------


def recipes(rank: int, world: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        training = start(recipe, (rank, world))
        train(training, 11)
        found[name] = facts(training)
    return found


def statistics(rank: int, world: int, folder: Path) -> dict[str, Any]:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), RECIPES["magnitude"])
    slots, need = pruner._slots, InputNorm()
    part = list(Shuffled((X, Y), 64, share=(rank, world)))
    stats = collect(model, slots[rank:], [need], part)  # one process never sees the first weight
    whole = ranks.merged(stats, [need], slots, model)
    return {
        s.name: whole(need, s.weight(model)).flatten().tolist()
        for s in slots
        if (need, s.name) in whole
    }


def decisions(rank: int, world: int, folder: Path) -> dict[str, Any]:
    mine = Masks({"b": torch.arange(11) % 3 == rank, "a": torch.full((2, 3), rank == 0)})
    taken = ranks.decided(mine)
    return {name: mask.tolist() for name, mask in taken.items()}


def differing(rank: int, world: int, folder: Path) -> dict[str, Any]:
    training = start(RECIPES["magnitude"], (rank, world))
    train(training, 4)
    if rank == 1:
        mask = training.model.get_buffer("module.0.weight_mask")
        mask[0, 0] = ~mask[0, 0]
    before = training.pruner.steps
    message = error_of(lambda: train(training, 3))
    return {"error": message, "steps": training.pruner.steps - before}


def continued(rank: int, world: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(100 + rank)  # other dropout in each process
    whole = start(RECIPES["wanda"], (rank, world), dropout=0.2)
    train(whole, 11)
    torch.manual_seed(100 + rank)
    first = start(RECIPES["wanda"], (rank, world), dropout=0.2)
    train(first, 5)
    save_checkpoint(folder / "two", first, step=5)
    torch.manual_seed(7)
    second = start(RECIPES["wanda"], (rank, world), dropout=0.2)
    step = resume_(folder / "two", second)
    train(second, 6)
    return {
        "step": step,
        "same": facts(second) == facts(whole),
        "files": sorted(f.name for f in (folder / "two").glob("step-*")),
        "foreign": error_of(
            lambda: resume_(folder / "one", start(RECIPES["wanda"], (rank, world)))
        ),
        "damaged": damaged(rank, world, folder),
    }


def damaged(rank: int, world: int, folder: Path) -> str:
    """The part of process 1 is lost: nobody continues, and nobody waits for ever."""
    ranks.barrier()
    if rank == 1:
        (folder / "two" / "step-000000005.rank-1.safetensors").rename(folder / "lost")
    training = start(RECIPES["wanda"], (rank, world), dropout=0.2)
    message = error_of(lambda: resume_(folder / "two", training))
    ranks.barrier()
    if rank == 1:
        (folder / "lost").rename(folder / "two" / "step-000000005.rank-1.safetensors")
    return f"{training.pruner.steps} {message}"


def sharded(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruned = secateur.prune(net())
    masked = pruned.model
    secateur.attach_(masked, pruned.masks)
    fully_shard(masked, mesh=init_device_mesh("cpu", (world,)))
    batches = list(Shuffled((X, Y), 16, share=(rank, world)))
    old = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    return {
        "gradual": error_of(lambda: Gradual(model, optimizer, RECIPES["magnitude"])),
        "prune": error_of(lambda: secateur.prune(model)),
        "attach": error_of(lambda: secateur.attach_(model, pruned.masks)),
        "finetune": error_of(lambda: secateur.finetune(masked, batches, FineTune(1))),
        "first": error_of(lambda: secateur.prune(old)),
        "unmasked": error_of(lambda: secateur.finetune(model, batches, FineTune(1))),
    }


def accelerated(rank: int, world: int, folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == world
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model, sgd)
    pruner = Gradual(wrapped, optimizer, RECIPES["movement"])
    for _, (x, y) in Shuffled((X, Y), 8, seed=2, share=(rank, world)).steps(0, 22):
        with accelerator.accumulate(wrapped):
            accelerator.backward(nn.functional.cross_entropy(wrapped(x), y))
            optimizer.step()
            if accelerator.sync_gradients:
                pruner.step()
            optimizer.zero_grad()
    assert pruner.steps == 11
    return facts(Training(model, sgd, pruner))


def broken(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """The loss of process 1 alone is NaN, once, in step 6."""
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    calls = []

    def loss(run: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        value = nn.functional.cross_entropy(run(batch[0]), batch[1])
        return value * float("nan") if rank == 1 and len(calls) == 6 else value

    def attach(optimizer: torch.optim.Optimizer, per_epoch: int) -> Gradual:
        pruners.append(Gradual(model, optimizer, RECIPES["magnitude"]))
        return pruners[0]

    pruners: list[Gradual] = []
    data = Data(train=Shuffled((X, Y), 16, seed=2, share=(rank, world)), loss=loss)
    how = FineTune(3, 0.1, on_nan="rollback")
    history = secateur.finetune(wrapped, data, how, attach=attach)
    told = [text for record in history for text in record.get("rollbacks", ())]
    return {**facts(Training(model, torch.optim.SGD(model.parameters()), pruners[0])), "told": told}


def refused(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Trainings that would end with other weights in each process, or never."""
    batches, how = list(Shuffled((X, Y), 16, share=(rank, world))), FineTune(1)
    model = net()
    before = [p.clone() for p in model.parameters()]
    uneven = nn.parallel.DistributedDataParallel(net())
    return {
        "plain": error_of(lambda: secateur.finetune(model, batches, how)),
        "copy": error_of(lambda: secateur.prune(model, Recipe(recovery=how), batches)),
        "uneven": error_of(lambda: secateur.finetune(uneven, batches[rank:], how)),
        "untouched": all(map(torch.equal, model.parameters(), before)),
    }


JOBS = (recipes, statistics, decisions, differing, continued, sharded, accelerated, broken, refused)


def process(rank: int, world: int, folder: Path) -> None:
    """One of several processes: all jobs after one another."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    found = {job.__name__: job(rank, world, folder) for job in JOBS}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def family(folder: Path) -> None:
    """Two children of one process, which has imported everything already."""
    import accelerate  # noqa: F401

    torch.set_num_threads(1)
    torch.optim.SGD(net().parameters(), 0.1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                process(rank, 2, folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("pair")
    one = start(RECIPES["wanda"])
    train(one, 5)
    save_checkpoint(folder / "one", one, step=5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def alone(name: str) -> dict[str, Any]:
    training = start(RECIPES[name])
    train(training, 11)
    return facts(training)


def near(a: dict[str, list[float]], b: dict[str, list[float]]) -> bool:
    pairs = [(torch.tensor(a[name]), torch.tensor(b[name])) for name in a]
    return a.keys() == b.keys() and all(torch.allclose(x, y, 1e-4, 1e-6) for x, y in pairs)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_equal_one(pair: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    one = alone(name)
    assert one["sparsity"] > 0.45
    for found in pair[1]:
        assert found["recipes"][name]["masks"] == one["masks"]
        assert near(found["recipes"][name]["weights"], one["weights"])
    assert pair[1][0]["recipes"][name] == pair[1][1]["recipes"][name]


def test_the_comparison_of_weights_sees_a_difference() -> None:
    assert not near({"a": [1.0]}, {"a": [1.001]})
    assert not near({"a": [1.0]}, {"a": [1.0], "b": []})
    assert alone("magnitude")["masks"] != alone("wanda")["masks"]


def test_a_loss_that_breaks_in_one_process_takes_all_of_them_back(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = (found["broken"] for found in pair[1])
    assert first["masks"] == second["masks"]
    assert first["weights"] == second["weights"]
    assert first["sparsity"] > 0.45
    for found in (first, second):
        # At step 5 masks were about to change, but that is the state that gave NaN.
        assert "step 6: went back to step 2" in found["told"][0]
    assert "the loss is nan at" in second["told"][0]
    assert "NaN or infinite in another process" in first["told"][0]


def test_trainings_that_nobody_averages_are_refused(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    for found in (each["refused"] for each in pair[1]):
        for name in ("plain", "copy"):
            assert found[name].startswith("UsageError: training Sequential in one of 2 processes")
        assert found["uneven"].startswith("DataError")
        assert "their epochs have 4, 3 batches" in found["uneven"]
        assert found["untouched"]


def test_statistics_are_those_of_all_data(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), RECIPES["magnitude"])
    need, slots = InputNorm(), pruner._slots
    half = next(Shuffled((X, Y), 64, share=(0, 2)).epoch(0))
    whole = collect(model, slots, [need], [(X, Y)])
    first = collect(model, slots[:1], [need], [half])  # only process 0 watched it
    assert len(slots) == 2
    for slot, stats in zip(slots, (first, whole), strict=True):
        expected = stats(need, slot.weight(model)).flatten()
        for found in pair[1]:
            mine = torch.tensor(found["statistics"][slot.name])
            assert torch.allclose(mine, expected, 1e-5, 1e-6), slot.name


def test_process_0_decides(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = {"b": [i % 3 == 0 for i in range(11)], "a": [[True] * 3] * 2}
    assert pair[1][0]["decisions"] == pair[1][1]["decisions"] == expected


def test_a_process_with_other_masks_is_named(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in pair[1]:
        assert "DataError: recipe, step and masks" in found["differing"]["error"]
        assert "rank 1 has" in found["differing"]["error"]
        assert found["differing"]["steps"] == 2  # at the next update, step 6


def test_two_processes_continue_exactly(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in pair[1]:
        assert found["continued"]["step"] == 5
        assert found["continued"]["same"] is True
        assert found["continued"]["files"] == [
            "step-000000005.rank-1.safetensors",
            "step-000000005.safetensors",
        ]


def test_a_part_that_is_lost_stops_every_process(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    for found in pair[1]:
        assert found["continued"]["damaged"].startswith("0 FormatError")
    assert "there is no such file" in pair[1][1]["continued"]["damaged"]
    assert "rank 1" in pair[1][0]["continued"]["damaged"]


def test_another_number_of_processes_is_refused(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = pair
    for process_found in found:
        assert "its world is 1, that of this run is 2" in process_found["continued"]["foreign"]
    with pytest.raises(UsageError, match="its world is 2, that of this run is 1"):
        resume_(folder / "two", start(RECIPES["wanda"], dropout=0.2))


def test_sharded_parameters_are_refused(pair: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in pair[1]:
        for name in ("gradual", "prune", "attach", "finetune"):
            assert (
                "UsageError: pruning a model whose parameters are shared" in found["sharded"][name]
            )
            assert "DTensor" in found["sharded"][name]
        assert "it has a FullyShardedDataParallel" in found["sharded"]["first"]
        assert found["sharded"]["unmasked"] == "nothing"


def test_accelerate_with_accumulation_equals_one_process(
    pair: tuple[Path, list[dict[str, Any]]],
) -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Gradual(model, sgd, RECIPES["movement"])
    for step, (x, y) in Shuffled((X, Y), 8, seed=2).steps(0, 22):
        (nn.functional.cross_entropy(model(x), y) / 2).backward()
        if step % 2:
            sgd.step()
            pruner.step()
            sgd.zero_grad()
    one = facts(Training(model, sgd, pruner))
    for found in pair[1]:
        assert found["accelerated"]["masks"] == one["masks"]
        assert near(found["accelerated"]["weights"], one["weights"])


# -- one process ------------------------------------------------------------------------------------


def test_nothing_happens_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is sent")

    for name in ("all_gather", "all_reduce", "broadcast", "barrier"):
        monkeypatch.setattr(dist, name, sent)
    masks = Masks({"w": torch.tensor([True, False])})
    assert ranks.decided(masks) is masks
    assert ranks.gather_text("x") == ["x"]
    ranks.require_agreement("masks", "x")
    ranks.barrier()
    alone("wanda")


def test_the_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather_text", lambda text: ["a", "a", "b", "a", "c"])
    with pytest.raises(DataError, match=r"on 5 processes: rank 2 has 'b', rank 4 has 'c'; .* 'a'"):
        ranks.require_agreement("masks", "a")


def test_wrappers_are_looked_through() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bare(torch.compile(model, backend="eager")) is model
    assert bare(model) is model


if __name__ == "__main__":
    family(Path(sys.argv[1]))
