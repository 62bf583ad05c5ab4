"""What a model puts out: its predictions, its own loss, and the loss that is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.batches import (
    Batch,
    Loss,
    evaluating,
    first_tensor,
    forward,
    inputs_of,
    size_of,
    tensors_of,
)
from secateur.core.errors import (
    DataError,
    NeedsData,
    SecateurError,
    UsageError,
    first_line,
    kind_of,
)
from secateur.core.samples import TARGETS

#: Targets that count for nothing, as everywhere in PyTorch and Transformers.
IGNORED = -100


def entry(output: Any, name: str) -> Tensor | None:
    """The tensor that a model's output holds under a name: a key of a mapping, or an attribute.

    Example:
        >>> entry({"logits": torch.zeros(2)}, "logits"), entry(torch.zeros(2), "logits")
        (tensor([0., 0.]), None)
    """
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model computed itself: ``loss`` by name, or the scalar that a tuple begins with.

    Both are conventions of Transformers, the second with ``return_dict=False``.

    Example:
        >>> own_loss({"loss": torch.tensor(2.0), "logits": torch.zeros(1, 3)})
        tensor(2.)
        >>> own_loss((torch.tensor(2.0), torch.zeros(1, 3)))
        tensor(2.)
        >>> own_loss(torch.zeros(1, 3)) is None
        True
    """
    if isinstance(output, (tuple, list)) and output:
        first = output[0]
        if isinstance(first, Tensor) and first.ndim == 0 and first.is_floating_point():
            return first
    return entry(output, "loss")


def logits_of(output: Any) -> Tensor:
    """The prediction tensor inside a model's output: ``logits`` by name, else the first that is no scalar.

    Raises:
        DataError: There is none.

    Example:
        >>> logits_of((torch.tensor(2.0), torch.zeros(1, 3)))
        tensor([[0., 0., 0.]])
    """
    for name in ("logits", "last_hidden_state"):
        value = entry(output, name)
        if value is not None:
            return value
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    else:
        parts = output if isinstance(output, (tuple, list)) else (output,)
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return part
    raise DataError(
        "the predictions of a model",
        f"its forward returned {_outline(output)}",
        "they are a tensor with an axis of samples: the output itself, its entry 'logits', or the "
        "first such tensor in it",
        "return the logits, alone or beside the loss",
    )


def _outline(output: Any) -> str:
    """What an output is made of, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{kind_of(output)} of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"{kind_of(output)} of {', '.join(map(_outline, output)) or 'nothing'}"
    return "None" if output is None else kind_of(output)


def task_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy on class indices (``-100`` is ignored), squared error on numbers.

    Classes lie on the last axis if the other axes are those of the target (one label a token), else
    on the second, as torch has it (one label a pixel). One logit for each label is that of class 1
    against class 0.

    Raises:
        DataError: Targets of numbers have another shape, or labels of one logit are not 0 and 1.

    Example:
        >>> task_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
        tensor(1.3863)
    """
    if target.dtype.is_floating_point:
        return squared_error(logits, target)
    if logits.numel() == target.numel() > 0:
        return _binary(logits.flatten(), target.flatten())
    if logits.ndim > 2 and logits.shape[:-1] == target.shape:
        logits, target = logits.flatten(0, -2), target.flatten()
    return F.cross_entropy(logits.float(), target.long())


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    counted = target != IGNORED
    logits, target = logits[counted], target[counted]
    if bool(((target != 0) & (target != 1)).any()):
        raise DataError(
            "the loss of one logit for each label",
            f"labels reach from {int(target.min())} to {int(target.max())}",
            "a single logit tells class 1 from class 0",
            "give a logit for each class; floats, where the targets are numbers; or Data(loss=...)",
        )
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; ``(N,)`` and ``(N, 1)`` are the same numbers, nothing else is stretched.

    Raises:
        DataError: The shapes differ in more than axes of length 1.

    Example:
        >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    if output.shape[:1] != target.shape[:1] or output.squeeze().shape != target.squeeze().shape:
        raise DataError(
            "the squared error to targets of floats",
            f"the model returned {tuple(output.shape)} and the targets are {tuple(target.shape)}",
            "each number of the output needs its own target",
            "give targets of the shape of the output, integers for classes, or Data(loss=...)",
        )
    return F.mse_loss(output.float(), target.float().reshape(output.shape))


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss if it returns one, else cross-entropy on ``(inputs, targets)``."""
    return loss_of(forward(model, batch), batch)


def differentiable(loss: object) -> Tensor:
    """A loss, if it is a scalar that gradients flow through.

    Raises:
        UsageError: It is none, e.g. a number or a vector.

    Example:
        >>> differentiable(torch.zeros(2))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the loss of a batch: it is a tensor of shape (2,). ...
    """
    found = ""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"it is {_outline(loss)}"
    elif not loss.requires_grad:
        found = "no gradient flows through it (it was detached, or computed without gradients)"
    if isinstance(loss, Tensor) and not found:
        return loss
    raise UsageError(
        "the loss of a batch",
        found,
        "training and gradients need a scalar tensor that depends on the weights",
        "return e.g. cross_entropy(model(x), y), without item(), detach() or reduction='none'",
    )


def loss_of(output: Any, batch: Batch) -> Tensor:
    """The task loss of an output that is there already.

    Raises:
        NeedsData: The output has no loss of its own, and the batch no target.

    Example:
        >>> loss_of(torch.zeros(2, 4), (None, torch.tensor([0, 3])))
        tensor(1.3863)
    """
    own = own_loss(output)
    if own is not None:
        return own
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return task_loss(logits_of(output), batch[-1])
    raise NeedsData(
        "a loss",
        f"a batch of type {type(batch).__name__} carries no target and the model returned no loss, "
        f"but {_outline(output)}",
        "gradients need a scalar to differentiate",
        "yield (inputs, targets), give a model that computes its loss what it needs (often 'labels'), "
        "or pass Data(loss=...)",
    )


def targets_of(batch: Batch) -> Tensor | None:
    """The targets inside a batch, or ``None``.

    Example:
        >>> targets_of((torch.zeros(1, 3), torch.tensor([2]))).item()
        2
        >>> targets_of(torch.zeros(1, 3)) is None
        True
    """
    found = None
    if isinstance(batch, Mapping):
        found = batch.get(TARGETS)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[-1]
    return found if isinstance(found, Tensor) else None


def read_tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch that the network reads: all but its targets.

    Example:
        >>> read_tensors({"labels": torch.tensor([0]), "pixel_values": torch.ones(1, 2)})
        [tensor([[1., 1.]])]
        >>> read_tensors(({"x": torch.ones(1, 2)}, torch.tensor([0])))
        [tensor([[1., 1.]])]
    """
    args, kwargs = inputs_of(batch)
    return list(tensors_of([args, {k: v for k, v in kwargs.items() if k != TARGETS}]))


