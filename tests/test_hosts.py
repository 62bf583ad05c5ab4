"""Pruning inside Transformers' Trainer and Lightning: exact, resumable, and never forgotten."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from secateur import Gradual, Recipe, Scope, Target, masks_of
from secateur.core.errors import MissingExtra, UsageError
from secateur.drive.training.hosts import LightningCallback, TransformersCallback
from secateur.drive.training.session import Session
from secateur.formats.checkpoint import read_checkpoint, write_checkpoint
from secateur.schedule import OneShot, Polynomial
from secateur.score import Movement

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TARGET = Target("sparsity", 0.75)
RECIPE = Recipe(Movement(), target=TARGET, schedule=Polynomial(0, 9, 3))


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": torch.tensor(i % 3)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2))
            self.middle = nn.Linear(16, 8)
            self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.middle(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(place: Path, callback: Any, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(place),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "save_steps": 5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 100,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**{**settings, **more})
    return transformers.Trainer(Net(), arguments, train_dataset=Pairs(), callbacks=[callback])


def test_the_trainer_prunes_and_continues_exactly(tmp_path: Path) -> None:
    whole = TransformersCallback(RECIPE)
    first = trainer(tmp_path / "a", whole)
    first.train()
    assert whole.pruned.facts.sparsity == pytest.approx(0.75, abs=0.02)
    assert [e["step"] for e in whole.pruned.facts.history] == [3, 6, 9]  # optimizer steps
    assert not len(masks_of(first.model))
    saved = tmp_path / "a" / "checkpoint-5"
    names = read_names(saved / "model.safetensors")
    assert names == set(first.model.state_dict())  # no masks among them
    for place, given in ((tmp_path / "a", {}), (tmp_path / "b", {"moved": True})):
        more: dict[str, Any] = {}
        if given:
            saved = saved.rename(tmp_path / "moved")
            more["resume_from_checkpoint"] = str(saved)
        callback = TransformersCallback(RECIPE)
        second = trainer(place, callback, **more)
        second.train(resume_from_checkpoint=str(saved))
        assert callback.pruned.masks == whole.pruned.masks
        assert callback.pruned.facts.history == whole.pruned.facts.history
        for name, value in first.model.state_dict().items():
            assert torch.equal(value, second.model.state_dict()[name]), name


def read_names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def test_a_schedule_longer_than_the_training_is_refused_at_once(tmp_path: Path) -> None:
    callback = TransformersCallback(Recipe(target=TARGET, schedule=Polynomial(0, 13, 2)))
    with pytest.raises(UsageError, match="training ends at step 12"):
        trainer(tmp_path, callback).train()
    epochs = Recipe(target=TARGET, schedule=Polynomial(0, 3, 0.1, unit="epochs"))
    with pytest.raises(UsageError, match="training ends at epoch 2"):
        trainer(tmp_path, TransformersCallback(epochs)).train()
    with pytest.raises(UsageError, match="rounds"):
        trainer(tmp_path, TransformersCallback(Recipe(schedule=OneShot()))).train()


class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 4


def test_training_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    callback = TransformersCallback(RECIPE)
    short = trainer(tmp_path, callback)
    short.add_callback(Stop())
    with pytest.raises(UsageError, match=r"finalize\(\) at step 4"):
        short.train()
    with pytest.raises(UsageError, match="did not reach its end"):
        _ = callback.pruned


def test_a_forgotten_callback_is_an_error() -> None:
    with pytest.raises(UsageError, match="never called"):
        _ = TransformersCallback(RECIPE).pruned


def test_weights_of_another_moment_are_not_put_back(tmp_path: Path) -> None:
    host = trainer(tmp_path, TransformersCallback(RECIPE))
    host.args.load_best_model_at_end = True
    with pytest.raises(UsageError, match="load_best_model_at_end"):
        host.train()


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    callback = TransformersCallback(RECIPE)
    trainer(tmp_path, callback).train()
    file = tmp_path / "checkpoint-5" / "secateur.safetensors"
    state, stamp = read_checkpoint(file)
    other = Recipe(Movement(), target=Target("sparsity", 0.5), schedule=Polynomial(0, 9, 3))
    with pytest.raises(UsageError, match="Another recipe"):
        trainer(tmp_path, TransformersCallback(other)).train(str(file.parent))
    file.unlink()
    with pytest.raises(UsageError, match=r"there is no secateur\.safetensors") as error:
        trainer(tmp_path, TransformersCallback(RECIPE)).train(str(file.parent))
    assert "killed" not in str(error.value)  # no earlier checkpoint is there
    write_checkpoint(file, state, stamp)
    trainer(tmp_path, TransformersCallback(RECIPE)).train(str(file.parent))


def test_a_run_that_was_killed_while_it_saved_is_told_where_to_go_on(tmp_path: Path) -> None:
    trainer(tmp_path, TransformersCallback(RECIPE)).train()
    (tmp_path / "checkpoint-10" / "secateur.safetensors").unlink()
    with pytest.raises(UsageError) as error:
        trainer(tmp_path, TransformersCallback(RECIPE)).train(str(tmp_path / "checkpoint-10"))
    said = "killed while it wrote checkpoint-10, remove that folder to continue from checkpoint-5"
    assert said in str(error.value)


def test_any_pruner_with_the_same_interface_will_do(tmp_path: Path) -> None:
    made: list[Any] = []

    def make(model: nn.Module, optimizer: Any, per_epoch: int | None) -> Any:
        assert per_epoch == 6
        made.append(Gradual(model, optimizer, RECIPE))
        return made[0]

    callback = TransformersCallback(make)
    trainer(tmp_path, callback).train()
    assert made[0].steps == 12
    assert callback.pruned.masks.total == 16 * 6 + 8 * 16


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("transformers", "lightning", "pytorch_lightning"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match="transformers"):
        TransformersCallback(RECIPE)
    if importlib.util.find_spec("lightning") is None:
        with pytest.raises(UsageError, match="pip install lightning"):
            LightningCallback(RECIPE)


# -- Lightning: what the callback does, with a stand-in for the trainer -----------------------------


def session_steps(session: Session, net: nn.Module, optimizer: Any, steps: int) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))).sum().backward()
        optimizer.step()
        session.step()


def test_a_session_can_be_restored_before_it_begins() -> None:
    def start() -> tuple[Session, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        return Session(RECIPE), net, torch.optim.SGD(net.parameters(), 0.1)

    session, net, sgd = start()
    session.restore({})  # nothing yet
    session.begin(net, sgd, steps=12, per_epoch=6)
    session_steps(session, net, sgd, 6)
    state = session.state()
    assert masks_of(net).sparsity > 0.5
    other, net2, sgd2 = start()
    other.restore(state)
    assert other.state().keys() == state.keys()
    net2.load_state_dict(net.state_dict())
    other.begin(net2, sgd2, steps=12, per_epoch=6)
    assert masks_of(net2) == masks_of(net)
    assert other.pruner.steps == 6
    foreign, net3, sgd3 = start()
    foreign.what = Recipe(target=TARGET, schedule=Polynomial(0, 8, 2))
    foreign.restore(state)
    with pytest.raises(UsageError, match="Another recipe"):
        foreign.begin(net3, sgd3, steps=12, per_epoch=6)


lightning = importlib.util.find_spec("lightning")


@pytest.mark.skipif(lightning is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("permanent", [True, False])
def test_lightning_prunes_and_continues(tmp_path: Path, permanent: bool) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def fit(folder: Path, epochs: int, what: Any = RECIPE, resume: str | None = None) -> Any:
        whats = what if isinstance(what, list) else [what]
        more: Any = {"make_pruning_permanent": permanent, "amount": 0.75}
        callbacks = [LightningCallback(each, **more) for each in whats]
        saver = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1)
        host = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, saver], logger=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        )  # fmt: skip
        module = Module()
        host.fit(module, DataLoader(Pairs(), 2), ckpt_path=resume)
        return module, callbacks if isinstance(what, list) else callbacks[0]

    module, callback = fit(tmp_path / "a", 2)
    assert callback.pruned.facts.sparsity == pytest.approx(0.75, abs=0.02)
    assert [e["step"] for e in callback.pruned.facts.history] == [3, 6, 9]
    assert (len(masks_of(module)) == 0) == permanent
    again, second = fit(tmp_path / "b", 2, resume=str(tmp_path / "a" / "epoch=0-step=6.ckpt"))
    assert second.pruned.masks == callback.pruned.masks
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    _, default = fit(tmp_path / "c", 4, what=None)
    assert [e["step"] for e in default.pruned.facts.history] == [6, 12]
    with pytest.raises(UsageError, match="training ends at step 6"):
        fit(tmp_path / "d", 1)
    other, last = Recipe(target=TARGET, schedule=RECIPE.schedule), tmp_path / "a"
    with pytest.raises(UsageError, match="Another recipe would prune differently"):
        fit(tmp_path / "e", 2, what=other, resume=str(last / "epoch=0-step=6.ckpt"))
    both = [Recipe(target=TARGET, schedule=RECIPE.schedule, scope=Scope(include=(name,)))
            for name in ("net.0.weight", "net.2.weight")]  # fmt: skip
    module, pair = fit(tmp_path / "f", 2, what=both)
    again, second = fit(
        tmp_path / "g", 2, what=both, resume=str(tmp_path / "f" / "epoch=0-step=6.ckpt")
    )
    for one, twin in zip(pair, second, strict=True):
        assert one.pruned.masks == twin.pruned.masks
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
