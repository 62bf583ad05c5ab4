"""Statistics of the inputs that multiply a weight.

All are sums over input *rows*: the vectors ``x`` (length ``fan_in = in * taps``) that a weight
matrix ``W`` multiplies, ``y = W x``. A linear layer sees one row per token, a convolution one per
output position. Grouped convolutions keep one statistic per group, ``(groups, ...)``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.core.weight import Weight
from secateur.stats.stat import State


@dataclass(frozen=True)
class InputNorm:
    r"""Root of the mean square of each input feature.

    **formula** :math:`\sqrt{\frac1n \sum_x x_j^2}`
    **Shapes** ``(groups, fan_in)``
    **Units** those of the activations; independent of the number of samples
    **Needs** a forward pass
    **Source** Wanda, arXiv 2306.11695 (which uses the norm; the two rank alike within a layer)

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 2), LINEAR)
        >>> stat = InputNorm()
        >>> state = stat.update(stat.init(w), w, torch.tensor([[[3.0, 0.0], [4.0, 2.0]]]), 2)
        >>> stat.value(state, w)
        tensor([[3.5355, 1.4142]])
    """

    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        return {"squares": _zeros(weight), "rows": no_rows(weight)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        return {
            "squares": state["squares"] + _sum(seen, square=True),
            "rows": state["rows"] + count_rows(weight, seen),
        }

    def value(self, state: State, weight: Weight) -> Tensor:
        return per_row(state["squares"], state["rows"]).sqrt().float()


@dataclass(frozen=True)
class Moments:
    r"""Mean and variance of each input feature.

    **formula** :math:`\mu_j = E[x_j],\ \sigma_j^2 = E[x_j^2] - \mu_j^2`
    **Shapes** ``(2, groups, fan_in)``: mean, then variance
    **Units** those of the activations (squared for the variance)
    **Needs** a forward pass
    **Source** sums in float64, so plain differences are exact enough for activations

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 1), LINEAR)
        >>> stat = Moments()
        >>> state = stat.update(stat.init(w), w, torch.tensor([[[1.0], [3.0]]]), 2)
        >>> stat.value(state, w).flatten()
        tensor([2., 1.])
    """

    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        return {"sum": _zeros(weight), "squares": _zeros(weight), "rows": no_rows(weight)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        return {
            "sum": state["sum"] + _sum(seen),
            "squares": state["squares"] + _sum(seen, square=True),
            "rows": state["rows"] + count_rows(weight, seen),
        }

    def value(self, state: State, weight: Weight) -> Tensor:
        mean = per_row(state["sum"], state["rows"])
        variance = (per_row(state["squares"], state["rows"]) - mean.square()).clamp(min=0)
        return torch.stack([mean, variance]).float()


@dataclass(frozen=True)
class Gram:
    r"""Second moments of the input rows, the Hessian of the layer's squared error up to a factor.

    **formula** :math:`G = \frac1n \sum_x x x^\top`
    **Shapes** ``(groups, fan_in, fan_in)``
    **Units** activations squared
    **Needs** a forward pass; ``groups * fan_in**2`` numbers of memory
    **Source** OBC (arXiv 2208.11580), SparseGPT (arXiv 2301.00774); float32 products of one batch,
    summed in float64 up to ``fan_in`` 2,048 and in float32 beyond, where the memory would double

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 2), LINEAR)
        >>> stat = Gram()
        >>> state = stat.update(stat.init(w), w, torch.tensor([[[1.0, 2.0]]]), 1)
        >>> stat.value(state, w)
        tensor([[[1., 2.],
                 [2., 4.]]], dtype=torch.float64)
    """

    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        fan_in = weight.fan_in
        dtype = torch.float64 if fan_in <= 2048 else torch.float32
        shape = (weight.axes.groups, fan_in, fan_in)
        return {
            "products": torch.zeros(shape, dtype=dtype, device=weight.value.device),
            "rows": no_rows(weight),
        }

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        x = wide(seen)
        # In place: this is the one statistic too big to copy for every batch.
        state["products"] += (x.transpose(1, 2) @ x).to(state["products"].dtype)
        rows = state["rows"] + count_rows(weight, seen)
        return {"products": state["products"], "rows": rows}

    def value(self, state: State, weight: Weight) -> Tensor:
        return per_row(state["products"], state["rows"])


@dataclass(frozen=True)
class Positions:
    """Input rows per sample: how often each weight is used, so multiply-adds per weight.

    **formula** rows seen / samples seen
    **Shapes** scalar
    **Units** multiply-adds per weight and sample
    **Needs** a forward pass
    **Source** definition

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 1), LINEAR)
        >>> stat = Positions()
        >>> stat.value(stat.update(stat.init(w), w, torch.zeros(1, 8, 1), 2), w)
        tensor(4., dtype=torch.float64)
    """

    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None
    #: Padding is multiplied like everything else.
    padding: ClassVar[bool] = True

    def init(self, weight: Weight) -> State:
        return {"rows": _count(weight), "samples": _count(weight)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        # Of experts, the mean: each holds an equal part of the weight.
        each = torch.as_tensor(count_rows(weight, seen), dtype=torch.float64)
        rows = each.mean() * weight.density
        return {"rows": state["rows"] + rows, "samples": state["samples"] + samples}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["rows"] / state["samples"].clamp(min=1)


# Rows that are summed in float64 at a time: a piece fits the caches, the whole often no memory.
_PIECE = 4096


def _sum(seen: Tensor, *, square: bool = False) -> Tensor:
    """Sum over rows in float64, ``(groups, fan_in)``."""
    total = seen.new_zeros(seen.shape[0], seen.shape[2], dtype=torch.float64)
    for piece in seen.split(_PIECE, dim=1):
        wide = piece.double()
        total += (wide.square() if square else wide).sum(1)
    return total


def _zeros(weight: Weight) -> Tensor:
    shape = (weight.axes.groups, weight.fan_in)
    return torch.zeros(shape, dtype=torch.float64, device=weight.value.device)


def _count(weight: Weight) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=weight.value.device)


def no_rows(weight: Weight) -> Tensor:
    """Where rows are counted: one number, or one for each of the experts, which get unlike many."""
    shape = (weight.axes.groups,) if weight.axes.stacked else ()
    return torch.zeros(shape, dtype=torch.float64, device=weight.value.device)


def count_rows(weight: Weight, seen: Tensor) -> Tensor | int:
    """How many rows there are; those of an expert without the zeros that fill them up."""
    return seen.any(2).sum(1) if weight.axes.stacked else seen.shape[1]


def wide(x: Tensor) -> Tensor:
    """In float32 at least: products in half precision would lose what is small.

    Example:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype, wide(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()


def per_row(total: Tensor, rows: Tensor) -> Tensor:
    """A sum over rows ``(groups, ...)``, divided by their number.

    Example:
        >>> per_row(torch.tensor([[6.0], [6.0]]), torch.tensor([2, 3])).tolist()
        [[3.0], [2.0]]
    """
    return total / rows.clamp(min=1).reshape(-1, *(1 for _ in total.shape[1:]))


@dataclass(frozen=True)
class Sketch:
    r"""A random projection of the input rows, from which output errors are estimated cheaply.

    **formula** :math:`S = X^\top R`, with :math:`R` random signs: :math:`E\lVert D S\rVert^2 / k =
    \lVert D X^\top \rVert^2` for any difference ``D`` of weights
    **Shapes** ``(groups, fan_in, size)``
    **Units** those of the activations
    **Needs** a forward pass
    **Source** Johnson-Lindenstrauss; 64 signs give about 18 % error for one output, far less over many

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.zeros(1, 2), LINEAR)
        >>> stat = Sketch(size=4)
        >>> stat.value(stat.update(stat.init(w), w, torch.ones(1, 8, 2), 8), w).shape
        torch.Size([1, 2, 4])
    """

    size: int = 64
    rows: int = 4096
    source: ClassVar[Literal["inputs"]] = "inputs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        shape = (weight.axes.groups, weight.fan_in, self.size)
        sketch = torch.zeros(shape, dtype=torch.float32, device=weight.value.device)
        return {"sketch": sketch, "rows": _count(weight)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        # At most ``rows`` of what is seen at a time, evenly spread: errors are ratios, so a sample
        # will do. The signs depend on the data and the place in it, so that parts of the data that
        # were sketched apart and merged do not share them.
        taken = seen[:, :: max(1, -(-seen.shape[1] // self.rows))].float()
        fingerprint = zlib.crc32(taken.sum((0, 1)).cpu().numpy().tobytes())
        generator = torch.Generator().manual_seed(fingerprint + int(state["rows"]))
        signs = (
            torch.randint(0, 2, (taken.shape[1], self.size), generator=generator).float() * 2 - 1
        )
        product = taken.transpose(1, 2) @ signs.to(seen.device)
        return {"sketch": state["sketch"] + product, "rows": state["rows"] + seen.shape[1]}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["sketch"]
