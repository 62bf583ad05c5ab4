"""How the masked network runs the operators that must see kept units only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from secateur.structure.counted import rows_along
from secateur.structure.labels import varying
from secateur.structure.rules.norms import own_statistics
from secateur.structure.rules.reductions import LOSSES, REDUCTIONS, reduced_axes
from secateur.structure.tracer import Call, Tracer

_WEIGHT_NORM = "aten._weight_norm_interface"
#: Axis -> the positions along it that are kept.
_Kept = dict[int, Tensor]


class SameDraws(TorchDispatchMode):
    """The n-th operator that draws random numbers starts from seed n.

    Two networks that differ in the number of units then draw the same numbers for the same units.

    Example:
        >>> with SameDraws():
        ...     first = torch.rand(2), torch.rand(2)
        >>> with SameDraws():
        ...     again = torch.rand(2), torch.rand(2)
        >>> torch.equal(first[1], again[1]), torch.equal(*first)
        (True, False)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = 0

    def seed(self, func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Seed for an operator that draws; its arguments without a generator of the network's own."""
        if not draws(func):
            return kwargs
        self._draws += 1
        torch.manual_seed(self._draws)
        return {name: value for name, value in kwargs.items() if name != "generator"}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **self.seed(func, kwargs or {}))


def draws(func: Any) -> bool:
    """Whether an operator draws random numbers.

    Example:
        >>> draws(torch.ops.aten.randn_like.default), draws(torch.ops.aten.relu.default)
        (True, False)
    """
    return torch.Tag.nondeterministic_seeded in func.tags


def run_on_kept(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """Run an operator on kept units only; ``None`` if it sees no removed one, or may see them."""
    if call.name in REDUCTIONS and not isinstance(call.argument(1, "other"), Tensor):
        x = call.args[0]
        kept = _kept(tracer, x, reduced_axes(call), alive)
        return call.func(_select(x, kept), *call.args[1:], **call.kwargs) if kept else None
    if call.name in LOSSES:
        return _compared(tracer, call, alive)
    if draws(call.func):
        return _drawn(tracer, call, alive)
    if call.name == _WEIGHT_NORM:
        # The direction of a removed row is zero divided by zero; it points nowhere.
        weight, norms = call.func(*call.args, **call.kwargs)
        return weight.nan_to_num(0.0), norms
    if "batch_norm" in call.name and own_statistics(call):
        return _batch_norm(tracer, call, alive)
    if call.name in ("aten.native_layer_norm", "aten._fused_rms_norm"):
        return _layer_norm(tracer, call, alive)
    if call.name == "aten.native_group_norm":
        return _group_norm(tracer, call, alive)
    return None


def _kept(tracer: Tracer, x: Tensor, axes: Any, alive: Tensor) -> _Kept:
    """The positions that are kept along the axes of which some are removed."""
    found = {}
    for label in tracer.labels(x):
        for axis in axes:
            if varying(label) == (axis,):
                ids = rows_along(label, axis)[:, 0]
                known = (ids >= 0) & (ids < len(alive))
                flags = torch.where(known, alive[ids.clamp(0, len(alive) - 1)], True)
                if not bool(flags.all()):
                    found[axis] = flags.nonzero()[:, 0].to(x.device)
    return found


def _select(x: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for axis, places in kept.items():
        x = x.index_select(axis, places)
    return x


def _spread(part: Tensor, like: Tensor, kept: Mapping[int, Tensor], rest: float = 0) -> Tensor:
    """The inverse of :func:`_select`, with ``rest`` in the other places."""
    for axis, places in kept.items():
        shape = (*part.shape[:axis], like.shape[axis], *part.shape[axis + 1 :])
        part = part.new_full(shape, rest).index_copy(axis, places, part)
    return part


def _compared(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """A loss between two tensors, over the units that both keep."""
    pair = torch.broadcast_tensors(*call.args[:2])
    found = [
        _kept(tracer, x, range(x.ndim), alive) for x in call.args[:2] if x.ndim == pair[0].ndim
    ]
    kept = {axis: places for part in found for axis, places in part.items()}
    if not kept or call.argument(2, "reduction", 1) == 0:
        return None
    small = (_select(x, kept) for x in pair)
    return call.func(*small, *call.args[2:], **call.kwargs)


def _drawn(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """Random numbers for the kept units: as many as the cut network draws, in the same order."""
    x = next(iter(call.tensors), None)
    kept = {} if x is None else _kept(tracer, x, range(x.ndim), alive)
    if x is None or not kept:
        return None
    shape = x.shape
    args, kwargs = tree_map_only(
        Tensor, lambda y: _select(y, kept) if y.shape == shape else y, (call.args, call.kwargs)
    )
    part = call.func(*args, **kwargs)
    # Not 0: its logarithm is infinite, and infinity times a weight of 0 is no number.
    whole = tree_map_only(Tensor, lambda y: _spread(y, x, kept, rest=0.5), part)
    return x.copy_(whole) if call.func._schema.is_mutable else whole


def _layer_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    x, shape, *vectors, eps = call.args
    lead = x.ndim - len(shape)
    kept = _kept(tracer, x, range(lead, x.ndim), alive)
    if not kept:
        return None
    inner = {axis - lead: places for axis, places in kept.items()}
    picked = [None if v is None else _select(v, inner) for v in vectors]
    small = _select(x, kept)
    part, *rest = call.func(small, list(small.shape[lead:]), *picked, eps)
    return _spread(part, x, kept), *rest


def _batch_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """One that computes its own statistics, e.g. to standardise a weight."""
    x = call.args[0]
    kept = _kept(tracer, x, (0, *range(2, x.ndim)), alive)
    if not kept:
        return None
    part, *rest = call.func(_select(x, kept), *call.args[1:], **call.kwargs)
    return _spread(part, x, kept), *rest


def _group_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    x, weight, bias, batch, channels, pixels, groups, eps = call.args
    kept = _kept(tracer, x, (1,), alive)
    if not kept:
        return None
    left = len((kept[1] // (channels // groups)).unique())
    picked = [None if v is None else v.index_select(0, kept[1]) for v in (weight, bias)]
    part, mean, scale = call.func(
        _select(x, kept).contiguous(), *picked, batch, len(kept[1]), pixels, left, eps
    )
    return _spread(part, x, kept), mean, scale
