"""The one place that registers hooks and runs backward passes to gather statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from secateur.core.attention import open_attention
from secateur.core.batches import (
    Batch,
    Loss,
    evaluating,
    micro_batches,
    real_tokens,
    size_of,
    to_device,
)
from secateur.core.errors import NeedsData, NonFinite, kind_of
from secateur.core.losses import default_loss, differentiable
from secateur.core.slots import Slot, device_of
from secateur.core.weight import Weight
from secateur.stats.activations import wide
from secateur.stats.pairs import Beside
from secateur.stats.passes import Passes
from secateur.stats.replay import Replay
from secateur.stats.stat import Probe, Stat, State, merge

# Rows of a convolution are unfolded copies of its input; this many numbers at a time.
_ROWS_AT_ONCE = 1 << 24


class Stats:
    """Collected statistics, looked up by statistic and weight.

    Values are computed lazily and cached, so two criteria that need the same inverse share it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._states: dict[tuple[Any, str], State] = {}
        self._values: dict[tuple[Any, str], Tensor] = {}
        self.memory: dict[tuple[Any, str], Tensor] = {}
        self._read: set[tuple[Any, str]] = set()

    def __call__(self, stat: Stat | Probe, weight: Weight) -> Tensor:
        """The value of ``stat`` for ``weight``."""
        key = (stat, weight.name)
        if key not in self._values:
            if key not in self._states:
                raise NeedsData(
                    f"{type(stat).__name__} of {weight.name!r}",
                    "it was not collected",
                    "this criterion or recovery works on statistics of data",
                    "pass data= (training batches), or declare the statistic in needs",
                )
            self._values[key] = stat.value(self._states[key], weight)  # type: ignore[union-attr]
        return self._values[key]

    def rows(self, stat: Stat | Probe, weight: Weight) -> Tensor | None:
        """How many rows of inputs it is made of, one number or one an expert; None if not counted."""
        return self._states.get((stat, weight.name), {}).get("rows")

    def __contains__(self, key: tuple[Any, str]) -> bool:
        return key in self._states or key in self._values

    def update(self, stat: Stat, weight: Weight, seen: Tensor, samples: int) -> None:
        """Stream one observation into a state."""
        key = (stat, weight.name)
        state = None if key in self._read else self._states.get(key)
        self._read.discard(key)
        # A network under autocast is watched from within, and would have products in its precision.
        with torch.autocast(seen.device.type, enabled=False):
            self._states[key] = stat.update(state or stat.init(weight), weight, seen, samples)
        self._values.pop(key, None)

    def at(self, probe: object, name: str) -> Tensor:
        """The result of a probe for a width, block or weight of that name."""
        if (probe, name) not in self._values:
            raise NeedsData(
                f"{type(probe).__name__} of {name!r}",
                "it was not collected",
                "this criterion works on what is measured on the whole network",
                "collect with stats.collect or stats.collect_groups, and declare it in needs",
            )
        return self._values[(probe, name)]

    def put(self, stat: object, name: str, value: Tensor) -> None:
        """Store a result, in place of what was seen."""
        self._states.pop((stat, name), None)
        self._values[(stat, name)] = value

    def begin_anew(self, needs: Iterable[Stat]) -> None:
        """Drop what was seen of these statistics as soon as something new is seen."""
        wanted = set(needs)
        self._read |= {key for key in self._states if key[0] in wanted}

    def merge(self, other: Stats) -> Stats:
        """The statistics of two disjoint parts of the data as one."""
        joined = Stats()
        for key in dict.fromkeys((*self._states, *other._states)):
            parts = [s._states[key] for s in (self, other) if key in s._states]
            whole = (
                merge(*parts) if len(parts) == 2 else {k: v.clone() for k, v in parts[0].items()}
            )
            joined._states[key] = whole
        return joined

    def names(self) -> list[str]:
        """Names of the weights that were seen, in the order in which data reached them."""
        return list(dict.fromkeys(name for _, name in self._states))

    def keep_values(self, other: Stats) -> Stats:
        """Take over probe results, which have no state to merge; returns itself."""
        self._values |= {k: v for k, v in other._values.items() if k not in self._states}
        return self

    def state_dict(self) -> dict[str, Any]:
        """All sums and remembered scores, as nested dictionaries of tensors."""
        states: dict[str, Any] = {f"{stat!r} {name}": s for (stat, name), s in self._states.items()}
        memory: dict[str, Any] = {f"{key!r} {name}": t for (key, name), t in self.memory.items()}
        read = {f"{stat!r} {name}": True for stat, name in self._read}
        return {"states": states, "memory": memory, "read": read}

    def load_state_dict(self, saved: Mapping[str, Any], keys: Iterable[tuple[Any, str]]) -> None:
        """Restore what :meth:`state_dict` saved for these statistics, criteria and weights."""
        for key in keys:
            text = f"{key[0]!r} {key[1]}"
            if text in saved["states"]:
                self._states[key] = dict(saved["states"][text])
            if text in saved["memory"]:
                self.memory[key] = saved["memory"][text]
            if text in saved.get("read", {}):
                self._read.add(key)

    def recall(self, key: object, name: str) -> Tensor | None:
        """What :meth:`remember` stored at the previous update (for smoothed criteria)."""
        return self.memory.get((key, name))

    def remember(self, key: object, name: str, value: Tensor) -> None:
        """Keep a score for the next update."""
        self.memory[(key, name)] = value

    def take(self, other: Stats) -> Stats:
        """Take over what was found of other statistics, as it is and not copied; returns itself."""
        new = {key: state for key, state in other._states.items() if key not in self._states}
        self.keep_values(other)
        self._states |= new
        return self

    def drop(self, name: str, needs: Iterable[Any]) -> None:
        """Free what was streamed of one weight.

        The results of probes stay: they may be asked for with another weight.
        """
        for need in needs:
            if hasattr(need, "source"):
                self._states.pop((need, name), None)
                self._values.pop((need, name), None)


