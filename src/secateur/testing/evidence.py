"""Made-up evidence: statistics fed with random rows and gradients, as a run would collect them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats import Probe, Stat, Stats

_PARTS = 3


def sample_rows(weight: Weight, seed: int = 0, *, rows: int = 60, rank: int = 0) -> Tensor:
    """Correlated input rows ``(groups, rows, fan_in)``.

    Args:
        weight: What they multiply.
        seed: Of the random numbers.
        rows: How many.
        rank: If positive, rows span only this many directions (a singular Gram matrix).

    Example:
        >>> from secateur.testing import sample_weight
        >>> sample_rows(sample_weight("grouped"), rows=5).shape
        torch.Size([2, 5, 24])
    """
    generator = torch.Generator().manual_seed(seed + 1)
    fan_in, groups = weight.fan_in, weight.axes.groups
    inner = rank or fan_in
    mix = torch.randn(groups, inner, fan_in, generator=generator) / inner**0.5
    own: Tensor = torch.randn(groups, rows, inner, generator=generator) @ mix
    return own if rank else own + 0.3 * torch.randn(groups, rows, fan_in, generator=generator)


def sample_pairs(weight: Weight, rows: Tensor, *, gap: float = 0.0) -> Tensor:
    """What a statistic of pairs is given: rows, the gap of outputs, and the dense network's outputs.

    Args:
        weight: What the rows multiply.
        rows: ``(groups, rows, fan_in)``.
        gap: Standard deviation of the gap; at 0 both networks are the same up to here.

    Example:
        >>> from secateur.testing import sample_weight
        >>> weight = sample_weight("grouped")
        >>> sample_pairs(weight, sample_rows(weight, rows=5)).shape
        torch.Size([2, 5, 32])
    """
    matrix = weight.matrix().reshape(weight.axes.groups, -1, weight.fan_in)
    outputs = rows.float() @ matrix.float().transpose(1, 2)
    apart = gap * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(len(rows)))
    return torch.cat([rows.float(), apart, outputs + apart], 2)


def evidence(
    weight: Weight, needs: Iterable[Stat | Probe], seed: int = 0, *, order: Tensor | None = None
) -> Stats:
    """Statistics of exactly ``needs``, from random rows, gradients and probe results.

    Args:
        weight: What they are about.
        needs: What to make up.
        seed: Of the random numbers.
        order: A permutation of the input channels, applied to all that is made up.

    Example:
        >>> from secateur.stats import InputNorm
        >>> from secateur.testing import sample_weight
        >>> weight = sample_weight()
        >>> evidence(weight, [InputNorm()])(InputNorm(), weight).shape
        torch.Size([1, 12])
    """
    stats = Stats()
    rows = sample_rows(weight, seed)
    taps = weight.cube().shape[2]
    if order is not None:
        split = rows.reshape(*rows.shape[:2], -1, taps)
        rows = split[:, :, order].reshape(rows.shape)
    generator = torch.Generator().manual_seed(seed + 2)
    gradients = [torch.randn(weight.value.shape, generator=generator) for _ in range(_PARTS)]
    if order is not None:
        gradients = [permuted(weight, g, order) for g in gradients]
    for need in needs:
        source = getattr(need, "source", "probe")
        if source == "probe":
            stats.put(cast(Probe, need), weight.name, gradients[0].clone())
        elif source == "inputs":
            for part in rows.chunk(_PARTS, dim=1):
                stats.update(cast(Stat, need), weight, part, part.shape[1])
        else:
            for gradient in gradients:
                stats.update(cast(Stat, need), weight, gradient, 4)
    return stats


def permuted(weight: Weight, x: Tensor, order: Tensor) -> Tensor:
    """``x``, of the weight's shape, with its input channels in another order."""
    cube = weight.axes.cube(x)[:, order]
    return weight.axes.uncube(cube, tuple(x.shape)).contiguous()
