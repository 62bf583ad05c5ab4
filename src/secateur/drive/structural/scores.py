"""Scores of all groups that take part in a structural pruning run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from secateur.core.batches import Data
from secateur.core.facts import Facts
from secateur.core.groups import groups_of
from secateur.core.widths import Width
from secateur.drive.contract import require_scores
from secateur.drive.decide import even_scores
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.frontends import discover
from secateur.stats.groups import collect_groups, wants_data


def group_scores(
    model: nn.Module,
    widths: Sequence[Width],
    recipe: ShrinkRecipe,
    data: Data | None,
    *,
    around: Sequence[Width] = (),
    facts: Facts | None = None,
) -> dict[str, Tensor]:
    """A score for every group of every width, ``(groups,)``, larger = keep.

    Args:
        model: The network.
        widths: Those that are scored.
        recipe: With the criterion.
        data: For criteria that measure.
        around: All widths of the network, for criteria that look at neighbours.
        facts: To note in which widths cannot be ranked.

    Raises:
        NonFinite: A score is NaN or infinite; the width is named.

    Example:
        >>> import torch
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> widths = couple(net, torch.zeros(1, 4)).widths
        >>> group_scores(net, widths, ShrinkRecipe(), None)["0"].shape
        torch.Size([3])
    """
    criterion = recipe.criterion
    groups = groups_of(model, widths, discover(model))
    seen = groups_of(model, around or widths, discover(model))
    wanted = wants_data(criterion.needs)
    batches = data.sample() if wanted and data is not None else []
    loss = data.loss if data is not None else None
    stats = collect_groups(model, seen, criterion.needs, batches, loss=loss, seed=recipe.seed)
    found = {}
    for group in groups:
        given = criterion(group, stats)
        about = f"the width {group.name!r}"
        scores = require_scores(criterion, about, (group.count,), given).float().cpu()
        if facts is not None and (even := even_scores(scores)):
            facts.note("even-scores", group.name, even)
        found[group.name] = scores
    return found
