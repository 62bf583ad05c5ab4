"""What parts owe, checked where they answer: a wrong part is named, and not what comes of it later.

The laws of :mod:`secateur.testing` look closer; these checks cost nothing and run always.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from secateur.core.arguments import is_number
from secateur.core.errors import BudgetError, NonFinite, UsageError, kind_of
from secateur.core.weight import Weight
from secateur.pattern import Pattern
from secateur.recover import Repaired


def require_scores(criterion: object, about: str, shape: tuple[int, ...], found: Any) -> Tensor:
    """Scores, if they are numbers in the given shape.

    Args:
        criterion: What gave them.
        about: What it was asked about, in words.
        shape: Of what it was asked about.
        found: What it gave.

    Raises:
        UsageError: They are something else, or of another shape.
        NonFinite: Some are NaN or infinite.

    Example:
        >>> require_scores("mine", "'fc'", (2, 3), torch.zeros(3, 2))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: str scores of 'fc': a tensor of shape (3, 2) came back, ...
    """
    asked = f"{type(criterion).__name__} scores of {about}"
    odd = ""
    if not isinstance(found, Tensor):
        odd = _kind(found)
    elif found.shape != shape:
        odd = f"a tensor of shape {tuple(found.shape)}"
    elif found.dtype == torch.bool or found.is_complex():
        odd = f"a tensor of {found.dtype}"
    if odd:
        raise UsageError(
            asked,
            f"{odd} came back, and {tuple(shape)} real numbers were asked for",
            "each is the score of one entry, larger for what should stay",
            "correct the criterion; its law in secateur.testing says more",
        )
    scores: Tensor = found.detach()
    if not bool(torch.isfinite(scores).all()):
        raise NonFinite(
            asked,
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} are NaN or infinite",
            "they cannot be ranked",
            "check the data, or choose a more robust criterion",
        )
    return scores


def require_folded(pattern: Pattern, weight: Weight, folded: Any) -> None:
    """Whether a weight was folded, and unfolds.

    Args:
        pattern: What folded it.
        weight: May be without values.
        folded: What came back.

    Raises:
        UsageError: It is no ``(pools, groups, members)`` of all entries, does not unfold, or the quota
            is no count of groups.

    Example:
        >>> from secateur.core.weight import Axes
        >>> from secateur.pattern import Elements
        >>> weight = Weight("fc", torch.zeros(2, 3), Axes(("out", "in")))
        >>> require_folded(Elements(), weight, Elements().fold(weight.value, weight.axes))
    """
    odd = ""
    if not isinstance(folded, Tensor) or folded.ndim != 3 or folded.numel() != weight.value.numel():
        odd = f"fold returned {_outline(folded)}, and not all entries as (pools, groups, members)"
    else:
        back = pattern.unfold(folded, tuple(weight.value.shape), weight.axes)
        groups = folded.shape[1]
        keep: Any = pattern.quota(groups, 0.5)
        if not isinstance(back, Tensor) or back.shape != weight.value.shape:
            odd = f"unfold returned {_outline(back)}, and not the shape of the weight"
        elif not isinstance(keep, Integral) or not 0 <= int(keep) <= groups:
            odd = f"of {groups} groups, quota keeps {keep!r} at sparsity 0.5"
    if odd:
        raise UsageError(
            f"pattern {type(pattern).__name__} on {weight.name!r} of shape {tuple(weight.value.shape)}",
            odd,
            "masks are made by folding, keeping that many groups, and unfolding",
            "correct the pattern; secateur.testing.check_pattern says more",
        )


def require_levels(allocation: object, names: list[str], found: Any) -> dict[str, float]:
    """What an allocation gave, if it is a sparsity for each weight.

    Raises:
        BudgetError: It is something else.

    Example:
        >>> require_levels("mine", ["a"], {"a": 0.5})
        {'a': 0.5}
    """
    odd, why = "", "each weight that takes part needs one"
    missing = [name for name in names if not isinstance(found, Mapping) or name not in found]
    if not isinstance(found, Mapping):
        odd = f"it returned {_kind(found)}, and not a sparsity for each name"
    elif missing:
        odd = f"it gave {len(missing)} of {len(names)} weights no sparsity, e.g. {missing[0]!r}"
    else:
        levels = {n: x.item() if isinstance(x, Tensor) else x for n, x in found.items()}
        wrong = [n for n in names if not is_number(levels[n]) or not 0 <= levels[n] < 1]
        if not wrong:
            return levels
        odd = f"it gave {wrong[0]!r} the sparsity {levels[wrong[0]]!r}"
        why = "a sparsity lies in [0, 1)"
    asked = f"allocation {type(allocation).__name__}"
    raise BudgetError(asked, odd, why, "this is a defect of the allocation")


def require_repaired(step: object, name: str, values: Tensor, found: Any) -> Repaired:
    """What a recovery gave, if it is values and a mask that fit the weight, and each other.

    Args:
        step: The recovery.
        name: The weight.
        values: Its matrix before.
        found: What the recovery returned.

    Raises:
        UsageError: It is not.
        NonFinite: Values are NaN or infinite.

    Example:
        >>> whole = torch.ones(2, 2)
        >>> require_repaired("mine", "fc", whole, Repaired(whole, whole > 0)).shift is None
        True
    """
    odd = ""
    if not isinstance(found, Repaired):
        odd = f"it returned {_kind(found)}"
    elif found.values.shape != values.shape or found.mask.shape != values.shape:
        odd = f"its values are {_outline(found.values)}, its mask is {_outline(found.mask)}"
    elif found.mask.dtype != torch.bool:
        odd = f"the mask is of {found.mask.dtype}"
    elif not bool(torch.isfinite(found.values).all()):
        raise NonFinite(
            f"recovery {type(step).__name__} of {name!r}",
            f"{int((~torch.isfinite(found.values)).sum())} of its values are NaN or infinite",
            "the network would compute nothing with them",
            "check the data and the precision of the weights, or leave the recovery out",
        )
    elif count := int(found.values.masked_fill(found.mask, 0).count_nonzero()):
        odd = f"{count} values are not zero where the mask is False"
    if odd:
        raise UsageError(
            f"recovery {type(step).__name__} of {name!r}",
            odd,
            f"it is asked for Repaired(values, mask) of shape {tuple(values.shape)}",
            "correct the recovery; secateur.testing.check_recovery says more",
        )
    repaired: Repaired = found
    return repaired


def _kind(found: object) -> str:
    return "None" if found is None else kind_of(found)


def _outline(found: object) -> str:
    return f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else _kind(found)
