"""Lottery tickets: what goes back where, and that no stage is lost, mixed up or computed twice."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner, Result

import secateur
from secateur.allocate import Ranked
from secateur.cli.main import app
from secateur.core.errors import BudgetError, DataError, FormatError, UsageError
from secateur.core.masks import Masks
from secateur.experiments import (
    Opposite,
    TicketFacts,
    TicketPlan,
    Training,
    find_ticket,
    load_ticket,
)
from secateur.experiments import ticket_search as module
from secateur.experiments.terms import levels_of
from secateur.experiments.ticket import reset_, restart_
from secateur.experiments.training import Stretch, seed_of, seeded, start_epoch_, steps_of, train_
from secateur.formats import read_bundle
from secateur.pattern import NM, Rows
from secateur.recover import BatchNorm
from secateur.score import Magnitude, Random, Snip

SHORT = Training(epochs=3, lr=0.05)
LEVELS = (0.36, 0.79)
RECIPE = secateur.Recipe(allocation=Ranked())


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 3),
    )


class Shuffled:
    """Batches in an order, and with noise, drawn from PyTorch's own random state."""

    def __init__(self, count: int = 128, batch: int = 32) -> None:
        self.x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
        self.y, self.batch = self.x[:, :3].argmax(1), batch

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.y)).split(self.batch):
            yield self.x[chosen] + 0.1 * torch.randn(len(chosen), 8), self.y[chosen]


def data() -> secateur.Data:
    train = Shuffled()
    return secateur.Data(train=train, test=[(train.x, train.y)])


def plan(**changes: Any) -> TicketPlan:
    return TicketPlan(**{"levels": LEVELS, "training": SHORT, **changes})


def search(folder: Path, how: TicketPlan | None = None, **changes: Any) -> TicketFacts:
    given = {"model": build, "recipe": RECIPE, "data": data(), **changes}
    model = given.pop("model")
    return find_ticket(model, folder=folder, plan=how or plan(), **given)


def tensors(folder: str | Path) -> dict[str, Tensor]:
    return dict(read_bundle(folder).tensors)


def first_weights(seed: int = 0, which: int | str = 0) -> dict[str, Tensor]:
    with seeded(seed_of(seed, "weights", which)):
        return build().state_dict()


def network_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


# ---- what the survivors start from


def start_of_first_level(
    monkeypatch: pytest.MonkeyPatch, folder: Path, how: TicketPlan
) -> tuple[nn.Module, Stretch, TicketFacts]:
    """The network as it enters the training of level 1."""
    real, caught = module.train_, []

    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        stretch = args[2]
        if stretch.index == 1:
            caught.append((copy.deepcopy(model), stretch))
        return real(model, *args, **options)

    monkeypatch.setattr(module, "train_", spy)
    found = search(folder, how)
    return *caught[0], found


def check_start(model: nn.Module, masks: Masks, values: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in values.items():
        keep = masks.get(name, torch.ones(value.shape, dtype=torch.bool))
        assert torch.equal(state[name][keep], value[keep]), f"survivors of {name}"
        assert not state[name][~keep].any(), f"pruned entries of {name}"


def test_weights_go_back_to_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, plan())
    check_start(model, found.masks()[0], first_weights())
    assert stretch == Stretch(1, 0)


@pytest.mark.parametrize(
    ("to", "unit", "step"), [(1, "epochs", 4), (6, "steps", 6), (0.5, "epochs", 2)]
)
def test_weights_go_back_to_the_snapshot_with_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: float, unit: str, step: int
) -> None:
    how = plan(rewind_to=to, unit=unit)
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, how)
    # The dense training once more, cut off at the step.
    with seeded(seed_of(0, "weights", 0)):
        again = build()
    with seeded(1), pytest.raises(Broken):
        train_(again, breaking(data(), step), SHORT, Stretch(0))
    snapshot = again.state_dict()
    assert int(snapshot["1.num_batches_tracked"]) == step
    check_start(model, found.masks()[0], snapshot)
    assert stretch == Stretch(1, step)


class Broken(Exception):
    """Training broke down on purpose."""


def breaking(feed: secateur.Data, step: int) -> secateur.Data:
    """Data whose loss breaks down before the given step (counted from 0) is taken."""
    calls = itertools.count()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training and next(calls) == step:
            raise Broken
        return functional.cross_entropy(model(batch[0]), batch[1])

    return replace(feed, loss=loss)


@pytest.mark.parametrize(("rewind", "last"), [("rate", False), ("finetune", True)])
def test_the_other_two_keep_the_final_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewind: str, last: bool
) -> None:
    how = plan(rewind=rewind, rewind_to=1)
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, how)
    check_start(model, found.masks()[0], tensors(found.dense.folder))
    assert stretch == Stretch(1, 4, last_rate=last)


