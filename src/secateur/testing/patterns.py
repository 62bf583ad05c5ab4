"""The laws of patterns."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.core.errors import FoldError
from secateur.core.select import keep_top
from secateur.core.weight import Weight
from secateur.pattern import Pattern
from secateur.testing.law import require, same
from secateur.testing.samples import sample_weight

_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def check_pattern(
    pattern: Pattern, weight: Weight | None = None, *, levels: Sequence[float] = _LEVELS
) -> None:
    """Check that a pattern keeps its laws on one weight that it can fold.

    Fold is a bijection; exactly ``quota`` groups stay in every pool; a group is whole; sparser is
    nested in denser; groups lie within the declared span of columns.

    Args:
        pattern: What to check.
        weight: On what; its values are the scores (ties, negative values and ``-inf`` are welcome).
        levels: Rising sparsities.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.pattern import NM
        >>> check_pattern(NM(2, 4))
    """
    weight = weight or sample_weight()
    x, axes, shape = weight.value, weight.axes, tuple(weight.value.shape)
    _check_bijection(pattern, weight)
    pools, groups, members = pattern.fold(x, axes).shape
    require(
        pattern.quota(groups, 0.0) == groups,
        "everything is kept at sparsity 0",
        pattern,
        f"{pattern.quota(groups, 0.0)} of {groups} groups",
    )
    scores = pattern.fold(x, axes).float().mean(2)
    denser: Tensor | None = None
    for level in sorted(levels):
        keep = pattern.quota(groups, level)
        require(
            1 <= keep <= groups,
            "quota lies from 1 to the number of groups",
            pattern,
            f"{keep} of {groups} at sparsity {level:g}",
        )
        spread = keep_top(scores, keep)[..., None].expand(pools, groups, members)
        mask = pattern.unfold(spread, shape, axes)
        folded = pattern.fold(mask, axes)
        require(
            torch.equal(folded.any(2), folded.all(2)),
            "a group is kept or pruned whole",
            pattern,
            f"a group is split at sparsity {level:g}",
        )
        counts = folded.all(2).sum(1)
        require(
            bool((counts == keep).all()),
            "exactly quota groups stay in every pool",
            pattern,
            f"{counts.tolist()} instead of {keep}",
        )
        if denser is not None:
            extra = int((mask & ~denser).sum())
            require(
                extra == 0,
                "sparser is nested in denser",
                pattern,
                f"{extra} entries come back at sparsity {level:g}",
            )
        denser = mask
    _check_span(pattern, weight)


def _check_bijection(pattern: Pattern, weight: Weight) -> None:
    x, axes, shape = weight.value, weight.axes, tuple(weight.value.shape)
    before = x.clone()
    numbers = torch.arange(x.numel()).reshape(shape)
    folded = pattern.fold(numbers, axes)
    require(
        folded.ndim == 3,
        "fold gives (pools, groups, members)",
        pattern,
        f"shape {tuple(folded.shape)}",
    )
    once = torch.equal(folded.flatten().sort().values, torch.arange(x.numel()))
    require(
        once, "fold holds every entry once", pattern, f"{folded.numel()} of {x.numel()} entries"
    )
    back = pattern.unfold(pattern.fold(x, axes), shape, axes)
    require(same(back, x), "unfold(fold(x)) == x", pattern, f"x of shape {shape} came back changed")
    require(same(x, before), "fold does not write", pattern, "values changed")
    meta = pattern.fold(torch.empty(shape, device="meta"), axes).shape
    law = "fold depends on the shape alone"
    require(meta == folded.shape, law, pattern, f"{tuple(meta)} without data")


def _check_span(pattern: Pattern, weight: Weight) -> None:
    taps = weight.cube().shape[2]
    span = pattern.span(taps)
    law = "groups lie within the declared span of columns"
    require(span >= 0, law, pattern, f"span {span}")
    if not span:
        return
    columns = torch.arange(weight.fan_in).expand(weight.out, weight.fan_in) // span
    blocks = pattern.fold(weight.like(columns), weight.axes)
    split = int((blocks != blocks[..., :1]).any(2).sum())
    require(split == 0, law, pattern, f"{split} groups cross a boundary of {span} columns")


def check_refusal(pattern: Pattern, weight: Weight) -> None:
    """Check that a pattern refuses a weight that it cannot fold, with the numbers.

    Raises:
        AssertionError: It folds, or the message lacks the size of an axis or a way out.

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.pattern import NM
        >>> check_refusal(NM(2, 4), Weight("w", torch.zeros(4, 10), LINEAR))
    """
    law = "refuses a shape it cannot fold, with the numbers"
    try:
        folded = pattern.fold(weight.value, weight.axes)
    except FoldError as error:
        numbers = {int(n) for n in re.findall(r"\d+", error.found)}
        sizes = {*weight.cube().shape, weight.fan_in, weight.axes.groups}
        require(bool(numbers & sizes), law, pattern, f"no size of an axis in {error.found!r}")
        require(bool(error.why and error.do), law, pattern, f"no reason or no way out in {error}")
        return
    except Exception as error:
        raise AssertionError(f"law {law!r} is broken by {pattern!r}: {error!r}") from error
    require(False, law, pattern, f"folded {tuple(weight.value.shape)} to {tuple(folded.shape)}")
