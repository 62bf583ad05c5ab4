"""A state that is saved and put back is exact; a foreign one changes nothing."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from restless import X, Y, loader, net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur import Data, FineTune, Gradual, Recipe, Target, attach_, finetune, masks_of, prune
from secateur.core.errors import DataError, FormatError, UsageError
from secateur.core.masks import Masks
from secateur.drive.training import ranks
from secateur.drive.training.order import Feed, Shuffled
from secateur.drive.training.recorder import Checkpoints, Recorder, Tally
from secateur.drive.training.regrow import Regrow
from secateur.drive.training.resume import Training, latest, resume_, save_checkpoint
from secateur.schedule import OneShot, Polynomial
from secateur.score import Snip

TARGET = Target("sparsity", 0.75)


# -- what is refused, and changes nothing -----------------------------------------------------------


def parts(seed: int = 0, sparsity: float = 0.75, width: int = 12) -> Training:
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recipe = Recipe(target=Target("sparsity", sparsity), schedule=Polynomial(0, 8, 2))
    pruner = Gradual(model, optimizer, recipe)
    rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    return Training(model, optimizer, pruner, rate, Feed([(X[:20], Y[:20]), (X[20:], Y[20:])]))


def train(training: Training, steps: int) -> None:
    while steps:
        for x, y in training.feed.rest():  # type: ignore[union-attr]
            training.optimizer.zero_grad()
            nn.functional.cross_entropy(training.model(x), y).backward()
            training.optimizer.step()
            training.pruner.step()
            training.rate.step()  # type: ignore[union-attr]
            steps -= 1
            if not steps:
                break


def bits(training: Training) -> dict[str, Any]:
    slots = {
        f"{i} {name}": value.clone()
        for i, state in enumerate(training.optimizer.state.values())
        for name, value in state.items()
    }
    model = {name: value.clone() for name, value in training.model.state_dict().items()}
    rate: Any = training.rate
    return {**model, **slots, "rate": torch.tensor([*rate.get_last_lr(), rate.last_epoch])}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_plain_loop_continues_exactly(tmp_path: Path) -> None:
    whole = parts()
    start = copy.deepcopy(whole.model.state_dict())
    train(whole, 11)
    first = parts()
    first.model.load_state_dict(start)
    train(first, 5)
    file = save_checkpoint(tmp_path, first, step=5)
    second = parts()
    torch.rand(7)  # other random numbers meanwhile
    assert resume_(tmp_path, second) == 5
    assert latest(tmp_path) == file
    assert equal(bits(first), bits(second))
    assert not equal(bits(first), bits(whole))
    train(second, 6)
    assert equal(bits(second), bits(whole))
    assert second.pruner.finalize().facts.history == whole.pruner.finalize().facts.history


def test_the_file_keeps_only_the_last_two(tmp_path: Path) -> None:
    training = parts()
    (tmp_path / "mine.safetensors").write_text("something else")
    (tmp_path / ".step-000000001.safetensors.0123abcd.unfinished").write_text("half")
    for step in range(1, 5):
        train(training, 1)
        save_checkpoint(tmp_path, training, step=step)
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {
        "mine.safetensors",
        "step-000000003.safetensors",
        "step-000000004.safetensors",
    }
    save_checkpoint(tmp_path / "one.safetensors", training, step=4)
    assert resume_(tmp_path / "one.safetensors", parts()) == 4


def test_an_empty_place_is_a_start(tmp_path: Path) -> None:
    training = parts()
    before = bits(training)
    assert resume_(tmp_path / "nothing", training) == 0
    assert resume_(tmp_path / "nothing.safetensors", training) == 0
    assert equal(before, bits(training))


def other_optimizer(training: Training) -> Training:
    sgd = torch.optim.SGD(training.model.parameters(), lr=0.1)
    rate = torch.optim.lr_scheduler.MultiStepLR(sgd, [3, 6])
    return Training(training.model, sgd, training.pruner, rate, training.feed)


def two_groups(training: Training) -> Training:
    first, *rest = training.model.parameters()
    adamw = torch.optim.AdamW([{"params": [first]}, {"params": rest}])
    rate = torch.optim.lr_scheduler.MultiStepLR(adamw, [3, 6])
    return Training(training.model, adamw, training.pruner, rate, training.feed)


def other_schedule(training: Training) -> Training:
    rate = torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer)
    return dataclasses.replace(training, rate=rate)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: parts(width=13), "its model is"),
        (lambda: other_schedule(parts()), "rate is ReduceLROnPlateau: .*state of MultiStepLR"),
        (lambda: parts(sparsity=0.5), "its recipe is"),
        (lambda: other_optimizer(parts()), "AdamW"),
        (lambda: two_groups(parts()), "2 groups"),
        (lambda: Training(*list(vars(parts()).values())[:4]), "feed"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_nothing_changes(
    build: Any, words: str, tmp_path: Path
) -> None:
    training = parts()
    train(training, 3)
    save_checkpoint(tmp_path, training, step=3)
    other = build()
    before, numbers = bits(other), torch.get_rng_state()
    with pytest.raises(UsageError, match=words):
        resume_(tmp_path, other)
    assert equal(before, bits(other))
    assert torch.equal(numbers, torch.get_rng_state())
    assert other.pruner.steps == 0


def test_a_training_of_another_length_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    def rigl(steps: int) -> Training:
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = OneShot(0, "steps")
        recipe = Recipe(target=TARGET, schedule=schedule, regrow=Regrow(frequency=5))
        return Training(model, optimizer, Gradual(model, optimizer, recipe, steps=steps))

    save_checkpoint(tmp_path, rigl(40), step=3)
    longer = rigl(80)
    before = {name: value.clone() for name, value in longer.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"training of 80 steps.*one of 40"):
        resume_(tmp_path, longer)
    assert equal(before, longer.model.state_dict())


def test_a_damaged_checkpoint_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    training = parts()
    train(training, 3)
    file = save_checkpoint(tmp_path, training, step=3)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    other = parts()
    before = bits(other)
    with pytest.raises(FormatError, match="or write it again"):
        resume_(tmp_path, other)
    assert equal(before, bits(other))


def test_a_damaged_checkpoint_says_how_to_continue_from_the_one_before(tmp_path: Path) -> None:
    training = parts()
    for step in (3, 6, 9):
        train(training, 3)
        save_checkpoint(tmp_path, training, step=step, keep=3)
    names = [f"step-{step:09d}.safetensors" for step in (3, 6, 9)]
    (tmp_path / names[2]).write_bytes(b"")
    with pytest.raises(FormatError, match="it has 0 bytes") as error:
        resume_(tmp_path, parts())
    assert error.value.do == f"remove {names[2]!r} from that folder to continue from step 6"
    with pytest.raises(FormatError, match="or write it again"):
        resume_(tmp_path / names[2], parts())  # one file was asked for, not the newest of a folder
    damaged = (tmp_path / names[1]).read_bytes()[:-1]
    (tmp_path / names[1]).write_bytes(damaged)
    with pytest.raises(FormatError) as error:
        resume_(tmp_path, parts())
    both = f"{names[2]!r} and {names[1]!r}"
    assert error.value.do == f"remove {both} from that folder to continue from step 3"
    for name in names[1:]:
        (tmp_path / name).unlink()
    assert resume_(tmp_path, parts()) == 3


def test_slots_find_their_parameters_by_name(tmp_path: Path) -> None:
    training = parts()
    train(training, 4)
    save_checkpoint(tmp_path, training, step=4)
    turned = parts()
    adamw = torch.optim.AdamW(list(turned.model.parameters())[::-1], lr=0.5)
    rate = torch.optim.lr_scheduler.MultiStepLR(adamw, [3, 6])
    other = Training(turned.model, adamw, turned.pruner, rate, turned.feed)
    resume_(tmp_path, other)
    assert adamw.param_groups[0]["lr"] == training.optimizer.param_groups[0]["lr"]
    for (name, mine), theirs in zip(
        turned.model.named_parameters(), training.model.parameters(), strict=True
    ):
        for slot, value in adamw.state[mine].items():
            assert torch.equal(value, training.optimizer.state[theirs][slot]), (name, slot)


# -- the order of the data --------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "size", "processes"), [(5, 2, 2), (10, 4, 4), (9, 8, 8)])
def test_every_process_has_samples_in_every_batch(samples: int, size: int, processes: int) -> None:
    data = torch.arange(samples)
    parts = [list(Shuffled(data, size, share=(p, processes)).epoch(1)) for p in range(processes)]
    for batches in zip(*parts, strict=True):
        assert {len(batch) for batch in batches} == {
            -(-len(torch.cat(batches).unique()) // processes)
        }
    assert torch.cat([torch.cat(batches) for batches in parts]).unique().tolist() == data.tolist()


def test_another_order_of_the_data_is_refused() -> None:
    feed = Feed(DataLoader(TensorDataset(X, Y), 8))
    drawn = feed.rest()
    next(drawn), next(drawn)
    for source in (
        DataLoader(TensorDataset(X, Y.flip(0)), 8),  # other data
        DataLoader(TensorDataset(X[:8], Y[:8]), 8),  # fewer batches
        Shuffled((X, Y), 8, seed=5),
    ):
        later = Feed(source)
        later.load_state_dict(feed.state_dict())
        with pytest.raises(DataError, match="continuing after batch 2"):
            next(later.rest())


@pytest.mark.parametrize("used", [1, 4, 5, 7])
@pytest.mark.parametrize("kind", ["own", "derived", "global", "numbered", "accelerate"])
def test_the_rest_of_the_data_comes_in_the_same_order(kind: str, used: int) -> None:
    if kind == "accelerate":
        pytest.importorskip("accelerate")
    feed = Feed(loader(kind))
    seen = []
    while len(seen) < used:
        for _, y in feed.rest():
            seen.append(y)
            if len(seen) == used:
                break
    state, numbers = copy.deepcopy(feed.state_dict()), torch.get_rng_state()
    whole = [y.tolist() for _ in range(2) for _, y in feed.rest()]
    torch.rand(3)
    later = Feed(loader(kind))
    torch.set_rng_state(numbers)
    later.load_state_dict(state)
    assert [y.tolist() for _ in range(2) for _, y in later.rest()] == whole
    assert [y.tolist() for _, y in later.rest()] not in (whole[:5], whole[-5:])  # each epoch anew


def test_two_processes_share_the_batches_of_one() -> None:
    whole = [torch.cat(pair) for pair in zip(*_shares(2), strict=True)]
    for (x, _), found in zip(Shuffled((X, Y), 10, 3).epoch(2), whole, strict=True):
        assert torch.equal(x, found)
    with pytest.raises(UsageError, match="shared among 3"):
        Shuffled((X, Y), 10, share=(0, 3))
    with pytest.raises(UsageError, match="make no batch"):
        Shuffled((X, Y), 64, drop_last=True)
    with pytest.raises(UsageError, match="hold 10 and 20 samples"):
        Shuffled((X[:20], Y[:10]), 4)
    with pytest.raises(UsageError, match="it is empty"):
        Shuffled((), 4)
    for wrong in ({"size": 0}, {"size": 2.5}, {"size": 4, "share": (0, 0)}):
        with pytest.raises(UsageError, match=r"Shuffled\((size|share)=.*1 or more"):
            Shuffled((X, Y), **wrong)


def _shares(processes: int) -> list[list[torch.Tensor]]:
    orders = [Shuffled((X, Y), 10, 3, share=(p, processes)) for p in range(processes)]
    return [[x for x, _ in order.epoch(2)] for order in orders]


def test_mappings_of_tensors_are_shuffled_as_tuples_are() -> None:
    whole = list(Shuffled((X, Y), 16, seed=3).epoch(1))
    found = list(Shuffled({"x": X, "labels": Y}, 16, seed=3).epoch(1))
    for (x, y), batch in zip(whole, found, strict=True):
        assert list(batch) == ["x", "labels"]
        assert torch.equal(batch["x"], x)
        assert torch.equal(batch["labels"], y)
    with pytest.raises(UsageError, match="hold 10 and 40 samples"):
        Shuffled({"x": X, "labels": Y[:10]}, 4)
    with pytest.raises(UsageError, match="its 'labels' is no tensor"):
        Shuffled({"x": X, "labels": Y.tolist()}, 4)


def test_epochs_differ_and_every_sample_comes_once() -> None:
    order = Shuffled((torch.arange(40),), 16)
    epochs = [torch.cat([x for (x,) in order.epoch(e)]) for e in range(3)]
    assert all(e.sort().values.tolist() == list(range(40)) for e in epochs)
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    assert [len(x) for (x,) in order.epoch(0)] == [16, 16, 8]
    other = Shuffled(TensorDataset(torch.arange(40)), 16)
    assert [x.tolist() for (x,) in other.epoch(1)] == [x.tolist() for (x,) in order.epoch(1)]


# -- NaN --------------------------------------------------------------------------------------------


def fragile(limit: float) -> Any:
    """A loss that becomes NaN once the masks are there and the learning rate is above a limit."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        value = nn.functional.cross_entropy(model(x), y)
        rate = fragile.optimizer.param_groups[0]["lr"]  # type: ignore[attr-defined]
        sparse = masks_of(model).sparsity > 0.6
        return value * float("nan") if sparse and rate > limit else value

    return loss


