"""Training in stretches that can be repeated bit for bit: every epoch has a seed of its own."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.core.batches import Batch, Data, count, size_of, to_device
from secateur.core.errors import DataError, NeedsData
from secateur.core.losses import default_loss, differentiable, explaining
from secateur.core.randomness import devices_of, own_random, start_
from secateur.core.slots import device_of
from secateur.drive.training.chance import generators_of, tell_epoch_
from secateur.drive.training.finetune import Progress, parameter_groups
from secateur.drive.training.held import Held
from secateur.experiments.terms import Training


@dataclass(frozen=True)
class Stretch:
    """A part of the training schedule.

    Args:
        index: Number of the stage, 0 for the dense training; decides the order of the data.
        begin: Step of the schedule at which it starts.
        end: Step before which it ends; by default the schedule's end.
        last_rate: Whether the whole stretch has the schedule's last rate.

    Example:
        >>> Stretch(index=2, begin=100).last_rate
        False
    """

    index: int
    begin: int = 0
    end: int | None = None
    last_rate: bool = False


def steps_of(data: Data, how: Training) -> tuple[int, int]:
    """Steps in an epoch and in the whole training.

    Example:
        >>> steps_of(Data(train=[torch.zeros(1)] * 5), Training(epochs=1.5))
        (5, 8)
    """
    if data.train is None:
        raise NeedsData(
            "finding tickets", "no training data", "they are trained", "pass Data(train=...)"
        )
    per_epoch = count(data.train)
    if per_epoch < 1:
        raise DataError(
            "finding tickets",
            "the training loader yields no batches",
            "it may be an iterator that was used up",
            "pass something that can be iterated once an epoch",
        )
    return per_epoch, max(1, math.ceil(how.epochs * per_epoch - 1e-9))


def train_(
    model: nn.Module,
    data: Data,
    how: Training,
    stretch: Stretch,
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place over a part of the schedule; its masks are held.

    The optimizer is new: no momentum comes from an earlier stretch. Must run inside
    :func:`seeded`, which gives the caller's random state back.

    Args:
        model: With its masks attached, if it has any.
        data: Training batches and, if wanted, a loss.
        how: The whole schedule.
        stretch: Which part of it.
        progress: Called once a step.

    Returns:
        One record an epoch: mean loss and learning rate.

    Raises:
        DataError: The loss became NaN or infinite, or the loader ran dry.
    """
    assert data.train is not None
    per_epoch, total = steps_of(data, how)
    optimizer = optimizer_for(model, how)
    held, device = Held(model, optimizer), device_of(model)
    loss_of = data.loss or default_loss
    history: list[dict[str, Any]] = []
    step, end = stretch.begin, total if stretch.end is None else stretch.end
    devices = devices_of(model)
    model.train()
    while step < end:
        epoch, skipped = divmod(step, per_epoch)
        order = 0 if how.same_order else stretch.index
        seed, number = seed_of(how.seed, order, epoch), order * per_epoch + epoch
        start_epoch_(data.train, seed, number, devices)
        losses, seen, began = 0.0, 0, step
        for position, drawn in enumerate(data.train):
            if position < skipped:
                continue  # a stretch that begins inside an epoch sees its second part
            rate = how.rate_at(total - 1 if stretch.last_rate else step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = to_device(drawn, device)
            value = _one_step_(model, batch, optimizer, loss_of, how, step)
            held.hold_()
            losses, seen, step = losses + value * size_of(batch), seen + size_of(batch), step + 1
            if progress is not None:
                progress("training", step - stretch.begin, end - stretch.begin)
            if step >= end or position + 1 >= per_epoch:
                break
        if step == began:
            raise DataError(
                f"training, epoch {epoch + 1}",
                "the training loader yielded no batches",
                "it may be an iterator that was used up",
                "pass something that can be iterated once an epoch",
            )
        history.append({"epoch": step / per_epoch, "loss": losses / max(1, seen), "lr": rate})
    return history


def _one_step_(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
    how: Training,
    step: int,
) -> float:
    kind = device_of(model).type
    narrow = torch.autocast(kind, dtype=torch.bfloat16) if how.bfloat16 else None
    optimizer.zero_grad(set_to_none=True)
    with narrow or contextlib.nullcontext(), explaining(model, batch, loss_of):
        loss = differentiable(loss_of(model, batch))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(
            f"training at step {step + 1}",
            f"the loss is {value}",
            "training cannot go on from there; the stages before it are kept",
            "lower the learning rate, or check the data",
        )
    loss.backward()
    optimizer.step()
    return value


def optimizer_for(model: nn.Module, how: Training) -> torch.optim.Optimizer:
    """A new optimizer over :func:`~secateur.drive.training.finetune.parameter_groups`.

    Example:
        >>> type(optimizer_for(nn.Linear(2, 2), Training(optimizer="adamw"))).__name__
        'AdamW'
    """
    groups = parameter_groups(model, how.weight_decay)
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.lr)
    return torch.optim.SGD(groups, lr=how.lr, momentum=0.9, nesterov=True)


def seed_of(*parts: object) -> int:
    """A seed from a run's seed and a place in it: stable, and unlike its neighbours.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def seeded(seed: int, model: nn.Module | None = None, train: object = None) -> Iterator[None]:
    """Random states from ``seed`` inside, the caller's own afterwards.

    Covers PyTorch, Python, NumPy, and generators that the training loader, its samplers or its data
    set carry.

    Example:
        >>> state = torch.get_rng_state()
        >>> with seeded(1):
        ...     first = torch.rand(1)
        >>> with seeded(1):
        ...     print(torch.equal(first, torch.rand(1)))
        True
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    python, numbers = random.getstate(), np.random.get_state()
    own = [(generator, generator.get_state()) for _, generator in generators_of(train)]
    with own_random(model):
        try:
            _seed_all(seed, devices_of(model))
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
            for generator, state in own:
                generator.set_state(state)


def start_epoch_(
    train: object, seed: int, number: int, devices: Sequence[torch.device] | None = None
) -> None:
    """Set every random state that the next epoch may draw from."""
    _seed_all(seed, devices)
    for _, generator in generators_of(train):
        generator.manual_seed(seed)
    tell_epoch_(train, number)


def _seed_all(seed: int, devices: Sequence[torch.device] | None) -> None:
    start_(seed, devices)
    random.seed(seed)
    np.random.seed(seed)
