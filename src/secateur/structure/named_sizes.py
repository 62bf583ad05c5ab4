"""Sizes that the code states by name: each attribute counts the units that lie there.

``x.view(b, t, self.num_heads, self.head_dim)`` names one attribute an axis. A sum such as
``self.num_heads + 2`` cuts an axis into segments, a product such as ``self.num_heads *
self.head_dim`` folds one. Of a quotient only is known that it must stay what it is: the axis keeps
its size, and the two attributes change together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.structure.counted import rows_along
from secateur.structure.labels import fill, relaxed, varying
from secateur.structure.named import Factor, Named, Origin, Term
from secateur.structure.seen import Quotient
from secateur.structure.sizes import Site, SizeUse

if TYPE_CHECKING:
    from secateur.structure.seen import Trace
    from secateur.structure.tracer import Tracer


NUMBER = "its code gives the size {} as a number"
_QUOTIENT = "its code computes the size {} from two others, so it stays"


def count_named(tracer: Tracer, label: Tensor, axis: int, given: Named) -> Tensor | None:
    """Note which attributes count the units of ``label`` along ``axis``.

    Returns:
        The label that is left; ``None`` if it is not known how ``given`` came about.
    """
    if given.terms and sum(_value(term) for term in given.terms) == label.shape[axis]:
        start = 0
        for term in given.terms:
            size = _value(term)
            _count_term(tracer, label.narrow(axis, start, size), axis, term)
            start += size
        return label
    if given.ratios:
        for pair in given.ratios:
            above, below = (_attribute(number, tracer.stack) for number in pair)
            if above is not None and below is not None:
                tracer.seen.ratios.append(Quotient(above, below))
        left = tracer.ledger.whole(label, axis, _QUOTIENT.format(int(given)))
        return fill(tuple(label.shape)) if left is None else left
    return None


def _count_term(tracer: Tracer, piece: Tensor, axis: int, term: Term) -> None:
    factors = [factor for factor in term if factor.value > 1]
    if all(factor.origin is None for factor in term):
        tracer.ledger.pin(piece, NUMBER.format(_value(term)))
    if not factors:
        return
    if len(factors) == 1:
        _count_factor(tracer, piece, axis, factors[0])
        return
    parts = relaxed(piece.unflatten(axis, [factor.value for factor in factors]))
    places = [axis + i for i in range(len(factors)) if axis + i in varying(parts)]
    if len(places) > 1:
        tracer.ledger.box(parts)
    for place in places:
        _count_factor(tracer, parts, place, factors[place - axis])


def _count_factor(tracer: Tracer, label: Tensor, axis: int, factor: Factor) -> None:
    if axis not in varying(label):
        return
    if factor.origin is None:
        tracer.ledger.whole(label, axis, NUMBER.format(factor.value))
        return
    site = site_of(factor.origin, tracer.stack)
    # Of an attribute of which a part was used, each part is like the first.
    units = rows_along(label, axis).repeat(factor.over, 1)
    tracer.seen.sizes.append(SizeUse(site, factor.value * factor.over, units, named=True))


def _value(term: Term) -> int:
    return math.prod(factor.value for factor in term)


def site_of(origin: Origin, stack: list[str]) -> Site:
    """The innermost running module that has the attribute."""
    inside = [path for path in reversed(stack) if path in origin.modules]
    return Site((inside or list(origin.modules))[0], (origin.attribute,))


def tie_named_sizes(found: Trace, root: Tensor) -> None:
    """Let what was seen by name decide over what only has the same value."""
    _drop_wrong_guesses(found, root)
    known: dict[tuple[str, str], list[SizeUse]] = {}
    for use in found.sizes:
        if use.named:
            known.setdefault((use.site.module, use.site.attributes[0]), []).append(use)
    for quotient in dict.fromkeys(found.ratios):
        _tie_quotient(found, known, quotient)


def _drop_wrong_guesses(found: Trace, root: Tensor) -> None:
    named: dict[tuple[str, str], list[SizeUse]] = {key: [] for key in found.names}
    for use in found.sizes:
        if use.named:
            named.setdefault((use.site.module, use.site.attributes[0]), []).append(use)
    left = []
    for use in found.sizes:
        attributes = use.site.attributes if use.named else tuple(
            name for name in use.site.attributes
            if (seen := named.get((use.site.module, name))) is None
            # A plain number is not that attribute where the code also reads it by its name.
            or (not (use.given and use.sure) and any(_alike(use, other, root) for other in seen))
        )  # fmt: skip
        if attributes:
            left.append(replace(use, site=Site(use.site.module, attributes)))
        elif use.sure:
            found.ledger.whole(use.units, 0, NUMBER.format(use.old))
    found.sizes[:] = left


def _alike(use: SizeUse, other: SizeUse, root: Tensor) -> bool:
    """Whether two uses count the same units, each at its place."""
    ours, theirs = root[use.units.clamp(min=0)], root[other.units.clamp(min=0)]
    if len(ours) != len(theirs):
        return False
    rows = torch.arange(len(theirs))[:, None].expand_as(theirs).reshape(-1)
    first = torch.full((len(root),), len(root)).scatter_reduce(0, theirs.reshape(-1), rows, "amin")
    last = torch.full((len(root),), -1).scatter_reduce(0, theirs.reshape(-1), rows, "amax")
    mine = torch.arange(len(ours))[:, None].expand_as(ours)
    met = last[ours] >= 0
    same = (first[ours] == mine) & (last[ours] == mine)
    return bool(met.any()) and bool(same[met].all())


def _tie_quotient(
    found: Trace, known: dict[tuple[str, str], list[SizeUse]], quotient: Quotient
) -> None:
    """It stays what it is: each unit of the divisor has its share of the dividend."""
    (above, many), (below, few) = quotient.above, quotient.below
    times = many // few
    for use in known.get((above.module, above.attributes[0]), []):
        shares = use.units.reshape(few, times, -1)
        found.ledger.join(shares, shares[:, :1])
        found.sizes.append(SizeUse(below, few, use.units.reshape(few, -1), named=True))
    for use in known.get((below.module, below.attributes[0]), []):
        found.sizes.append(SizeUse(above, many, use.units.repeat_interleave(times, 0), named=True))


def _attribute(number: Named, stack: list[str]) -> tuple[Site, int] | None:
    """The one attribute that a number is, if it is one."""
    if len(number.terms) != 1 or len(number.terms[0]) != 1:
        return None
    factor = number.terms[0][0]
    if factor.origin is None or factor.over != 1:
        return None
    return site_of(factor.origin, stack), factor.value


def names_in(given: object, stack: list[str]) -> set[tuple[str, str]]:
    """Modules and attributes that went into a number."""
    if not isinstance(given, Named):
        return set()
    found = {
        (site.module, site.attributes[0])
        for term in given.terms
        for factor in term
        if factor.origin is not None
        for site in (site_of(factor.origin, stack),)
    }
    return found.union(*(names_in(x, stack) for pair in given.ratios for x in pair))
