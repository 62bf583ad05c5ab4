"""The order of the data: one that derives from a seed, and the place of a run in any other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.core.arguments import require_count
from secateur.core.batches import Batch
from secateur.core.errors import DataError, UsageError
from secateur.drive.training.chance import (
    generator_states,
    random_states,
    restore_generators_,
    restore_random_,
    tell_epoch_,
)


@runtime_checkable
class Epochs(Protocol):
    """Batches whose order is known for every epoch without having drawn the ones before."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number``, from batch ``start`` on."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Batches of a map-style data set; the order of an epoch derives from the seed and its number.

    So nothing needs to be saved to continue: step 1000 sees the same samples in every run.

    Args:
        data: A tensor, a tuple or mapping of tensors of equal length (what a tokenizer gives), or a data set
            with ``len`` and ``[i]``.
        size: Samples of a batch, over all processes together.
        seed: Of the order.
        share: ``(process, processes)``: this process takes its equal part of every batch. If the last
            one of an epoch cannot be shared out evenly, some of its samples are taken twice.
        drop_last: Leave out the last batch of an epoch if it is not whole.

    Example:
        >>> order = Shuffled((torch.arange(5), torch.arange(5)), size=2)
        >>> len(order), [len(x) for x, y in order.epoch(0)]
        (3, [2, 2, 1])
        >>> whole = [x.tolist() for x, y in order.epoch(7)]
        >>> whole[1:] == [x.tolist() for x, y in order.epoch(7, start=1)]
        True
        >>> [step for step, batch in order.steps(2, 5)]
        [2, 3, 4]
    """

    data: Any
    size: int
    seed: int = 0
    share: tuple[int, int] = (0, 1)
    drop_last: bool = False

    def __post_init__(self) -> None:
        require_count("Shuffled(size=...)", self.size, what="samples of a batch", write="size=128")
        process, processes = self.share
        what, write = "how many processes there are", "share=(0, 1)"
        require_count("Shuffled(share=(process, processes))", processes, what=what, write=write)
        parts = self._parts
        lengths = sorted({len(part) for part in parts})
        if len(lengths) != 1:
            raise UsageError(
                "Shuffled(data)",
                f"its tensors hold {' and '.join(map(str, lengths))} samples"
                if parts
                else "it is empty",
                "a sample is an entry of each",
                "give a tuple of tensors of equal length, e.g. (inputs, targets)",
            )
        if isinstance(self.data, Mapping) and not all(isinstance(x, Tensor) for x in parts):
            raise UsageError(
                "Shuffled(data)",
                f"its {next(k for k, v in self.data.items() if not isinstance(v, Tensor))!r} is no tensor",
                "a batch is some rows of each",
                "let the tokenizer pad and give tensors (padding=True, return_tensors='pt')",
            )
        wrong = ""
        if self.size % processes:
            wrong = f"size={self.size} cannot be shared among {processes} processes"
        elif not 0 <= process < processes:
            wrong = f"process {process} is not one of {processes}"
        elif not len(self):
            wrong = f"{self._count} samples make no batch of {self.size}"
        if wrong:
            why = "every process takes an equal part of each batch"
            raise UsageError("Shuffled(...)", wrong, why, "correct the value")

    @property
    def _parts(self) -> tuple[Any, ...]:
        if isinstance(self.data, Mapping):
            return tuple(self.data.values())
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def _count(self) -> int:
        return len(self._parts[0])

    def __len__(self) -> int:
        return self._count // self.size if self.drop_last else -(-self._count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Epoch 0: for calibration, which is to see the same samples every time."""
        return self.epoch(0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number``, from batch ``start`` on."""
        # A hash, because generators with neighbouring seeds are alike in their first numbers.
        seed = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
        order = torch.randperm(self._count, generator=generator)
        process, processes = self.share
        for index in range(start, len(self)):
            chosen = order[index * self.size : (index + 1) * self.size]
            part = -(-len(chosen) // processes)
            # A process without samples would have no loss: its batch is NaN.
            again = chosen.repeat(processes)[: part * processes - len(chosen)]
            chosen = torch.cat([chosen, again])
            yield self._batch(chosen[process * part : (process + 1) * part])

    def steps(self, begin: int, end: int) -> Iterator[tuple[int, Batch]]:
        """``(step, batch)`` for the steps ``begin .. end - 1``, epoch after epoch."""
        step = begin
        while step < end:
            for batch in self.epoch(step // len(self), step % len(self)):
                yield step, batch
                step += 1
                if step >= end:
                    return

    def _batch(self, chosen: Tensor) -> Batch:
        if isinstance(self.data, Tensor):
            return self.data[chosen]
        if isinstance(self.data, tuple):
            return tuple(part[chosen] for part in self.data)
        if isinstance(self.data, Mapping):
            return {name: part[chosen] for name, part in self.data.items()}
        from torch.utils.data import default_collate

        return default_collate([self.data[i] for i in chosen.tolist()])


class Feed:
    """Batches epoch after epoch from any loader, with a place that can be saved and found again.

    A loader that knows its order (:class:`Shuffled`) is asked for the rest of the epoch. Of any
    other, the random states at the start of the epoch are kept; to continue, the epoch is started
    from them again and the batches that were used are drawn and dropped. That is exact for a
    ``DataLoader`` and everything else whose order derives from torch's, Python's or numpy's
    generators, or from one that the loader, its sampler or its data set carries as ``generator``. Those
    that derive it from the number of the epoch (``DistributedSampler``, Accelerate's) are told that with
    ``set_epoch``.
    Workers that stay (``persistent_workers=True``) begin with fresh random states of their own, so
    what they draw themselves comes out otherwise.
    The labels of the last batch, if they are a whole number for each sample, are compared; if others come,
    the run is refused.

    Args:
        source: What is iterated once an epoch.

    Example:
        >>> feed = Feed([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])])
        >>> batches = feed.rest()
        >>> float(next(batches)), feed.epoch, feed.used
        (1.0, 0, 1)
        >>> later = Feed(feed.source)
        >>> later.load_state_dict(feed.state_dict())
        >>> [float(x) for x in later.rest()], later.epoch
        ([2.0, 3.0], 1)
    """

    def __init__(self, source: Iterable[Batch]) -> None:
        self.source = source
        self.epoch = self.used = 0
        self._start: dict[str, Any] | None = None
        self._last: Batch | str = ""

    def rest(self) -> Iterator[Batch]:
        """The batches of this epoch that were not used yet; then the next epoch begins."""
        for batch in self._again() if self.used else self._anew():
            self.used += 1
            self._last = batch
            yield batch
        self.epoch, self.used, self._start, self._last = self.epoch + 1, 0, None, ""

    def _anew(self) -> Iterator[Batch]:
        if isinstance(self.source, Epochs):
            return self.source.epoch(self.epoch)
        tell_epoch_(self.source, self.epoch)
        self._start_workers()
        self._start = random_states(self.source)
        return iter(self.source)

    def _again(self) -> Iterator[Batch]:
        """The rest of an epoch, after the batches that were used are drawn again."""
        if isinstance(self.source, Epochs):
            batches = self.source.epoch(self.epoch, self.used - 1)
            self._skip(batches, 1)
            return batches
        tell_epoch_(self.source, self.epoch)
        self._start_workers()
        now = random_states(self.source)
        if self._start is not None:
            restore_random_(self._start, self.source)
        batches = iter(self.source)
        self._skip(batches, self.used)
        restore_random_(now, self.source)
        return batches

    def _start_workers(self) -> None:
        """Workers that stay draw a seed when they start, and not in the epochs after the first."""
        loader: Any = self.source
        stays = self.epoch > 0 and getattr(loader, "persistent_workers", False)
        if stays and getattr(loader, "_iterator", None) is None:
            now = random_states(loader)
            iter(loader)
            restore_random_(now, loader)

    def _skip(self, batches: Iterator[Batch], count: int) -> None:
        asked = f"continuing after batch {self.used} of epoch {self.epoch + 1}"
        came, last = 0, None
        for batch in islice(batches, count):
            came, last = came + 1, batch
        if came < count:
            raise DataError(
                asked,
                f"the loader has fewer batches ({came} of {count} came)",
                "the run would go on with other data",
                "give it the data of the run that was interrupted",
            )
        if self._hash() != batch_hash(last):
            raise DataError(
                asked,
                "the loader yields another batch there than it did before the interruption",
                "its data changed, or its order derives from something that is not saved",
                "give it the same data, and an order that derives from torch's generators or from "
                "a generator= of its own, or use secateur.drive.training.order.Shuffled",
            )

    def _hash(self) -> str:
        return self._last if isinstance(self._last, str) else batch_hash(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as plain values and tensors."""
        return {
            "epoch": self.epoch,
            "used": self.used,
            "start": self._start,
            "now": generator_states(self.source),
            "last": self._hash(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place; the next :meth:`rest` continues from there."""
        self.epoch, self.used = int(state["epoch"]), int(state["used"])
        self._start, self._last = state["start"], str(state["last"])
        restore_generators_(state["now"], self.source)


def batch_hash(batch: Batch) -> str:
    """A hash of what augmentation leaves alone: the number of samples and their whole-number labels.

    Random changes of the inputs are drawn between the steps of training, so they are others when
    batches are only drawn and dropped; that does no harm, as those batches were used already.

    Example:
        >>> labels = torch.tensor([0, 1])
        >>> batch_hash((torch.zeros(2, 3), labels)) == batch_hash((torch.ones(2, 3), labels))
        True
        >>> batch_hash((torch.zeros(2, 3), labels)) == batch_hash((torch.zeros(2, 3), 1 - labels))
        False
    """
    digest = hashlib.sha256()
    items: list[Any] = [batch]
    while items:
        item = items.pop(0)
        if isinstance(item, Tensor):
            digest.update(f"{len(item) if item.ndim else 1} ".encode())
            if item.ndim == 1 and not item.is_floating_point() and not item.is_complex():
                digest.update(str(item.tolist()).encode())
        elif isinstance(item, Mapping):
            items += item.values()
        elif isinstance(item, (list, tuple)):
            items += item
    return digest.hexdigest()[:16]
