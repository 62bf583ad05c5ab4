"""How alike masks are, against what chance alone would give, and the structure that emerges in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_kind
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.weight import Axes
from secateur.frontends import discover


@dataclass(frozen=True)
class Jaccard:
    """A Jaccard index with the level that two random masks of the same densities reach.

    Args:
        value: ``|A and B| / |A or B|``; 1 for two empty sets.
        chance: Its level for independent random masks.

    Example:
        >>> Jaccard(0.75, 0.5).corrected
        0.5
    """

    value: float
    chance: float

    @property
    def corrected(self) -> float:
        """``(value - chance) / (1 - chance)``: 0 for random masks, 1 for equal ones."""
        if self.chance >= 1:
            return 1.0 if self.value >= 1 else 0.0
        return (self.value - self.chance) / (1 - self.chance)

    @property
    def distance(self) -> float:
        """``1 - value``."""
        return 1 - self.value


@dataclass(frozen=True)
class Similarity:
    """Two masks compared.

    Args:
        whole: Over all weights together, against random masks of the same overall densities.
        given_layers: The same index against random masks that have the right density in every
            layer. Global rankings fill layers alike, which alone lifts ``whole`` over its chance.
        layers: Each weight by itself; empty if that was not asked for.
    """

    whole: Jaccard
    given_layers: Jaccard
    layers: Mapping[str, Jaccard] = field(default_factory=dict)


def chance_level(a: float, b: float) -> float:
    r"""The Jaccard index of independent random masks of densities ``a`` and ``b``.

    **formula** :math:`J_0 = d_1 d_2 / (d_1 + d_2 - d_1 d_2)`
    **Shapes** scalars
    **Units** none
    **Needs** nothing
    **Source** ratio of the expected intersection to the expected union

    Example:
        >>> chance_level(0.5, 0.5), chance_level(1, 1), chance_level(0, 0)
        (0.3333333333333333, 1.0, 1.0)
    """
    union = a + b - a * b
    return a * b / union if union else 1.0


def mask_jaccard(a: Masks, b: Masks, *, per_layer: bool = True, of: str = "kept") -> Similarity:
    r"""The Jaccard index of two masks, whole and per layer, with chance levels.

    **formula** :math:`J = |A \cap B| / |A \cup B|`
    **Shapes** masks of the same weights
    **Units** none, 0 to 1
    **Needs** nothing
    **Source** arXiv 2001.05050; chance correction as in Cohen's kappa

    Args:
        a: One mask.
        b: The other; of the same weights.
        per_layer: Whether to compare each weight by itself, too.
        of: Compare the ``"kept"`` or the ``"pruned"`` entries.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False, False])})
        >>> b = Masks({"w": torch.tensor([True, False, True, False])})
        >>> found = mask_jaccard(a, b)
        >>> round(found.whole.value, 3), round(found.layers["w"].chance, 3)
        (0.333, 0.333)
    """
    if of not in ("kept", "pruned"):
        raise UsageError(
            f"of={of!r}",
            "it is 'kept' or 'pruned'",
            "masks have no other side",
            "write one of the two",
        )
    counts = {n: _counts(x, y, of) for n, x, y in _pairs(a, b)}
    layers = {n: _jaccard(*c) for n, c in counts.items()}
    one, two, both, size = (sum(c[i] for c in counts.values()) for i in range(4))
    whole = _jaccard(one, two, both, size)
    expected = sum(c[0] * c[1] / c[3] for c in counts.values() if c[3])
    union = one + two - expected
    given = Jaccard(whole.value, expected / union if union else 1.0)
    return Similarity(whole, given, layers if per_layer else {})


def overlap_coefficient(a: Masks, b: Masks) -> float:
    """``|A and B| / min(|A|, |B|)`` of the kept entries: 1 if one mask is nested in the other.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False])})
        >>> overlap_coefficient(a, Masks({"w": torch.tensor([True, False, False])}))
        1.0
    """
    counts = [_counts(x, y, "kept") for _, x, y in _pairs(a, b)]
    smaller = min(sum(c[0] for c in counts), sum(c[1] for c in counts))
    return sum(c[2] for c in counts) / smaller if smaller else 1.0


def hamming(a: Masks, b: Masks) -> float:
    """Share of entries in which two masks differ.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False, False])})
        >>> hamming(a, Masks({"w": torch.tensor([True, False, True, False])}))
        0.5
    """
    counts = [_counts(x, y, "kept") for _, x, y in _pairs(a, b)]
    size = sum(c[3] for c in counts)
    return sum(c[0] + c[1] - 2 * c[2] for c in counts) / size if size else 0.0


def mask_churn(before: Masks, after: Masks) -> float:
    """How much a mask changed: the Jaccard distance of the kept entries.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False, False])})
        >>> mask_churn(a, Masks({"w": torch.tensor([True, False, False, False])}))
        0.5
    """
    return mask_jaccard(before, after, per_layer=False).whole.distance


def weight_drift(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], masks: Masks | None = None
) -> dict[str, float]:
    r"""How far weights moved, relative to their size; ``""`` names all of them together.

    **formula** :math:`\|w' - w\|_2 / \|w\|_2`
    **Shapes** tensors of the same names
    **Units** none
    **Needs** nothing
    **Source** arXiv 2001.05050 ("weight-stable")

    Args:
        before: E.g. a ``state_dict()``.
        after: The same names and shapes.
        masks: Compare only these weights, and of them only what is kept.

    Example:
        >>> weight_drift({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 9.0])})
        {'': 1.0, 'w': 1.0}
    """
    names = list(masks if masks is not None else before)
    found: dict[str, float] = {}
    moved = size = 0.0
    for name in names:
        if name not in before or name not in after:
            raise _different([name])
        old, new = before[name], after[name]
        if not old.dtype.is_floating_point:
            continue
        keep = masks[name].cpu() if masks is not None else torch.ones(old.shape, dtype=torch.bool)
        old, new = old.detach().cpu().double() * keep, new.detach().cpu().double() * keep
        one, two = float((new - old).square().sum()), float(old.square().sum())
        found[name] = _ratio(one, two)
        moved, size = moved + one, size + two
    return {"": _ratio(moved, size), **found}


@dataclass(frozen=True)
class Matrix:
    """Every mask of a collection against every other.

    Args:
        names: Of rows and columns.
        values: Jaccard indices.
        corrected: The same, chance-corrected given the density of every layer.
    """

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    corrected: tuple[tuple[float, ...], ...]


def similarity_matrix(masks: Mapping[str, Masks]) -> Matrix:
    """Compare many masks (seeds, methods, levels) pair by pair.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False, False])})
        >>> b = Masks({"w": torch.tensor([True, False, True, False])})
        >>> [[round(x, 2) for x in row] for row in similarity_matrix({"a": a, "b": b}).values]
        [[1.0, 0.33], [0.33, 1.0]]
    """
    names = tuple(masks)
    found: dict[tuple[str, str], Jaccard] = {}
    for i, one in enumerate(names):
        for two in names[i:]:
            pair = mask_jaccard(masks[one], masks[two], per_layer=False).given_layers
            found[one, two] = found[two, one] = pair
    values = tuple(tuple(found[a, b].value for b in names) for a in names)
    corrected = tuple(tuple(found[a, b].corrected for b in names) for a in names)
    return Matrix(names, values, corrected)


# -- emergent structure -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Emptiness:
    """Groups of one kind that are empty, and how many would be under a random mask.

    Args:
        groups: How many there are.
        share: Of them, empty.
        expected: The same for a random mask that keeps as many weights.
    """

    groups: int
    share: float
    expected: float


@dataclass(frozen=True)
class Structure:
    """Structure that emerged in the mask of one weight.

    Args:
        filters: Whole outputs.
        channels: Whole inputs; each convolution group, and each expert, has its own.
        kernels: Single pairs of an output and an input; ``None`` where each is one weight, as in linear
            layers and 1 x 1 convolutions.
    """

    filters: Emptiness
    channels: Emptiness
    kernels: Emptiness | None


def emergent_structure(masks: Masks, model: nn.Module | None = None) -> dict[str, Structure]:
    r"""Shares of filters, input channels and kernels that are entirely zero, against chance.

    **formula** :math:`P = \binom{N-m}{K} / \binom{N}{K}` for a group of m of N weights, K kept
    **Shapes** ``(groups, out / groups, in / groups, taps)``
    **Units** none, 0 to 1
    **Needs** nothing
    **Source** arXiv 2001.05050; the expectation is that of a uniformly random mask (hypergeometric)

    Args:
        masks: Of weights ``(out, in, ...)``, as PyTorch has them.
        model: The network, for weights whose axes lie otherwise (transposed convolutions, GPT-2) or
            that have groups.

    Returns:
        One entry a weight. Masks of one axis are left out.

    Example:
        >>> mask = torch.ones(2, 2, 1, 1, dtype=torch.bool)
        >>> mask[0] = False
        >>> found = emergent_structure(Masks({"w": mask}))["w"]
        >>> found.filters.share, round(found.filters.expected, 4), found.channels.share
        (0.5, 0.1667, 0.0)
    """
    write = "e.g. pruned.masks"
    require_kind("emergent_structure(masks)", masks, Masks, what="masks", write=write)
    axes = {} if model is None else {s.name: s.axes for s in discover(model) if s.axes is not None}
    found = {}
    for name, mask in masks.items():
        if mask.ndim < 2:
            continue
        own = axes.get(name, _plain_axes(mask))
        cube = own.cube(mask.cpu()).unflatten(0, (own.groups, -1))
        kept, size = int(cube.sum()), cube.numel()
        parts = []
        for inside in ((2, 3), (1, 3), (3,)):
            alive = cube.any(inside[0]) if len(inside) == 1 else cube.amax(inside)
            members = size // alive.numel()
            share = 1 - float(alive.double().mean())
            parts.append(Emptiness(alive.numel(), share, empty_probability(members, kept, size)))
        filters, channels, kernels = parts
        found[name] = Structure(filters, channels, kernels if cube.shape[3] > 1 else None)
    return found


def overall_structure(found: Mapping[str, Structure]) -> dict[str, Emptiness]:
    """The filters, channels and kernels of all weights together; a kind that none has is left out.

    Example:
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> whole = overall_structure(emergent_structure(Masks({"a": mask, "b": ~mask[:1]})))
        >>> list(whole), whole["filters"].groups, round(whole["filters"].share, 2)
        (['filters', 'channels'], 3, 0.67)
    """
    whole = {}
    for kind in ("filters", "channels", "kernels"):
        parts = [each for each in (getattr(s, kind) for s in found.values()) if each is not None]
        groups = sum(part.groups for part in parts)
        if groups:
            share = sum(part.groups * part.share for part in parts) / groups
            expected = sum(part.groups * part.expected for part in parts) / groups
            whole[kind] = Emptiness(groups, share, expected)
    return whole


def empty_probability(members: int, kept: int, size: int) -> float:
    """The chance that a random mask, ``kept`` of ``size``, keeps none of ``members`` entries.

    Example:
        >>> round(empty_probability(2, 2, 4), 4), empty_probability(2, 3, 4), empty_probability(2, 0, 4)
        (0.1667, 0.0, 1.0)
    """
    if kept + members > size:
        return 0.0
    log = math.lgamma(size - members + 1) - math.lgamma(size - members - kept + 1)
    log += math.lgamma(size - kept + 1) - math.lgamma(size + 1)
    return min(1.0, math.exp(log))


def _plain_axes(mask: Tensor) -> Axes:
    return Axes(("out", "in", *(f"k{i}" for i in range(mask.ndim - 2))))


def _pairs(a: Masks, b: Masks) -> Iterator[tuple[str, Tensor, Tensor]]:
    for masks in (a, b):
        require_kind("comparing masks", masks, Masks, what="masks", write="e.g. pruned.masks")
    others = set(a) ^ set(b)
    others |= {name for name in set(a) & set(b) if a[name].shape != b[name].shape}
    if others or not a:
        raise _different(sorted(others))
    return ((name, a[name].cpu(), b[name].cpu()) for name in a)


def _different(names: list[str]) -> UsageError:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return UsageError(
        "comparing two networks' weights or masks",
        f"{shown} is not in both with the same shape" if names else "there are no masks",
        "only weights that both have can be compared",
        "compare runs of the same network and scope",
    )


def _counts(a: Tensor, b: Tensor, of: str) -> tuple[int, int, int, int]:
    """Sizes of both sets and of their intersection, and the number of entries."""
    if of == "pruned":
        a, b = ~a, ~b
    return int(a.sum()), int(b.sum()), int((a & b).sum()), a.numel()


def _jaccard(a: int, b: int, both: int, size: int) -> Jaccard:
    union = a + b - both
    return Jaccard(
        both / union if union else 1.0, chance_level(a / size, b / size) if size else 1.0
    )


def _ratio(moved: float, size: float) -> float:
    if size:
        return math.sqrt(moved / size)
    return math.inf if moved else 0.0
