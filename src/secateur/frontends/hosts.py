"""Callbacks of training frameworks. They tell a session when to begin, step, save and end.

The session is given from above (:mod:`secateur.drive.training.session`): this file knows the frameworks, and
nothing about pruning. Their classes are made when they are asked for, so nothing is imported before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary
from weakref import ref as ref_to

import torch
from torch import nn

from secateur.core.batches import length_of
from secateur.core.errors import MissingExtra, UsageError

#: The file of a session beside the other files of a Transformers checkpoint.
FILE = "secateur.safetensors"

#: What the keys of our states in a checkpoint of Lightning begin with.
KEY = "secateur.LightningCallback "

#: The callbacks of a training that is going on, in the order in which they began, by its optimizer: each
#: has a file of its own. Nothing is kept alive by it.
_RUNNING: WeakKeyDictionary[Any, list[ReferenceType[Any]]] = WeakKeyDictionary()


class Session(Protocol):
    """What a callback drives."""

    @property
    def key(self) -> str:
        """The same in every run of it, and another one for another session of one training."""
        ...

    def forget(self) -> None:
        """Another training begins."""
        ...

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None,
        per_epoch: int | None,
        trial: bool = False,
    ) -> None:
        """Training begins: attach masks. ``steps`` is the length of the training.

        If a state was restored or read before, the host has loaded weights and optimizer as well.
        A ``trial`` is too short for any schedule.
        """
        ...

    def step(self) -> None:
        """The optimizer made a step."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that the framework does not save itself."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`; before or after :meth:`begin`."""
        ...

    def write(self, file: Path) -> None:
        """Save the state into a file."""
        ...

    def read(self, file: Path) -> None:
        """Continue from a file of :meth:`write`; before or after :meth:`begin`."""
        ...

    def end(self) -> None:
        """Training ends: the target must have been reached."""
        ...

    def hold(self) -> None:
        """All callbacks have ended: what they wrote into pruned weights goes."""
        ...


def transformers_callback(session: Session) -> Any:
    """A ``TrainerCallback`` that drives a session.

    Raises:
        MissingExtra: Transformers is not installed.

    Example:
        >>> class Silent:
        ...     def step(self): print("step")
        >>> callback = transformers_callback(Silent())
        >>> callback.on_optimizer_step(None, None, None)
        step
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingExtra("transformers", "transformers", "TransformersCallback(...)") from None

    class PruningCallback(TrainerCallback):
        """Prunes while a ``Trainer`` trains."""

        def __init__(self) -> None:
            self.session, self._file = session, FILE

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _refuse_best(args)
            self._file = _file_of(self, kwargs["optimizer"])
            loader: Any = kwargs.get("train_dataloader")
            length, per_epoch = length_of(loader), None  # no length: the data is a stream
            if length is not None:
                per_epoch = max(1, math.ceil(length / args.gradient_accumulation_steps))
            session.forget()
            if state.global_step:  # before it begins: the Trainer has loaded weights and moments
                session.read(_saved(args, state.global_step, self._file))
            session.begin(
                kwargs["model"], kwargs["optimizer"], steps=state.max_steps, per_epoch=per_epoch
            )

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            session.step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                session.write(folder / self._file)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _RUNNING.pop(kwargs["optimizer"], None)
            session.end()

        @property
        def pruned(self) -> Any:
            """The result, after training."""
            return session.pruned  # type: ignore[attr-defined]

    return PruningCallback()


def _file_of(callback: Any, optimizer: Any) -> str:
    begun = [ref for ref in _RUNNING.get(optimizer, ()) if ref() is not None]
    if all(ref() is not callback for ref in begun):
        begun.append(ref_to(callback))
    _RUNNING[optimizer] = begun
    place = next(i for i, ref in enumerate(begun) if ref() is callback)
    return FILE if place == 0 else FILE.replace(".", f"-{place + 1}.")


def _refuse_best(args: Any) -> None:
    if getattr(args, "load_best_model_at_end", False):
        raise UsageError(
            "TransformersCallback with load_best_model_at_end=True",
            "at the end the Trainer would put back the weights of an earlier checkpoint",
            "those may be from before the last mask update, when less was pruned",
            "set load_best_model_at_end=False",
        )


def _saved(args: Any, step: int, file: str) -> Path:
    given = getattr(args, "resume_from_checkpoint", None)
    places = [Path(args.output_dir) / f"checkpoint-{step}"]
    if isinstance(given, str) and given not in ("True", "False"):
        places.insert(0, Path(given))
    for place in places:
        if (place / file).is_file():
            return place / file
    do = (
        "continue a run that was saved with as many of these callbacks, and set "
        "resume_from_checkpoint= in the TrainingArguments if the folder was moved"
    )
    saved = (
        p.parent.name.removeprefix("checkpoint-") for p in Path(args.output_dir).glob(f"*/{file}")
    )
    earlier = [int(number) for number in saved if number.isdigit() and int(number) < step]
    if earlier:  # ours is the last file of a checkpoint
        do += (
            f"; if the run was killed while it wrote checkpoint-{step}, remove that folder to continue "
            f"from checkpoint-{max(earlier)}"
        )
    raise UsageError(
        f"continuing a Trainer run at step {step} with TransformersCallback",
        f"there is no {file} in {' or '.join(str(place) for place in places)}",
        "the masks and the place in the schedule are in that file",
        do,
    )


def lightning_callback(session: Session, begin: Any, *, verbose: int = 0) -> Any:
    """A Lightning ``Callback`` that drives a session.

    Args:
        session: What is driven.
        begin: Called with steps, and steps of an epoch, before the session begins.
        verbose: 1 prints the masks of every step.

    Raises:
        UsageError: Lightning is not installed.
    """
    lightning = _lightning()
    base = lightning.Callback

    class PruningCallback(base):  # type: ignore[misc, valid-type]  # untyped
        """Prunes while a Lightning ``Trainer`` fits."""

        def __init__(self) -> None:
            self.session = session
            self._steps = 0
            self._fits = self._new = self._restored = self._begun = False

        @property
        def state_key(self) -> str:
            return KEY + session.key

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self._fits = self._new = stage == "fit"
            self._begun = False

        def _renew(self) -> None:
            if self._new:  # not in setup: a fit with nothing left to do begins no training
                session.forget()
                self._new = self._restored = False

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if self._fits:  # test and validate load the states of callbacks, too
                self._renew()
                self._restored = bool(state_dict)
                session.restore(state_dict)

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            # Lightning passes over states whose key it does not find. One that nobody here has the key
            # of may be ours, of another recipe: the session says so, and does not begin anew.
            saved = checkpoint.get("callbacks") or {}
            here = {callback.state_key for callback in trainer.callbacks}
            left = [key for key in saved if str(key).startswith(KEY) and key not in here]
            if left and self.state_key not in saved:
                self.load_state_dict(saved[left[0]])

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._renew()
            self._begun = True
            _require_one(trainer.optimizers)
            _refuse_average(lightning, trainer.callbacks, pl_module)
            self._steps = int(trainer.global_step)
            steps, per_epoch = _length(trainer, 0 if self._restored else self._steps)
            begin(steps, per_epoch)
            trial = bool(getattr(trainer, "fast_dev_run", False))
            optimizer = trainer.optimizers[0]
            session.begin(pl_module, optimizer, steps=steps, per_epoch=per_epoch, trial=trial)

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            while self._steps < trainer.global_step:  # not while gradients are accumulated
                self._steps += 1
                session.step()
                if verbose:
                    trainer.print(session)

        def state_dict(self) -> dict[str, Any]:
            return session.state()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            session.end()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            # Of a checkpoint in which the training is over, Lightning trains nothing.
            left = self._restored and not self._new and not self._begun
            if left and trainer.num_training_batches:
                self.on_train_start(trainer, pl_module)
                session.end()
            session.hold()  # an average may have been put into the model after our on_train_end

        @property
        def pruned(self) -> Any:
            """The result, after training."""
            return session.pruned  # type: ignore[attr-defined]

    return PruningCallback()


def _length(trainer: Any, done: int) -> tuple[int | None, int | None]:
    """Steps from ``done`` to the end of the training, and those of an epoch; ``None`` if not known."""
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    known = isinstance(batches, int) or math.isfinite(batches)
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if known else None
    return int(total) - done if math.isfinite(total) and total > done else None, per_epoch


def _require_one(optimizers: list[Any]) -> None:
    if len(optimizers) != 1:
        raise UsageError(
            "LightningCallback(...)",
            f"the module has {len(optimizers)} optimizers",
            "masks are held after the step of one optimizer",
            "use secateur.Gradual in training_step, with manual optimization",
        )


def _refuse_average(lightning: Any, callbacks: list[Any], module: nn.Module) -> None:
    """Refuse averages that go through all buffers by their place: masks are buffers that they lack."""
    kind = getattr(lightning.callbacks, "WeightAveraging", None)
    if kind is None or next(module.buffers(), None) is None:
        return
    for callback in callbacks:
        if isinstance(callback, kind):
            raise UsageError(
                f"LightningCallback(...) together with {type(callback).__name__}",
                "the module has buffers, e.g. those of a batch normalisation",
                "that callback copies buffers by their place, and masks are buffers that its copy of "
                "the module does not have",
                "use Lightning's StochasticWeightAveraging, which leaves buffers alone, or average with "
                "torch.optim.swa_utils.AveragedModel in a loop of your own",
            )


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UsageError(
        "LightningCallback(...)",
        "the package 'lightning' is not installed",
        "it is no dependency of secateur, not even an optional one",
        "run: pip install lightning",
    )
