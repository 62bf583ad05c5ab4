"""Which groups stay, with equal widths in all layers where a plain configuration shall describe them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.select import keep_top
from secateur.core.widths import Width
from secateur.frontends.remembered import surgery_of
from secateur.frontends.surgery import surgery_for
from secateur.frontends.transformers_save import is_transformers, loadable
from secateur.structure import Structure, apply_, cuts_for

_ALL = torch.ones(1, dtype=torch.bool)


def best_groups(
    structure: Structure,
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    *,
    uniform: bool = False,
    steps: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The groups with the largest scores.

    Args:
        structure: The widths.
        scores: Name of a width -> ``(groups,)``, larger = keep.
        counts: Name of a width -> how many groups stay.
        uniform: Make like widths alike, see :func:`uniform_keep`.
        steps: What kept groups come in multiples of then.

    Returns:
        Name of a width -> ``(groups,)``, True = kept.

    Example:
        >>> from torch import nn
        >>> from secateur.structure import couple
        >>> structure = couple(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> best_groups(structure, {"0": torch.tensor([0.1, 0.3, 0.2])}, {"0": 2})
        {'0': tensor([False,  True,  True])}
    """
    keep = {name: keep_top(scores[name][None].float(), count)[0] for name, count in counts.items()}
    return uniform_keep(structure, keep, scores, steps) if uniform else keep


def uniform_keep(
    structure: Structure,
    keep: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None = None,
    steps: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Change a choice of groups so that like widths of all layers keep equally many.

    Widths are alike if they have equally many groups and their names differ only in numbers, or in
    ``encoder`` and ``decoder`` (T5 states one width for both). Each
    keeps the mean of what they kept, rounded to a multiple of their step; groups come back, or go,
    by their scores.

    Args:
        structure: The widths.
        keep: Name of a width -> ``(groups,)``, True = kept. Widths that are not named stay whole,
            and count as such.
        scores: Name of a width -> ``(groups,)``, larger = keep; without them the last groups go
            and the first ones come back.
        steps: Name of a width -> kept groups come in multiples of it, or all stay; by default 1.

    Returns:
        A choice for every width that is like a named one.

    Example:
        >>> from torch import nn
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> structure = couple(net, torch.zeros(1, 4))
        >>> keep = {"0": torch.tensor([1, 1, 1, 0]).bool(), "1": torch.tensor([0, 1, 0, 0]).bool()}
        >>> {name: flags.int().tolist() for name, flags in uniform_keep(structure, keep).items()}
        {'0': [1, 1, 0, 0], '1': [1, 1, 0, 0]}
    """
    evened: dict[str, Tensor] = {}
    for widths in _alike(structure):
        if not any(width.name in keep for width in widths):
            continue
        flags = [keep.get(w.name, torch.ones(w.groups, dtype=torch.bool)).cpu() for w in widths]
        step = max((steps or {}).get(width.name, 1) for width in widths)
        mean = sum(int(f.sum()) for f in flags) / len(flags)
        count = _nearest(mean, widths[0].groups, step)
        for width, own in zip(widths, flags, strict=True):
            score = None if scores is None else scores.get(width.name)
            evened[width.name] = _keeping(own, count, score)
    return evened


def held_back(structure: Structure, taking: Collection[str]) -> dict[str, str]:
    """Widths that stay whole because one that is like them takes no part: name -> why.

    Args:
        structure: The widths.
        taking: Names of those that take part otherwise.

    Example:
        >>> from torch import nn
        >>> from secateur.structure import couple
        >>> structure = couple(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.zeros(1, 4))
        >>> held_back(structure, ["0", "1"]), held_back(structure, ["0"])
        ({}, {'0': "it keeps as many groups as '1', which takes no part"})
    """
    found: dict[str, str] = {}
    for widths in _alike(structure):
        out = next((width.name for width in widths if width.name not in taking), None)
        if out is not None:
            why = f"it keeps as many groups as {out!r}, which takes no part"
            found |= {width.name: why for width in widths if width.name in taking}
    return found


def unstated(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> dict[str, str]:
    """Widths of a Transformers model that no configuration can state as chosen: name -> why.

    Nothing is looked up: configurations are built and compared, see
    :func:`~secateur.frontends.transformers_save.save_transformers`. Like widths are tried together.

    Args:
        model: Not cut yet. One that is not of Transformers has no configuration, and no such widths.
        structure: Its widths.
        keep: Name of a width -> ``(groups,)``, True = kept.
        example: Inputs on which the rebuilt model must agree.

    Returns:
        Empty if a configuration builds what is chosen, or each kind of width alone.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> from secateur.structure import couple
        >>> unstated(net, couple(net, torch.zeros(1, 2)), {"0": torch.tensor([True, True, False])}, 0)
        {}
    """
    if not is_transformers(model) or _stated(model, structure, keep, example):
        return {}
    found: dict[str, str] = {}
    for widths in _alike(structure):
        part = {w.name: keep[w.name] for w in widths if not bool(keep.get(w.name, _ALL).all())}
        if part and not _stated(model, structure, part, example):
            found |= dict.fromkeys(
                part, f"is one that no {type(model).__name__} configuration builds"
            )
    return found


def _stated(
    model: nn.Module, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> bool:
    cuts = cuts_for(model, structure, keep)
    surgery, earlier = surgery_for(model, cuts, weights=False), surgery_of(model)
    small = copy.deepcopy(model).eval()
    apply_(small, cuts)
    return loadable(small, earlier.then(surgery) if earlier else surgery, example)


def _alike(structure: Structure) -> list[list[Width]]:
    """Widths of equally many groups whose names differ in numbers, encoder and decoder only."""
    alike: dict[tuple[str, int], list[Width]] = {}
    for width in structure.widths:
        alike.setdefault(
            (re.sub(r"\d+|encoder|decoder", "*", width.name), width.groups), []
        ).append(width)
    return list(alike.values())


def _nearest(mean: float, groups: int, step: int) -> int:
    """A multiple of ``step``, or all."""
    below = max(1, round(mean / step)) * step
    return below if abs(below - mean) < groups - mean else groups


def _keeping(flags: Tensor, count: int, score: Tensor | None) -> Tensor:
    """``count`` kept groups: those that are kept come first, then the better, then the earlier."""
    if score is None:
        score = -torch.arange(len(flags), dtype=torch.float64)
    better = torch.argsort(score.cpu().double(), descending=True, stable=True)
    order = better[torch.argsort((~flags[better]).int(), stable=True)]
    return torch.zeros_like(flags).index_fill_(0, order[:count], True)
