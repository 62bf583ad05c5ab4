"""Statistics of weights, also those that need to know what is connected to what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from secateur.core.batches import Batch, Loss, inputs_of, to_device
from secateur.core.groups import groups_of
from secateur.core.slots import Slot, device_of
from secateur.frontends import discover
from secateur.stats import Replay, Stats, collect
from secateur.stats.groups import collect_groups
from secateur.structure import couple


def gather(
    model: nn.Module,
    slots: Sequence[Slot],
    needs: Iterable[Any],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    replay: Replay | None = None,
) -> Stats:
    """:func:`~secateur.stats.collect`, and measurements over the network's widths.

    Args:
        model: Run on its own device, and left as it was.
        slots: The weights to watch.
        needs: Statistics and probes; those with ``measure_groups`` see the whole structure, which
            is traced on the first batch.
        batches: Calibration batches.
        loss: For gradients.
        replay: For sequential collection, see :func:`~secateur.stats.collect`.

    Example:
        >>> from secateur.stats.neighbours import Neighbours
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> stats = gather(net, discover(net)[:1], [Neighbours()], [torch.zeros(1, 3)])
        >>> energy = net[1].weight.detach().double().square().T.expand(2, 3)
        >>> torch.allclose(stats.at(Neighbours(), "0.weight"), energy)
        True
    """
    wanted = list(needs)
    over_widths = [need for need in wanted if hasattr(need, "measure_groups")]
    rest = [need for need in wanted if need not in over_widths]
    stats = collect(model, slots, rest, batches, loss=loss, replay=replay)
    if not over_widths:
        return stats
    positional, named = inputs_of(to_device(batches[0], device_of(model)))
    widths = couple(model, named or positional).widths
    found = collect_groups(model, groups_of(model, widths, discover(model)), over_widths, batches)
    for need in over_widths:
        for slot in slots:
            if (need, slot.name) not in found:  # in no width: nothing known is next to it
                weight = slot.tensor(model)
                found.put(need, slot.name, torch.ones_like(weight, dtype=torch.float64))
    return stats.keep_values(found)
