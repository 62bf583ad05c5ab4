"""Random states: everything random that a training loop draws from, as plain values."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def random_states(source: object = None) -> dict[str, Any]:
    """The states of Python's, torch's and (if it is loaded) numpy's generators.

    Args:
        source: A loader; generators that it, its sampler or its data set carry are included.

    Example:
        >>> before = random_states()
        >>> drawn = torch.rand(3)
        >>> restore_random_(before)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    version, numbers, spare = random.getstate()
    states: dict[str, Any] = {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), spare],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = list(torch.cuda.get_rng_state_all())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = dict(numpy.random.get_state(legacy=False))
        inner = dict(state["state"])
        if state["bit_generator"] == "MT19937":  # somebody may have set another one
            words = torch.tensor(inner["key"].astype("int64"))
            place = [inner["pos"], state["has_gauss"], state["gauss"]]
            states["numpy"] = [words, int(place[0]), int(place[1]), float(place[2])]
    return {**states, "loader": generator_states(source)}


def restore_random_(states: Mapping[str, Any], source: object = None) -> None:
    """Set every generator to a state of :func:`random_states`.

    Example:
        >>> restore_random_(random_states())
    """
    version, numbers, spare = states["python"]
    random.setstate((version, tuple(numbers.tolist()), spare))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        words, place, has_gauss, gauss = states["numpy"]
        key = words.numpy().astype("uint32")
        numpy.random.set_state(("MT19937", key, place, has_gauss, gauss))
    restore_generators_(states["loader"], source)


def generator_states(source: object) -> dict[str, torch.Tensor]:
    """The states of the generators that a loader, its sampler or its data set carry."""
    return {name: generator.get_state() for name, generator in generators_of(source)}


def restore_generators_(states: Mapping[str, torch.Tensor], source: object) -> None:
    """Inverse of :func:`generator_states`."""
    for name, generator in generators_of(source):
        if name in states:
            generator.set_state(states[name])


def generators_of(source: object) -> Iterator[tuple[str, torch.Generator]]:
    """Generators that a loader, its samplers or its data set carry, each once, by their place.

    Example:
        >>> loader = torch.utils.data.DataLoader([1, 2], generator=torch.Generator())
        >>> [name for name, _ in generators_of(loader)]
        ['']
    """
    seen: set[int] = set()
    for name, holder in parts_of(source).items():
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield name, generator


def tell_epoch_(source: object, number: int) -> None:
    """Say which epoch comes to whatever derives its order from the number: ``set_epoch``, if it is there.

    Example:
        >>> sampler = torch.utils.data.DistributedSampler([1, 2, 3], num_replicas=1, rank=0)
        >>> tell_epoch_(torch.utils.data.DataLoader([1, 2, 3], sampler=sampler), 4)
        >>> sampler.epoch
        4
    """
    for part in parts_of(source).values():
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(number)


def parts_of(source: object) -> dict[str, object]:
    """A loader and those of its parts that may decide an order, by their place in it.

    Example:
        >>> list(parts_of([1, 2]))
        ['', 'sampler', 'batch_sampler', 'dataset', 'batch_sampler.sampler']
    """
    parts = {"": source}
    for name in ("sampler", "batch_sampler", "dataset"):
        parts[name] = getattr(source, name, None)
    parts["batch_sampler.sampler"] = getattr(parts["batch_sampler"], "sampler", None)
    return parts
