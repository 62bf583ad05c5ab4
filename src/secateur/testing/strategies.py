"""Hypothesis strategies for weights, scores, rows, masks. Needs the extra ``dev``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.core.errors import MissingExtra
from secateur.core.masks import Masks
from secateur.core.weight import Weight
from secateur.testing.evidence import sample_rows
from secateur.testing.samples import KINDS, sample_weight

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingExtra("hypothesis", "dev", "drawing inputs for the law kit") from error

_SEEDS = st.integers(0, 2**20)


def weights(kinds: tuple[str, ...] = tuple(KINDS)) -> st.SearchStrategy[Weight]:
    """Weights of every kind of layer.

    Example:
        >>> isinstance(weights(), st.SearchStrategy)
        True
    """
    return st.builds(sample_weight, st.sampled_from(kinds), _SEEDS)


@st.composite
def scored(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS)) -> Weight:
    """A weight whose values are awkward scores: many ties, negative values, ``-inf``, both zeros."""
    weight = sample_weight(draw(st.sampled_from(kinds)), draw(_SEEDS))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    palette = torch.tensor(
        draw(
            st.lists(
                st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1e-40, 0.5, 0.5, 3.0, 1e30]),
                min_size=1,
                max_size=5,
            )
        )
    )
    pick = torch.randint(0, len(palette), weight.value.shape, generator=generator)
    return Weight(weight.name, palette[pick], weight.axes)


@st.composite
def inputs(draw: st.DrawFn, weight: Weight) -> Tensor:
    """Rows for a weight: plenty, few (singular Gram), of low rank, or with inputs that are zero."""
    seed, kind = draw(_SEEDS), draw(st.sampled_from(["full", "few", "low rank", "dead"]))
    if kind == "few":
        return sample_rows(weight, seed, rows=2)
    rows = sample_rows(weight, seed, rank=2 if kind == "low rank" else 0)
    if kind == "dead":
        rows[..., :: draw(st.integers(2, 4))] = 0.0
    return rows


@st.composite
def grams(draw: st.DrawFn, size: int = 6) -> Tensor:
    """Gram matrices ``(1, size, size)`` in float64, also singular and badly scaled ones."""
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    rank = draw(st.integers(1, 2 * size))
    x = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    scale = 10.0 ** draw(st.integers(-6, 6))
    return (x.T @ x * scale / rank)[None]


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Masks, Masks]:
    """Two masks over partly the same weights."""
    shapes = {"a.weight": (3, 5), "b.weight": (2, 2, 3), "c": (1, 9)}
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    both = []
    for _ in range(2):
        names = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        density = draw(st.sampled_from([0.0, 0.3, 1.0]))
        both.append(
            Masks({n: torch.rand(shapes[n], generator=generator) < density for n in sorted(names)})
        )
    return both[0], both[1]
