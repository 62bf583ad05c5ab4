"""Stored weights in the form that a kernel runs from, and which kernel that is.

The form is packed at the first call and kept until the layer goes, or the memory of the stored weight.
Which kernel, is decided once for each size of input (by powers of two) and each kind of layer: those
of one shape, type, sparsity and pattern share the choice. The dense layer takes part in the race:
where it wins, its weight is unpacked and kept, too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.masks import unpack_bits
from secateur.formats.layouts import LAYOUTS
from secateur.runtime.native import Layer, Spec, Variant, candidates
from secateur.runtime.race import race
from secateur.runtime.stored import Stored, fill
from secateur.runtime.threads import Workers, workers_beside_torch

# Bit masks multiply by their zeros. With more tokens than this, that costs more than reading the
# weights does, and lists are the better guess.
_FEW_TOKENS = 2
_MOST_THREADS = 256
# Seconds that choosing a kernel takes for one size of input, or five runs of each.
_CHOOSING = 0.01
# Milliseconds that a call of an operator takes, and one of torch.nn.functional does not.
_CALL = 0.015


@functools.lru_cache(maxsize=8)
def _pool(threads: int) -> Workers:
    return workers_beside_torch(threads)


@dataclass(frozen=True)
class Way:
    """How to run: on how many threads (0: as many as torch), and whether to time the kernels."""

    threads: int
    measure: bool


@dataclass(frozen=True, eq=False)
class Operands:
    """What an operator is given of a layer."""

    spec: Spec
    values: Tensor
    index: Tensor
    bias: Tensor | None

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the packed form is made from."""
        given = (self.values, self.index)
        return given if self.bias is None else (*given, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix."""
        return self.spec.outputs, self.spec.columns

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.values.numel() / (self.spec.outputs * self.spec.columns)

    def kind(self) -> Hashable:
        """What layers have in common that are fastest with the same kernel."""
        kept = unpack_bits(self.index.detach(), self.shape)
        pattern = round(self.density, 2), round(fill(kept.numpy()), 1)
        return self.spec, self.values.dtype, self.bias is None, pattern

    def dense(self) -> Tensor:
        """The weight as a matrix.

        Raises:
            FormatError: values and index do not belong together.
        """
        parts = {"values": self.values.detach(), "bitmask": self.index.detach()}
        return LAYOUTS["bitmask"].unpack(parts, self.shape, self.values.dtype)[0]


Run = Callable[[Tensor, Workers], Tensor]


@dataclass(frozen=True, eq=False)
class Packed:
    """One stored weight, ready to run in each way that its inputs have asked for.

    Args:
        owners: The memory that it was made from, weakly.
        bias: Its content, as bytes; None without one.
        ways: By kernel; None is dense, in PyTorch.
        chosen: The kernel for each size of input.
        lock: Held while either changes.
    """

    owners: tuple[StorageWeakRef, ...]
    bias: Tensor | None = None
    ways: dict[Variant | None, Run] = field(default_factory=dict)
    chosen: dict[int, Variant | None] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def alive(self) -> bool:
        """Whether any tensor still uses that memory."""
        return not any(owner.expired() for owner in self.owners)

    def holds(self, bias: Tensor | None) -> bool:
        """Whether it can stand for the memory that it was made from, with this bias in it."""
        same = bias is None or (self.bias is not None and torch.equal(self.bias, bias))
        # Of dead memory another tensor may have got the address since.
        return same and self.alive

    def run(self, stored: Operands, x: Tensor, positions: int, way: Way) -> Tensor:
        """The output for an input with so many positions (of an image) or tokens."""
        if torch.is_autocast_enabled("cpu"):  # it would round the dense way, and only that
            with torch.autocast("cpu", enabled=False):
                return self.run(stored, x, positions, way)
        pool = _pool(way.threads or min(_MOST_THREADS, torch.get_num_threads()))
        size = positions.bit_length()
        if size not in self.chosen:
            with self.lock:
                if size not in self.chosen:
                    self._choose_(size, stored, x, positions, pool, measure=way.measure)
        return self.ways[self.chosen[size]](x, pool)

    def _choose_(
        self,
        size: int,
        stored: Operands,
        x: Tensor,
        positions: int,
        pool: Workers,
        *,
        measure: bool,
    ) -> None:
        kernels = _kernels(stored, positions)
        best: Variant | None = kernels[0]
        if measure:
            kind = (stored.kind(), size, pool.threads)
            known = _CHOICES.copy()  # forget() may come at any time
            if kind in known:
                best = known[kind]
            else:
                entrants = {k: self.ways.get(k) or _way_of(stored, k) for k in (None, *kernels)}
                best = _CHOICES[kind] = _fastest(entrants, x, pool)
                self.ways[best] = entrants[best]
        if best not in self.ways:
            self.ways[best] = _way_of(stored, best)
        self.chosen[size] = best


def _fastest(entrants: dict[Variant | None, Run], x: Tensor, pool: Workers) -> Variant | None:
    raced = race([_once(run, x, pool) for run in entrants.values()], seconds=_CHOOSING)
    costs = {
        kernel: raced.undisturbed(i) + (_CALL if kernel else 0.0)
        for i, kernel in enumerate(entrants)
    }
    return min(costs, key=lambda kernel: costs[kernel])


def _way_of(stored: Operands, kernel: Variant | None) -> Run:
    bias = None if stored.bias is None else stored.bias.detach()
    if kernel is None:
        return Dense(stored.spec, stored.dense(), bias)
    wide = None if bias is None else bias.float().contiguous()
    given = (stored.values.detach().contiguous(), stored.index.detach().contiguous())
    layer = Layer.from_stored(Stored("bitmask", *given), stored.spec, kernel, wide)
    # Activations and sums are float32; in half precision the output is rounded once, at the end.
    return lambda x, pool: layer.run(x.float(), pool=pool).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """A layer in PyTorch.

    Args:
        spec: Its shape.
        matrix: Its weight, unpacked.
        bias: ``(outputs,)`` or None.
    """

    spec: Spec
    matrix: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, _: Workers) -> Tensor:
        if self.spec.kind == "linear":
            return functional.linear(x, self.matrix, self.bias)
        spec, (top, left, bottom, right) = self.spec, self.spec.pads
        weight = self.matrix.view(spec.outputs, spec.inputs, *spec.kernel)
        inside = (top, left)
        if inside != (bottom, right):
            x, inside = functional.pad(x, (left, right, top, bottom)), (0, 0)
        y = functional.conv2d(x, weight, self.bias, spec.stride, inside, spec.dilation, spec.groups)
        return y.contiguous()


def _once(run: Run, x: Tensor, pool: Workers) -> Callable[[], None]:
    def once() -> None:
        run(x, pool)

    return once


def _kernels(stored: Operands, positions: int) -> list[Variant]:
    """Likeliest first."""
    found = candidates(stored.spec, positions, stored.density)
    return sorted(found, key=lambda k: k.family == "gemv" and positions > _FEW_TOKENS)


class _Key(NamedTuple):
    """Changes with a weight, or the place of its bias."""

    spec: Spec
    values: tuple[object, ...]
    kept: tuple[object, ...]
    bias: tuple[object, ...] | None


_PACKED: dict[_Key, Packed] = {}
# The fastest kernel for each kind of layer, size of input and number of threads; None is dense.
_CHOICES: dict[Hashable, Variant | None] = {}
# Held while a form is added.
_CHANGING = threading.RLock()


def packed(stored: Operands) -> Packed:
    """The packed form of a weight; made once for as long as its memory lives and is unchanged."""
    bias, place = None, None
    if stored.bias is not None:
        # Biases are changed through .data and in inference mode, too, which count no versions. They
        # are small enough to be compared at every call: as bytes, where NaN is equal to itself.
        place = _place(stored.bias)
        bias = stored.bias.detach().reshape(-1).contiguous().view(torch.uint8)
    key = _Key(stored.spec, identity(stored.values), identity(stored.index), place)
    found = _PACKED.get(key)
    if found is None or not found.holds(bias):
        _require_whole(stored)
        with _CHANGING:
            forget()
            found = _PACKED.get(key)
            if found is None or not found.holds(bias):
                owners = tuple(StorageWeakRef(t.untyped_storage()) for t in stored.tensors())
                found = Packed(owners, None if bias is None else bias.clone())
                _PACKED[key] = found
    return found


def _require_whole(stored: Operands) -> None:
    """Refuse parts that are not those of one layer, before anything is read from them."""
    (outputs, columns), index, bias = stored.shape, stored.index, stored.bias
    found, size = "", -(-outputs * columns // 8)
    if min(outputs, columns) < 1:
        found = f"the weight is {outputs} x {columns}"
    elif index.dtype != torch.uint8 or index.numel() != size:
        found = f"the index is {index.dtype} of length {index.numel()}, not torch.uint8 of {size}"
    elif bias is not None and tuple(bias.shape) != (outputs,):
        found = f"the bias has the shape {tuple(bias.shape)}, not ({outputs},)"
    if found:
        raise UsageError(
            f"secateur::sparse_{stored.spec.kind} with a weight of {outputs} x {columns}",
            found,
            "a weight has a row and a column, a bit an entry, and a bias an entry a row",
            "give the parts of one layer, or use secateur.runtime.accelerate",
        )


def stays_dense(stored: Operands, positions: int) -> bool | None:
    """Whether a layer was fastest dense for so many positions or tokens; None if not known yet."""
    chosen = packed(stored).chosen
    size = positions.bit_length()
    return chosen[size] is None if size in chosen else None


def unpacked(stored: Operands) -> Tensor | None:
    """The dense weight of a layer as a matrix, if it was unpacked because dense was fastest."""
    way = packed(stored).ways.get(None)
    return way.matrix if isinstance(way, Dense) else None


def forget(*, choices: bool = False) -> None:
    """Drop the packed forms of weights that are gone; every new weight does this, too.

    Args:
        choices: Forget also which kernels were fastest, so that they are timed anew.
    """
    if choices:
        _CHOICES.clear()
    _drop_([key for key, form in _PACKED.copy().items() if not form.alive])


def release(parts: Mapping[str, Tensor | None]) -> None:
    """Drop the packed forms of a weight that is not used any more.

    Args:
        parts: Its ``values``, by name. Who else uses their memory packs them again.
    """
    values = parts.get("values")
    if values is not None:
        place = values.untyped_storage()._cdata
        _drop_([key for key in _PACKED.copy() if key.values[0] == place])


def _drop_(keys: list[_Key]) -> None:
    # Without a lock: the garbage collector may ask for this in the middle of anything.
    for key in keys:
        _PACKED.pop(key, None)


def identity(x: Tensor) -> tuple[object, ...]:
    """What changes when a tensor's memory or contents do, but not between its aliases."""
    # Tensors of inference mode count no versions: they cannot be written outside of it.
    return *_place(x), -1 if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.dtype
