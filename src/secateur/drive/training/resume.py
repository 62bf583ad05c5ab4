"""Checkpoints of a training loop: saved every few steps, and continued bit for bit."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.atomic import sweep
from secateur.core.errors import FormatError, SecateurError, UsageError
from secateur.core.masks import Masks
from secateur.core.slots import bare, device_of
from secateur.drive.training import ranks
from secateur.drive.training.chance import random_states, restore_random_
from secateur.drive.training.held import SUFFIX, attach_, masks_of
from secateur.drive.training.slotted import optimizer_state, restore_optimizer_
from secateur.formats.checkpoint import (
    Stamp,
    names_hash,
    read_checkpoint,
    require_stamp,
    write_checkpoint,
)

_NAME = re.compile(r"step-(\d{9})\.safetensors")


class Stateful(Protocol):
    """What has a state that can be saved: a pruner, a learning-rate schedule, a gradient scaler.

    If it has ``require_fit(state)``, that is asked before anything is changed, and raises if the state
    is not one of its own.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Training:
    """The parts of a training loop that have a state.

    Args:
        model: The network; a wrapper of ``DistributedDataParallel`` is looked through.
        optimizer: Its optimizer.
        pruner: :class:`~secateur.Gradual` or anything else with a state and, if it has one, a recipe.
        rate: A learning-rate schedule.
        feed: The place in the data, a :class:`~secateur.drive.training.order.Feed`.
        others: Anything else with a state, by name (a gradient scaler, an average of the weights).
        start: A hash of the weights that the run began with, if only those may go on.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> Training(net, torch.optim.SGD(net.parameters(), 0.1)).fingerprint
        ''
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Any = None
    rate: Stateful | None = None
    feed: Stateful | None = None
    others: Mapping[str, Stateful] = field(default_factory=dict)
    start: str = ""

    @property
    def fingerprint(self) -> str:
        """That of the pruner's recipe."""
        recipe = getattr(self.pruner, "recipe", None)
        return recipe.fingerprint() if recipe is not None else ""

    def parts(self) -> dict[str, Stateful]:
        """Everything beside model and optimizer, by name.

        Raises:
            UsageError: One of them has no state that could be saved.
        """
        named = {"pruner": self.pruner, "rate": self.rate, "feed": self.feed}
        named = {name: part for name, part in named.items() if part is not None}
        named |= {f"other {name}": part for name, part in self.others.items()}
        for name, part in named.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise UsageError(
                    f"saving or continuing a training with {name} {type(part).__name__}",
                    "it has no state_dict() and load_state_dict()",
                    "its state would be missing from the checkpoint, and begin anew",
                    "give it both (an empty mapping will do if it has no state), or leave it out",
                )
        return named


def save_checkpoint(place: str | Path, training: Training, *, step: int, keep: int = 2) -> Path:
    """Write the whole state of a training loop.

    Call it after ``optimizer.step()``, ``pruner.step()`` and ``rate.step()``. With several
    processes, all of them call it; the folder must be one that all of them see.

    Args:
        place: A folder, which then holds the last ``keep`` checkpoints, or a ``.safetensors`` file.
        training: The parts of the loop.
        step: Optimizer steps done so far.
        keep: How many checkpoints stay in the folder.

    Returns:
        The file of process 0.

    Raises:
        UsageError: A part has no state, or one that is not made of tensors and plain values.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 1)
        >>> training = Training(net, torch.optim.SGD(net.parameters(), 0.1))
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_checkpoint(folder, training, step=5).name
        'step-000000005.safetensors'
        >>> _ = net.weight.data.fill_(9)
        >>> resume_(folder, training), bool((net.weight < 1).all())
        (5, True)
    """
    place = Path(place)
    file = place if place.suffix == ".safetensors" else place / f"step-{step:09d}.safetensors"
    stamp = stamp_of(training, step)
    state = state_of(training)
    if ranks.rank() > 0:  # parameters are the same in all processes; numbers and data are not
        kept = ("random", "parts")
        write_checkpoint(beside(file, ranks.rank()), {k: state[k] for k in kept}, stamp)
    ranks.barrier()  # the file of process 0 comes last: if it is there, all are
    if ranks.rank() == 0:
        write_checkpoint(file, state, stamp)
        if file != place:
            _tidy(place, keep)
    ranks.barrier()
    return file


