"""Lottery tickets: what goes back where, and that levels are met and nested."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tickets_cases import RECIPE, SHORT, Broken, Shuffled, breaking, build, data, plan, search
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur.core.errors import BudgetError
from secateur.core.masks import Masks
from secateur.experiments import Opposite, TicketFacts, TicketPlan, Training, load_ticket
from secateur.experiments import ticket_search as module
from secateur.experiments.terms import levels_of
from secateur.experiments.ticket import restart_
from secateur.experiments.training import Stretch, seed_of, seeded, start_epoch_, train_
from secateur.formats import read_bundle
from secateur.pattern import NM, Rows
from secateur.score import Magnitude, Random, Snip


def tensors(folder: str | Path) -> dict[str, Tensor]:
    return dict(read_bundle(folder).tensors)


def first_weights(seed: int = 0, which: int | str = 0) -> dict[str, Tensor]:
    with seeded(seed_of(seed, "weights", which)):
        return build().state_dict()


# ---- what the survivors start from


def start_of_first_level(
    monkeypatch: pytest.MonkeyPatch, folder: Path, how: TicketPlan
) -> tuple[nn.Module, Stretch, TicketFacts]:
    """The network as it enters the training of level 1."""
    real, caught = module.train_, []

    def spy(model: nn.Module, *args: Any, **options: Any) -> Any:
        stretch = args[2]
        if stretch.index == 1:
            caught.append((copy.deepcopy(model), stretch))
        return real(model, *args, **options)

    monkeypatch.setattr(module, "train_", spy)
    found = search(folder, how)
    return *caught[0], found


def check_start(model: nn.Module, masks: Masks, values: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in values.items():
        keep = masks.get(name, torch.ones(value.shape, dtype=torch.bool))
        assert torch.equal(state[name][keep], value[keep]), f"survivors of {name}"
        assert not state[name][~keep].any(), f"pruned entries of {name}"


def test_weights_go_back_to_the_first_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, plan())
    check_start(model, found.masks()[0], first_weights())
    assert stretch == Stretch(1, 0)


@pytest.mark.parametrize(
    ("to", "unit", "step"), [(1, "epochs", 4), (6, "steps", 6), (0.5, "epochs", 2)]
)
def test_weights_go_back_to_the_snapshot_with_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: float, unit: str, step: int
) -> None:
    how = plan(rewind_to=to, unit=unit)
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, how)
    # The dense training once more, cut off at the step.
    with seeded(seed_of(0, "weights", 0)):
        again = build()
    with seeded(1), pytest.raises(Broken):
        train_(again, breaking(data(), step), SHORT, Stretch(0))
    snapshot = again.state_dict()
    assert int(snapshot["1.num_batches_tracked"]) == step
    check_start(model, found.masks()[0], snapshot)
    assert stretch == Stretch(1, step)


@pytest.mark.parametrize(("rewind", "last"), [("rate", False), ("finetune", True)])
def test_the_other_two_keep_the_final_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewind: str, last: bool
) -> None:
    how = plan(rewind=rewind, rewind_to=1)
    model, stretch, found = start_of_first_level(monkeypatch, tmp_path, how)
    check_start(model, found.masks()[0], tensors(found.dense.folder))
    assert stretch == Stretch(1, 4, last_rate=last)


def test_reinit_draws_new_weights_at_each_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, found = start_of_first_level(monkeypatch, tmp_path, plan(rewind="reinit"))
    check_start(model, found.masks()[0], first_weights(0, found.levels[0].name))
    old, new = first_weights(), model.state_dict()
    assert not torch.equal(
        old["3.weight"], new["3.weight"] + (new["3.weight"] == 0) * old["3.weight"]
    )


@pytest.mark.parametrize(
    ("last", "expected"),
    [(False, [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005]), (True, [0.0005] * 6)],
)
def test_rates_follow_the_schedule_from_the_rewinding_point(
    monkeypatch: pytest.MonkeyPatch, last: bool, expected: list[float]
) -> None:
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    feed, how = secateur.Data(train=Shuffled(256, 32)), Training(epochs=1, lr=0.05, warmup=0)
    with seeded(0):
        train_(build(), feed, how, Stretch(1, begin=2, last_rate=last))
    assert rates == pytest.approx(expected)


def test_a_level_is_trained_with_a_new_optimizer(tmp_path: Path) -> None:
    """An independent loop with fresh momentum gives the same bits."""
    found = search(tmp_path, plan(levels=(0.5,), rewind="rate", rewind_to=1))
    feed, masks = data(), found.masks()[0]
    with seeded(0):
        net = build()
        net.load_state_dict(tensors(found.dense.folder))
        groups = [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        sgd = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
        masks.apply_(net)
        for epoch in (1, 2):
            start_epoch_(feed.train, seed_of(0, 1, epoch), 0)
            for step, (x, y) in enumerate(feed.train, start=4 * epoch):
                for group in sgd.param_groups:
                    group["lr"] = SHORT.rate_at(step, 12)
                sgd.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                sgd.step()
                masks.apply_(net)
                for name, mask in masks.items():
                    sgd.state[net.get_parameter(name)]["momentum_buffer"].masked_fill_(~mask, 0)
    expected = net.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in tensors(found.levels[0].folder).items())


def test_restart_takes_old_masks_off() -> None:
    net = nn.Linear(2, 1, bias=False)
    restart_(net, Masks({"weight": torch.tensor([[True, False]])}), {"weight": torch.ones(1, 2)})
    restart_(net, Masks({"weight": torch.tensor([[False, True]])}), {"weight": torch.ones(1, 2)})
    assert net.weight.tolist() == [[0.0, 1.0]]


# ---- levels


def test_levels_are_nested_and_met(tmp_path: Path) -> None:
    found = search(tmp_path, plan(levels=(0.36, 0.6, 0.79)))
    masks = found.masks()
    for level, mask, asked in zip(found.levels, masks, (0.36, 0.6, 0.79), strict=True):
        assert mask.sparsity == pytest.approx(asked, abs=2 / mask.total)
        assert level.sparsity == mask.sparsity
        assert level.mask == mask.fingerprint()
        for name, tensor in tensors(level.folder).items():
            assert name not in mask or not tensor[~mask[name]].any()
    for before, after in itertools.pairwise(masks):
        assert all(not (after[n] & ~before[n]).any() for n in after)
    assert found.dense.sparsity == 0


def test_one_shot_levels_all_come_from_the_dense_network(tmp_path: Path) -> None:
    found = search(tmp_path, plan(one_shot=True))
    dense = tensors(found.dense.folder)
    sizes = torch.cat([dense[n].abs().flatten() for n in found.masks()[1]])
    for mask in found.masks():
        kept = torch.cat([m.flatten() for m in mask.values()])
        assert sizes[kept].min() >= sizes[~kept].max()
    alone = search(tmp_path, plan(levels=(0.79,)))
    assert alone.levels[0].done, "one level is the same whether it is called one-shot or not"


def test_default_levels_remove_a_fifth_of_the_rest() -> None:
    recipe = replace(RECIPE, target=secateur.Target("sparsity", 0.89))
    levels = levels_of(TicketPlan(), recipe)
    assert levels[:3] == pytest.approx((0.2, 0.36, 0.488))
    assert levels[-1] == 0.89
    assert len(levels) == 10


@pytest.mark.parametrize("criterion", [Random(), Snip(), Opposite(Magnitude())])
def test_filters_and_other_criteria(tmp_path: Path, criterion: Any) -> None:
    recipe = secateur.Recipe(criterion, Rows())
    found = search(tmp_path, plan(levels=(0.25, 0.5)), recipe=recipe)
    for mask in found.masks():
        for rows in mask.values():
            assert torch.equal(rows.any(1), rows.all(1))
    assert found.levels[1].sparsity == 0.5
    dense, sparse = found.masks()
    assert all(not (sparse[name] & ~dense[name]).any() for name in sparse)


def test_nm_has_one_level(tmp_path: Path) -> None:
    recipe = secateur.Recipe(pattern=NM(2, 4))
    found = search(tmp_path, plan(levels=None), recipe=recipe)
    assert [level.sparsity for level in found.levels] == [0.5]
    with pytest.raises(BudgetError, match="one level"):
        search(tmp_path, plan(), recipe=recipe)


def test_facts_tell_what_happened(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert found.metric == "accuracy"
    assert 0 <= found.levels[0].accuracy_at_start <= 1
    assert found.levels[0].churn == pytest.approx(0.36, abs=0.01)
    # 21 % of all weights are left out of 64 %.
    assert found.levels[1].churn == pytest.approx(1 - 0.21 / 0.64, abs=0.01)
    json.dumps(found.to_dict())
    net = build()
    restored = load_ticket(net, found.levels[1].folder)
    assert restored.masks == found.masks()[1]
    assert restored.facts.measures["accuracy"] == found.levels[1].accuracy
