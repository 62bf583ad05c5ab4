"""What a model answers on a batch, and how many of its answers are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss, forward, size_of, to_device
from secateur.core.errors import DataError, SecateurError
from secateur.core.losses import (
    IGNORED,
    classes_last,
    entry,
    logits_of,
    own_loss,
    squared_error,
    targets_of,
    task_loss,
    unusable,
)
from secateur.core.slots import bare, device_of


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one batch, one row per *unit* (a sample, a token, a pixel).

    Args:
        logits: ``(units, classes)`` of the units that count, or ``None`` if the model does not
            classify.
        sample: ``(units,)`` the sample of each unit.
        right: ``(units,)`` whether the unit is right, or ``None`` without integer targets.
        loss: Mean loss, or ``None`` if there is none.
        samples: Samples in the batch.
        nats: Mean cross-entropy, where the units are tokens, each predicted from those before it.
            The loss may be another: models and users add terms to theirs.
        classes: The least and the largest class that is right; ``None`` without any.
    """

    logits: Tensor | None
    sample: Tensor
    right: Tensor | None
    loss: float | None
    samples: int
    nats: float | None = None
    classes: tuple[int, int] | None = None

    @property
    def counted(self) -> int:
        """What the loss is a mean over: the units that have a label, or else the samples."""
        return self.samples if self.right is None else len(self.right)


@torch.no_grad()
def answer(
    model: nn.Module, batch: Batch, loss: Loss | None = None, *, judged: bool = False
) -> Answers:
    """Run ``model`` (as it is, in whatever mode) on a batch and judge its answers.

    The right class is the last element of a tuple, or ``labels`` of a mapping; ``-100`` does not
    count. Logits may be ``(N, classes)``, per token ``(N, T, classes)``, or per pixel
    ``(N, classes, H, W)``; a single logit is right when its sign is. Labels of causal language
    models are shifted by one, as those models do themselves.

    Args:
        model: Run as it is.
        batch: Moved to its device.
        loss: The user's own.
        judged: Whether a metric of the user's own judges the model. With it, or with a loss, the model
            may put out anything, such as boxes.

    Raises:
        DataError: The model itself cannot be run on the batch, or puts out no predictions.

    Example:
        >>> net = nn.Identity()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        >>> answer(net, (x, torch.tensor([0, 0, -100]))).right.tolist()
        [True, False]
    """
    batch = to_device(batch, device_of(model))
    try:
        return _answer(model, batch, loss, judged or loss is not None)
    except SecateurError:
        raise
    except Exception as error:
        reason = unusable(model, batch, loss)
        if reason is None:
            raise
        raise reason from error


def _answer(model: nn.Module, batch: Batch, loss: Loss | None, judged: bool) -> Answers:
    output, samples = forward(model, batch), size_of(batch)
    found = None if loss is None else float(loss(model, batch))
    try:
        logits, target = logits_of(output).float(), targets_of(batch)
    except DataError:
        if not judged:
            raise
        found = _own(output) if found is None else found
        return Answers(None, torch.arange(samples), None, found, samples)
    if target is not None and target.dtype.is_floating_point:
        if found is None:
            found = _own(output)
        if found is None:
            found = float(squared_error(logits, target))
        return Answers(None, torch.arange(samples), None, found, samples)
    language = target is not None and _shifts(model, batch, target)
    if target is not None and language:
        logits, target = logits[:, :-1], target[:, 1:]
    rows, labels = _units(logits, target)
    which = torch.arange(samples).repeat_interleave(max(1, len(rows) // max(1, samples)))
    if found is None:
        found = _own(output)
    if labels is None:
        classifies = entry(output, "last_hidden_state") is None and rows.shape[1] > 1
        return Answers(rows if classifies else None, which, None, found, samples)
    counted = labels != IGNORED
    rows, labels, which = rows[counted], labels[counted], which[counted.cpu()]
    nats = float(task_loss(rows, labels)) if len(rows) and (language or found is None) else None
    classes = (int(labels.min()), int(labels.max())) if len(labels) else None
    right = choices(rows) == labels
    found = nats if found is None else found
    return Answers(rows, which, right, found, samples, nats if language else None, classes)


def choices(rows: Tensor) -> Tensor:
    """The class each row of logits chooses; with one logit, whether it is positive.

    A row with a NaN chooses none, which is told as :data:`~secateur.core.losses.IGNORED`.

    Example:
        >>> choices(torch.tensor([[0.1, 0.9]])).item(), choices(torch.tensor([[-1.0]])).item()
        (1, 0)
        >>> choices(torch.tensor([[0.1, float("nan")]])).item()
        -100
    """
    chosen = (rows[:, 0] > 0).long() if rows.shape[1] == 1 else rows.argmax(1)
    return chosen.masked_fill(rows.isnan().any(1), IGNORED)


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of each row of logits, in nats.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> bool(divergence(x, x).abs().max() < 1e-6), bool((divergence(x, x.flip(1)) > 0.1).all())
        (True, True)
    """
    if a.shape[1] == 1:  # the other class of a single logit has logit 0
        a, b = (torch.cat([torch.zeros_like(x), x], 1) for x in (a, b))
    p, q = F.log_softmax(a.double(), 1), F.log_softmax(b.double(), 1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1).clamp(min=0)


def _units(logits: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits as ``(units, classes)``, samples first, and the targets in the same order."""
    if logits.ndim == 1:
        logits = logits[:, None]
    logits = classes_last(logits, target)
    rows = logits.reshape(-1, logits.shape[-1])
    if target is None or target.numel() != len(rows):
        return rows, None
    return rows, target.reshape(-1)


def _shifts(model: nn.Module, batch: Batch, target: Tensor) -> bool:
    """Whether the labels are the inputs themselves, each to be predicted from those before it."""
    if not isinstance(batch, Mapping) or target.ndim != 2:
        return False
    name = type(bare(model)).__name__
    if "CausalLM" in name or "LMHead" in name:
        return True
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != target.shape:
        return False
    counted = target != IGNORED
    return bool(counted.any()) and bool((ids == target)[counted].all())


def _own(output: Any) -> float | None:
    own = own_loss(output)
    return float(own) if own is not None and own.numel() == 1 else None