def collect(
    model: nn.Module,
    slots: Sequence[Slot],
    needs: Iterable[Stat | Probe],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    replay: Replay | None = None,
) -> Stats:
    """Run ``batches`` through ``model`` and gather every statistic in ``needs`` for every slot.

    The model is run in evaluation mode and left as it was: same mode, same gradients, no hooks.

    Args:
        model: Run on its own device.
        slots: The weights to watch.
        needs: Statistics and probes.
        batches: Calibration batches.
        loss: For gradient statistics; by default :func:`~secateur.core.batches.default_loss`.
        replay: For sequential collection: what is finished is not computed again to see inputs, and
            a forward pass ends once all slots were seen. Statistics of pairs want the dense network
            :class:`~secateur.stats.pairs.Beside`, and are left out without it.

    Raises:
        NonFinite: An activation or gradient is NaN or infinite; the weight is named.
    """
    stats = Stats()
    wanted: list[Any] = list(needs)
    beside = replay if isinstance(replay, Beside) else None
    rows = ("inputs",) if beside is None else ("inputs", "pairs")
    inputs = [s for s in wanted if getattr(s, "source", "") in rows]
    gradients = [s for s in wanted if getattr(s, "source", "") == "gradients"]
    probes = [s for s in wanted if not hasattr(s, "source")]
    device = device_of(model)
    # A part of the network may be compiled by itself; hooks inside it are seen in eager mode only.
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), open_attention(model), eager:
        if inputs:
            _Watch(model, slots, inputs, stats, beside).run(batches, replay)
        for samples in {s.samples for s in gradients}:
            same = [s for s in gradients if s.samples == samples]
            pieces = (to_device(b, device) for b in micro_batches(batches, samples))
            _collect_gradients(model, slots, same, pieces, loss or default_loss, stats)
        for probe in probes:
            moved = [to_device(b, device) for b in batches]
            found = probe.measure(model, slots, moved, loss or default_loss)
            for name, value in found.items():
                stats.put(probe, name, finite(value, name, "a probe"))
    return stats