def test_reinit_draws_new_weights_at_each_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, found = start_of_first_level(monkeypatch, tmp_path, plan(rewind="reinit"))
    check_start(model, found.masks()[0], first_weights(0, found.levels[0].name))
    old, new = first_weights(), model.state_dict()
    assert not torch.equal(
        old["3.weight"], new["3.weight"] + (new["3.weight"] == 0) * old["3.weight"]
    )


@pytest.mark.parametrize(
    ("last", "expected"),
    [(False, [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]), (True, [0.0005] * 6)],
)
def test_rates_follow_the_schedule_from_the_rewinding_point(
    monkeypatch: pytest.MonkeyPatch, last: bool, expected: list[float]
) -> None:
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    feed, how = secateur.Data(train=Shuffled(256, 32)), Training(epochs=1, lr=0.05, warmup=0)
    with seeded(0):
        train_(build(), feed, how, Stretch(1, begin=2, last_rate=last))
    assert rates == pytest.approx(expected)


def test_a_level_is_trained_with_a_new_optimizer(tmp_path: Path) -> None:
    """An independent loop with fresh momentum gives the same bits."""
    found = search(tmp_path, plan(levels=(0.5,), rewind="rate", rewind_to=1))
    feed, masks = data(), found.masks()[0]
    with seeded(0):
        net = build()
        net.load_state_dict(tensors(found.dense.folder))
        groups = [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        sgd = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
        masks.apply_(net)
        for epoch in (1, 2):
            start_epoch_(feed.train, seed_of(0, 1, epoch), 0)
            for step, (x, y) in enumerate(feed.train, start=4 * epoch):
                for group in sgd.param_groups:
                    group["lr"] = SHORT.rate_at(step, 12)
                sgd.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                sgd.step()
                masks.apply_(net)
                for name, mask in masks.items():
                    sgd.state[net.get_parameter(name)]["momentum_buffer"].masked_fill_(~mask, 0)
    expected = net.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in tensors(found.levels[0].folder).items())


def test_restart_takes_old_masks_off() -> None:
    net = nn.Linear(2, 1, bias=False)
    restart_(net, Masks({"weight": torch.tensor([[True, False]])}), {"weight": torch.ones(1, 2)})
    restart_(net, Masks({"weight": torch.tensor([[False, True]])}), {"weight": torch.ones(1, 2)})
    assert net.weight.tolist() == [[0.0, 1.0]]


# ---- levels


def test_levels_are_nested_and_met(tmp_path: Path) -> None:
    found = search(tmp_path, plan(levels=(0.36, 0.6, 0.79)))
    masks = found.masks()
    for level, mask, asked in zip(found.levels, masks, (0.36, 0.6, 0.79), strict=True):
        assert mask.sparsity == pytest.approx(asked, abs=2 / mask.total)
        assert level.sparsity == mask.sparsity
        assert level.mask == mask.fingerprint()
        for name, tensor in tensors(level.folder).items():
            assert name not in mask or not tensor[~mask[name]].any()
    for before, after in itertools.pairwise(masks):
        assert all(not (after[n] & ~before[n]).any() for n in after)
    assert found.dense.sparsity == 0


def test_one_shot_levels_all_come_from_the_dense_network(tmp_path: Path) -> None:
    found = search(tmp_path, plan(one_shot=True))
    dense = tensors(found.dense.folder)
    sizes = torch.cat([dense[n].abs().flatten() for n in found.masks()[1]])
    for mask in found.masks():
        kept = torch.cat([m.flatten() for m in mask.values()])
        assert sizes[kept].min() >= sizes[~kept].max()
    alone = search(tmp_path, plan(levels=(0.79,)))
    assert alone.levels[0].done, "one level is the same whether it is called one-shot or not"


def test_default_levels_remove_a_fifth_of_the_rest() -> None:
    recipe = replace(RECIPE, target=secateur.Target("sparsity", 0.89))
    levels = levels_of(TicketPlan(), recipe)
    assert levels[:3] == pytest.approx((0.2, 0.36, 0.488))
    assert levels[-1] == 0.89
    assert len(levels) == 10


@pytest.mark.parametrize("criterion", [Random(), Snip(), Opposite(Magnitude())])
def test_filters_and_other_criteria(tmp_path: Path, criterion: Any) -> None:
    recipe = secateur.Recipe(criterion, Rows())
    found = search(tmp_path, plan(levels=(0.25, 0.5)), recipe=recipe)
    for mask in found.masks():
        for rows in mask.values():
            assert torch.equal(rows.any(1), rows.all(1))
    assert found.levels[1].sparsity == 0.5
    dense, sparse = found.masks()
    assert all(not (sparse[name] & ~dense[name]).any() for name in sparse)


