"""Patterns: what goes together, by small examples; the laws are in test_laws.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur import Recipe, Scope, Target, plan, prune
from secateur.core.errors import BudgetError, FoldError, UsageError
from secateur.core.weight import CONV2D, LINEAR, Axes, Weight
from secateur.drive.decide import select
from secateur.pattern import NM, Blocks, Columns, Elements, Kernels, PerRow, Rows
from secateur.pattern.nm import multiple


def mask_of(pattern: Any, values: torch.Tensor, axes: Axes, sparsity: float) -> torch.Tensor:
    weight = Weight("w", values, axes)
    scores = pattern.fold(values.abs(), axes).mean(2)
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    return select(weight, Recipe(pattern=pattern, target=target), scores, sparsity)


def test_elements_compare_the_whole_weight() -> None:
    values = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert mask_of(Elements(), values, LINEAR, 0.5).tolist() == [[True] * 3, [False] * 3]


def test_per_row_keeps_equally_many_in_every_row() -> None:
    values = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    mask = mask_of(PerRow(), values, LINEAR, 1 / 3)
    assert mask.tolist() == [[True, True, False], [False, True, True]]


def test_nm_runs_along_the_inputs() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    assert mask_of(NM(2, 4), values, LINEAR, 0.5).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    # A transposed weight (GPT-2) has its inputs along the first axis.
    turned = mask_of(NM(2, 4), values.T.contiguous(), Axes(("in", "out")), 0.5)
    assert turned[:, 0].int().tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_nm_in_convolutions_runs_over_channels_at_each_tap() -> None:
    values = torch.randn(3, 8, 2, 2)
    mask = mask_of(NM(1, 4), values, CONV2D, 0.75)
    for o in range(3):
        for y in range(2):
            for x in range(2):
                for start in (0, 4):
                    run = values[o, start : start + 4, y, x].abs()
                    kept = mask[o, start : start + 4, y, x]
                    assert kept.nonzero().flatten().tolist() == [int(run.argmax())]


def test_vector_wise_nm_shares_the_choice_over_rows() -> None:
    mask = mask_of(NM(2, 4, rows=4), torch.randn(8, 8), LINEAR, 0.5)
    for start in (0, 4):
        part = mask[start : start + 4]
        assert bool((part == part[:1]).all())
    assert mask.reshape(8, 2, 4).sum(2).unique().tolist() == [2]


def test_nm_on_the_way_keeps_more() -> None:
    assert [NM(1, 4).quota(4, s) for s in (0, 0.2, 0.3, 0.5, 0.75, 0.9)] == [4, 3, 3, 2, 1, 1]


@pytest.mark.parametrize(
    ("pattern", "axes", "shape", "expected"),
    [
        (Blocks(2, 2), LINEAR, (4, 6), (1, 6, 4)),
        (Rows(), CONV2D, (8, 4, 3, 3), (1, 8, 36)),
        (Columns(), CONV2D, (8, 4, 3, 3), (1, 4, 72)),
        (Kernels(), CONV2D, (8, 4, 3, 3), (1, 32, 9)),
        (Rows(), Axes(("in", "out")), (6, 5), (1, 5, 6)),
        (Rows(), Axes(("in", "out", "kw"), 2), (4, 3, 5), (1, 6, 10)),
    ],
)
def test_shapes(pattern: Any, axes: Axes, shape: Any, expected: Any) -> None:
    assert tuple(pattern.fold(torch.zeros(shape), axes).shape) == expected


@pytest.mark.parametrize(
    "axes", [CONV2D, Axes(("in", "out", "kh", "kw"))], ids=["conv", "transposed"]
)
@pytest.mark.parametrize(
    ("pattern", "axis"), [(Rows(), "out"), (Columns(), "in")], ids=["rows", "columns"]
)
def test_rows_and_columns_are_slices_of_the_tensor(pattern: Any, axis: str, axes: Axes) -> None:
    values = torch.randn(6, 8, 2, 2)
    mask = mask_of(pattern, values, axes, 0.5)
    along = axes.names.index(axis)
    slices = mask.transpose(0, along).flatten(1)
    assert bool((slices.all(1) == slices.any(1)).all())
    norms = values.abs().transpose(0, along).flatten(1).sum(1)
    assert slices.all(1).tolist() == (norms >= norms.sort().values[len(norms) // 2]).tolist()


def test_blocks_are_rectangles() -> None:
    mask = mask_of(Blocks(2, 3), torch.randn(4, 6), LINEAR, 0.5)
    tiles = mask.reshape(2, 2, 2, 3).transpose(1, 2).flatten(2)
    assert bool((tiles.all(2) == tiles.any(2)).all())
    assert int(tiles.all(2).sum()) == 2


@pytest.mark.parametrize(
    ("pattern", "axes", "shape", "words"),
    [
        (NM(2, 4), LINEAR, (4, 10), ["'in' axis is 10", "8 and 12"]),
        (NM(2, 4), CONV2D, (4, 3, 3, 3), ["'in' axis is 3", "4 is"]),
        (NM(2, 4, rows=4), LINEAR, (6, 8), ["'out' axis is 6", "4 and 8"]),
        (Blocks(4, 1), LINEAR, (6, 8), ["'out' axis is 6", "4 and 8"]),
        (Blocks(1, 4), CONV2D, (6, 2, 3, 3), ["'in' axis is 18", "16 and 20", "taps"]),
        (Columns(), Axes(("out", "in", "kw"), 2), (4, 2, 3), ["2 groups", "'kernels'"]),
    ],
)
def test_misfits_say_what_would_fit(pattern: Any, axes: Axes, shape: Any, words: list[str]) -> None:
    with pytest.raises(FoldError) as caught:
        pattern.fold(torch.zeros(shape), axes)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(FoldError):
        pattern.unfold(torch.zeros(shape), shape, axes)


def test_arithmetic_of_misfits() -> None:
    assert multiple(3, 4) == "3 is not a multiple of 4 (4 is)"
    assert multiple(18, 4) == "18 is not a multiple of 4 (16 and 20 are)"


@pytest.mark.parametrize(
    "build", [lambda: NM(0, 4), lambda: NM(5, 4), lambda: NM(2, 4, rows=0), lambda: Blocks(0, 1)]
)
def test_impossible_patterns_are_refused(build: Any) -> None:
    with pytest.raises(UsageError):
        build()


def test_nm_fixes_the_sparsity() -> None:
    assert Recipe(pattern=NM(1, 4)).target == Target("sparsity", 0.75)
    with pytest.raises(BudgetError, match=r"2:4 keeps 2 of 4"):
        Recipe(pattern=NM(2, 4), target=Target("sparsity", 0.75))


def test_weights_that_do_not_fit_are_left_out_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    recipe = Recipe(pattern=NM(2, 4))
    slots = {s.name: s for s in plan(net, recipe).slots}
    assert "its 'in' axis is 10" in slots["0.weight"].reason
    pruned = prune(net, recipe)
    assert list(pruned.masks) == ["2.weight"]
    assert any(n.where == "0.weight" and "10" in n.text for n in pruned.facts.notes)
    with pytest.raises(UsageError, match="no parameter takes part"):
        prune(net, Recipe(pattern=NM(2, 4), scope=Scope(include=("0",))))
