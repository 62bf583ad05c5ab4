"""The callback for Lightning, in the order in which its Trainer calls it; Lightning is not needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Gradual, Recipe, Regrow, Scope, Target, masks_of
from secateur.core.errors import UsageError
from secateur.drive.training.hosts import LightningCallback
from secateur.frontends import hosts
from secateur.schedule import Polynomial

TARGET = Target("sparsity", 0.75)
RECIPE = Recipe(target=TARGET, schedule=Polynomial(0, 9, 3))
PER_EPOCH = 8


class Averaging:
    """Stands for Lightning's WeightAveraging."""


class Trainer:
    """The parts of Lightning's Trainer that the callback meets."""

    accumulate_grad_batches = 1

    def __init__(
        self, callback: Any, steps: float = 16, *, batches: float = PER_EPOCH, **more: Any
    ):
        self.callbacks, self.total = [callback, *more.pop("callbacks", ())], steps
        self.num_training_batches, self.global_step = batches, more.pop("done", 0)
        self.fast_dev_run, self.stop = more.pop("trial", False), more.pop("stop", None)
        assert not more

    @property
    def estimated_stepping_batches(self) -> float:
        return self.total

    def test(self, net: nn.Module, saved: Any) -> None:
        self.callbacks[0].setup(self, net, "test")
        net.load_state_dict(saved[0])
        self.callbacks[0].load_state_dict(saved[1])

    def fit(self, net: nn.Module, saved: Any = None) -> Any:
        """Train; returns what a checkpoint after step 4 holds."""
        callback, sgd = self.callbacks[0], torch.optim.SGD(net.parameters(), 0.1)
        self.optimizers = [sgd]
        callback.setup(self, net, "fit")
        if saved is not None:
            net.load_state_dict(saved[0])
            callback.load_state_dict(saved[1])
            self.global_step = saved[2]
        callback.on_train_start(self, net)
        kept = None
        while self.global_step < (self.stop or self.total):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.global_step))
            sgd.zero_grad()
            net(x).square().mean().backward()
            sgd.step()
            self.global_step += 1
            callback.on_train_batch_end(self, net, None, None, 0)
            if self.global_step == 4:
                kept = copy.deepcopy((net.state_dict(), callback.state_dict(), 4))
        callback.on_train_end(self, net)
        return kept


class Loop:
    """Lightning's order of calls for several callbacks, with its own checkpoints of their states."""

    num_training_batches, accumulate_grad_batches, fast_dev_run = PER_EPOCH, 1, False

    def __init__(self, *callbacks: Any, steps: int = 16):
        self.callbacks, self.estimated_stepping_batches = list(callbacks), steps
        assert len({callback.state_key for callback in callbacks}) == len(callbacks)

    def saved(self, net: nn.Module, sgd: torch.optim.Optimizer) -> Any:
        states = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        weights = (net.state_dict(), sgd.state_dict(), self.global_step)
        return copy.deepcopy((*weights, {"callbacks": states}))

    def fit(self, net: nn.Module, saved: Any = None) -> Any:
        """Train; returns a checkpoint after step 4."""
        sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        self.optimizers, self.global_step, kept = [sgd], 0, None
        for callback in self.callbacks:
            callback.setup(self, net, "fit")
        if saved is not None:
            weights, moments, self.global_step, checkpoint = copy.deepcopy(saved)
            net.load_state_dict(weights)
            for callback in self.callbacks:
                callback.on_load_checkpoint(self, net, checkpoint)
            for callback in self.callbacks:
                if callback.state_key in checkpoint["callbacks"]:
                    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
            sgd.load_state_dict(moments)
        for callback in self.callbacks:
            callback.on_train_start(self, net)
        while self.global_step < self.estimated_stepping_batches:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.global_step))
            sgd.zero_grad()
            net(x).square().mean().backward()
            sgd.step()
            self.global_step += 1
            for callback in self.callbacks:
                callback.on_train_batch_end(self, net, None, None, 0)
            if self.global_step == 4:
                kept = self.saved(net, sgd)
        for callback in self.callbacks:
            callback.on_train_end(self, net)
        return kept


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(Callback=object, callbacks=SimpleNamespace(WeightAveraging=Averaging))
    monkeypatch.setattr(hosts, "_lightning", lambda: found)


def build(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), *more, nn.Linear(8, 3))