def resume_(place: str | Path, training: Training) -> int:
    """Put a saved state back, in place, if there is one.

    Build model, optimizer, pruner and so on as at the start of the run, then call this. Everything
    is checked before anything is changed.

    Args:
        place: The folder or file of :func:`save_checkpoint`. A folder that is not there, or is
            empty, is the start of a run.
        training: The parts of the loop.

    Returns:
        Optimizer steps that were done: 0 at the start of a run.

    Raises:
        UsageError: The checkpoint is of another model, start, recipe or number of processes, or a
            part of the loop has no state.
        FormatError: It is damaged, or of a newer version.

    Example:
        >>> import tempfile
        >>> net = torch.nn.Linear(2, 1)
        >>> loop = Training(net, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> folder = tempfile.mkdtemp()
        >>> resume_(folder, loop)
        0
        >>> _ = save_checkpoint(folder, loop, step=3)
        >>> resume_(folder, loop)
        3
    """
    training.parts()  # refuses a part without a state now, not at the first checkpoint
    file = latest(place)
    newest = ranks.gather_text("" if file is None else file.name)
    if len(set(newest)) > 1:
        raise UsageError(
            f"continuing from {str(place)!r} on {len(newest)} processes",
            f"they find different checkpoints ({', '.join(map(repr, newest[:8]))})",
            "all processes continue from one step",
            "use a folder on a disk that all of them see",
        )
    if file is None:
        return 0
    earlier = [other for other in _checkpoints(Path(place)) if other.name < file.name]
    state, stamp = _read_for_all(file, training, earlier)
    try:
        put_back_(training, state)
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"continuing from the checkpoint {str(file)!r}",
            f"a part of the state is missing or of another form ({str(error)[:120]})",
            "it was written by another version, or by a loop with other parts",
            "continue with the program that wrote it",
        ) from error
    return stamp.step


def _read_for_all(
    file: Path, training: Training, earlier: list[Path]
) -> tuple[dict[str, Any], Stamp]:
    """Read the parts of this process; if one process cannot, none goes on."""
    failed: SecateurError | None = None
    try:
        state, stamp = read_checkpoint(file)
        _reshape_(training, state)
        wanted = stamp_of(training, stamp.step)
        require_stamp(file, stamp, replace(wanted, rank=0))
        if ranks.rank() > 0:
            own, own_stamp = read_checkpoint(beside(file, ranks.rank()))
            require_stamp(beside(file, ranks.rank()), own_stamp, wanted)
            state |= own
    except FormatError as error:
        failed = _or_earlier(error, file, earlier)
    except SecateurError as error:
        failed = error
    errors = ranks.gather_text("" if failed is None else str(failed))
    if failed is not None:
        raise failed
    for number, text in enumerate(errors):
        if text:
            raise FormatError(
                f"continuing from the checkpoint {str(file)!r}",
                f"rank {number} cannot: {text[:400]}",
                "all processes continue together",
                "see the message of that process",
            )
    return state, stamp


def _or_earlier(error: FormatError, file: Path, earlier: list[Path]) -> FormatError:
    """The same error; if an earlier checkpoint can be read, it says how to continue from that."""
    remove = [file.name]
    for other in reversed(earlier):
        try:
            _, stamp = read_checkpoint(other)
            read_checkpoint(beside(other, ranks.rank()))
        except FormatError:
            remove.append(other.name)
            continue
        names = " and ".join(map(repr, remove))
        do = f"remove {names} from that folder to continue from step {stamp.step}"
        return FormatError(error.asked, error.found, error.why, do)
    return error


def _reshape_(training: Training, state: Mapping[str, Any]) -> None:
    """A pruner that removes filters cuts the uncut model first, so that every tensor finds its place."""
    replay, saved = getattr(training.pruner, "replay_", None), state["parts"].get("pruner")
    if replay is not None and saved is not None:
        replay(saved)


def latest(place: str | Path) -> Path | None:
    """The newest checkpoint of a folder (or the file itself), ``None`` if there is none yet.

    Example:
        >>> latest("no-such-folder") is None
        True
    """
    place = Path(place)
    if place.suffix == ".safetensors":
        return place if place.exists() else None
    found = _checkpoints(place)
    return found[-1] if found else None


