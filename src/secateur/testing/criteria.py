"""The laws of criteria."""

from __future__ import annotations

import torch

from secateur.core.errors import NeedsData
from secateur.core.weight import Weight
from secateur.score import Criterion
from secateur.stats import Stats
from secateur.testing.evidence import evidence, permuted
from secateur.testing.law import require, same
from secateur.testing.samples import sample_weight


def check_criterion(
    criterion: Criterion, weight: Weight | None = None, *, seed: int = 0, equivariant: bool = True
) -> None:
    """Check that a criterion keeps its laws on one weight.

    Shape of the weight; finite; does not write; deterministic; uses only the statistics it
    declares; permuting the inputs permutes the scores.

    Args:
        criterion: What to check.
        weight: On what; by default a linear weight.
        seed: Of the made-up statistics.
        equivariant: False for criteria that look at positions on purpose (random scores, blocks of
            neighbouring weights): the last law is then left out.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.score import Wanda
        >>> check_criterion(Wanda())
    """
    weight = weight or sample_weight(seed=seed)
    stats = evidence(weight, criterion.needs, seed)
    value = weight.value.clone()
    before = {need: stats(need, weight).clone() for need in criterion.needs}
    try:
        scores = criterion(weight, stats).clone()
    except NeedsData as error:
        raise AssertionError(
            f"law 'uses only the statistics it declares' is broken by {criterion!r}: {error}"
        ) from error
    shape = tuple(weight.value.shape)
    require(
        tuple(scores.shape) == shape,
        "scores have the shape of the weight",
        criterion,
        f"{tuple(scores.shape)} for {shape}",
    )
    bad = int((~torch.isfinite(scores)).sum())
    require(bad == 0, "scores are finite", criterion, f"{bad} of {scores.numel()} are not")
    require(same(weight.value, value), "does not write the weight", criterion, "values changed")
    for need, old in before.items():
        law = "does not write the statistics"
        require(same(stats(need, weight), old), law, criterion, f"{need!r} changed")
    again = (criterion(weight, stats), criterion(weight, evidence(weight, criterion.needs, seed)))
    for other in again:
        off = float((other - scores).abs().max())
        require(same(other, scores), "is deterministic", criterion, f"two calls differ by {off:g}")
    if equivariant:
        _check_permutation(criterion, weight, stats, seed)


def _check_permutation(criterion: Criterion, weight: Weight, stats: Stats, seed: int) -> None:
    channels = weight.cube().shape[1]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed + 3))
    other = Weight(weight.name, permuted(weight, weight.value, order), weight.axes)
    moved = criterion(other, evidence(other, criterion.needs, seed, order=order))
    expected = permuted(weight, criterion(weight, stats), order)
    scale = float(expected.abs().max()) or 1.0
    off = float((moved.double() - expected.double()).abs().max()) / scale
    require(
        off < 1e-4, "permuting inputs permutes scores", criterion, f"relative difference {off:.2g}"
    )
