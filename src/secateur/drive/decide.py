"""From scores to masks: ranking, allocation and selection, for any parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.core.budget import Budget, Cost, Item, Probe
from secateur.core.facts import Note
from secateur.core.masks import Masks
from secateur.core.select import keep_top
from secateur.core.slots import Slot
from secateur.core.weight import Weight
from secateur.drive.contract import require_levels, require_scores
from secateur.drive.recipe import Recipe
from secateur.score import Criterion, Smoothed
from secateur.stats import Stats


def score(weight: Weight, recipe: Recipe, stats: Stats, *, moving: bool = True) -> Tensor:
    """Scores of one weight, checked.

    Args:
        weight: With its value.
        recipe: With the criterion.
        stats: What the criterion needs.
        moving: Whether averages over updates move on; once in an update.
    """
    found = recipe.criterion(weight, stats)
    scores = require_scores(recipe.criterion, repr(weight.name), weight.value.shape, found)
    # Averages move on after everything was scored with the old ones.
    parts = smoothed_parts(recipe.criterion) if moving else []
    moved = {part: part(weight, stats) for part in parts}
    for part, value in moved.items():
        stats.remember(part, weight.name, value)
    return scores


def smoothed_parts(criterion: Criterion) -> list[Smoothed]:
    """Every smoothed criterion inside ``criterion``, itself included.

    Example:
        >>> from secateur.score import Lamp, Magnitude
        >>> smoothed_parts(Lamp(Smoothed(Magnitude())))
        [Smoothed(inner=Magnitude(p=1), beta=0.85)]
    """
    found: list[Smoothed] = [criterion] if isinstance(criterion, Smoothed) else []
    for name in ("inner", "parts"):
        value = getattr(criterion, name, ())
        for inner in value if isinstance(value, tuple) else (value,):
            found += smoothed_parts(inner)
    return found


def group_scores(scores: Tensor, weight: Weight, recipe: Recipe, prior: Tensor | None) -> Tensor:
    """Mean score of each group, ``(pools, groups)``; groups pruned before count as lowest."""
    folded = recipe.pattern.fold(scores, weight.axes)
    means = folded.squeeze(2) if folded.shape[2] == 1 else folded.mean(2)
    if prior is not None:
        alive = recipe.pattern.fold(prior, weight.axes).any(2)
        means = means.masked_fill(~alive, -math.inf)
    return means


def remarks(weight: Weight, recipe: Recipe, stats: Stats, ranks: Tensor) -> list[Note]:
    """What to tell of scores that say little: experts without tokens, or all groups with one score."""
    found = {"unseen": _idle_experts(weight, recipe, stats), "even-scores": even_scores(ranks)}
    return [Note(topic, weight.name, text) for topic, text in found.items() if text]


def even_scores(ranks: Tensor) -> str:
    """What to tell of scores that are all the same; empty if they differ, or nothing is to be chosen.

    Example:
        >>> even_scores(torch.tensor([0.0, 0.0, -math.inf]))[:29]
        'all its scores are the same: '
        >>> even_scores(torch.tensor([0.0, 0.1, -math.inf]))
        ''
    """
    low, high = (float(each) for each in ranks.aminmax())
    if low < high and low == -math.inf:  # some were pruned before
        low = float(ranks.masked_fill(ranks == low, high).min())
    if ranks.numel() < 2 or low < high or high == -math.inf:
        return ""
    return (
        "all its scores are the same: the criterion cannot rank it, as before training or where the "
        "loss does not reach it, and its order decides what goes; leave it out, or take another criterion"
    )


def _idle_experts(weight: Weight, recipe: Recipe, stats: Stats) -> str:
    if not weight.axes.stacked:
        return ""
    needs = [n for n in recipe.criterion.needs if getattr(n, "source", "") == "inputs"]
    counts = [rows for need in needs if (rows := stats.rows(need, weight)) is not None]
    idle = int((counts[0] == 0).sum()) if counts else 0
    if not idle:
        return ""
    return f"{idle} of {weight.axes.groups} experts got no token: their weights are ranked by size"


def items(
    weights: Sequence[Weight],
    slots: Sequence[Slot],
    recipe: Recipe,
    groups: Mapping[str, Tensor],
    costs: Mapping[str, Cost],
) -> list[Item]:
    """The weights as an allocation sees them."""
    found = []
    for weight, slot in zip(weights, slots, strict=True):
        shape = recipe.pattern.fold(
            torch.empty(weight.value.shape, device="meta"), weight.axes
        ).shape
        named = zip(weight.value.shape, weight.axes.names, strict=True)
        kernel = tuple(n for n, axis in named if axis not in ("expert", "out", "in"))
        out, inn, _ = weight.cube().shape
        found.append(
            Item(
                name=weight.name,
                kind=slot.kind,
                fans=(weight.axes.together(out), inn, *kernel),
                scores=groups.get(weight.name, torch.empty(0)),
                pools=shape[0],
                groups=shape[1],
                members=shape[2],
                cost=costs[weight.name],
                quota=recipe.pattern.quota,
            )
        )
    return found


def allocate(found: Sequence[Item], recipe: Recipe, budget: Budget) -> dict[str, float]:
    """Run the allocation and check that it kept its word."""
    names = [item.name for item in found]
    levels = require_levels(recipe.allocation, names, recipe.allocation(found, budget))
    # Never more than what the quota allows at sparsity 0, which may be less than everything.
    return {i.name: max(levels[i.name], i.sparsity_of(i.quota(i.groups, 0.0))) for i in found}


def select(weight: Weight, recipe: Recipe, groups: Tensor, sparsity: float) -> Tensor:
    """The mask of one weight: the best ``quota`` groups of every pool."""
    keep = recipe.pattern.quota(groups.shape[1], sparsity)
    return spread(keep_top(groups, keep), weight, recipe)


def spread(kept: Tensor, weight: Weight, recipe: Recipe) -> Tensor:
    """The mask of one weight from flags of its groups, ``(pools, groups)``."""
    folded = recipe.pattern.fold(torch.empty(weight.value.shape, device="meta"), weight.axes)
    flags = kept[..., None].expand(*kept.shape, folded.shape[2])
    return recipe.pattern.unfold(flags, tuple(weight.value.shape), weight.axes)


def probe_for(
    model: nn.Module,
    weights: Sequence[Weight],
    recipe: Recipe,
    groups: Mapping[str, Tensor],
    loss: Callable[[], float],
) -> Probe:
    """A way to try an assignment: mask the model, measure, put the weights back."""
    by_name = {w.name: w for w in weights}

    def probe(levels: Mapping[str, float]) -> float:
        before = {name: by_name[name].value.clone() for name in levels}
        try:
            masks = {n: select(by_name[n], recipe, groups[n], level) for n, level in levels.items()}
            Masks(masks).apply_(model)
            return loss()
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    by_name[name].value.copy_(value)

    return probe
