"""Ticket searches taken up again: no stage is lost, mixed up or computed twice."""

from __future__ import annotations

import copy
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tickets_cases import LEVELS, SHORT, Broken, Shuffled, build, counted, data, plan, search
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import secateur
from secateur.experiments.training import Stretch, seeded, train_


def network_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_finished_stages_are_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    first = search(tmp_path)
    assert calls == [0, 1, 2]
    second = search(tmp_path)
    assert calls == [0, 1, 2]
    assert [stage.done for stage in (second.dense, *second.levels)] == [True] * 3
    levels = [replace(level, done=False) for level in second.levels]
    assert levels == list(first.levels)
    search(tmp_path, plan(levels=(*LEVELS, 0.89)))
    assert calls == [0, 1, 2, 3], "a run can be taken further"


def test_dense_training_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    for rewind in ("weights", "rate", "finetune", "reinit"):
        search(tmp_path, plan(rewind=rewind, levels=(0.5,)))
    assert calls == [0, 1, 1, 1, 1]
    search(tmp_path, plan(rewind_to=1, levels=(0.5,)))
    assert calls[5:] == [0, 1], "only the beginning of the dense training is repeated"
    assert len(list(tmp_path.glob("dense-*"))) == 1


@pytest.mark.parametrize(("stage", "step"), [(1, 0), (1, 7), (2, 0), (2, 5), (3, 11)])
def test_a_run_broken_inside_a_stage_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, step: int
) -> None:
    search(tmp_path / "whole", plan(rewind="rate"))
    with monkeypatch.context() as patch:
        counted(patch, fail_at=stage, step=step)
        with pytest.raises(Broken):
            search(tmp_path / "broken", plan(rewind="rate"))
    torch.manual_seed(99)  # the caller's random state plays no part
    search(tmp_path / "broken", plan(rewind="rate"))
    assert network_files(tmp_path / "broken") == network_files(tmp_path / "whole")


def test_a_run_broken_between_stages_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", plan(rewind_to=1))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(
        tmp_path / "broken" / Path(whole.levels[1].folder).relative_to(tmp_path / "whole")
    )
    found = search(tmp_path / "broken", plan(rewind_to=1))
    assert [level.done for level in found.levels] == [True, False]
    assert network_files(tmp_path / "broken") == network_files(tmp_path / "whole")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import tickets_cases as here
    from secateur.experiments import training

    real, steps = training._one_step_, []

    def one_step(*args):
        steps.append(1)
        if len(steps) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    training._one_step_ = one_step
    here.search(Path(sys.argv[1]), here.plan(rewind_to=1))
"""


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = [sys.executable, "-c", textwrap.dedent(KILLED)]
    # Dense: 12 steps, to the rewinding point: 4, level 1: 8, level 2: 8.
    arguments = [str(tmp_path / "a"), str(Path(__file__).parent), "29"]
    ended = subprocess.run([*script, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(network_files(tmp_path / "a")) == 3
    search(tmp_path / "a", plan(rewind_to=1))
    search(tmp_path / "b", plan(rewind_to=1))
    assert network_files(tmp_path / "a") == network_files(tmp_path / "b")
    assert len(network_files(tmp_path / "a")) == 4


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    found = search(tmp_path)
    run = Path(found.folder)
    (run / ".level-02-0.79-after-abcdef.x3_9abcd.unfinished").mkdir()
    (run / ".gitignore").write_text("*")
    search(tmp_path)
    assert {p.name for p in run.glob(".*")} == {".gitignore"}


@pytest.mark.parametrize("inside", [False, True])
def test_the_caller_keeps_the_random_state_and_the_network(inside: bool, tmp_path: Path) -> None:
    net, feed = build(), data()
    generator = torch.Generator().manual_seed(5)
    pairs = TensorDataset(feed.train.x, feed.train.y)
    order = BatchSampler(RandomSampler(pairs, generator=generator), 32, drop_last=False)
    loader = (
        DataLoader(pairs, batch_sampler=order)
        if inside
        else DataLoader(pairs, 32, shuffle=True, generator=generator)
    )
    feed = replace(feed, train=loader)
    before, states = copy.deepcopy(net.state_dict()), (torch.get_rng_state(), generator.get_state())
    first = search(tmp_path / "a", model=net, data=feed)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], generator.get_state())
    assert net.training
    next(iter(feed.train))  # moves the loader's generator
    second = search(tmp_path / "b", model=net, data=feed)
    assert [x.mask for x in first.levels] == [x.mask for x in second.levels]
    assert list(network_files(tmp_path / "a").values()) == list(
        network_files(tmp_path / "b").values()
    )


def test_seeds_and_orders_differ_between_levels_unless_asked_otherwise(tmp_path: Path) -> None:
    one, two = search(tmp_path), search(tmp_path, plan(training=replace(SHORT, seed=1)))
    assert one.dense.folder != two.dense.folder
    assert one.levels[0].mask != two.levels[0].mask


class Recorded(Shuffled):
    """Remembers what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().__iter__():
            self.drawn.append(x)
            yield x, y


@pytest.mark.parametrize("same", [False, True])
def test_a_level_sees_the_batches_of_the_dense_training_if_asked(same: bool) -> None:
    dense, level = Recorded(), Recorded()
    how = replace(SHORT, same_order=same)
    with seeded(0):
        train_(build(), secateur.Data(train=dense), how, Stretch(0))
        train_(build(), secateur.Data(train=level), how, Stretch(1, begin=4))
    assert (len(dense.drawn), len(level.drawn)) == (12, 8)
    pairs = zip(dense.drawn[4:], level.drawn, strict=True)
    assert [torch.equal(x, y) for x, y in pairs] == [same] * 8


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise that workers draw."""

    def __init__(self) -> None:
        self.all = Shuffled()

    def __len__(self) -> int:
        return len(self.all.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.all.x[index] + 0.1 * torch.randn(8), self.all.y[index]


def test_epochs_are_repeated_where_workers_stay(tmp_path: Path) -> None:
    def once(folder: Path, rewind: str) -> dict[str, bytes]:
        loader = DataLoader(Noisy(), 32, shuffle=True, num_workers=1, persistent_workers=True)
        how = plan(rewind=rewind, rewind_to=1, levels=(0.5,), training=replace(SHORT, epochs=2))
        secateur.find_ticket(build, data=secateur.Data(train=loader), folder=folder, plan=how)
        return network_files(folder)

    whole = once(tmp_path / "whole", "weights")  # the first epoch of the dense training twice
    once(tmp_path / "parts", "rate")
    parts = once(tmp_path / "parts", "weights")
    assert {name: parts[name] for name in whole} == whole
