"""Networks that carry masks of an earlier pruning: what it took stays zero, whatever repairs the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur import Masks, Recipe, attach_, prune
from secateur.core.budget import Target
from secateur.pattern import NM, Blocks, Elements, Pattern, PerRow
from secateur.recover import ColumnSweep, ExactObs, LeastSquares, Recovery
from secateur.score import Criterion, Magnitude, ObsSaliency

OUT, IN = 8, 32
ROWS = torch.randn(128, IN, generator=torch.Generator().manual_seed(1))
DATA = [ROWS @ torch.randn(IN, IN, generator=torch.Generator().manual_seed(2))]


def earlier(kind: str) -> Tensor:
    kept = torch.ones(OUT, IN, dtype=torch.bool)
    if kind == "half":  # of the second half of the columns nothing is left
        kept[:, IN // 2 :] = False
    elif kind == "row":
        kept[1] = False
    else:
        kept = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) < 0.5
    return kept


def network(kept: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 4))
    attach_(net, Masks({"0.weight": kept}))
    return net


@pytest.mark.parametrize("kind", ["half", "row", "scattered"])
@pytest.mark.parametrize(
    ("criterion", "pattern", "repair"),
    [
        (ObsSaliency(), Elements(), ColumnSweep(block=8)),
        (ObsSaliency(), PerRow(), ColumnSweep(block=8)),
        (ObsSaliency(), Blocks(2, 2), ColumnSweep(block=8)),
        (ObsSaliency(), NM(2, 4), ColumnSweep(block=8)),
        (Magnitude(), NM(2, 4), LeastSquares()),
        (ObsSaliency(), Blocks(4, 1), ExactObs()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_was_pruned_stays_zero(
    kind: str, criterion: Criterion, pattern: Pattern, repair: Recovery
) -> None:
    kept = earlier(kind)
    target = None if isinstance(pattern, NM) else Target("sparsity", 0.3)
    found = prune(network(kept), Recipe(criterion, pattern, target, recovery=repair), DATA)
    mask, weight = found.masks["0.weight"], found.model.get_parameter("0.weight")
    assert not bool((mask & ~kept).any())
    assert not bool(weight[~mask].any())
    assert found.facts.layers[0].kept == int(mask.sum())


@pytest.mark.parametrize("kind", ["half", "scattered"])
@pytest.mark.parametrize("pattern", [Elements(), PerRow()])
def test_the_column_sweep_meets_the_target_in_what_is_left(kind: str, pattern: Pattern) -> None:
    recipe = Recipe(ObsSaliency(), pattern, Target("sparsity", 0.75), recovery=ColumnSweep(block=8))
    mask = prune(network(earlier(kind)), recipe, DATA).masks["0.weight"]
    assert int(mask.sum()) == OUT * IN // 4


def test_a_block_with_gaps_is_ranked_by_what_is_left_in_it() -> None:
    kept = torch.ones(OUT, IN, dtype=torch.bool)
    kept[0] = kept[4] = False  # a gap in every block: none may count as gone
    recipe = Recipe(
        ObsSaliency(), Blocks(4, 1), Target("sparsity", 0.5), recovery=ColumnSweep(block=IN)
    )
    net = network(kept)
    net.get_parameter("0.weight").data[4:] *= 100
    mask = prune(net, recipe, DATA).masks["0.weight"]
    assert bool(mask[5:].all())
    assert not bool(mask[:4].any())
