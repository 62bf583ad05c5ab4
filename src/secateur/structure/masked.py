"""The masked network: what a cut network must compute, found without cutting.

Masked means that every slice of the removed groups is zero, and that an operator which reduces over
units (a LayerNorm over the residual width, a mean over channels) sees the kept units only. The
second part needs the operators themselves: the masked network runs under the tracer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import evaluating
from secateur.structure.counted import rows_along
from secateur.structure.coupling import Structure
from secateur.structure.labels import varying
from secateur.structure.outputs import predictions
from secateur.structure.rules.norms import own_statistics
from secateur.structure.rules.reductions import reduced_axes
from secateur.structure.trace import Call, Tracer, run_traced

_REDUCTIONS = {"aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.var", "aten.std",
               "aten.var_mean", "aten.linalg_vector_norm", "aten.logsumexp"}  # fmt: skip
_WEIGHT_NORM = "aten._weight_norm_interface"


@torch.no_grad()
def mask_(model: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> None:
    """Set every slice of the groups that are not kept to zero, in place.

    Example:
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> mask_(net, couple(net, torch.zeros(1, 4)), {"0": torch.tensor([True, False, True])})
        >>> net[0].bias[1].item(), net[2].weight[:, 1].tolist()
        (0.0, [0.0, 0.0])
    """
    for name, kept in keep.items():
        for part in structure.by_name[name].slices:
            path, _, attribute = part.parameter.rpartition(".")
            x: Tensor = getattr(model.get_submodule(path), attribute)
            gone = part.index[~kept.cpu()].reshape(-1).to(x.device)
            x.data.index_fill_(part.axis, gone, 0)


def run_masked(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> Any:
    """The output of the masked network; ``model`` is left as it is."""
    masked = copy.deepcopy(model)
    mask_(masked, structure, keep)
    alive = structure.alive(keep)

    def execute(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        special = _kept_units(tracer, Call(func, args, kwargs, None), alive)
        return func(*args, **kwargs) if special is None else special

    return run_traced(masked, example, Tracer(masked, execute))


def _kept_units(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """Run a reduction on kept units only; ``None`` if it sees no removed one."""
    if call.name in _REDUCTIONS:
        x = call.args[0]
        for axis in reduced_axes(call):
            kept = _kept_along(tracer, x, axis, alive)
            if kept is not None:
                x = x.index_select(axis, kept)
        same = x is call.args[0]
        return None if same else call.func(x, *call.args[1:], **call.kwargs)
    if call.name == _WEIGHT_NORM:
        # The direction of a removed row is zero divided by zero; it points nowhere.
        weight, norms = call.func(*call.args, **call.kwargs)
        return weight.nan_to_num(0.0), norms
    if "batch_norm" in call.name and own_statistics(call):
        return _batch_norm(tracer, call, alive)
    if call.name == "aten.native_layer_norm":
        return _layer_norm(tracer, call, alive)
    if call.name == "aten.native_group_norm":
        return _group_norm(tracer, call, alive)
    return None


def _kept_along(tracer: Tracer, x: Tensor, axis: int, alive: Tensor) -> Tensor | None:
    for label in tracer.labels(x):
        if varying(label) == (axis,):
            ids = rows_along(label, axis)[:, 0]
            known = (ids >= 0) & (ids < len(alive))
            flags = torch.where(known, alive[ids.clamp(0, len(alive) - 1)], True)
            if not bool(flags.all()):
                return flags.nonzero()[:, 0].to(x.device)
    return None


def _layer_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    x, shape, weight, bias, eps = call.args[:5]
    kept = _kept_along(tracer, x, x.ndim - 1, alive)
    if kept is None or len(shape) != 1:
        return None
    picked = [None if v is None else v.index_select(0, kept) for v in (weight, bias)]
    part, mean, scale = call.func(x.index_select(-1, kept), [len(kept)], *picked, eps)
    return torch.zeros_like(x).index_copy(-1, kept, part), mean, scale


def _batch_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    """One that computes its own statistics, e.g. to standardise a weight."""
    x = call.args[0]
    for axis in (0, *range(2, x.ndim)):
        kept = _kept_along(tracer, x, axis, alive)
        if kept is not None:
            part, *rest = call.func(x.index_select(axis, kept), *call.args[1:], **call.kwargs)
            return torch.zeros_like(x).index_copy(axis, kept, part), *rest
    return None


def _group_norm(tracer: Tracer, call: Call, alive: Tensor) -> Any:
    x, weight, bias, batch, channels, pixels, groups, eps = call.args
    kept = _kept_along(tracer, x, 1, alive)
    if kept is None:
        return None
    left = len((kept // (channels // groups)).unique())
    picked = [None if v is None else v.index_select(0, kept) for v in (weight, bias)]
    part, mean, scale = call.func(
        x.index_select(1, kept).contiguous(), *picked, batch, len(kept), pixels, left, eps
    )
    return torch.zeros_like(x).index_copy(1, kept, part), mean, scale


@dataclass(frozen=True)
class Proof:
    """How far the cut network is from the masked one.

    Args:
        error: Largest difference of any output, relative to the largest masked output; of integers
            and flags, the share that differs.
        outputs: How many numbers were compared.
        scale: The largest masked output. Where it is 0, the comparison says nothing.
    """

    error: float
    outputs: int
    scale: float = 1.0


def prove(
    model: nn.Module, cut: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> Proof:
    """Compare a cut network with the masked one on an example, in evaluation mode.

    Args:
        model: The uncut network.
        cut: A copy of it that was cut.
        structure: From :func:`~secateur.structure.couple`.
        keep: The choice of groups.
        example: Inputs, as for :func:`~secateur.structure.couple`.

    Example:
        >>> from secateur.structure import apply_, couple, cuts_for
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> structure = couple(net, torch.zeros(1, 4))
        >>> keep = {"0": torch.tensor([True, False, True])}
        >>> small = copy.deepcopy(net)
        >>> apply_(small, cuts_for(net, structure, keep))
        >>> prove(net, small, structure, keep, torch.randn(5, 4)).error < 1e-5
        True
    """
    wanted = predictions(run_masked(model, structure, keep, example))
    with evaluating(cut), torch.no_grad():
        found = predictions(call(cut, example))
    return compare(found, wanted)


def call(model: nn.Module, example: Any) -> Any:
    """Run ``model`` on example inputs."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def compare(found: list[Tensor], wanted: list[Tensor]) -> Proof:
    """The largest difference, as in :class:`Proof`; infinite if shapes differ."""
    worst, count, largest = 0.0, 0, 0.0
    if len(found) != len(wanted):
        return Proof(float("inf"), 0)
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return Proof(float("inf"), count)
        if b.numel():
            error, scale = _difference(a, b)
            # A number that is none compares with nothing, so max() would pass over it.
            worst = max(worst, float("inf") if math.isnan(error) else error)
            count, largest = count + b.numel(), max(largest, scale)
    return Proof(worst, count, largest)


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How far ``a`` is from ``b``, relative to the largest of ``b``; and that."""
    if not (b.is_floating_point() or b.is_complex()):
        # Indices and flags are right or wrong. Where two scores are as good as equal, rounding
        # decides, so it is their share that counts.
        return float((a != b).double().mean()), float(b.double().abs().max())
    wide = torch.complex128 if b.is_complex() else torch.double
    a, b = a.to(wide), b.to(wide)
    scale, gap = float(b.abs().max()), float((a - b).abs().max())
    return gap / scale if scale else gap, scale
