"""Callbacks of training frameworks. They tell a session when to begin, step, save and end.

The session is given from above (:mod:`secateur.drive.training.hosts`): this file knows the frameworks, and
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

#: The callbacks of a training that is going on, in the order in which they began, by its optimizer: each
#: has a file of its own. Nothing is kept alive by it.
_RUNNING: WeakKeyDictionary[Any, list[ReferenceType[Any]]] = WeakKeyDictionary()


class Session(Protocol):
    """What a callback drives."""

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None,
        per_epoch: int | None,
    ) -> None:
        """Training begins: attach masks. ``steps`` is the length of the training.

        If a state was restored or read before, the host has loaded weights and optimizer as well.
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
    raise UsageError(
        f"continuing a Trainer run at step {step} with TransformersCallback",
        f"there is no {file} in {' or '.join(str(place) for place in places)}",
        "the masks and the place in the schedule are in that file",
        "continue a run that was saved with as many of these callbacks, and set "
        "resume_from_checkpoint= in the TrainingArguments if the folder was moved",
    )


def lightning_callback(session: Session, begin: Any, *, verbose: int = 0) -> Any:
    """A Lightning ``Callback`` that drives a session.

    Args:
        session: What is driven.
        begin: Called with the trainer before the session begins.
        verbose: 1 prints each mask update.

    Raises:
        MissingExtra: Lightning is not installed.
    """
    base = _lightning().Callback

    class PruningCallback(base):  # type: ignore[misc, valid-type]  # untyped
        """Prunes while a Lightning ``Trainer`` fits."""

        def __init__(self) -> None:
            self.session = session
            self._steps = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise UsageError(
                    "LightningCallback(...)",
                    f"the module has {len(trainer.optimizers)} optimizers",
                    "masks are held after the step of one optimizer",
                    "use secateur.Gradual in training_step, with manual optimization",
                )
            begin(trainer)
            total = trainer.estimated_stepping_batches
            batches = trainer.num_training_batches
            known = isinstance(batches, int) or math.isfinite(batches)
            per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if known else None
            session.begin(
                pl_module,
                trainer.optimizers[0],
                steps=int(total) if math.isfinite(total) and total > 0 else None,
                per_epoch=per_epoch,
            )
            self._steps = int(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            while self._steps < trainer.global_step:  # not while gradients are accumulated
                self._steps += 1
                session.step()
                if verbose:
                    trainer.print(session)

        def state_dict(self) -> dict[str, Any]:
            return session.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            session.restore(state_dict)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            session.end()

        @property
        def pruned(self) -> Any:
            """The result, after training."""
            return session.pruned  # type: ignore[attr-defined]

    return PruningCallback()


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
