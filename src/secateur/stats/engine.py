"""The one place that registers hooks and runs backward passes to gather statistics."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from secateur.core.attention import open_attention
from secateur.core.batches import (
    Batch,
    Loss,
    evaluating,
    forward,
    micro_batches,
    real_tokens,
    size_of,
    to_device,
)
from secateur.core.errors import NeedsData, NonFinite, kind_of
from secateur.core.failing import looking_inside
from secateur.core.losses import default_loss, differentiable
from secateur.core.slots import Slot, device_of
from secateur.core.weight import Weight
from secateur.stats.replay import Replay
from secateur.stats.stat import Probe, Stat, State, merge
from secateur.stats.steps import before_update

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
        """Store the result of a probe."""
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

    def drop(self, name: str) -> None:
        """Free everything known about one weight."""
        for store in (self._states, self._values):
            for key in [k for k in store if k[1] == name]:
                del store[key]


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
            a forward pass ends once all slots were seen.

    Raises:
        NonFinite: An activation or gradient is NaN or infinite; the weight is named.
    """
    stats = Stats()
    wanted: list[Any] = list(needs)
    inputs = [s for s in wanted if getattr(s, "source", "") == "inputs"]
    gradients = [s for s in wanted if getattr(s, "source", "") == "gradients"]
    probes = [s for s in wanted if not hasattr(s, "source")]
    device = device_of(model)
    # A part of the network may be compiled by itself; hooks inside it are seen in eager mode only.
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), open_attention(model), eager:
        if inputs:
            _Watch(model, slots, inputs, stats).run(batches, replay)
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


class _Enough(Exception):
    """All watched layers were reached; the rest of the forward pass is of no use."""


class _Watch:
    """Forward hooks on the modules of some slots, for the time of one :meth:`run`."""

    def __init__(
        self, model: nn.Module, slots: Sequence[Slot], needs: Sequence[Stat], stats: Stats
    ) -> None:
        self._model, self._needs, self._stats = model, needs, stats
        self._slots: dict[str, list[Slot]] = {}
        # Now: code that calls a module with other weights has put them in their place by then.
        self._weights: dict[str, Weight] = {}
        for slot in slots:
            if slot.rows is None:
                continue
            self._weights[slot.name] = slot.weight(model)
            for path in slot.owners(model):
                self._slots.setdefault(path, []).append(slot)
        self._ended: Counter[str] = Counter()
        self._samples = 0
        self._reached: set[str] = set()
        self._batch: Batch = None
        # The mask of an encoder says nothing of what its decoder reads.
        self._one_mask = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def run(self, batches: Sequence[Batch], replay: Replay | None) -> None:
        device = device_of(self._model)
        handles = [self._hook(path) for path in self._slots]
        ends = replay.ends(self._slots) if replay is not None else None
        handles += [self._end(path, ends) for path in ends or ()]
        try:
            with torch.no_grad():
                for batch in batches:
                    self._ended.clear()
                    self._reached.clear()
                    self._batch = batch
                    self._samples = size_of(batch)
                    known = replay.serving(batch) if replay is not None else nullcontext()
                    with suppress(_Enough), looking_inside(self._model), known:
                        forward(self._model, to_device(batch, device))
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            inputs = args
            if kwargs:  # Transformers and others pass inputs by name
                inputs = tuple(inspect.signature(module.forward).bind(*args, **kwargs).args)
            for slot in self._slots[path]:
                self._update(slot, module, inputs, output)

        module = self._model.get_submodule(path)
        return module.register_forward_hook(hook, with_kwargs=True)

    def _end(self, path: str, ends: Counter[str] | None) -> RemovableHandle:
        def hook(*_: Any) -> None:
            self._ended[path] += 1
            if self._ended == ends:
                raise _Enough

        return self._model.get_submodule(path).register_forward_hook(hook)

    def _update(self, slot: Slot, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
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

    def _without_padding(self, x: Any, rows: Tensor) -> Tensor:
        """The rows of real tokens, where ``x`` is ``(samples, tokens, features)`` and each is a row."""
        mask = real_tokens(self._batch, x) if self._one_mask and isinstance(x, Tensor) else None
        if mask is None or rows.shape[:2] != (1, mask.numel()) or bool(mask.all()):
            return rows
        return rows[:, mask.flatten().bool().to(rows.device)]


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
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for slot, gradient in zip(slots, found, strict=True):
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
            "check the calibration data and the layers before this one",
        )
    return x


def stream_gradients(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    slots: Sequence[Slot],
    needs: Sequence[Stat],
    stats: Stats,
) -> RemovableHandle:
    """Feed ``stats`` from a training loop: the gradients just before every update of the weights.

    Returns:
        A handle whose ``remove()`` ends it.
    """

    def before(_: torch.optim.Optimizer) -> None:
        if all(slot.tensor(model).grad is None for slot in slots):
            return  # no backward pass came before this step
        for slot in slots:
            parameter = slot.tensor(model)
            # The loss does not depend on a weight that it left without a gradient.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for need in needs:
                stats.update(need, slot.weight(model), gradient, 1)

    return before_update(optimizer, before)
