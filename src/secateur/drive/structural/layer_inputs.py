"""What layers read: their inputs in two networks at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.attention import open_attention
from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.failing import looking_inside
from secateur.core.slots import Slot, device_of
from secateur.recover import Moments
from secateur.stats import Replay
from secateur.stats.engine import finite

_A_SAMPLE = 128


class _Seen(Exception):
    """The layer was reached; the rest of the forward pass is of no use."""


class Both:
    """The dense network and the one as repaired so far, run on the same batches.

    Args:
        dense: The dense network.
        model: The other one, whose weights may change in place.
        slots: The layers that will be fitted, in execution order.
        batches: Calibration data.
    """

    def __init__(
        self, dense: nn.Module, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch]
    ) -> None:
        self._runs = tuple((m, Replay(m, slots, batches)) for m in (dense, model))
        self._batches = batches
        self._device = device_of(model)

    def moments(self, slot: Slot, columns: tuple[int, Tensor], most: int) -> Moments:
        """Sums over the inputs of one layer in both networks.

        Args:
            slot: The layer's weight.
            columns: How many columns a group of it has in the dense network, and which columns of
                the other one count.
            most: Stop after about so many rows.
        """
        assert slot.axes is not None
        wide, kept = columns[0], columns[1].to(self._device)
        moments = Moments(slot.axes.groups, wide, len(kept), self._device)
        generator = torch.Generator().manual_seed(0)
        for batch in self._batches:
            draw = _Draw(min(_A_SAMPLE * size_of(batch), most), generator, self._device)
            x, z = (r.trying(partial(_rows, m, slot, batch, r, draw)) for m, r in self._runs)
            # An expert may be reached in one of them only, or by other tokens.
            if x is not None and z is not None and draw.alike:
                moments.add(x, z.index_select(2, kept))
            if moments.count >= most:
                break
        return moments

    def finish(self, slot: Slot) -> None:
        """The weights of a layer will not change any more."""
        for _, replay in self._runs:
            replay.finish(slot)


class _Draw:
    """Picks the same rows in both networks, as long as they have equally many."""

    def __init__(self, most: int, generator: torch.Generator, device: torch.device) -> None:
        self._most, self._generator, self._device = most, generator, device
        self._counts: set[int] = set()
        self._picked = torch.empty(0)

    @property
    def alike(self) -> bool:
        """Whether all that were drawn from had equally many rows."""
        return len(self._counts) == 1

    def __call__(self, count: int) -> Tensor:
        if not self._counts:
            drawn = torch.randperm(count, generator=self._generator)[: self._most]
            self._picked = drawn.to(self._device)
        self._counts.add(count)
        return self._picked if self.alike else self._picked[:0]


def _rows(model: nn.Module, slot: Slot, batch: Batch, replay: Replay, draw: _Draw) -> Tensor | None:
    """Some of the rows that multiply a weight at the first call of its module, if it is called."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        assert slot.rows is not None
        rows = slot.rows(module, args or tuple(kwargs.values()), out, draw)
        if rows is not None:
            found.append(finite(rows, slot.name, "an input"))
        raise _Seen

    module = model.get_submodule(slot.module)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        reading = looking_inside(model)
        with (
            evaluating(model),
            open_attention(model),
            replay.serving(batch),
            suppress(_Seen),
            reading,
        ):
            forward(model, to_device(batch, device_of(model)))
    finally:
        handle.remove()
    return found[0] if found else None
