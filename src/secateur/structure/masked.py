"""The masked network: what a cut network must compute, found without cutting.

Masked means that every slice of the removed groups is zero, and that an operator which reduces over
units (a LayerNorm over the residual width, a mean over channels) sees the kept units only. The
second part needs the operators themselves: the masked network runs under the tracer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from secateur.core.attention import unfused_attention
from secateur.core.batches import evaluating
from secateur.core.randomness import own_random
from secateur.core.slots import device_of
from secateur.core.widths import Slices
from secateur.structure.coupling import Structure
from secateur.structure.kept_units import SameDraws, run_on_kept
from secateur.structure.outputs import predictions
from secateur.structure.running import positional
from secateur.structure.trace import run_traced
from secateur.structure.tracer import Call, Tracer


@torch.no_grad()
def mask_(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], *, buffers: bool = True
) -> None:
    """Set every slice of the groups that are not kept to zero, in place.

    Of a weight with a weight norm the lengths become zero, and the directions stay.

    Args:
        model: Changed.
        structure: From :func:`~secateur.structure.couple`.
        keep: The choice of groups.
        buffers: Those, too; without, parameters only.

    Example:
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> mask_(net, couple(net, torch.zeros(1, 4)), {"0": torch.tensor([True, False, True])})
        >>> net[0].bias[1].item(), net[2].weight[:, 1].tolist()
        (0.0, [0.0, 0.0])
    """
    fixed = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, kept in keep.items():
        slices = structure.by_name[name].slices
        for part in slices:
            if _points(model, part, slices) or (part.parameter in fixed and not buffers):
                continue
            path, _, attribute = part.parameter.rpartition(".")
            x: Tensor = getattr(model.get_submodule(path), attribute)
            gone = part.index[~kept.cpu()].reshape(-1).to(x.device)
            x.data.index_fill_(part.axis, gone, 0)


def _points(model: nn.Module, part: Slices, slices: Sequence[Slices]) -> bool:
    """Whether it is the directions of a weight norm whose lengths become zero as well.

    That is enough, and a direction of zeros is zero divided by zero.
    """
    path, _, attribute = part.parameter.rpartition(".")
    normed = any(isinstance(m, _WeightNorm) for m in model.get_submodule(path).children())
    lengths = f"{path}.original0", part.axis
    return (
        normed and attribute == "original1" and lengths in {(s.parameter, s.axis) for s in slices}
    )


def run_masked(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> Any:
    """The output of the masked network; ``model`` is left as it is."""
    found = _run(model, structure, keep, example, buffers=True)
    if not _finite(found):
        # A buffer may be a divisor, as deviations and the grids of splines are: where nothing else
        # is zero, the units that are removed have numbers again, which nobody reads.
        again = _run(model, structure, keep, example, buffers=False)
        found = again if _finite(again) else found
    return found


def _finite(output: Any) -> bool:
    return all(x.is_meta or bool(x.isfinite().all()) for x in predictions(output))


def _run(
    model: nn.Module,
    structure: Structure,
    keep: Mapping[str, Tensor],
    example: Any,
    *,
    buffers: bool,
) -> Any:
    masked = copy.deepcopy(model)
    mask_(masked, structure, keep, buffers=buffers)
    alive = structure.alive(keep)

    same = SameDraws()

    def execute(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = same.seed(func, kwargs)
        special = run_on_kept(tracer, Call(func, args, kwargs, None), alive)
        return func(*args, **kwargs) if special is None else special

    return run_traced(masked, example, Tracer(masked, execute))


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

    Both draw the same random numbers for the units that are kept; the state of the generators stays.

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
    return prove_against(masked_outputs(model, structure, keep, example), cut, example)


def masked_outputs(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> list[Tensor]:
    """What :func:`prove` compares with: it is the same for every network cut by ``keep``."""
    with own_random(model):
        return predictions(run_masked(model, structure, keep, example))


def prove_against(wanted: list[Tensor], cut: nn.Module, example: Any) -> Proof:
    """:func:`prove`, with what the masked network computes at hand."""
    # The fused operator gives zeros for padding, where the masked network has numbers.
    with own_random(cut), evaluating(cut), unfused_attention(), torch.no_grad(), SameDraws():
        return compare(predictions(call(cut, example)), wanted)


def call(model: nn.Module, example: Any) -> Any:
    """Run ``model`` on example inputs, wherever they are.

    Example:
        >>> call(nn.Linear(2, 1, device="meta"), torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """
    args, kwargs = positional(example, device_of(model))
    return model(*args, **kwargs)


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
    # Where both are infinite, as scores that are masked out, they agree, and have no size.
    gap = float((a - b).masked_fill(a == b, 0).abs().max())
    scale = float(b.masked_fill(b.isinf(), 0).abs().max())
    return gap / scale if scale else gap, scale
