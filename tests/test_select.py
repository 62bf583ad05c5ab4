"""Selection: exactly k, ties to the lower index, and the global threshold against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.allocate import Ranked
from secateur.core.budget import Budget, Cost, Item
from secateur.core.select import from_ordered_bits, keep_top, ordered_bits, quota

AWKWARD = [
    *(-math.inf, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-45, 1e-40, 1.1754944e-38),
    *(0.5, 1.0, math.nextafter(1.0, 2.0), 1.0000001, 3e38, math.inf),
]


def brute(scores: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest of each row by a stable sort, the lower index first among equals."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : max(0, keep)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 31),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_keep_top_is_a_stable_sort(
    pools: int, groups: int, keep: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, len(AWKWARD), (pools, groups), generator=generator)
    scores = torch.tensor(AWKWARD, dtype=torch.float64)[pick].to(dtype)
    kept = keep_top(scores, keep)
    assert kept.sum(1).tolist() == [min(keep, groups)] * pools
    assert torch.equal(kept, brute(scores, min(keep, groups)))


@given(st.lists(st.integers(0, 12), min_size=3, max_size=3), st.integers(0, 999))
def test_a_count_per_pool(keep: list[int], seed: int) -> None:
    scores = torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_top(scores, torch.tensor(keep))
    expected = torch.cat([brute(s[None], k) for s, k in zip(scores, keep, strict=True)])
    assert torch.equal(kept, expected)


def adversarial(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "equal":
        return torch.full((1, size), 0.25, dtype=dtype)
    if kind == "zeros of both signs":
        return torch.where(torch.rand(1, size, generator=generator) < 0.5, 0.0, -0.0).to(dtype)
    if kind == "denormal":
        return (torch.rand(1, size, generator=generator) * 1e-41).to(dtype)
    if kind == "half -inf":
        x = torch.randn(1, size, generator=generator).to(dtype)
        return x.masked_fill(torch.rand(1, size, generator=generator) < 0.5, -torch.inf)
    if kind == "neighbours":  # differ in the last bits only: the lowest digits decide
        step = torch.finfo(dtype).eps
        return 1 + step * torch.randint(0, 50, (1, size), generator=generator).to(dtype)
    if kind == "huge":
        top = torch.finfo(dtype).max
        return (torch.rand(1, size, generator=generator, dtype=torch.float64) * 2 - 1).to(
            dtype
        ) * top
    pick = torch.randint(0, len(AWKWARD), (1, size), generator=generator)
    return torch.tensor(AWKWARD, dtype=torch.float64)[pick].to(dtype)


KINDS = ["equal", "zeros of both signs", "denormal", "half -inf", "neighbours", "huge", "mixed"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("kind", KINDS)
def test_radix_path_is_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    size = (1 << 16) + 77  # one more than 65,536 takes the counting path
    scores = adversarial(kind, size, dtype)
    for keep in (1, 2, size // 3, size // 2 + 1, size - 1):
        kept = keep_top(scores, keep)
        assert int(kept.sum()) == keep
        assert torch.equal(kept, brute(scores, keep))


def test_radix_path_crosses_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.core.select._CHUNK", 1000)
    scores = adversarial("mixed", (1 << 16) + 3, torch.float32)
    assert torch.equal(keep_top(scores, 30_000), brute(scores, 30_000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ordered_bits_keep_the_order_and_invert(dtype: torch.dtype) -> None:
    x = torch.tensor(sorted(set(AWKWARD) - {0.0}), dtype=dtype).unique()
    bits = ordered_bits(x)
    assert bool((bits[1:] > bits[:-1]).all())
    back = torch.stack([from_ordered_bits(int(b), dtype, x.device) for b in bits])
    assert torch.equal(back, x)
    zeros = ordered_bits(torch.tensor([0.0, -0.0], dtype=dtype))
    assert int(zeros[0]) == int(zeros[1])


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_quota_is_the_nearest_count_and_never_zero(groups: int, sparsity: float) -> None:
    keep = quota(groups, sparsity)
    assert 1 <= keep <= groups
    assert keep == 1 or abs(keep - groups * (1 - sparsity)) <= 0.5 + 1e-6


@given(st.integers(1, 5000), st.data())
def test_quota_inverts_the_share(groups: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, groups))
    assert quota(groups, 1.0 - keep / groups) == keep


# -- the global threshold -------------------------------------------------------------------------


def item(name: str, scores: Tensor, members: int = 1, cost: Cost = float) -> Item:
    groups = scores.shape[1]
    fans = (scores.shape[0], groups * members)
    return Item(name, "Linear", fans, scores, scores.shape[0], groups, members, cost)


def brute_global(items: list[Item], budget: Budget) -> list[int]:
    """Groups from high to low score; at the first score that does not fit, as many as fit."""
    counts = [0] * len(items)

    def spent(trial: list[int]) -> float:
        return sum(i.cost(c * i.members) for i, c in zip(items, trial, strict=True))

    entries = [
        (-float(score), index)
        for index, i in enumerate(items)
        for score in i.scores.flatten().double()
    ]
    for _, ties in itertools.groupby(sorted(entries), key=lambda entry: entry[0]):
        group = [index for _, index in ties]
        trial = counts.copy()
        for index in group:
            trial[index] += 1
        if spent(trial) <= budget.limit * (1 + 1e-12):
            counts = trial
            continue
        for index in range(len(items)):
            for _ in range(group.count(index)):
                trial = counts.copy()
                trial[index] += 1
                if spent(trial) > budget.limit * (1 + 1e-12):
                    break
                counts = trial
        break
    return counts


COSTS: list[Cost] = [
    float,
    lambda kept: 3.0 * kept,
    lambda kept: float(kept**2),
    lambda kept: 10.0 * math.ceil(kept / 4),
    lambda kept: 7.0 + math.sqrt(kept),
]


@given(
    st.integers(0, 99999),
    st.sampled_from(["continuous", "ties", "awkward", "double"]),
    st.floats(0.05, 1.05),
    st.lists(st.sampled_from(range(len(COSTS))), min_size=3, max_size=3),
)
def test_ranked_is_brute_force(seed: int, kind: str, share: float, costs: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index, groups in enumerate((5, 13, 21)):
        if kind == "ties":
            scores = torch.randint(-2, 3, (1, groups), generator=generator).float()
        elif kind == "awkward":
            pick = torch.randint(0, len(AWKWARD), (1, groups), generator=generator)
            scores = torch.tensor(AWKWARD)[pick]
        else:
            scores = torch.randn(1, groups, generator=generator)
            scores = scores.double() * 1e-200 if kind == "double" else scores
        items.append(item(f"w{index}", scores, index + 1, COSTS[costs[index]]))
    floor = sum(i.cost(i.members) for i in items)
    dense = sum(i.cost(i.size) for i in items)
    budget = Budget(floor + share * (dense - floor))
    levels = Ranked()(items, budget)
    kept = [i.quota(i.groups, levels[i.name]) for i in items]
    assert kept == [max(1, count) for count in brute_global(items, budget)]


def test_ranked_spreads_over_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled, single = torch.rand(6, 10, generator=generator), torch.rand(1, 50, generator=generator)
    items = [item("pooled", pooled), item("single", single)]
    levels = Ranked()(items, Budget(55.0))
    threshold = torch.cat([pooled.flatten(), single.flatten()]).sort(descending=True).values[54]
    above = [int((x >= threshold).sum()) for x in (pooled, single)]
    assert items[0].quota(10, levels["pooled"]) == round(above[0] / 6)
    assert items[1].quota(50, levels["single"]) == above[1]


def test_ranked_mixes_precisions() -> None:
    a, b = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.75, 1e-300]], dtype=torch.float64)
    levels = Ranked()([item("a", a), item("b", b)], Budget(2.0))
    assert levels == {"a": 0.5, "b": 0.5}
