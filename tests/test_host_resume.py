"""A host loads weights and optimizer first; the pruner that is built then must leave them alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Recipe, Regrow, Scope, Target, masks_of
from secateur.core.errors import UsageError
from secateur.drive.training.hosts import TransformersCallback
from secateur.drive.training.regrow import TopKast
from secateur.drive.training.session import Session
from secateur.schedule import OneShot, Polynomial

TARGET = Target("sparsity", 0.75)
# All of them choose a mask before the first step.
FIRST = {
    "rigl": Recipe(target=TARGET, regrow=Regrow(frequency=3)),
    "set": Recipe(target=TARGET, regrow=Regrow("random", frequency=3)),
    "topkast": Recipe(target=TARGET, regrow=TopKast(0.1, frequency=3)),
    "oneshot": Recipe(target=TARGET, schedule=OneShot(0, unit="steps")),
}
STEPS, CUT = 12, 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.middle, self.head = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.middle(torch.relu(self.body(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(session: Session, net: nn.Module, optimizer: Any, begin: int, end: int) -> None:
    for i in range(begin, end):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        net(x, torch.arange(4) % 3)["loss"].backward()
        optimizer.step()
        session.step()


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("waits", ["state", "file"])
def test_what_was_loaded_before_the_pruner_is_kept(name: str, waits: str, tmp_path: Path) -> None:
    def start() -> tuple[Session, nn.Module, torch.optim.Optimizer]:
        net = Net()
        return Session(FIRST[name]), net, torch.optim.AdamW(net.parameters(), 0.02)

    whole, net, adamw = start()
    whole.begin(net, adamw, steps=STEPS, per_epoch=None)
    train(whole, net, adamw, 0, CUT)
    state = copy.deepcopy(whole.state())
    whole.write(tmp_path / "a.safetensors")
    saved = copy.deepcopy((net.state_dict(), adamw.state_dict()))
    train(whole, net, adamw, CUT, STEPS)
    whole.end()

    again, other, optimizer = start()
    if waits == "state":  # as Lightning does
        again.restore(state)
    else:  # as the Trainer does
        again.read(tmp_path / "a.safetensors")
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.begin(other, optimizer, steps=STEPS, per_epoch=None)
    for key, value in saved[0].items():
        assert torch.equal(value, other.state_dict()[key]), key
    for i, slots in saved[1]["state"].items():
        for slot, value in slots.items():
            assert torch.equal(value, optimizer.state_dict()["state"][i][slot]), (i, slot)
    train(again, other, optimizer, CUT, STEPS)
    again.end()
    assert again.pruned.masks == whole.pruned.masks
    assert again.pruned.facts.history == whole.pruned.facts.history
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_file_of_another_recipe_is_named_when_training_begins(tmp_path: Path) -> None:
    session, net = Session(FIRST["oneshot"]), Net()
    session.begin(net, torch.optim.SGD(net.parameters(), 0.1), steps=STEPS, per_epoch=None)
    session.write(tmp_path / "a.safetensors")
    other, net = Session(FIRST["rigl"]), Net()
    other.read(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"a\.safetensors.*[Aa]nother recipe"):
        other.begin(net, torch.optim.SGD(net.parameters(), 0.1), steps=STEPS, per_epoch=None)
    alien = nn.Sequential(nn.Linear(6, 4))
    other, recipe = Session(FIRST["oneshot"]), FIRST["oneshot"]
    assert other.what is recipe
    other.read(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="its model is"):
        other.begin(alien, torch.optim.SGD(alien.parameters(), 0.1), steps=STEPS, per_epoch=None)


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": torch.tensor(i % 3)}


@pytest.mark.parametrize("name", FIRST)
def test_the_trainer_continues_dynamic_sparse_training_exactly(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def go(resume: str | None = None) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4,
            learning_rate=0.02, save_steps=CUT, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_steps=100, dataloader_pin_memory=False,
        )  # fmt: skip
        callback = TransformersCallback(FIRST[name])
        host = transformers.Trainer(Net(), arguments, train_dataset=Pairs(), callbacks=[callback])
        host.train(resume_from_checkpoint=resume)
        assert not len(masks_of(host.model))
        return callback.pruned

    whole = go()
    resumed = go(str(tmp_path / f"checkpoint-{CUT}"))
    assert resumed.masks == whole.masks
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_two_callbacks_of_one_trainer_keep_files_of_their_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    # The second one still changes its target while it exchanges weights.
    recipes = (
        Recipe(target=TARGET, schedule=Polynomial(2, 8, 2), scope=Scope(include=("body",))),
        Recipe(
            target=Target("sparsity", 0.5),
            schedule=Polynomial(1, 9, 4),
            scope=Scope(include=("middle",)),
            regrow=Regrow("random", frequency=3, start="criterion"),
        ),
    )

    def go(resume: str | None = None) -> list[Any]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4,
            learning_rate=0.02, save_steps=CUT, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_steps=100, dataloader_pin_memory=False,
        )  # fmt: skip
        callbacks = [TransformersCallback(recipe) for recipe in recipes]
        host = transformers.Trainer(Net(), arguments, train_dataset=Pairs(), callbacks=callbacks)
        host.train(resume_from_checkpoint=resume)
        return [callback.pruned for callback in callbacks]

    whole = go()
    assert [list(p.masks) for p in whole] == [["body.weight"], ["middle.weight"]]
    saved = tmp_path / f"checkpoint-{CUT}"
    assert {p.name for p in saved.glob("secateur*")} == {
        "secateur.safetensors",
        "secateur-2.safetensors",
    }
    resumed = go(str(saved))
    for before, after in zip(whole, resumed, strict=True):
        assert after.masks == before.masks
        assert after.facts.history == before.facts.history
    for key, value in whole[0].model.state_dict().items():
        assert torch.equal(value, resumed[0].model.state_dict()[key]), key


def test_a_callback_can_be_used_for_the_next_training(tmp_path: Path) -> None:
    """A notebook: the same callback, and the same trainer, continue or begin anew."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback = TransformersCallback(FIRST["rigl"])

    def host() -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4,
            learning_rate=0.02, save_steps=CUT, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_steps=100, dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(Net(), arguments, train_dataset=Pairs(), callbacks=[callback])

    first = host()
    first.train()
    whole = copy.deepcopy(callback.pruned)
    first.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CUT}"))
    assert callback.pruned.masks == whole.masks
    for other in (str(tmp_path / f"checkpoint-{CUT}"), None):
        host().train(resume_from_checkpoint=other)
        assert callback.pruned.masks == whole.masks
        assert callback.pruned.facts.history == whole.facts.history


def test_a_training_that_was_interrupted_leaves_nothing_for_the_next() -> None:
    net = Net()
    adamw = torch.optim.AdamW(net.parameters(), 0.02)
    session = Session(FIRST["rigl"])
    session.begin(net, adamw, steps=STEPS, per_epoch=None)
    train(session, net, adamw, 0, CUT)
    assert len(masks_of(net))
    session.forget()
    assert not len(masks_of(net))
    assert not adamw._optimizer_step_pre_hooks
    assert not adamw._optimizer_step_post_hooks
    with pytest.raises(UsageError, match="never called"):
        _ = session.pruned
    session.begin(net, adamw, steps=STEPS, per_epoch=None)
    train(session, net, adamw, 0, STEPS)
    session.end()
    assert session.pruned.masks.sparsity == pytest.approx(0.75, abs=0.02)