def nan_run(
    monkeypatch: pytest.MonkeyPatch, how: FineTune, limit: float, checkpoint: Any = None
) -> Any:
    from secateur.drive.training import finetune as module

    real = module._optimizer

    def optimizer(model: nn.Module, how: FineTune) -> torch.optim.Optimizer:
        fragile.optimizer = real(model, how)  # type: ignore[attr-defined]
        return fragile.optimizer  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(module, "_optimizer", optimizer)
    recipe = Recipe(target=TARGET, schedule=Polynomial(1, 9, 2), recovery=(how,))
    data = Data(train=Shuffled((X, Y), 8), loss=fragile(limit))
    return prune(net(), recipe, data, checkpoint=checkpoint)


def test_every_process_keeps_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        training = dataclasses.replace(parts(), others={"tally": Tally()})
        Recorder(training, Checkpoints(tmp_path), rollback=True).start_()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"before-pruning.safetensors", "before-pruning.rank-1.safetensors"}


def test_nan_after_pruning_raises_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"at step \d+: the loss is nan.*on_nan='rollback'"):
        nan_run(monkeypatch, FineTune(3, 0.2), 0.1)
    with pytest.raises(UsageError, match="on_nan"):
        FineTune(on_nan="ignore")


@pytest.mark.parametrize("saved", [False, True])
def test_nan_after_pruning_goes_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, saved: bool, tmp_path: Path
) -> None:
    how = FineTune(3, 0.2, on_nan="rollback")
    place = Checkpoints(tmp_path, 2) if saved else None
    pruned = nan_run(monkeypatch, how, 0.1, place)
    notes = [note.text for note in pruned.facts.notes if note.topic == "rolled-back"]
    # 60 % is passed at step 5; the copy before it is from the end of step 4.
    assert len(notes) == 1
    assert "loss is nan at step 6: went back to step 4" in notes[0]
    assert "50 %" in notes[0]
    assert pruned.facts.sparsity == pytest.approx(0.75, abs=0.02)
    assert [event["step"] for event in pruned.facts.history if "step" in event] == [3, 5, 7, 9]
    assert pruned.facts.history[-1]["lr"] == 0.0
    if saved:
        again = nan_run(monkeypatch, how, 0.1, place)  # finished: nothing is trained
        assert torch.equal(again.model[0].weight, pruned.model[0].weight)
        assert [n.text for n in again.facts.notes if n.topic == "rolled-back"] == notes
    else:
        slow = nan_run(monkeypatch, how, 1.0)
        assert not [n for n in slow.facts.notes if n.topic == "rolled-back"]