class _Watch(Passes):
    """Reads the inputs of the modules of some slots, for the time of one :meth:`run`."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        needs: Sequence[Stat],
        stats: Stats,
        beside: Beside | None,
    ) -> None:
        self._needs = [need for need in needs if need.source == "inputs"]
        self._pairs = [need for need in needs if need.source == "pairs"]
        self._stats, self._beside = stats, beside if self._pairs else None
        self._slots: dict[str, list[Slot]] = {}
        # Now: code that calls a module with other weights has put them in their place by then.
        self._weights: dict[str, Weight] = {}
        for slot in slots:
            if slot.rows is None:
                continue
            self._weights[slot.name] = slot.weight(model)
            for path in slot.owners(model):
                self._slots.setdefault(path, []).append(slot)
        super().__init__(model, self._slots)
        self._samples = 0
        self._reached: set[str] = set()
        self._unlike: set[str] = set()
        self._batch: Batch = None

    def begin(self, batch: Batch) -> None:
        self._reached.clear()
        self._batch = batch
        self._samples = size_of(batch)
        if self._beside is not None:
            self._beside.see(self.paths, batch)

    def called(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        dense = self._beside.call(path) if self._beside is not None else None
        for slot in self._slots[path]:
            self._update(slot, module, inputs, output, dense)

    def _update(
        self,
        slot: Slot,
        module: nn.Module,
        inputs: tuple[Any, ...],
        output: Any,
        dense: tuple[Any, ...] | None,
    ) -> None:
        assert slot.rows is not None
        x = inputs[0] if inputs else None
        if not isinstance(x, (Tensor, PackedSequence)):
            raise NeedsData(
                f"the inputs of {slot.module!r}",
                f"its first argument is {kind_of(x)}",
                "statistics are read from a tensor input",
                "leave this module out with ignore=",
            )
        weight = self._weights[slot.name]
        # Unfolding a convolution's input multiplies it by the taps: go through it in slices.
        total = max(1, len(x))
        step = total
        if weight.axes.convolves and isinstance(x, Tensor) and len(slot.shape) == x.ndim:
            step = max(1, _ROWS_AT_ONCE * total // max(1, x.numel() * weight.cube().shape[2]))
        for start in range(0, total, step):
            part = inputs if step >= total else (x[start : start + step], *inputs[1:])
            found = slot.rows(module, part, output)
            if found is None:
                return
            rows = finite(found, slot.name, "an input")
            # Each sample once: not with every slice, nor with every call that shares the weight.
            samples = 0 if slot.name in self._reached else self._samples
            self._reached.add(slot.name)
            if slot.transposed:
                real = len(part[0]) * math.prod(part[0].shape[2:])
                weight = replace(weight, density=real / rows.shape[1])
            real = self._without_padding(x, rows)
            for need in self._needs:
                whole = getattr(need, "padding", False)
                self._stats.update(need, weight, rows if whole else real, samples)
            if self._beside is not None and slot.name not in self._unlike:
                piece = slice(None) if step >= total else slice(start, start + step)
                other = self._beside.rows(slot, dense, piece)
                # Experts are given the tokens that the router sends there, and it may send others
                # now. Where every sample has equally many, they are taken to be the same.
                uneven = step >= total and rows.shape[1] % max(1, self._samples)
                fits = other is not None and other.shape == rows.shape and not uneven
                self._compare(slot, weight, x, rows, other if fits else None)

    def _compare(
        self, slot: Slot, weight: Weight, x: Any, rows: Tensor, other: Tensor | None
    ) -> None:
        """Feed what is made of these rows, and of the same ones in the dense network if there are any."""
        assert self._beside is not None
        if other is None or weight.axes.stacked:
            self._unlike.add(slot.name)
            for need in self._pairs:
                self._stats.put(need, slot.name, rows.new_empty(0))
            return
        real, before = (self._without_padding(x, each) for each in (rows, other))
        with torch.autocast(rows.device.type, enabled=False):
            dense = _outputs(slot.weight(self._beside.dense), before)
            seen = torch.cat([wide(real), dense - _outputs(weight, real), dense], 2)
        for need in self._pairs:
            self._stats.update(need, weight, seen, 0)

    def _without_padding(self, x: Any, rows: Tensor) -> Tensor:
        """The rows of real tokens, where the batch says which are, and each is a row."""
        mask = real_tokens(self.model, self._batch, x) if isinstance(x, Tensor) else None
        if mask is None or rows.shape[:2] != (1, mask.numel()) or bool(mask.all()):
            return rows
        return rows[:, mask.flatten()]


def _outputs(weight: Weight, rows: Tensor) -> Tensor:
    """What a weight makes of rows, ``(groups, rows, out / groups)``."""
    matrix = weight.matrix().reshape(weight.axes.groups, -1, weight.fan_in)
    return wide(rows) @ wide(matrix).transpose(1, 2)


def _collect_gradients(
    model: nn.Module,
    slots: Sequence[Slot],
    needs: Sequence[Stat],
    batches: Iterable[Batch],
    loss: Loss,
    stats: Stats,
) -> None:
    parameters = [slot.tensor(model) for slot in slots]
    with requiring_grad(parameters), torch.enable_grad():
        for batch in batches:
            value = differentiable(loss(model, batch))
            found: list[Tensor | None] = [
                *torch.autograd.grad(value, parameters, allow_unused=True)
            ]
            for index, slot in enumerate(slots):
                # Together they are as large as the network: none lives on beside the next backward pass.
                gradient, found[index] = found[index], None
                weight = slot.weight(model)
                seen = torch.zeros_like(weight.value) if gradient is None else gradient
                finite(seen, slot.name, "a gradient")
                for need in needs:
                    stats.update(need, weight, seen, size_of(batch))


@contextmanager
def requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """All of ``parameters`` with gradients inside; their own flags restored afterwards."""
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def finite(x: Tensor, name: str, what: str) -> Tensor:
    """``x``, if it has no NaN or infinity."""
    # One reduction: a sum is NaN or infinite if any entry is (or if it overflows: then look closer).
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise NonFinite(
            f"statistics of {name!r}",
            f"{bad} of {x.numel()} entries of {what} are NaN or infinite",
            "a statistic over them would be meaningless",
            "check the data and the layers before this one",
        )
    return x
