"""The laws of group criteria, and small networks with groups to check them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch
from secateur.core.errors import NeedsData
from secateur.core.groups import Groups, groups_of
from secateur.core.widths import Slices, Width
from secateur.frontends import discover
from secateur.score.groups import GroupCriterion
from secateur.stats import Stat, Stats, collect_groups
from secateur.testing.law import require, same


@dataclass(frozen=True)
class SampleGroups:
    """A network, its widths, and labelled batches for it."""

    model: nn.Module
    groups: list[Groups]
    batches: list[Batch]


def sample_groups(kind: Literal["plain", "heads"] = "plain", seed: int = 0) -> SampleGroups:
    """A small network with the widths that coupling would find.

    ``"plain"``: two convolutions with BatchNorm and a linear layer behind a flatten. ``"heads"``: a
    residual block of attention with two heads over a LayerNorm.

    Example:
        >>> [(g.name, g.count) for g in sample_groups("heads").groups]
        [('embed', 8), ('query', 2)]
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: nn.Module = _plain() if kind == "plain" else _Heads()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                nn.init.normal_(module.running_mean)
        shape = (4, 3, 6, 6) if kind == "plain" else (4, 5, 6)
        batches = [(torch.randn(shape), torch.tensor([0, 1, 2, 1])) for _ in range(2)]
    widths = _PLAIN if kind == "plain" else _HEADS
    return SampleGroups(model.eval(), groups_of(model, widths, discover(model)), batches)


def check_group_criterion(
    criterion: GroupCriterion,
    sample: SampleGroups | None = None,
    *,
    seed: int = 0,
    equivariant: bool = True,
) -> None:
    """Check that a group criterion keeps its laws on every width of a network.

    One score per group; finite; does not write; deterministic; uses only the statistics it
    declares; listing the groups in another order permutes the scores.

    Args:
        criterion: What to check.
        sample: On what; by default :func:`sample_groups`.
        seed: Of the permutation.
        equivariant: False for criteria that look at positions on purpose (random scores).

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> from secateur.score import Grouped, Magnitude
        >>> check_group_criterion(Grouped(Magnitude(2)))
    """
    sample = sample or sample_groups(seed=seed)
    before = {name: value.clone() for name, value in sample.model.state_dict().items()}
    stats = _collected(criterion, sample, sample.groups)
    kept = {key: value.clone() for key, value in _tensors(stats)}
    scores = [_score(criterion, groups, stats).clone() for groups in sample.groups]
    for groups, found in zip(sample.groups, scores, strict=True):
        require(
            tuple(found.shape) == (groups.count,),
            "one score for every group",
            criterion,
            f"{tuple(found.shape)} for {groups.count} groups of {groups.name!r}",
        )
        bad = int((~torch.isfinite(found)).sum())
        require(bad == 0, "scores are finite", criterion, f"{bad} of {groups.count} are not")
    for name, value in sample.model.state_dict().items():
        require(same(value, before[name]), "does not write the network", criterion, name)
    for key, value in _tensors(stats):
        written = key in kept and not same(value, kept[key])
        require(not written, "does not write the statistics", criterion, f"{key} changed")
    again = _collected(criterion, sample, sample.groups)
    for groups, found in zip(sample.groups, scores, strict=True):
        for other in (_score(criterion, groups, stats), _score(criterion, groups, again)):
            require(same(other, found), "is deterministic", criterion, f"on {groups.name!r}")
    if equivariant:
        _check_order(criterion, sample, scores, seed)


def _check_order(
    criterion: GroupCriterion, sample: SampleGroups, scores: Sequence[Tensor], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed + 3)
    orders = [torch.randperm(g.count, generator=generator) for g in sample.groups]
    listed = [_reordered(g, order) for g, order in zip(sample.groups, orders, strict=True)]
    stats = _collected(criterion, sample, listed)
    for groups, order, found in zip(listed, orders, scores, strict=True):
        expected = found[order.to(found.device)].double()
        off = float((_score(criterion, groups, stats).double() - expected).abs().max())
        off /= float(expected.abs().max()) or 1.0
        law = "listing the groups in another order permutes the scores"
        require(off < 1e-4, law, criterion, f"relative difference {off:.2g} on {groups.name!r}")


def _reordered(groups: Groups, order: Tensor) -> Groups:
    slices = tuple(replace(s, index=s.index[order]) for s in groups.width.slices)
    width = replace(groups.width, slices=slices, units=groups.width.units[order])
    return Groups(width, tuple(replace(p, index=p.index[order]) for p in groups.parts))


def _collected(criterion: GroupCriterion, sample: SampleGroups, groups: Sequence[Groups]) -> Stats:
    stats = collect_groups(sample.model, groups, criterion.needs, sample.batches)
    # Values are computed when first asked for: ask now, so that a write to them is seen.
    for part in (p for g in groups for p in g.trained):
        for need in criterion.needs:
            if hasattr(need, "source") and (need, part.parameter) in stats:
                stats(cast(Stat, need), part.weight)
    return stats


def _score(criterion: GroupCriterion, groups: Groups, stats: Stats) -> Tensor:
    try:
        return criterion(groups, stats)
    except NeedsData as error:
        raise AssertionError(
            f"law 'uses only the statistics it declares' is broken by {criterion!r}: {error}"
        ) from error


def _tensors(stats: Stats) -> list[tuple[str, Tensor]]:
    saved: dict[str, Any] = stats.state_dict()["states"]
    found = [(f"{key} {name}", x) for key, state in saved.items() for name, x in state.items()]
    return found + [(f"{key!r}", value) for key, value in stats._values.items()]


def _plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class _Heads(nn.Module):
    """A residual stream with two heads of attention on it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, 4
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (
            m(y).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for m in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head((x + self.out(y)).mean(1))
        return out


def _width(name: str, groups: int, *slices: tuple[str, int, int]) -> Width:
    made = tuple(
        Slices(parameter, axis, torch.arange(groups * members).reshape(groups, members))
        for parameter, axis, members in slices
    )
    return Width(name, made, torch.arange(groups))


_BATCHNORM = ("weight", "bias", "running_mean", "running_var")
_PLAIN = [
    _width(
        "0", 6, ("0.weight", 0, 1), ("0.bias", 0, 1), *((f"1.{n}", 0, 1) for n in _BATCHNORM),
        ("4.weight", 1, 1),
    ),
    _width(
        "4", 4, ("4.weight", 0, 1), ("4.bias", 0, 1), *((f"5.{n}", 0, 1) for n in _BATCHNORM),
        ("8.weight", 1, 4),
    ),
]  # fmt: skip
_HEADS = [
    _width(
        "embed", 8, ("embed.weight", 0, 1), ("embed.bias", 0, 1), ("norm.weight", 0, 1),
        ("norm.bias", 0, 1), *((f"{n}.weight", 1, 1) for n in ("query", "key", "value", "head")),
        ("out.weight", 0, 1), ("out.bias", 0, 1),
    ),
    _width(
        "query", 2, *((f"{n}.{p}", 0, 4) for n in ("query", "key", "value") for p in ("weight", "bias")),
        ("out.weight", 1, 4),
    ),
]  # fmt: skip