def test_nan_that_stays_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="after 3 rollbacks"):
        nan_run(monkeypatch, FineTune(3, 0.2, on_nan="rollback"), 0.001)


def test_going_back_restores_everything() -> None:
    training = parts()
    tally = Tally()
    training = Training(**{**vars(training), "others": {"tally": tally}})
    recorder = Recorder(training, None, rollback=True)
    recorder.start_()
    train(training, 1)  # the schedule begins at 0, so nothing is pruned before step 2
    tally.count(1.0, 1)
    recorder.after_step(last=False)
    before, lr = bits(training), training.optimizer.param_groups[0]["lr"]
    train(training, 2)
    tally.done += 2
    assert masks_of(training.model).sparsity > 0
    recorder.back_(float("nan"))
    assert equal(bits(training), before)
    assert tally.done == 1
    assert training.optimizer.param_groups[0]["lr"] == lr / 2
    assert training.pruner.steps == 1


@pytest.mark.parametrize("killed", [False, True])
def test_from_the_state_that_gave_nan_it_goes_back_further(tmp_path: Path, killed: bool) -> None:
    def begin() -> tuple[Training, Recorder]:
        training = parts()
        training = Training(**{**vars(training), "others": {"tally": Tally()}})
        recorder = Recorder(training, Checkpoints(tmp_path, every=1), rollback=True)
        recorder.start_()
        return training, recorder

    training, recorder = begin()
    states = []
    while len(states) < 3:  # of the moments before masks change
        train(training, 1)
        training.others["tally"].count(1.0, 1)
        recorder.after_step(last=False)
        if training.pruner.imminent:
            states.append((training.pruner.steps, bits(training)))
    if killed:
        training, recorder = begin()
    recorder.back_(float("nan"))  # the loss of the state that was copied last
    assert training.pruner.steps == states[1][0]
    assert equal(bits(training), states[1][1])
    # And from there, if it is NaN again at once, nothing earlier is left.
    with pytest.raises(DataError, match="after 1 rollbacks"):
        recorder.back_(float("nan"))


