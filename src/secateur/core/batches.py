"""What a batch is and how a model is run on it.

Accepted batches: a tensor, a ``(inputs, targets)`` pair or longer tuple (the last element is the
target), or a mapping of keyword arguments as Transformers uses (``labels`` makes its own loss). A part
may be a mapping, tuple or list of tensors itself: ``(features,)`` calls ``model(features)``. Targets
that are a list of mappings are one for each sample, and so is a list of as many images beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from secateur.core.arguments import require_count
from secateur.core.errors import (
    DataError,
    NeedsData,
    UnknownName,
    UsageError,
    kind_of,
)
from secateur.core.samples import (
    divisible,
    first_of,
    first_tensor,
    mapped,
    micro_batches,
    narrow,
    size_of,
    tensors_of,
    to_device,
)

__all__ = [
    "Data",
    "Watched",
    "as_data",
    "aside",
    "count",
    "divisible",
    "evaluating",
    "first_of",
    "first_tensor",
    "forward",
    "inputs_of",
    "lack",
    "length_of",
    "mapped",
    "micro_batches",
    "narrow",
    "own_modes",
    "real_tokens",
    "size_of",
    "tensors_of",
    "to_device",
]

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Metric = Callable[[nn.Module, Iterable[Batch]], float]


@dataclass(frozen=True)
class Data:
    """Where a run finds its examples.

    Args:
        train: Re-iterable over batches; for calibration and fine-tuning.
        test: Re-iterable over batches; only ever used to report.
        loss: ``(model, batch) -> scalar``; by default :func:`default_loss`.
        metric: ``(model, batches) -> float``, larger is better; by default accuracy.
        calibration: How many *samples* of ``train`` the statistics see.

    Example:
        >>> batches = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))]
        >>> Data(train=batches, calibration=2).sample()[0][0].shape
        torch.Size([2, 3])
    """

    train: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    calibration: int = 1024

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            _require_batches(f"Data({name}=...)", getattr(self, name))
        what, write = "how many samples are measured", "e.g. calibration=1024"
        require_count("Data(calibration=...)", self.calibration, what=what, write=write)
        if isinstance(self.loss, nn.modules.loss._Loss):
            kind = type(self.loss).__name__
            raise UsageError(
                "Data(loss=...)",
                f"a {kind}() was given, which takes outputs and targets",
                "a loss is a function of the model and a batch, because it runs the model",
                f"write loss=lambda model, batch: nn.{kind}()(model(batch[0]), batch[1])",
            )

    def sample(self) -> list[Batch]:
        """The first ``calibration`` samples of ``train``, as a list of batches."""
        if self.train is None:
            raise NeedsData(
                "calibration data",
                "Data(train=None)",
                "statistics are measured on training batches",
                "pass train=, an iterable of batches",
            )
        taken: list[Batch] = []
        left = self.calibration
        for batch in aside(self.train):
            size = size_of(batch)
            if size == 0:
                continue
            taken.append(batch if size <= left else narrow(batch, left))
            left -= size
            if left <= 0:
                break
        if not taken:
            raise DataError(
                "calibration data",
                "the training loader yielded no samples",
                "statistics need at least one",
                "check the loader, and whether it can be iterated more than once",
            )
        return taken


def aside(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The same batches from workers that do not stay, and draw a seed for every loop.

    Where they stay, a look at the data while somebody trains would begin the epoch anew. Loaders of
    Accelerate tell the training when its epoch ends, and a look at them would tell it so early: they
    give one of torch's own.

    Example:
        >>> aside([torch.zeros(2)])
        [tensor([0., 0.])]
    """
    if not isinstance(batches, DataLoader):
        return batches
    # Accelerate's loaders hold one of torch's own.
    plain: DataLoader[Batch] = vars(batches).get("base_dataloader", batches)
    if plain is batches and not plain.persistent_workers:
        return batches
    twin = copy(plain)
    vars(twin).update(persistent_workers=False, _iterator=None)  # plain assignment is refused
    return twin


def as_data(data: Data | Iterable[Batch] | Mapping[str, Any] | None) -> Data | None:
    """Accept :class:`Data`, a mapping with its fields, or a plain iterable of batches."""
    if data is None or isinstance(data, Data):
        return data
    if isinstance(data, Mapping):
        unknown = next((str(key) for key in data if key not in _FIELDS), None)
        if unknown is not None:
            _require_batches("the data", data)
            raise UnknownName("data key", unknown, _FIELDS)
        return Data(**data)
    return Data(train=data)


_FIELDS = tuple(f.name for f in fields(Data))


