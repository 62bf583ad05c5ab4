"""Group criteria: how much each group of a width matters. Larger = keep."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.groups import Groups, Part
from secateur.score.criterion import NOTHING, Criterion
from secateur.stats import Probe, Stat, Stats
from secateur.stats.groups import GroupProbe

GroupNeeds = frozenset[Stat | Probe | GroupProbe]

_TINY = torch.finfo(torch.float64).tiny
Reduce = Literal["l2", "sum", "mean", "max"]


class GroupCriterion(Protocol):
    """Scores the groups of a width. Implementations are frozen dataclasses.

    Laws: shape ``(groups,)``; finite; does not write; same result for the same seed; listing the
    groups in another order permutes the scores; uses only the statistics it declares.
    """

    @property
    def needs(self) -> GroupNeeds:
        """What :func:`~secateur.stats.groups.collect_groups` must gather for it."""
        ...

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        """A score for every group of the width, ``(groups,)``."""
        ...


@dataclass(frozen=True)
class Grouped:
    r"""Element scores, summed over each slice and reduced over the slices of a group.

    A slice is what a group owns of one parameter: rows of its producers, columns of its consumers,
    scales of normalisations. Slices are divided by their mean over the width first, so that a
    large consumer does not drown a small producer, and every width has the mean score 1 (for
    scores that are positive): widths can be ranked together.

    What an element criterion cannot score is left out: where it needs statistics of inputs, all
    parameters whose inputs cannot be seen (vectors, embeddings, stacked experts); where it needs a
    probe of the whole network, parameters whose axes have no known meaning.

    **formula** :math:`I_g = \operatorname{reduce}_k e_{kg}/\bar e_k,\quad e_{kg} = \sum_{i\in
    \text{slice}(k,g)} s_i`, where :math:`\bar e_k` is the mean of :math:`|e_{kg}|` over the groups
    **Shapes** ``(groups,)``
    **Units** none; those of the inner criterion with ``normalise="none"``
    **Needs** what the inner criterion needs
    **Source** DepGraph, arXiv 2301.12900
    **Differs** DepGraph's code adds the slices up as they are and divides the sum by its mean:
    that is ``normalise="width"``

    Args:
        inner: Any element criterion.
        reduce: Over the slices of a group: ``"mean"``, ``"sum"``, ``"l2"`` (root of the sum of
            squares) or ``"max"``.
        normalise: ``"slices"``, ``"width"`` (once, after reducing) or ``"none"``.
        of: Which slices: the whole ``"group"``, only rows of producers (``"out"``) or only columns
            of consumers (``"in"``). Depthwise kernels count as both.
        biases: Whether biases and shifts count.

    Example:
        >>> from secateur.score import Magnitude
        >>> from secateur.testing import sample_groups
        >>> groups = sample_groups("plain").groups[0]
        >>> Grouped(Magnitude(2))(groups, Stats()).shape
        torch.Size([6])
        >>> round(float(Grouped(Magnitude(2))(groups, Stats()).mean()), 4)
        1.0
    """

    inner: Criterion
    reduce: Reduce = "mean"
    normalise: Literal["slices", "width", "none"] = "slices"
    of: Literal["group", "out", "in"] = "group"
    biases: bool = False

    def __post_init__(self) -> None:
        one_of("Grouped", "reduce", self.reduce, ("l2", "sum", "mean", "max"))
        one_of("Grouped", "normalise", self.normalise, ("slices", "width", "none"))
        one_of("Grouped", "of", self.of, ("group", "out", "in"))

    @property
    def needs(self) -> GroupNeeds:
        return frozenset(self.inner.needs)

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        parts = [part for part in self._parts(groups) if _scorable(part, self.inner)]
        parts = measured(parts, self.inner.needs, stats)
        if not parts:
            raise no_part(f"Grouped({type(self.inner).__name__})", groups, "can score", self.of)
        slices = [part.sum(self.inner(part.weight, stats)).sum(1) for part in parts]
        return reduced(slices, self.reduce, self.normalise).float()

    def _parts(self, groups: Groups) -> tuple[Part, ...]:
        if self.of == "out":
            return groups.having("out", "channel")
        if self.of == "in":
            return groups.having("in", "channel")
        return tuple(part for part in groups.trained if self.biases or not part.bias)


def _scorable(part: Part, inner: Criterion) -> bool:
    for need in inner.needs:
        source = getattr(need, "source", "probe")
        if (source == "inputs" and not part.seen) or (source == "probe" and not part.known):
            return False
    return True


def measured(parts: Sequence[Part], needs: Iterable[object], stats: Stats) -> list[Part]:
    """Parts whose inputs were seen; all if those of none were, and then the first one says so.

    The weight of a cross-attention that multiplies two inputs can be seen in principle, and is not.
    """
    inputs = [need for need in needs if getattr(need, "source", "") == "inputs"]
    found = [part for part in parts if all((need, part.parameter) in stats for need in inputs)]
    return found or list(parts)


def reduced(slices: list[Tensor], how: str, normalise: str) -> Tensor:
    """Scores of slices, each ``(groups,)``, as scores of groups.

    Example:
        >>> reduced([torch.tensor([1.0, 3.0]), torch.tensor([30.0, 10.0])], "sum", "slices")
        tensor([2., 2.])
    """
    stacked = torch.stack([_scaled(s) for s in slices] if normalise == "slices" else slices)
    steps: dict[str, Callable[[], Tensor]] = {
        "sum": lambda: stacked.sum(0),
        "mean": lambda: stacked.mean(0),
        "max": lambda: stacked.amax(0),
        "l2": lambda: stacked.square().sum(0).sqrt(),
    }
    result = steps[how]()
    return _scaled(result) if normalise == "width" else result


def _scaled(scores: Tensor) -> Tensor:
    return scores / scores.abs().mean().clamp(min=_TINY)


@dataclass(frozen=True)
class RandomGroups:
    r"""Uniform random scores, fixed by the seed and the width's name.

    **formula** :math:`I_g \sim U(0, 1)`
    **Shapes** ``(groups,)``
    **Units** none
    **Needs** nothing
    **Source** baseline

    Example:
        >>> from secateur.testing import sample_groups
        >>> groups = sample_groups("plain").groups[0]
        >>> bool((RandomGroups(1)(groups, Stats()) == RandomGroups(1)(groups, Stats())).all())
        True
    """

    seed: int = 0

    @property
    def needs(self) -> GroupNeeds:
        return NOTHING

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        seed = (self.seed + stats.seed) * 1_000_003 + zlib.crc32(groups.name.encode())
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        scores = torch.rand(groups.count, generator=generator, dtype=torch.float32)
        return scores.to(groups.parts[0].value.device)


def one_of(where: str, name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse an unknown option of a criterion.

    Raises:
        UsageError: Naming the known ones.
    """
    if value not in known:
        listed = ", ".join(known)
        raise UsageError(
            f"{where}({name}={value!r})", "unknown", f"it should be one of {listed}", "choose one"
        )


def no_part(who: str, groups: Groups, what: str, of: str = "group") -> UsageError:
    """The error of a criterion that finds nothing to work on in a width."""
    have = ", ".join(f"{p.parameter} ({p.role})" for p in groups.parts[:6])
    return UsageError(
        f"{who} on the width {groups.name!r}",
        f"none of its {len(groups.parts)} slices is one it {what}: {have}",
        "a width is scored by what its groups own"
        + ("" if of == "group" else f", and only slices of role {of!r} were asked for"),
        "leave the width out with ignore=, or use another criterion",
    )
