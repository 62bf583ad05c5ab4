"""Random numbers of our own: the caller's generators are afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_random(model: nn.Module | None, seed: int | None = None) -> Iterator[None]:
    """Put the random states of torch back afterwards: of the processor, and of a model's devices.

    Args:
        model: Draws happen on its devices, and on the processor; ``None`` if that is not known.
        seed: Begin with it; by default with the caller's states.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> before = torch.get_rng_state()
        >>> with own_random(net, seed=0):
        ...     first = torch.rand(3)
        >>> with own_random(net, seed=0):
        ...     print(torch.equal(first, torch.rand(3)))
        True
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    devices = devices_of(model)
    everywhere = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(everywhere if devices is None else devices):
        if seed is not None:
            start_(seed, devices)
        yield


def devices_of(model: nn.Module | None) -> list[torch.device] | None:
    """The CUDA devices of a model; ``None`` if there may be others with generators of their own.

    Example:
        >>> devices_of(nn.Linear(1, 1)), devices_of(None)
        ([], None)
    """
    if model is None:
        return None
    found = {p.device for p in model.parameters()}
    if {device.type for device in found} - {"cpu", "cuda", "meta"}:
        return None
    return sorted((device for device in found if device.type == "cuda"), key=str)


def start_(seed: int, devices: Sequence[torch.device] | None) -> None:
    """Seed the generators of the processor and of some devices, or of all.

    ``torch.manual_seed`` seeds those of *all* devices, also of those that nobody puts back.

    Example:
        >>> start_(0, [])
    """
    if devices is None:
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
