"""Parts of one's own that do not keep their word are named, before anything comes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur import Recipe, ShrinkRecipe, Target, prune, shrink
from secateur.core.errors import BudgetError, NonFinite, SecateurError, UsageError
from secateur.core.select import quota
from secateur.drive.contract import require_folded
from secateur.drive.plan import plan
from secateur.pattern import PATTERNS
from secateur.recover import Repaired


def part(call: Any, **attributes: Any) -> Any:
    return type("Mine", (), {"__call__": lambda self, *given: call(*given), **attributes})()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def refused(kind: type[SecateurError], match: str, **parts: Any) -> None:
    net = network()
    before = [x.clone() for x in net.state_dict().values()]
    with pytest.raises(kind, match=match):
        prune(net, Recipe(target=Target("sparsity", 0.5), **parts))
    assert all(map(torch.equal, before, net.state_dict().values()))


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (lambda w: w.T, r"a tensor of shape \(16, 32\)"),
        (lambda w: w.sum(0), r"a tensor of shape \(16,\)"),
        (lambda w: w > 0, "a tensor of torch.bool"),
        (lambda w: w.to(torch.complex64), "a tensor of torch.complex64"),
        (lambda w: w.tolist(), "a list"),
        (lambda w: None, "None"),
    ],
)
def test_scores_of_another_form(scores: Any, found: str) -> None:
    criterion = part(lambda weight, stats: scores(weight.value.abs()), needs=frozenset())
    refused(
        UsageError,
        rf"Mine scores of '0.weight': {found} came back, and \(32, 16\)",
        criterion=criterion,
    )


def test_scores_with_a_gradient_and_of_whole_numbers_are_scores() -> None:
    plain = part(lambda weight, stats: weight.value.abs(), needs=frozenset())
    traced = part(lambda weight, stats: weight.value.abs().requires_grad_() * 1, needs=frozenset())
    whole = part(lambda weight, stats: (weight.value.abs() * 1e8).long(), needs=frozenset())
    masks = [prune(network(), Recipe(criterion)).masks for criterion in (plain, traced, whole)]
    assert masks[0] == masks[1] == masks[2]


def test_scores_of_groups_of_another_form() -> None:
    for found, match in (
        (torch.zeros(3), r"\(3,\) came back, and \(32,\)"),
        (None, "None came back"),
    ):
        criterion = part(lambda groups, stats, found=found: found, needs=frozenset())
        with pytest.raises(UsageError, match=f"scores of the width '0': .*{match}"):
            shrink(network(), ShrinkRecipe(criterion=criterion, recovery=()), torch.zeros(1, 16))


class PerColumn:
    def fold(self, x: torch.Tensor, axes: Any) -> torch.Tensor:
        return axes.cube(x).flatten(1).T[..., None]  # type: ignore[no-any-return]

    def unfold(self, folded: torch.Tensor, shape: tuple[int, ...], axes: Any) -> torch.Tensor:
        return folded.squeeze(2).T.reshape(shape)

    def quota(self, groups: int, sparsity: float) -> int:
        return quota(groups, sparsity)


@pytest.mark.parametrize(
    ("method", "answer", "found"),
    [
        ("fold", lambda x, axes: x, r"fold returned a tensor of shape \(32, 16\)"),
        ("fold", lambda x, axes: x[:8, :8, None], r"fold returned a tensor of shape \(8, 8, 1\)"),
        ("unfold", lambda x, shape, axes: x, r"unfold returned a tensor of shape \(16, 32, 1\)"),
        ("quota", lambda groups, sparsity: -1, "of 32 groups, quota keeps -1"),
        ("quota", lambda groups, sparsity: 2 * groups, "of 32 groups, quota keeps 64"),
        ("quota", lambda groups, sparsity: groups / 2, "of 32 groups, quota keeps 16.0"),
        ("quota", lambda groups, sparsity: None, "of 32 groups, quota keeps None"),
    ],
)
def test_patterns_that_do_not_fold(method: str, answer: Any, found: str) -> None:
    changed = {method: lambda self, *given: answer(*given)}
    mine = type("Mine", (PerColumn,), changed)()
    refused(
        UsageError,
        f"pattern Mine on '0.weight' .*: {found}",
        pattern=mine,
    )
    assert prune(network(), Recipe(pattern=PerColumn())).masks.sparsity == 0.5


@pytest.mark.parametrize("name", PATTERNS)
def test_all_patterns_fold(name: str) -> None:
    pattern = PATTERNS[name]()
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 4))
    for slot in plan(net, Recipe(pattern=pattern)).chosen:
        weight = slot.weight(net)
        require_folded(pattern, weight, pattern.fold(weight.value, weight.axes))


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        (lambda items: [0.5] * len(items), "it returned a list"),
        (lambda items: None, "it returned None"),
        (lambda items: {items[0].name: 0.5}, "it gave 1 of 2 weights no sparsity, e.g. '2.weight'"),
        (lambda items: {i.name: "50%" for i in items}, "it gave '0.weight' the sparsity '50%'"),
        (
            lambda items: {i.name: float("nan") for i in items},
            "it gave '0.weight' the sparsity nan",
        ),
        (lambda items: {i.name: 1.0 for i in items}, "it gave '0.weight' the sparsity 1.0"),
    ],
)
def test_levels_that_are_none(levels: Any, found: str) -> None:
    allocation = part(lambda items, budget: levels(items), needs_scores=False, needs_probe=False)
    refused(BudgetError, f"allocation Mine: {found}", allocation=allocation)


@pytest.mark.parametrize(
    ("repaired", "kind", "found"),
    [
        (lambda *both: both, UsageError, "it returned a tuple"),
        (lambda w, m: None, UsageError, "it returned None"),
        (
            Repaired,
            UsageError,
            "256 values are not zero where the mask is False",
        ),
        (
            lambda w, m: Repaired((w * m).T, m),
            UsageError,
            r"its values are a tensor of shape \(16, 32\)",
        ),
        (lambda w, m: Repaired(w * m, m.float()), UsageError, "the mask is of torch.float32"),
        (lambda w, m: Repaired(w * m / 0, m), NonFinite, "512 of its values are NaN or infinite"),
    ],
)
def test_repairs_that_fit_neither_weight_nor_mask(repaired: Any, kind: Any, found: str) -> None:
    def repair(weight: Any, stats: Any, choose: Any, rounding: Any) -> Any:
        return repaired(choose.values, choose())

    refused(
        kind, f"recovery Mine of '0.weight': {found}", recovery=(part(repair, needs=frozenset()),)
    )