def classes_last(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """Logits with their classes on the last axis, where rows and tokens have them.

    Per pixel ``(N, classes, H, W)`` they are on the second, and with labels ``(N, L)`` also those of
    ``(N, classes, L)`` are.

    Example:
        >>> classes_last(torch.zeros(2, 3, 8, 9)).shape, classes_last(torch.zeros(2, 8, 3)).shape
        (torch.Size([2, 8, 9, 3]), torch.Size([2, 8, 3]))
    """
    if target is not None and logits.shape[:-1] == target.shape:
        return logits
    flat = target is not None and logits.ndim == 3 and target.ndim == 2
    return logits.movedim(1, -1) if flat or logits.ndim > 3 else logits


def unusable(model: nn.Module, batch: Batch, loss: Loss | None = None) -> DataError | None:
    """Why a network cannot be run on a batch, in its own words; ``None`` if it can.

    Asked after something failed: what the network alone does not survive is no defect of ours.

    Args:
        model: As the user made it.
        batch: On its device.
        loss: By default :func:`default_loss`.

    Example:
        >>> print(unusable(nn.Linear(4, 2), torch.zeros(8, 3)))
        running Linear on a batch of shape (8, 3): its own forward fails (RuntimeError: ...
        >>> unusable(nn.Linear(4, 2), torch.zeros(8, 4)) is None
        True
    """
    steps: dict[str, Callable[..., Any]] = {"forward": forward, "loss": loss or default_loss}
    with evaluating(model), torch.no_grad():
        for name, step in steps.items():
            try:
                step(model, batch)
            except (SecateurError, MemoryError, torch.OutOfMemoryError):
                return None
            except Exception as error:
                return DataError(
                    f"running {type(model).__name__} on a batch of shape "
                    f"{tuple(first_tensor(batch).shape)}",
                    f"its own {name} fails ({first_line(error)})",
                    "inputs and targets must be what the network was made for",
                    _remedy(name, batch),
                )
    return None


def _remedy(step: str, batch: Batch) -> str:
    if step == "forward" and isinstance(batch, (tuple, list)) and len(batch) > 2:
        return (
            f"of the {len(batch)} parts of the batch the last is taken for the target, and the others "
            "are inputs: where more are targets, yield (inputs, (first, second))"
        )
    return "check the shapes, the types and the labels that the data gives"


@contextmanager
def explaining(model: nn.Module, batch: Batch, loss: Loss | None = None) -> Iterator[None]:
    """Where training fails on a batch that the network alone does not survive, say so.

    Args:
        model: In training.
        batch: On its device.
        loss: By default :func:`default_loss`.

    Raises:
        DataError: In place of what was raised.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> with explaining(net, torch.zeros(1, 4)):
        ...     net(torch.zeros(1, 4))
        Traceback (most recent call last):
            ...
        secateur.core.errors.DataError: training Sequential on a batch of one sample: its BatchNorm ...
    """
    try:
        yield
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = unusable(model, batch, loss)  # e.g. a label beyond the classes
        norms = any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
        if reason is None and norms and size_of(batch) == 1:
            reason = DataError(
                f"training {type(model).__name__} on a batch of one sample",
                f"its BatchNorm layers fail on it ({str(error).partition(chr(10))[0][:300]})",
                "one value a channel has no variance",
                "leave an incomplete last batch out, as DataLoader(drop_last=True) does, or choose a "
                "batch size that leaves more than one sample for it",
            )
        if reason is not None:
            raise reason from error
        raise