# -- small things -----------------------------------------------------------------------------------


def test_checkpoints_say_what_is_wrong_with_them() -> None:
    with pytest.raises(UsageError, match="every=0"):
        Checkpoints("a", every=0)
    assert Checkpoints("a", 3).stage(1) == Checkpoints(Path("a/stage-2"), 3)


def test_plain_fine_tuning_continues_too(tmp_path: Path) -> None:
    def pruned() -> nn.Module:
        model = net()
        attach_(model, Masks({"0.weight": torch.eye(12, 6) > 0}))
        return model

    data, how = Data(train=Shuffled((X, Y), 8)), FineTune(2, 0.05)
    torch.manual_seed(1)
    whole = pruned()
    history = finetune(whole, data, how)
    torch.manual_seed(1)
    first = pruned()
    finetune(first, data, how, checkpoint=Checkpoints(tmp_path, 3))
    last = latest(tmp_path)
    assert last is not None
    last.unlink()  # as if it had died before the last step
    second = pruned()
    assert finetune(second, data, how, checkpoint=Checkpoints(tmp_path, 3)) == history
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_pruner_states_move_with_the_model(tmp_path: Path) -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    recipe = Recipe(Snip(), target=TARGET, schedule=OneShot(begin=3, unit="steps"))
    training = Training(model, sgd, Gradual(model, sgd, recipe))
    for x, y in Shuffled((X, Y), 20):
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
        training.pruner.step()
    save_checkpoint(tmp_path, training, step=2)
    other = net(1)
    sgd2 = torch.optim.SGD(other.parameters(), 0.1)
    again = Training(other, sgd2, Gradual(other, sgd2, recipe))
    assert resume_(tmp_path, again) == 2
    mine, theirs = (t.pruner.state_dict()["stats"]["states"] for t in (training, again))
    assert mine.keys() == theirs.keys() != set()
    assert all(torch.equal(mine[k][p], theirs[k][p]) for k in mine for p in mine[k])
