"""Fine-tuning with masks held, and distillation from the dense network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.arguments import odd_number, require_kind
from secateur.core.batches import (
    Batch,
    Data,
    as_data,
    count,
    evaluating,
    forward,
    size_of,
    to_device,
)
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.core.losses import default_loss, differentiable, explaining, logits_of, loss_of
from secateur.core.slots import device_of
from secateur.drive.network import require_values
from secateur.drive.training import ranks
from secateur.drive.training.held import Held, masks_of
from secateur.drive.training.order import Feed
from secateur.drive.training.recorder import Checkpoints, Recorder, Tally, as_checkpoints
from secateur.drive.training.resume import Training
from secateur.formats.checkpoint import values_hash
from secateur.learn.objectives import distance


class Progress(Protocol):
    """How a long run reports: called with a stage, the work done so far, and the whole."""

    def __call__(self, stage: str, done: float, total: float) -> None: ...


@dataclass(frozen=True)
class FineTune:
    r"""Train the survivors with the masks held; with ``distill`` also towards the dense network.

    **formula** :math:`(1-\alpha) L + \alpha T^2\, \mathrm{KL}(p_{dense}^{1/T} \| p^{1/T})`, with a
    linear warm-up over 5 % of the steps and a cosine to zero; outputs that are numbers and no classes
    have their squared error in place of the KL
    **Shapes** scalar loss
    **Units** loss
    **Needs** training batches with targets (with ``distill=1`` inputs suffice)
    **Source** Hinton et al., arXiv 1503.02531

    Args:
        epochs: Passes over the training batches; may be a fraction.
        lr: Peak learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``.
        weight_decay: On all parameters with two or more axes.
        distill: α, 0 to 1.
        temperature: T.
        bfloat16: Run forward and backward under bfloat16 autocast. For GPUs, and for processors with
            AVX-512; others emulate it, and convolutions then take several times as long.
        on_nan: A loss that is NaN or infinite: ``"raise"``, or ``"rollback"`` to before the last
            mask update and go on with half the learning rate, three times at most.

    Example:
        >>> FineTune(epochs=2, distill=0.5).lr
        0.01
    """

    epochs: float = 1.0
    lr: float = 0.01
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    bfloat16: bool = False
    on_nan: str = "raise"

    def __post_init__(self) -> None:
        numbers = ("epochs", "lr", "weight_decay", "distill", "temperature")
        wrong = ""
        if odd := odd_number(self, numbers):
            wrong = odd
        elif self.epochs <= 0 or self.lr <= 0 or self.temperature <= 0:
            wrong = "epochs, lr and temperature must be positive"
        elif self.weight_decay < 0:
            wrong = f"weight_decay is 0 or more, not {self.weight_decay:g}"
        elif self.optimizer not in ("sgd", "adamw"):
            wrong = f"optimizer is 'sgd' or 'adamw', not {self.optimizer!r}"
        elif self.on_nan not in ("raise", "rollback"):
            wrong = f"on_nan is 'raise' or 'rollback', not {self.on_nan!r}"
        elif not 0 <= self.distill <= 1:
            wrong = f"distill is a share from 0 to 1, not {self.distill:g}"
        if wrong:
            raise UsageError(
                "FineTune(...)", wrong, "no training can be done with it", "correct the value"
            )


class Stepper(Protocol):
    """What may run after every optimizer step: a gradual pruner, or a plain holder of masks."""

    def step(self) -> None: ...


Attach = Callable[[torch.optim.Optimizer, int], Stepper]


def finetune(
    model: nn.Module,
    data: Data | Any,
    how: FineTune | None = None,
    *,
    teacher: nn.Module | None = None,
    attach: Attach | None = None,
    checkpoint: Checkpoints | str | Path | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place on ``data.train``; its masks stay exactly as they are.

    Args:
        model: Any model; if it carries masks (``attach_``), pruned weights stay zero.
        data: Training batches and, if wanted, a loss.
        how: Epochs, learning rate and so on.
        teacher: The dense network, for ``distill > 0``.
        attach: Builds what runs after each step from the optimizer and the steps per epoch; by
            default the masks are held.
        checkpoint: A folder, or :class:`Checkpoints`. A run that was killed and is called again
            ends with the same bits (see :class:`~secateur.drive.training.order.Feed` for the order of data).
            Other weights to begin with and other settings are refused; other data cannot be recognised
            with certainty.

    Returns:
        One record an epoch: mean loss, learning rate, sparsity of the masked weights.

    Raises:
        DataError: The loss became NaN or infinite, the network does not take a batch, or several
            processes have epochs of unequal length.
        UsageError: The checkpoint is of another network, or of a training with other settings; or one of
            several processes trains a network that is not in ``DistributedDataParallel``.

    Example:
        >>> x = torch.randn(64, 4); y = (x.sum(1) > 0).long()
        >>> net = nn.Linear(4, 2)
        >>> history = finetune(net, Data(train=[(x, y)]), FineTune(epochs=30, lr=0.5))
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    require_values("finetune(model=...)", model)
    write = "e.g. FineTune(epochs=2)"
    kinds = (FineTune, type(None))
    require_kind("finetune(how=...)", how, kinds, what="a FineTune", write=write)
    found = as_data(data) or Data()
    return Loop(model, found, how or FineTune(), teacher, attach, None, checkpoint).run()


@dataclass(frozen=True)
class Loop:
    """The loop of :func:`finetune`, with a report of its progress. ``run()`` trains in place.

    Args:
        progress: Called about once a step; the other fields are those of :func:`finetune`.
        start: :func:`~secateur.formats.checkpoint.values_hash` of what the whole run started from; by
            default of ``model`` as it is now.

    Example:
        >>> batch = (torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
        >>> steps = []
        >>> note = lambda stage, done, total: steps.append(f"{stage} {done}/{total}")
        >>> _ = Loop(nn.Linear(4, 2), Data(train=[batch]), FineTune(2), progress=note).run()
        >>> steps
        ['fine-tuning 1/2', 'fine-tuning 2/2']
    """

    model: nn.Module
    data: Data
    how: FineTune
    teacher: nn.Module | None = None
    attach: Attach | None = None
    progress: Progress | None = None
    checkpoint: Checkpoints | str | Path | None = None
    start: str = ""

    @torch.enable_grad()
    def run(self) -> list[dict[str, Any]]:
        """Train, and return the history."""
        model, how, data = self.model, self.how, self.data
        if data.train is None:
            what, found = "fine-tuning", "no training data"
            raise NeedsData(what, found, "weights learn from batches", "pass Data(train=...)")
        if how.distill and self.teacher is None:
            raise NeedsData(
                f"distill={how.distill:g}",
                "no teacher",
                "distillation follows the dense network",
                "pass teacher=",
            )
        per_epoch = _epoch(model, data.train)
        total = max(1, math.ceil(how.epochs * per_epoch - 1e-9))
        start = self._began()
        optimizer, tally = _optimizer(model, how), Tally(terms=_terms(how))
        warmup = max(1, round(0.05 * total))
        # What is attached may add a group of its own parameters, so it comes before the schedule.
        stepper = self.attach(optimizer, per_epoch) if self.attach else _Hold(model, optimizer)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: tally.slowed * _cosine(t, warmup, total)
        )
        feed = Feed(data.train)
        training = Training(model, optimizer, stepper, rate, feed, {"tally": tally}, start)
        recorder = Recorder(
            training, as_checkpoints(self.checkpoint), rollback=how.on_nan == "rollback"
        )
        device, modes = device_of(model), {m: m.training for m in model.modules()}
        model.train()
        try:
            recorder.start_()
            while tally.done < total:
                went_back = False
                for drawn in feed.rest():
                    batch = to_device(drawn, device)
                    optimizer.zero_grad(set_to_none=True)
                    with _autocast(device, how.bfloat16):
                        loss = differentiable(self._loss(batch))
                    value = float(loss.detach())
                    # All processes go back together, or the others wait for this one's gradients.
                    if not ranks.finite_everywhere(value):
                        recorder.back_(value)
                        went_back = True
                        break
                    loss.backward()
                    optimizer.step()
                    stepper.step()
                    rate.step()
                    tally.count(value, size_of(batch))
                    if self.progress is not None:
                        self.progress("fine-tuning", tally.done, total)
                    recorder.after_step(last=tally.done >= total)
                    if tally.done >= total:
                        break
                if not went_back:
                    _close_epoch(tally, per_epoch, rate, model)
            if tally.seen:  # the run had been finished already when it was called again
                _close_epoch(tally, per_epoch, rate, model)
        finally:
            optimizer.zero_grad(set_to_none=True)  # they are as large as the network
            for module, mode in modes.items():
                module.training = mode
        return tally.history

    def _loss(self, batch: Batch) -> Tensor:
        if not size_of(batch):
            raise DataError(
                "a batch of the training data",
                "it has no samples",
                "a mean over nothing is NaN",
                "leave empty batches out of what the loader yields",
            )
        with explaining(self.model, batch, self.data.loss):
            return _objective(self.model, batch, self.how, self.teacher, self.data)

    def _began(self) -> str:
        if self.checkpoint is None:
            return ""
        return self.start or values_hash(self.model.state_dict())


def _epoch(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Steps of an epoch, if all processes can train together."""
    ranks.require_averaged(model)
    steps = max(1, count(batches))
    ranks.require_equal_epochs(steps)
    return steps


def _terms(how: FineTune) -> dict[str, Any]:
    """What decides how a training goes on; after a NaN it may go on by going back."""
    return {name: value for name, value in asdict(how).items() if name != "on_nan"}


def _close_epoch(tally: Tally, per_epoch: int, rate: Any, model: nn.Module) -> None:
    if not tally.seen:
        raise DataError(
            "fine-tuning",
            "the training loader yielded no batches",
            "it may be an iterator that was used up",
            "pass something that can be iterated once an epoch",
        )
    record: dict[str, Any] = {
        "epoch": tally.done / per_epoch,
        "loss": tally.losses / tally.seen,
        "lr": float(rate.get_last_lr()[0]),
        "sparsity": masks_of(model).sparsity,
    }
    if tally.rollbacks:
        record["rollbacks"] = list(tally.rollbacks)
    tally.history.append(record)
    tally.losses, tally.seen = 0.0, 0


class _Hold:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._held = Held(model, optimizer)

    def step(self) -> None:
        self._held.hold_()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        self._held.refresh()


def _objective(
    model: nn.Module, batch: Batch, how: FineTune, teacher: nn.Module | None, data: Data
) -> Tensor:
    if not how.distill or teacher is None:
        return (data.loss or default_loss)(model, batch)
    with torch.no_grad(), evaluating(teacher):
        target = logits_of(forward(teacher, batch))
    output = forward(model, batch)
    logits = logits_of(output)
    far = distance(logits, target, batch, how.temperature, of=teacher)
    if how.distill == 1:
        return far
    own = data.loss(model, batch) if data.loss is not None else loss_of(output, batch)
    return (1 - how.distill) * own + how.distill * far


def _optimizer(model: nn.Module, how: FineTune) -> torch.optim.Optimizer:
    groups = parameter_groups(model, how.weight_decay)
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.lr)
    return torch.optim.SGD(groups, lr=how.lr, momentum=0.9, nesterov=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What an optimizer trains; weight decay acts on parameters with two or more axes.

    Raises:
        UsageError: Everything is frozen.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), 0.1)]
        [1, 1]
    """
    free = [p for p in model.parameters() if p.requires_grad]
    if not free:
        raise UsageError(
            "training the network",
            f"all {sum(1 for _ in model.parameters())} parameters are frozen (requires_grad=False)",
            "there is nothing to train",
            "call requires_grad_(True) on what may change, or leave out the training",
        )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in free if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in free if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _autocast(device: torch.device, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()