def beside(file: Path, number: int) -> Path:
    """Where process ``number`` keeps its own part of the checkpoint ``file``."""
    return file if number == 0 else file.with_suffix(f".rank-{number}.safetensors")


def state_of(training: Training) -> dict[str, Any]:
    """Everything that decides how the loop goes on, as nested plain values and tensors."""
    model = bare(training.model)
    return {
        "model": _without_masks(model),
        "masks": dict(masks_of(model)),
        "optimizer": optimizer_state(model, training.optimizer),
        "kinds": {name: type(part).__name__ for name, part in training.parts().items()},
        "parts": {name: part.state_dict() for name, part in training.parts().items()},
        "random": random_states(),
    }


def put_back_(training: Training, state: Mapping[str, Any]) -> None:
    """Inverse of :func:`state_of`, in place.

    Raises:
        UsageError: The parts do not fit; nothing was changed.
    """
    model = bare(training.model)
    parts = training.parts()
    own, masks = _without_masks(model), Masks(state["masks"])
    lost = sorted(set(masks_of(model)) - set(masks))
    problems = {
        "tensors": sorted(set(own) ^ set(state["model"])),
        "parts": sorted(set(parts) ^ set(state["parts"])),
        "masks": lost,
    }
    for what, names in problems.items():
        if names:
            raise UsageError(
                f"continuing a loop with {len(own)} tensors and {len(parts)} parts",
                f"{what} of the loop and of the checkpoint differ: {', '.join(names[:4])}",
                "every state must find its place",
                "build the loop as it was when the checkpoint was written",
            )
    _require_kinds(parts, state.get("kinds", {}))
    for name, part in parts.items():
        refuse = getattr(part, "require_fit", None)
        if refuse is not None:
            refuse(state["parts"][name])
    restore_optimizer_(model, training.optimizer, state["optimizer"])  # checks first as well
    with torch.no_grad():
        model.load_state_dict(state["model"], strict=False)
        attach_(model, masks)
    device = device_of(model)
    for name, part in parts.items():
        own_state = state["parts"][name]
        copied = on_device(own_state, device) if name == "pruner" else copy.deepcopy(own_state)
        part.load_state_dict(copied)
    restore_random_(state["random"])


def _require_kinds(parts: Mapping[str, object], saved: Mapping[str, str]) -> None:
    # Schedules of learning rates take over whatever they are given, and go on with some of it.
    for name, part in parts.items():
        own = type(part).__name__
        if saved.get(name, own) != own:
            raise UsageError(
                f"continuing a loop whose {name} is {own}",
                f"the checkpoint has the state of {saved[name]}",
                "the state of one kind means nothing to another",
                "build the loop as it was when the checkpoint was written",
            )


def on_device(value: Any, device: torch.device) -> Any:
    """A copy of a nested state with its tensors on ``device``.

    Example:
        >>> on_device({"a": [torch.ones(1)]}, torch.device("cpu"))
        {'a': [tensor([1.])]}
    """
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def stamp_of(training: Training, step: int) -> Stamp:
    """What a checkpoint of this loop belongs to."""
    tensors = _without_masks(bare(training.model))
    return Stamp(
        names_hash({n: t for n, t in tensors.items() if isinstance(t, Tensor)}),
        training.fingerprint,
        step,
        ranks.rank(),
        ranks.world(),
        version("secateur"),
        training.start,
    )


def _without_masks(model: nn.Module) -> dict[str, Any]:
    masks = {f"{name}{SUFFIX}" for name in masks_of(model)}
    return {name: value for name, value in model.state_dict().items() if name not in masks}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(f for f in _files(folder) if _NAME.fullmatch(f.name))


def _files(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def drop_later(folder: str | Path, step: int) -> None:
    """Remove the checkpoints of steps after ``step``."""
    for file in list(_files(Path(folder))):
        match = _NAME.fullmatch(file.name)
        if match and int(match[1]) > step:
            file.unlink(missing_ok=True)


def _tidy(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what killed runs left half written."""
    sweep(folder)
    steps = sorted({m[1] for f in _files(folder) if (m := _NAME.fullmatch(f.name))})
    old = {f"step-{step}." for step in steps[:-keep]}
    for file in list(_files(folder)):
        if any(file.name.startswith(name) for name in old):
            file.unlink(missing_ok=True)