def test_nm_has_one_level(tmp_path: Path) -> None:
    recipe = secateur.Recipe(pattern=NM(2, 4))
    found = search(tmp_path, plan(levels=None), recipe=recipe)
    assert [level.sparsity for level in found.levels] == [0.5]
    with pytest.raises(BudgetError, match="one level"):
        search(tmp_path, plan(), recipe=recipe)


def test_facts_tell_what_happened(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert found.metric == "accuracy"
    assert 0 <= found.levels[0].accuracy_at_start <= 1
    assert found.levels[0].churn == pytest.approx(0.36, abs=0.01)
    # 21 % of all weights are left out of 64 %.
    assert found.levels[1].churn == pytest.approx(1 - 0.21 / 0.64, abs=0.01)
    json.dumps(found.to_dict())
    net = build()
    restored = load_ticket(net, found.levels[1].folder)
    assert restored.masks == found.masks()[1]
    assert restored.facts.measures["accuracy"] == found.levels[1].accuracy


# ---- taken up again


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int = 0, step: int = 0) -> list[int]:
    """Count trainings; optionally break down inside one of them."""
    real, calls = module.train_, []

    def spy(model: nn.Module, feed: secateur.Data, *args: Any, **options: Any) -> Any:
        calls.append(args[1].index)
        return real(
            model, breaking(feed, step) if fail_at == len(calls) else feed, *args, **options
        )

    monkeypatch.setattr(module, "train_", spy)
    return calls


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
    import test_tickets as here
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
    (run / ".level-02-0.79-after-abcdef.x3_9abcd").mkdir()
    (run / ".gitignore").write_text("*")
    search(tmp_path)
    assert {p.name for p in run.glob(".*")} == {".gitignore"}


def test_the_caller_keeps_the_random_state_and_the_network(tmp_path: Path) -> None:
    net, feed = build(), data()
    generator = torch.Generator().manual_seed(5)
    pairs = TensorDataset(feed.train.x, feed.train.y)
    feed = replace(feed, train=DataLoader(pairs, 32, shuffle=True, generator=generator))
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


# ---- what is refused


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


# ---- on the command line

FILES = """
import sys
sys.path.insert(0, {tests!r})
import test_tickets as here

build = here.build
load = here.data

def seeded():
    import torch
    torch.manual_seed(0)
    return build()
"""


def command(place: Path, *words: str, network: str = "build") -> Result:
    file = place / "parts.py"
    file.write_text(FILES.format(tests=str(Path(__file__).parent)))
    fixed = ["ticket", f"{file}:{network}", "--data", f"{file}:load", "-o", str(place / "runs")]
    return CliRunner().invoke(app, [*fixed, "--epochs", "1", *words])


def test_command_finds_what_python_finds(tmp_path: Path) -> None:
    words = ["--levels", "36%,0.79", "--rewind", "rate", "--rewind-to", "2steps"]
    words += ["--allocation", "global", "--lr", "0.05", "--seed", "3"]
    told = json.loads(command(tmp_path, "--json", *words).stdout)
    assert told["ok"] is True
    how = plan(rewind="rate", rewind_to=2, unit="steps", training=Training(1.0, 0.05, seed=3))
    found = search(tmp_path / "runs", how, recipe=replace(RECIPE, seed=3))
    assert all(level.done for level in found.levels)
    assert [level["mask"] for level in told["levels"]] == [level.mask for level in found.levels]
    assert set(told["structure"]) == {"filters", "channels", "kernels"}
    again = json.loads(command(tmp_path, "--json", *words).stdout)
    assert [level["done"] for level in again["levels"]] == [True, True]
    shown = command(tmp_path, *words).stdout
    assert "level 2" in shown
    assert shown.count("done before") == 3
    assert "entirely zero" in shown


def test_command_refuses_in_its_own_words(tmp_path: Path) -> None:
    for words, network, match in (
        (["--rewind", "back"], "build", "rewind is one of"),
        (["--levels", "0.5,0.2"], "build", "rising"),
        (["--rewind-to", "soon"], "build", "cannot be read"),
        (["--rewind", "reinit"], "seeded", "gives the same weights again"),
    ):
        ended = command(tmp_path, "--json", *words, network=network)
        assert ended.exit_code == 2
        error = json.loads(ended.stdout)["error"]
        assert match in " ".join(str(value) for value in error.values())
    assert not (tmp_path / "runs").exists()
