"""Sizes that know their units: what ``x.shape`` gives while a network is traced.

``b, n, c = x.shape; y.view(b, n, heads, c // heads)`` makes the width of ``y`` follow that of ``x``.
The operator sees plain numbers only. So ``shape`` and ``size`` give integers that remember which
units they count, and methods that take a shape say which of its numbers were such, and which came
from elsewhere: an attribute of the module, or a number in its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.structure.labels import compact, varying
from secateur.structure.units import Ledger

Sizes = list[int | None]


@dataclass(frozen=True)
class Source:
    """The axis that a size was read from.

    Args:
        label: Of the tensor.
        axis: One along which the label changes.
        agreed: Told when the size was compared with a number and is equal to it.
    """

    label: Tensor
    axis: int
    agreed: Callable[[Tensor, int, Any], object]

    @property
    def rows(self) -> Tensor:
        """The units along the axis, ``(size, others)``."""
        return rows_along(self.label, self.axis)


def plain(x: object) -> bool:
    """Whether a number did not come from a tensor."""
    return isinstance(x, int) and not isinstance(x, (bool, Counted))


class Counted(int):
    """A size of an axis with units, or a number computed from one.

    Args:
        value: The number.
        source: Where it is from; ``None`` if sums or products of several sizes went into it.
        times: It is the size times this,
        over: divided by this.

    Example:
        >>> size = Counted(12, Source(torch.arange(12), 0, print))
        >>> (size // 4).over, (2 * size).times, (size + 1), size // 5
        (4, 2, 13, 2)
    """

    source: Source | None
    times: int
    over: int

    def __new__(cls, value: int, source: Source | None, times: int = 1, over: int = 1) -> Counted:
        self = int.__new__(cls, value)
        self.source, self.times, self.over = source, times, over
        return self

    def __mul__(self, other: Any) -> Any:
        if plain(other):
            return Counted(int(self) * other, self.source, self.times * int(other), self.over)
        product = int.__mul__(self, other)
        return Counted(product, None) if isinstance(other, Counted) else product

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        quotient = int.__floordiv__(self, other)
        if plain(other) and int(self) == quotient * other:
            return Counted(quotient, self.source, self.times, self.over * int(other))
        return Counted(quotient, None) if isinstance(other, int) else quotient

    def __add__(self, other: Any) -> Any:
        total = int.__add__(self, other)
        return Counted(total, None) if isinstance(other, int) else total

    def __sub__(self, other: Any) -> Any:
        total = int.__sub__(self, other)
        return Counted(total, None) if isinstance(other, int) else total

    __radd__ = __add__

    def __eq__(self, other: object) -> Any:
        equal = int.__eq__(self, other)
        if equal is True and plain(other) and self.source and self.times == self.over == 1:
            self.source.agreed(self.source.label, self.source.axis, other)
        return equal

    def __ne__(self, other: object) -> Any:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> Any:
        """A copy is a plain number: modules that keep one do not keep its units."""
        return int, (int(self),)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "pow")


@contextmanager
def counting(
    sources: Callable[[Tensor], Mapping[int, Source]],
    stated: Callable[[Sizes | None], None],
    *,
    used: Callable[[int], object],
    kinds: Iterable[type[int]],
) -> Iterator[None]:
    """Make tensors give counted sizes.

    Args:
        sources: Tensor -> axis -> where its size is from, for the axes with units.
        stated: Told the numbers of a shape before a method that takes one runs, ``None`` after it.
        used: Told the sizes with which the code computes,
        kinds: if they are of one of these types.
    """
    own_shape = torch._C.TensorBase.shape.__get__  # type: ignore[attr-defined]

    def shape(x: Tensor) -> Any:
        true = own_shape(x)
        axes = sources(x)
        if not axes:
            return true
        # torch.Size keeps the objects it is given.
        return torch.Size(
            Counted(size, axes[axis]) if axis in axes else size for axis, size in enumerate(true)
        )

    def size(x: Tensor, dim: int | None = None) -> Any:
        return shape(x) if dim is None else shape(x)[dim]

    def told(method: Any, reading: Callable[..., Sizes | None]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            stated(reading(*args, **kwargs))
            try:
                return method(*args, **kwargs)
            finally:
                stated(None)

        return run

    def computed(method: Any) -> Any:
        def run(*args: Any) -> Any:
            for number in args:
                if isinstance(number, int):
                    used(number)
            return method(*args)

        return run

    def scaled(attention: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if args and kwargs.get("scale") is None and args[0].ndim:
                used(args[0].shape[-1])
            return attention(*args, **kwargs)

        return run

    def agreeing(norm: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            # It is taken apart below Python, where it compares these sizes with those of its input.
            if len(args) > 1:
                for mine, size in zip(args[0].shape[::-1], args[1][::-1], strict=False):
                    _ = mine == size
            return norm(*args, **kwargs)

        return run

    changes: list[tuple[Any, str, Any]] = [
        (Tensor, "shape", property(shape)),
        (Tensor, "size", size),
        (Tensor, "unflatten", told(Tensor.unflatten, _unflattened)),
        (torch, "unflatten", told(torch.unflatten, _unflattened)),
        (torch, "reshape", told(torch.reshape, _whole)),
        (torch, "broadcast_to", told(torch.broadcast_to, _whole)),
        (Tensor, "split", told(Tensor.split, _parts)),
        (torch, "split", told(torch.split, _parts)),
        (Tensor, "__getitem__", told(Tensor.__getitem__, _bounds)),
    ]
    makes = ("zeros", "ones", "empty", "full")
    changes += [(torch, name, told(getattr(torch, name), _made)) for name in makes]
    changes += [(torch, "rms_norm", agreeing(torch.rms_norm))]
    attention = "scaled_dot_product_attention"
    changes += [(torch.nn.functional, attention, scaled(getattr(torch._C._nn, attention)))]
    changes += [(torch._C._nn, "pad", told(torch._C._nn.pad, _padded))]
    changes += [(torch._C._nn, "pad_sequence", told(torch._C._nn.pad_sequence, _together))]
    unpack = torch._VF._pad_packed_sequence
    changes += [(torch._VF, "_pad_packed_sequence", told(unpack, _unpacked))]
    whole = ("view", "reshape", "expand", "broadcast_to", *(f"new_{name}" for name in makes))
    changes += [(Tensor, name, told(getattr(Tensor, name), _whole)) for name in whole]
    signs = [f"__{side}{name}__" for name in _ARITHMETIC for side in ("", "r")]
    changes += [(Tensor, name, computed(getattr(Tensor, name))) for name in signs]
    # Sums and products of sizes are sizes; these make other numbers of them.
    makes_other = ("__float__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__")
    changes += [
        (kind, name, computed(getattr(int, name))) for kind in kinds for name in makes_other
    ]
    own = [(place, name, vars(place).get(name)) for place, name, _ in changes]
    try:
        for place, name, value in changes:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in own:
            delattr(place, name) if value is None else setattr(place, name, value)


def _whole(x: Any, *args: Any, **kwargs: Any) -> Sizes | None:
    """The sizes of ``x.view(2, 3)`` or ``x.reshape((2, 3))``."""
    listed: Any = args or tuple(kwargs.values())
    if listed and isinstance(listed[0], (tuple, list)):
        listed = listed[0]
    return list(listed) if all(isinstance(v, int) for v in listed) else None


def _made(*args: Any, **kwargs: Any) -> Sizes | None:
    """The sizes of ``torch.zeros(2, 3)``, which has no tensor in front."""
    return _whole(None, *args) if args else _whole(None, kwargs.get("size", ()))


def _padded(x: Tensor, pads: Any, *rest: Any) -> Sizes:
    """The sizes that ``F.pad`` leaves; circular padding copies into an empty tensor of its own."""
    grown = x.ndim - len(pads) // 2
    return [*x.shape[:grown], *[None] * (x.ndim - grown)]


def _together(sequences: Any, *rest: Any) -> Sizes:
    """Steps and batch, then the sizes of one step of the sequences that are padded."""
    return [None, None, *sequences[0].shape[1:]]


def _unpacked(data: Tensor, *rest: Any) -> Sizes:
    """Steps and batch, then the sizes of one step: packed sequences are copied into zeros."""
    return [None, None, *data.shape[1:]]


def _parts(x: Tensor, *args: Any, **kwargs: Any) -> Sizes | None:
    """The sizes of ``x.split([2, 3], 1)`` or ``x.split(2)``; the two differ in their keywords."""
    dim = kwargs.pop("dim", args[1] if len(args) > 1 else 0)
    sizes: Any = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(sizes, int):
        return [sizes] * -(-x.shape[dim] // sizes) if sizes > 0 else None
    return list(sizes) if isinstance(sizes, (tuple, list)) else None


def _bounds(x: Tensor, index: Any) -> Sizes | None:
    """The bounds of the slices of ``x[..., 2:4]``, then the positions of ``x[..., [0, 1]]``."""
    listed = index if isinstance(index, tuple) else (index,)
    slices = [part for part in listed if isinstance(part, slice)]
    found = [bound for part in slices for bound in (part.start, part.stop)]
    found += [place for part in listed if isinstance(part, list) for place in part]
    return [bound if isinstance(bound, int) else None for bound in found]


def _unflattened(x: Tensor, dim: Any, sizes: Any) -> Sizes | None:
    if not isinstance(dim, int):
        return None
    before = dim % x.ndim
    return [*[None] * before, *sizes, *[None] * (x.ndim - 1 - before)]


def follow(ledger: Ledger, label: Tensor, axis: int, size: Counted) -> None:
    """Tie the units along an axis to those that its size was computed from.

    Their numbers must stay equal, so units at the same places are cut together.
    """
    if size.source is None:
        return
    source = size.source.rows
    mine = rows_along(label, axis)
    if bool(torch.isin(mine.contiguous(), source.contiguous()).all()):
        return  # the same units: their number follows by itself
    if size.times > 1 and size.over > 1:
        reason = "the code computes their number from that of other units"
        ledger.pin(source, reason)
        ledger.pin(mine, reason)
    elif size.over > 1:
        _divided(ledger, label, axis, source, size.over)
    else:
        ledger.join(mine.reshape(size.times, len(source), -1), source[:, :1])
        ledger.join(source, source[:, :1])


def _divided(ledger: Ledger, label: Tensor, axis: int, source: Tensor, over: int) -> None:
    """``x.view(..., heads, width // heads)``: the units of ``width`` lie as heads times places."""
    places = source[:, 0].reshape(over, -1)
    ledger.join(source, source[:, :1])
    beside = axis - 1
    if beside >= 0 and label.shape[beside] % over == 0 and beside in varying(label):
        block = compact(label.movedim((beside, axis), (-2, -1)))[0]
        block = block.reshape(*block.shape[:-2], -1, over, block.shape[-1])
        ledger.join(block, places)
        return
    ledger.join(places, places[:1])
    ledger.join(rows_along(label, axis), places[0][:, None])


def rows_along(label: Tensor, axis: int) -> Tensor:
    """The units of a label, ``(size of axis, others)``, without repetition along still axes."""
    moved = label.movedim(axis, 0)
    narrow = compact(moved)[0]
    return narrow.expand(len(moved), *narrow.shape[1:]).reshape(len(moved), -1)