def test_testing_a_checkpoint_puts_no_masks_back() -> None:
    callback, net = LightningCallback(RECIPE), build()
    trainer = Trainer(callback)
    early = trainer.fit(net)
    callback.on_fit_end(trainer, net)
    result = callback.pruned
    late = copy.deepcopy((net.state_dict(), callback.state_dict(), 16))
    trainer.test(net, late)
    assert not len(masks_of(net))
    assert callback.pruned is result
    trainer.test(net, early)  # weights from before the last mask update
    assert not len(masks_of(net))
    with pytest.raises(UsageError, match="not zero where it was pruned"):
        _ = callback.pruned


def test_the_same_callback_continues_from_a_checkpoint() -> None:
    callback, net = LightningCallback(RECIPE), build()
    saved = Trainer(callback).fit(net)
    whole, history = callback.pruned.masks, callback.pruned.facts.history
    for again in (net, build()):
        Trainer(callback).fit(again, saved)
        assert callback.pruned.masks == whole
        assert callback.pruned.facts.history == history
        for a, b in zip(net.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_checkpoint_from_after_the_end_has_the_masks() -> None:
    """As ``trainer.save_checkpoint`` writes it when all is done, for a longer training later."""
    callback, net = LightningCallback(RECIPE), build()
    Trainer(callback).fit(net)
    saved = copy.deepcopy((net.state_dict(), callback.state_dict(), 16))
    again = LightningCallback(RECIPE)
    Trainer(again, 24).fit(build(), saved)
    assert again.pruned.masks == callback.pruned.masks
    assert not torch.equal(again.pruned.model[0].weight, net[0].weight)  # it was trained on


def test_a_checkpoint_in_which_the_training_is_over_gives_its_result() -> None:
    """Lightning restores it, trains nothing, and calls nothing but the end of the fit."""
    callback, net = LightningCallback(RECIPE), build()
    Trainer(callback).fit(net)
    weights, state = copy.deepcopy((net.state_dict(), callback.state_dict()))
    again, twin = LightningCallback(RECIPE), build()
    trainer = Trainer(again, done=16)
    trainer.optimizers = [torch.optim.SGD(twin.parameters(), 0.1)]
    again.setup(trainer, twin, "fit")
    twin.load_state_dict(weights)
    again.load_state_dict(state)
    again.on_fit_end(trainer, twin)
    assert again.pruned.masks == callback.pruned.masks
    assert again.pruned.facts.history == callback.pruned.facts.history
    assert not len(masks_of(twin))
    assert all(map(torch.equal, twin.state_dict().values(), weights.values()))


def test_what_is_left_of_a_training_counts() -> None:
    """From a checkpoint without masks, or in a second fit, pruning begins at its first step."""
    callback = LightningCallback(RECIPE)
    trainer = Trainer(callback, 24, done=10)
    trainer.fit(build())
    assert [e["step"] for e in callback.pruned.facts.history] == [3, 6, 9]
    with pytest.raises(UsageError, match="training ends at step 8"):
        Trainer(LightningCallback(RECIPE), 24, done=16).fit(build())
    rigl = LightningCallback(Recipe(target=TARGET, regrow=Regrow(frequency=2)))
    Trainer(rigl, 24, done=12).fit(build())
    assert rigl.session.pruner.steps == 12


@pytest.mark.parametrize(
    ("steps", "batches", "at_end", "expected"),
    [
        (32, 8, True, [8, 16]),
        (8, 8, True, [8]),
        (20, 8, True, [8]),  # two epochs and a half: max_steps= may end anywhere
        (5, 8, True, [1, 2]),
        (16, float("inf"), True, [1, 2, 3, 4, 5, 6, 7, 8]),
        (16, 8, False, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_by_default_it_prunes_in_the_first_half(
    steps: int, batches: float, at_end: bool, expected: list[int]
) -> None:
    callback = LightningCallback(amount=0.5, prune_on_train_epoch_end=at_end)
    Trainer(callback, steps, batches=batches).fit(build())
    assert [e["step"] for e in callback.pruned.facts.history] == expected
    assert callback.pruned.facts.sparsity == pytest.approx(0.5, abs=0.01)


def test_without_any_length_the_first_half_is_unknown() -> None:
    endless = Trainer(LightningCallback(), float("inf"), batches=float("inf"))
    with pytest.raises(UsageError, match="max_steps="):
        endless.fit(build())


@pytest.mark.parametrize("regrow", [None, Regrow(frequency=2)])
@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_a_trial_need_not_reach_the_target(regrow: Any, unit: str) -> None:
    recipe = Recipe(target=TARGET, schedule=Polynomial(0, 90, 3, unit=unit), regrow=regrow)
    callback = LightningCallback(recipe)
    Trainer(callback, 1, batches=1, trial=True).fit(build())
    assert [n.topic for n in callback.pruned.facts.notes].count("trial") == 1
    with pytest.raises(UsageError, match="would never be reached"):
        Trainer(LightningCallback(recipe), 1, batches=1).fit(build())


def test_an_early_end_says_how_to_keep_what_there_is() -> None:
    callback, net = LightningCallback(RECIPE), build()
    with pytest.raises(UsageError, match=r"callback\.session\.pruner\.finalize\(early=True\)"):
        Trainer(callback, stop=5).fit(net)
    found = callback.session.pruner.finalize(early=True)
    assert 0 < found.facts.sparsity < 0.75


def test_an_average_that_is_written_at_the_end_is_pruned_too() -> None:
    callback, net = LightningCallback(RECIPE), build()
    trainer = Trainer(callback, callbacks=[Averaging()])
    trainer.fit(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)  # as a callback does whose on_train_end comes after ours
    callback.on_fit_end(trainer, net)
    assert int((net[0].weight != 0).sum()) == callback.pruned.masks["0.weight"].sum()
    assert "average" in next(n.text for n in callback.pruned.facts.notes if n.topic == "masks")
    with pytest.raises(UsageError, match=r"together with Averaging: the module has buffers"):
        Trainer(LightningCallback(RECIPE), callbacks=[Averaging()]).fit(build(nn.BatchNorm1d(8)))


def test_what_is_no_recipe_is_refused_before_training() -> None:
    for wrong in ("magnitude", 0.9):
        with pytest.raises(UsageError, match="wants a Recipe"):
            LightningCallback(wrong)  # type: ignore[arg-type]


# -- several callbacks ----------------------------------------------------------------------------


def of(name: str, end: int = 9) -> Recipe:
    return Recipe(target=TARGET, schedule=Polynomial(0, end, 3), scope=Scope(include=(name,)))


def test_two_callbacks_are_saved_side_by_side_and_continue() -> None:
    def two() -> list[Any]:
        return [LightningCallback(of("0.weight")), LightningCallback(of("2.weight", 12))]

    first, net = two(), build()
    saved = Loop(*first).fit(net)
    assert [list(callback.pruned.masks) for callback in first] == [["0.weight"], ["2.weight"]]
    second, again = two()[::-1], build()  # the order in the list does not matter
    Loop(*second).fit(again, saved)
    for one, other in zip(first, second[::-1], strict=True):
        assert other.pruned.masks == one.pruned.masks
        assert other.pruned.facts.history == one.pruned.facts.history
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_callback_that_joins_later_begins_then() -> None:
    saved = Loop(LightningCallback(of("0.weight"))).fit(build())
    old, new = LightningCallback(of("0.weight")), LightningCallback(of("2.weight"))
    Loop(old, new).fit(build(), saved)
    assert [e["step"] for e in old.pruned.facts.history] == [3, 6, 9]
    assert [e["step"] for e in new.pruned.facts.history] == [3, 6, 9]  # of its own steps
    assert new.session.pruner.steps == 12


def test_a_checkpoint_of_another_recipe_is_refused() -> None:
    saved = Loop(LightningCallback(of("0.weight"))).fit(build())
    with pytest.raises(UsageError, match="Another recipe would prune differently"):
        Loop(LightningCallback(of("0.weight", 12))).fit(build(), saved)


def test_the_key_of_a_state_is_the_same_in_every_run() -> None:
    def build_pruner(model: nn.Module, optimizer: Any, per_epoch: int | None) -> Any:
        return Gradual(model, optimizer, RECIPE)

    for what in (RECIPE, None, build_pruner):
        callback = LightningCallback(what)
        key = callback.state_key
        assert LightningCallback(what).state_key == key
        Loop(callback).fit(build())
        assert callback.state_key == key
    keys = {LightningCallback(what).state_key for what in (RECIPE, None, build_pruner, print)}
    keys |= {LightningCallback(amount=0.9).state_key}
    assert len(keys) == 5
