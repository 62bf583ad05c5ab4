"""What a one-shot run keeps in memory while it works, and what it tells of its way."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from secateur import Recipe, prune, prune_
from secateur.allocate import Ranked, Uniform
from secateur.core.errors import NonFinite
from secateur.core.weight import Weight
from secateur.drive.plan import require_finite
from secateur.score import Taylor
from secateur.stats import Gradient, Stats


@dataclass(frozen=True)
class _Seen:
    """Magnitudes; at each call it counts the scores, and the gradients of other weights, that live."""

    needs: frozenset[Any] = frozenset({Gradient()})
    counts: list[tuple[int, int]] = field(default_factory=list, hash=False, compare=False)
    made: list[Any] = field(default_factory=list, hash=False, compare=False)
    names: list[str] = field(default_factory=list, hash=False, compare=False)

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        living = sum(not made.expired() for made in self.made)
        self.counts.append((living, sum((Gradient(), name) in stats for name in self.names)))
        scores = weight.value.abs()
        for need in self.needs:
            scores = scores * stats(need, weight).abs()
        self.made.append(StorageWeakRef(scores.untyped_storage()))
        self.names.append(weight.name)
        return scores


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(8)))


def test_scores_do_not_wait_for_one_another_where_nobody_compares_them() -> None:
    criterion = _Seen(frozenset())
    prune(deep(), Recipe(criterion))
    assert len(criterion.counts) == 7
    assert max(living for living, _ in criterion.counts) <= 1


def test_scores_of_data_are_all_there_before_a_weight_changes() -> None:
    """They may be no numbers."""

    class Failing(_Seen):
        def __call__(self, weight: Weight, stats: Stats) -> Tensor:
            scores = super().__call__(weight, stats)
            return scores / 0 if len(self.counts) == 7 else scores

    net = deep()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NonFinite, match=r"scores of '6\.weight'"):
        prune_(net, Recipe(Failing()), [(torch.rand(4, 6), torch.arange(4))])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("allocation", [Uniform(), Ranked()])
def test_gradients_go_when_their_weight_was_scored(allocation: Any) -> None:
    criterion = _Seen()
    recipe = Recipe(criterion, allocation=allocation)
    prune(deep(), recipe, [(torch.rand(4, 6), torch.arange(4))])
    assert [left for _, left in criterion.counts] == [0] * 7


def test_calibrating_and_scoring_tell_how_far_they_are() -> None:
    seen: list[tuple[str, float, float]] = []
    batches = [(torch.rand(4, 6), torch.arange(4)) for _ in range(3)]
    recipe = Recipe(Taylor(), allocation=Ranked())
    prune(deep(), recipe, batches, progress=lambda *args: seen.append(args))
    for stage, total in (("calibrating", 3), ("scoring", 7)):
        steps = [(done, of) for name, done, of in seen if name == stage]
        assert steps == [(i, total) for i in range(total + 1)] * (len(steps) // (total + 1))
        assert steps


def test_finite_weights_are_looked_at_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    whole = torch.isfinite

    def isfinite(x: Tensor) -> Tensor:
        looked.append(x.numel())
        return whole(x)

    monkeypatch.setattr(torch, "isfinite", isfinite)
    net = deep()
    require_finite(net)
    assert set(looked) == {1}
    with torch.no_grad():  # the sum of these is infinite, and they are not
        net[3].weight.fill_(3e38)
    require_finite(net)
    for odd in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            net[5].weight[1, 2] = odd
        with pytest.raises(NonFinite, match="1 of its 36 entries"):
            require_finite(net)
