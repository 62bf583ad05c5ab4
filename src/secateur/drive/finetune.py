"""Fine-tuning with masks held, and distillation from the dense network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.batches import (
    Batch,
    Data,
    default_loss,
    evaluating,
    forward,
    logits_of,
    size_of,
    task_loss,
    to_device,
)
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.core.slots import device_of
from secateur.drive.held import Held, masks_of


class Progress(Protocol):
    """How a long run reports: called with a stage, the work done so far, and the whole."""

    def __call__(self, stage: str, done: float, total: float) -> None: ...


@dataclass(frozen=True)
class FineTune:
    r"""Train the survivors with the masks held; with ``distill`` also towards the dense network.

    **formula** :math:`(1-\alpha) L + \alpha T^2\, \mathrm{KL}(p_{dense}^{1/T} \| p^{1/T})`, with a
    linear warm-up over 5 % of the steps and a cosine to zero
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
        bfloat16: Run forward and backward under bfloat16 autocast.

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

    def __post_init__(self) -> None:
        wrong = ""
        if self.epochs <= 0 or self.lr <= 0 or self.temperature <= 0:
            wrong = "epochs, lr and temperature must be positive"
        elif self.optimizer not in ("sgd", "adamw"):
            wrong = f"optimizer is 'sgd' or 'adamw', not {self.optimizer!r}"
        elif not 0 <= self.distill <= 1:
            wrong = f"distill is a share from 0 to 1, not {self.distill:g}"
        if wrong:
            raise UsageError("FineTune(...)", wrong, "", "correct the value")


class Stepper(Protocol):
    """What may run after every optimizer step: a gradual pruner, or a plain holder of masks."""

    def step(self) -> None: ...


Attach = Callable[[torch.optim.Optimizer, int], Stepper]


def finetune(
    model: nn.Module,
    data: Data,
    how: FineTune | None = None,
    *,
    teacher: nn.Module | None = None,
    attach: Attach | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train ``model`` in place on ``data.train``; its masks stay exactly as they are.

    Args:
        model: Any model; if it carries masks (``attach_``), pruned weights stay zero.
        data: Training batches and, if wanted, a loss.
        how: Epochs, learning rate and so on.
        teacher: The dense network, for ``distill > 0``.
        attach: Builds what runs after each step from the optimizer and the steps per epoch; by
            default the masks are held.
        progress: Called about once a step.

    Returns:
        One record an epoch: mean loss, learning rate, sparsity of the masked weights.

    Raises:
        DataError: The loss became NaN or infinite.

    Example:
        >>> x = torch.randn(64, 4); y = (x.sum(1) > 0).long()
        >>> net = nn.Linear(4, 2)
        >>> history = finetune(net, Data(train=[(x, y)]), FineTune(epochs=30, lr=0.5))
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    how = how or FineTune()
    if data.train is None:
        raise NeedsData(
            "fine-tuning", "no training data", "weights learn from batches", "pass Data(train=...)"
        )
    if how.distill and teacher is None:
        raise NeedsData(
            f"distill={how.distill:g}",
            "no teacher",
            "distillation follows the dense network",
            "pass teacher=",
        )
    per_epoch = _length(data.train)
    total = max(1, math.ceil(how.epochs * per_epoch - 1e-9))
    optimizer = _optimizer(model, how)
    warmup = max(1, round(0.05 * total))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _cosine(t, warmup, total))
    stepper = attach(optimizer, per_epoch) if attach else _Hold(model, optimizer)
    device, modes = device_of(model), {m: m.training for m in model.modules()}
    history: list[dict[str, Any]] = []
    done = 0
    model.train()
    try:
        while done < total:
            losses, seen = 0.0, 0
            for drawn in data.train:
                batch = to_device(drawn, device)
                optimizer.zero_grad(set_to_none=True)
                with _autocast(device, how.bfloat16):
                    loss = _objective(model, batch, how, teacher, data)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise DataError(
                        f"fine-tuning at step {done + 1}",
                        f"the loss is {value}",
                        "training cannot go on from there",
                        "lower the learning rate, or check the data",
                    )
                loss.backward()
                optimizer.step()
                stepper.step()
                rate.step()
                done += 1
                losses, seen = losses + value * size_of(batch), seen + size_of(batch)
                if progress is not None:
                    progress("fine-tuning", done, total)
                if done >= total:
                    break
            if not seen:
                raise DataError(
                    "fine-tuning",
                    "the training loader yielded no batches",
                    "it may be an iterator that was used up",
                    "pass something that can be iterated once an epoch",
                )
            history.append(
                {
                    "epoch": done / per_epoch,
                    "loss": losses / seen,
                    "lr": rate.get_last_lr()[0],
                    "sparsity": masks_of(model).sparsity,
                }
            )
    finally:
        for module, mode in modes.items():
            module.training = mode
    return history


class _Hold:
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._held = Held(model, optimizer)

    def step(self) -> None:
        self._held.hold_()


def _objective(
    model: nn.Module, batch: Batch, how: FineTune, teacher: nn.Module | None, data: Data
) -> Tensor:
    if not how.distill or teacher is None:
        return (data.loss or default_loss)(model, batch)
    with torch.no_grad(), evaluating(teacher):
        target = logits_of(forward(teacher, batch)).float()
    logits = logits_of(forward(model, batch)).float()
    t = how.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, -1),
        F.log_softmax(target / t, -1),
        reduction="none",
        log_target=True,
    )
    distance = soft.sum(-1).mean() * t * t
    if how.distill == 1:
        return distance
    own = data.loss(model, batch) if data.loss is not None else _task(logits, model, batch)
    return (1 - how.distill) * own + how.distill * distance


def _task(logits: Tensor, model: nn.Module, batch: Batch) -> Tensor:
    # The usual case needs no second forward pass.
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return task_loss(logits, batch[-1])
    return default_loss(model, batch)


def _optimizer(model: nn.Module, how: FineTune) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": how.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.lr)
    return torch.optim.SGD(groups, lr=how.lr, momentum=0.9, nesterov=True)


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _autocast(device: torch.device, wanted: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


def _length(batches: Iterable[Batch]) -> int:
    length = getattr(batches, "__len__", None)
    return max(1, length() if length is not None else sum(1 for _ in batches))