def _require_batches(asked: str, batches: object) -> None:
    kind = type(batches)
    hugging_face = kind.__module__.partition(".")[0] == "datasets"
    if hugging_face or (isinstance(batches, Dataset) and not isinstance(batches, IterableDataset)):
        made = 'dataset.with_format("torch")' if hugging_face else f"{kind.__name__}(...)"
        raise UsageError(
            asked,
            f"{kind_of(batches)}, a data set, was given",
            "it yields single samples, and batches are wanted",
            f"write DataLoader({made}, batch_size=32); where its items are batches, batch_size=None",
        )
    if isinstance(batches, Iterator):
        raise UsageError(
            asked,
            f"{kind_of(batches)} was given, which can be gone through only once",
            "batches are read several times: to look at them, to train, to measure",
            "give a list, a DataLoader, or a class whose __iter__ begins anew",
        )
    found = ""
    parts: Any = batches.values() if isinstance(batches, Mapping) else batches
    if isinstance(batches, (str, bytes)):
        found = f"the text {batches!r:.60}"
    elif isinstance(batches, Tensor):
        found = f"a tensor of shape {tuple(batches.shape)}, whose rows would be taken for batches,"
    elif isinstance(batches, (tuple, Mapping)) and any(isinstance(part, Tensor) for part in parts):
        found = f"{kind_of(batches)} of tensors, which is a single batch,"
    elif batches is not None and not isinstance(batches, Iterable):
        # In the old way, things can be iterated by numbers.
        found = "" if hasattr(batches, "__getitem__") else kind_of(batches)
    if found:
        raise UsageError(
            asked,
            f"{found} was given",
            "it is an iterable of batches",
            "write [batch], e.g. [(inputs, targets)], or pass a DataLoader",
        )


def length_of(batches: Iterable[Batch]) -> int | None:
    """How many batches there are, or ``None`` where only iterating would tell.

    A ``DataLoader`` over an ``IterableDataset`` has a ``__len__`` that raises ``TypeError``.

    Example:
        >>> length_of([1, 2]), length_of(iter([1, 2]))
        (2, None)
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def count(batches: Iterable[Batch]) -> int:
    """How many batches there are, if need be by going through them once.

    Example:
        >>> count([1, 2]), count(iter([1, 2]))
        (2, 2)
    """
    known = length_of(batches)
    return sum(1 for _ in batches) if known is None else known


@dataclass(frozen=True)
class Watched(Sequence[Any]):
    """Batches that report how many of them were read.

    Args:
        batches: As long as they are; a stream has no length.
        stage: What they are read for.
        report: Called with the stage, how many were read, and how many there are, or ``None``.

    Example:
        >>> list(Watched([1, 2], "reading", print))
        reading 0 2
        reading 1 2
        reading 2 2
        [1, 2]
    """

    batches: Any
    stage: str
    report: Callable[[str, float, Any], object]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        total, done = length_of(self.batches), 0
        for done, batch in enumerate(self.batches):
            self.report(self.stage, done, total)
            yield batch
        self.report(self.stage, done + 1, total)


def lack(data: Data | None) -> str:
    """What is missing, where training batches are needed and there are none.

    Example:
        >>> lack(None), lack(Data(test=[]))
        ('no data was given', 'the data has no training batches')
    """
    return "no data was given" if data is None else "the data has no training batches"


def inputs_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the forward call (targets left out)."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {key: mapped(value) for key, value in batch.items()}
    given = tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return mapped(given), {}


def forward(model: nn.Module, batch: Batch) -> Any:
    """Run ``model`` on the inputs of ``batch``."""
    args, kwargs = inputs_of(batch)
    torch.clear_autocast_cache()  # it holds weights as they were before the last cut
    return model(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored afterwards."""
    with own_modes(model):
        model.eval()
        yield


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """Every module's own mode, whatever is done to it inside, restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        # Not only its flag: a module may keep what it computed from its weights until it trains again.
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


def real_tokens(model: nn.Module, batch: Batch, x: Tensor) -> Tensor | None:
    """Which of ``(N, T, features)``, or of ``(N * T, features)``, belong to tokens that are no padding.

    None for all. That is also the answer for models with encoder and decoder: the mask of the one says
    nothing of what the other reads, which may be as long.

    Example:
        >>> batch = {"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> real_tokens(nn.Identity(), batch, torch.zeros(1, 3, 8))
        tensor([[ True,  True, False]])
        >>> real_tokens(nn.Identity(), batch, torch.zeros(3, 8))
        tensor([ True,  True, False])
        >>> real_tokens(nn.Identity(), batch, torch.zeros(1, 8))
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(mask, Tensor) or two:
        return None
    if mask.ndim == x.ndim == 2 and len(x) == mask.numel():
        mask = mask.flatten()
    return mask.bool().to(x.device) if mask.shape == x.shape[:-1] else None
