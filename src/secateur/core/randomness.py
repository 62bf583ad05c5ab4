"""Random numbers that leave the caller's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def own_random(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """A random state of its own inside; the caller's goes on afterwards as if nothing had been.

    Args:
        model: Its devices are those on which something is drawn.
        seed: Of the draws inside; by default they go on from the caller's state.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> before = torch.get_rng_state()
        >>> with own_random(net, 0):
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    found = {p.device for p in model.parameters() if p.device.type == "cuda"}
    devices = sorted(found, key=str)
    with torch.random.fork_rng(devices):
        if seed is not None:
            # Not torch.manual_seed: that also seeds all other devices, whose state is not kept.
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
