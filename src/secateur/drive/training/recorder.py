"""What a training loop keeps of itself on the way: checkpoints, and a copy before each pruning."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.core.arguments import require_place
from secateur.core.atomic import require_writable
from secateur.core.errors import DataError, UsageError
from secateur.drive.training import ranks
from secateur.drive.training.resume import (
    Training,
    beside,
    drop_later,
    on_device,
    put_back_,
    resume_,
    save_checkpoint,
    stamp_of,
    state_of,
)
from secateur.formats.checkpoint import read_checkpoint, require_stamp, write_checkpoint

#: How often a run goes back before it gives up.
ROLLBACKS = 3
_BEFORE = ("before-pruning.safetensors", "before-that.safetensors")


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run saves itself; the same call continues from there.

    Args:
        folder: Holds the checkpoints. If there are some already, the run continues.
        every: Optimizer steps between two.
        keep: How many stay.

    Example:
        >>> Checkpoints("runs/a", every=100).keep
        2
    """

    folder: str | Path
    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        require_place("a folder for checkpoints", self.folder)
        if self.every < 1 or self.keep < 1:
            found = f"every={self.every}, keep={self.keep}"
            why = "both are counts of at least 1"
            raise UsageError("Checkpoints(...)", found, why, "correct the value")

    def require_writable(self) -> None:
        """Fail before any work if nothing can be saved there.

        Raises:
            FileError: The folder is a file, or cannot be written.
        """
        place = Path(self.folder)
        require_writable(place.parent if place.suffix == ".safetensors" else place)

    def stage(self, number: int) -> Checkpoints:
        """The folder of a later stage of training of one run (0 is the folder itself)."""
        folder = Path(self.folder)
        return Checkpoints(
            folder / f"stage-{number + 1}" if number else folder, self.every, self.keep
        )


def as_checkpoints(given: Checkpoints | str | Path | None) -> Checkpoints | None:
    """Accept :class:`Checkpoints` or just a folder.

    Example:
        >>> as_checkpoints("runs/a").every
        500
    """
    return given if given is None or isinstance(given, Checkpoints) else Checkpoints(given)


@dataclass
class Tally:
    """What a loop counts: steps, the losses of this epoch, its history, and how often it went back.

    Args:
        terms: Settings of the training; a run goes on with the same ones only.

    Example:
        >>> tally = Tally(done=3)
        >>> other = Tally()
        >>> other.load_state_dict(tally.state_dict())
        >>> other == tally, tally.slowed
        (True, 1.0)
    """

    done: int = 0
    losses: float = 0.0
    seen: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: list[str] = field(default_factory=list)
    terms: dict[str, Any] = field(default_factory=dict)

    def count(self, loss: float, samples: int) -> None:
        """One more step."""
        self.done += 1
        self.losses, self.seen = self.losses + loss * samples, self.seen + samples

    @property
    def slowed(self) -> float:
        """Factor on the learning rate: halved each time that the run went back."""
        return float(0.5 ** len(self.rollbacks))

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dict(vars(self))

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a training with other settings.

        Raises:
            UsageError: They are named.
        """
        saved = state.get("terms") or self.terms
        names = [n for n, value in self.terms.items() if saved.get(n) != value]
        if names:
            before, now = (
                ", ".join(f"{n}={terms.get(n)}" for n in names) for terms in (saved, self.terms)
            )
            raise UsageError(
                "continuing a training from its checkpoint",
                f"it was begun with {before}, and now {now} is asked for",
                "what comes out would be the network of neither",
                "choose another folder, or continue with the settings of that run",
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        vars(self).update(copy.deepcopy(state))


class Recorder:
    """Saves a loop as it goes, continues it, and takes it back to before a pruning that failed.

    Args:
        training: The parts of the loop, with ``others["tally"]``.
        checkpoint: Where to save, if anywhere.
        rollback: Keep a copy from before the last pruning.
    """

    def __init__(
        self, training: Training, checkpoint: Checkpoints | None, *, rollback: bool
    ) -> None:
        self._training, self._checkpoint, self._rollback = training, checkpoint, rollback
        self._tally: Any = training.others["tally"]
        # The newest first: it may be from before the next pruning, and the other from before the last.
        self._copies: list[tuple[dict[str, Any], int]] = []
        self._saved = -1

    @property
    def _files(self) -> list[Path]:
        if self._checkpoint is None:
            return []
        return [beside(Path(self._checkpoint.folder) / name, ranks.rank()) for name in _BEFORE]

    def start_(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        if self._checkpoint is not None:
            self._checkpoint.require_writable()
            self._saved = resume_(self._checkpoint.folder, self._training) or -1
        if not self._rollback:
            return
        for file in self._files if self._saved > 0 else []:
            if not file.exists():
                continue
            state, stamp = read_checkpoint(file)
            require_stamp(file, stamp, stamp_of(self._training, 0))
            if stamp.step <= self._saved:
                self._copies.append((state, stamp.step))
        if not self._copies:
            self._keep_copy()

    def after_step(self, *, last: bool) -> None:
        """Save what is due after a step."""
        done, checkpoint = self._tally.done, self._checkpoint
        every = checkpoint.every if checkpoint is not None else 100
        # Whoever cannot say when it will prune is copied regularly.
        if self._rollback and getattr(self._training.pruner, "imminent", done % every == 0):
            self._keep_copy()
        if checkpoint is not None and (last or done % every == 0) and done != self._saved:
            save_checkpoint(checkpoint.folder, self._training, step=done, keep=checkpoint.keep)
            self._saved = done

    def back_(self, value: float) -> None:
        """Go back to before the last pruning, with half the learning rate.

        Raises:
            DataError: The run does not want that, or went back too often.
        """
        step, before = self._tally.done + 1, list(self._tally.rollbacks)
        found = f"the loss is {value}"
        if math.isfinite(value):
            found += ", and NaN or infinite in another process"
        # From the very state that gave NaN nothing else can come.
        earlier = [kept for kept in self._copies if kept[1] < self._tally.done]
        if not self._rollback or not earlier or len(before) >= ROLLBACKS:
            often = f" after {len(before)} rollbacks" if before else ""
            raise DataError(
                f"fine-tuning at step {step}",
                found + often,
                "training cannot go on from there",
                "lower the learning rate, or check the data"
                + ("" if self._rollback else "; on_nan='rollback' goes back and slows down"),
            )
        state, at = earlier[0]
        self._copies = earlier
        put_back_(self._training, state)
        self._tally.rollbacks = [
            *before,
            f"{found} at step {step}: went back to step {at}, before the last mask update, and on "
            f"with {100 * 0.5 ** (len(before) + 1):g} % of the learning rate",
        ]
        slower = self._tally.slowed / 0.5 ** len(_rollbacks(state))
        for group in self._training.optimizer.param_groups:
            group["lr"] *= slower
        if self._checkpoint is not None:  # what was saved on the way into NaN leads there again
            drop_later(self._checkpoint.folder, at)
            save_checkpoint(self._checkpoint.folder, self._training, step=at)
            self._saved = at

    def _keep_copy(self) -> None:
        state = on_device(state_of(self._training), torch.device("cpu"))
        self._copies = [(state, self._tally.done), *self._copies[:1]]
        if self._files:
            newest, older = self._files
            if newest.exists():
                newest.replace(older)
            write_checkpoint(newest, state, stamp_of(self._training, self._tally.done))


def _rollbacks(state: dict[str, Any]) -> list[str]:
    found: list[str] = state["parts"]["other tally"]["rollbacks"]
    return found
