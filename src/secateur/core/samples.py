"""The samples of a batch: how many there are, and some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import DataError, kind_of

Batch = Any

#: The name of the targets in batches that are mappings.
TARGETS = "labels"


def size_of(batch: Batch) -> int:
    """Number of samples in a batch: its list of targets, or the first axis of its first tensor.

    Example:
        >>> images = [torch.zeros(3, 8, 9), torch.zeros(3, 5, 6)]
        >>> size_of((images, [{"labels": torch.zeros(4)}, {"labels": torch.zeros(1)}]))
        2
    """
    return listed_in(batch) or len(first_tensor(batch))


def listed_in(batch: Batch) -> int:
    """How many samples there are where each has a mapping of its own, as in detection; else 0.

    Example:
        >>> listed_in((torch.zeros(2, 3, 8, 8), [{"labels": torch.zeros(4)}, {}]))
        2
        >>> listed_in(([{"ids": torch.zeros(5)}], torch.zeros(5)))
        0
    """
    targets: Any = None
    if isinstance(batch, Mapping):
        targets = batch.get(TARGETS)
    elif type(batch) in (tuple, list) and len(batch) > 1:
        targets = batch[-1]
    if type(targets) not in (tuple, list) or not all(isinstance(x, Mapping) for x in targets):
        return 0
    return len(targets)


def is_listed(part: Any, samples: int) -> bool:
    """Whether a part of a batch is a list with an entry for each of so many samples.

    Example:
        >>> is_listed([torch.zeros(3, 8, 9), torch.zeros(3, 5, 6)], 2), is_listed(torch.zeros(2), 2)
        (True, False)
    """
    return type(part) in (tuple, list) and len(part) == samples > 0


def first_of(batches: Iterable[Batch]) -> Batch:
    """The first batch that has samples.

    Raises:
        DataError: There is none.

    Example:
        >>> first_of([torch.zeros(0, 3), torch.zeros(2, 3)]).shape
        torch.Size([2, 3])
    """
    for batch in batches:
        if size_of(batch):
            return batch
    raise DataError(
        "an example out of the data",
        "the loader yielded no samples",
        "the network has to run once",
        "check the loader, and whether it can be iterated more than once",
    )


def first_tensor(batch: Batch) -> Tensor:
    """The first tensor inside a batch that has an axis of samples.

    Example:
        >>> first_tensor(({"size": 3, "x": torch.zeros(2, 5)}, torch.zeros(2))).shape
        torch.Size([2, 5])
    """
    if (found := next((part for part in tensors_of(batch) if part.ndim), None)) is None:
        raise DataError(
            "a batch",
            f"{kind_of(batch)} without any tensor of samples",
            "batches are a tensor, a tuple (inputs, targets) or a mapping of keyword arguments",
            "change what the loader yields",
        )
    return found


def tensors_of(part: Any) -> Iterator[Tensor]:
    """The tensors inside a batch or a part of one, in their order.

    Example:
        >>> [x.item() for x in tensors_of([torch.tensor(1), {"size": 3, "x": torch.tensor(2)}])]
        [1, 2]
    """
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (Mapping, tuple, list)):
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from tensors_of(inner)


def divisible(batch: Batch) -> bool:
    """Whether samples can be taken out of a batch: each tensor has a row for each, or one for all.

    Example:
        >>> nodes, edges = torch.zeros(5, 8), torch.zeros(2, 9, dtype=torch.long)
        >>> divisible((nodes, torch.zeros(5))), divisible((nodes, edges, torch.zeros(5)))
        (True, False)
    """
    return all(len(x) in (1, size_of(batch)) for x in _with_rows(batch))


def _with_rows(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch that should have one row for each sample."""
    listed = listed_in(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    for part in (batch,) if isinstance(batch, Tensor) else parts:
        if not is_listed(part, listed):
            yield from (x for x in tensors_of(part) if x.ndim)


def narrow(batch: Batch, size: int, start: int = 0) -> Batch:
    """Samples ``start .. start + size`` of a batch; a row that all samples share stays.

    A batch that is not :func:`divisible`, e.g. a graph, stays whole.

    Example:
        >>> [len(x) for x in narrow((torch.zeros(8, 3), torch.zeros(1, 3), torch.zeros(8)), 2, 4)]
        [2, 1, 2]
    """
    if not divisible(batch):
        return batch
    listed = listed_in(batch)

    def rows(x: Tensor) -> Tensor:
        return x if x.ndim == 0 or len(x) == 1 else x[start : start + size]

    def part(given: Any) -> Any:
        listing = is_listed(given, listed)
        return given[start : start + size] if listing else mapped(given, rows)

    return _plain(batch, part)


def micro_batches(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """Cut batches into pieces of at most ``size`` samples (``None`` leaves them as they are).

    Raises:
        DataError: A batch is larger, and cannot be cut.
    """
    for batch in batches:
        if size is None or size_of(batch) <= size:
            yield batch
            continue
        if not divisible(batch):
            rows = ", ".join(str(len(x)) for x in _with_rows(batch))
            raise DataError(
                f"gradients of {size} sample{'s' * (size > 1)} at a time",
                f"the tensors of a batch have {rows} rows",
                "it cannot be taken apart where they are not one for each sample, or one for all",
                "give batches of so few samples, or choose a criterion that reads whole batches, "
                "such as Taylor",
            )
        for start in range(0, size_of(batch), size):
            yield narrow(batch, size, start)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to where the model is."""
    return _plain(batch, lambda part: mapped(part, lambda x: x.to(device)))


def mapped(part: Any, function: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """A batch, or a part of one, with ``function`` of each tensor in it; classes stay as they are.

    Mappings and lists are new ones, so that a model may write into them.

    Example:
        >>> mapped([{"x": torch.ones(1), "size": 3}], torch.neg)
        [{'x': tensor([-1.]), 'size': 3}]
    """
    if isinstance(part, Tensor):
        return function(part)
    if isinstance(part, MutableMapping):
        found = copy(part)
        for key, value in part.items():
            found[key] = mapped(value, function)
        return found
    if type(part) in (tuple, list):  # not those with names, such as a packed sequence
        return type(part)(mapped(value, function) for value in part)
    return part


def _plain(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """``function`` of each part of a whole batch: a tensor, a plain mapping or a tuple."""
    if isinstance(batch, Mapping):
        return {key: function(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(map(function, batch))
    first_tensor(batch)  # raises where it is no batch
    return function(batch)
