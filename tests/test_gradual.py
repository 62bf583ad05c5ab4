"""Gradual pruning: zeros stay zero, whatever the loop around them does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradual_cases import BATCHES, X, net, recipe, train
from torch import Tensor
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from secateur import FineTune, Gradual, Masks, Recipe, Scope, attach_, masks_of
from secateur.allocate import ErdosRenyi, Given, Ranked
from secateur.core.errors import NeedsData, UsageError
from secateur.pattern import NM, Rows
from secateur.recover import ColumnSweep, Integer
from secateur.schedule import Cosine, Cyclic, Exponential, Linear, OneShot, Polynomial
from secateur.score import Magnitude, Movement, Obd, ObsSaliency, Snip, Taylor, Wanda

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


# -- zeros stay zero ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_and_their_moments_stay_zero(kind: str) -> None:
    model = net()
    pruner = Gradual(model, OPTIMIZERS[kind](model.parameters()), recipe(Polynomial(2, 8, 3)))
    before: Masks | None = None
    for t in range(12):
        train(model, pruner, 1, t)
        masks = Masks({n: m.clone() for n, m in pruner.masks.items()})
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            assert bool((parameter[~mask] == 0).all())
            moments = [
                v for v in pruner.optimizer.state[parameter].values()
                if isinstance(v, Tensor) and v.shape == parameter.shape
            ]  # fmt: skip
            assert moments
            assert all(bool((m[~mask] == 0).all()) for m in moments)
        if before is not None:
            assert before.diff(masks)[1].kept == 0  # nothing comes back
        before = masks
    pruned = pruner.finalize()
    assert pruned.masks.kept == round(0.25 * (72 + 120))
    assert [layer.kept for layer in pruned.facts.layers] == [18, 30]
    assert not any(n.endswith("_mask") for n in model.state_dict())
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in pruned.masks.items())


@pytest.mark.parametrize(
    "schedule",
    [Polynomial(0, 8, 3), Linear(1, 9, 2), Cosine(0, 10, 4), Exponential(0, 6, 2, unit="steps"),
     Cyclic(0, 9, 1), OneShot(3, "steps"), OneShot(0, "steps")],
    ids=lambda s: f"{type(s).__name__}-{s.begin}",
)  # fmt: skip
@pytest.mark.parametrize("criterion", [Magnitude(), Movement(), Snip(), Taylor()], ids=repr)
def test_the_target_is_met_to_the_weight(criterion: Any, schedule: Any) -> None:
    model = net()
    pruner = Gradual(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        recipe(schedule, 0.6, criterion=criterion, allocation=Ranked()),
    )
    train(model, pruner, 12)
    pruned = pruner.finalize()
    assert abs(pruned.masks.kept - 0.4 * 192) < 1
    assert pruned.facts.sparsity == pytest.approx(0.6, abs=1 / 192)


@pytest.mark.parametrize("criterion", [Wanda(), Obd(), ObsSaliency()], ids=repr)
def test_criteria_that_measure_are_given_data(criterion: Any) -> None:
    model = net()
    pruner = Gradual(
        model, torch.optim.SGD(model.parameters(), 0.1), recipe(criterion=criterion), data=BATCHES
    )
    train(model, pruner, 8)
    assert pruner.finalize().facts.sparsity == pytest.approx(0.75)
    with pytest.raises(NeedsData, match="no data"):
        Gradual(net(), torch.optim.SGD(model.parameters(), 0.1), recipe(criterion=criterion))


@pytest.mark.parametrize("pattern", [NM(2, 4), Rows()], ids=repr)
def test_patterns_hold_on_the_way(pattern: Any) -> None:
    model = net()
    wanted = Recipe(pattern=pattern, schedule=Linear(0, 8, 2), scope=Scope(include=("2",)))
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), wanted)
    for t in range(8):
        train(model, pruner, 1, t)
        mask = pruner.masks["2.weight"]
        folded = pattern.fold(mask, nn_axes())
        assert bool((folded.any(2) == folded.all(2)).all())
        assert len(set(folded.all(2).sum(1).tolist())) == 1
    assert float(pruner.finalize().masks["2.weight"].float().mean()) == 0.5


def nn_axes() -> Any:
    from secateur.core.weight import LINEAR

    return LINEAR


def test_history_counts_what_was_dropped() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())
    kept = pruner.masks
    total = kept.kept
    train(model, pruner, 8)
    assert kept.kept == total == 192, "masks that were handed out are immutable"
    history = pruner.facts.history
    assert sum(record["dropped"] for record in history) == round(0.75 * 192)
    assert sum(record["grown"] for record in history) == 0
    assert [record["step"] for record in history] == [2, 4, 6, 8]


def test_weights_come_back_in_a_cyclic_schedule() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.3), recipe(Cyclic(0, 9, 1)))
    train(model, pruner, 9)
    history = pruner.facts.history
    assert sum(record["grown"] for record in history) > 0
    dropped = sum(r["dropped"] - r["grown"] for r in history)
    masks = pruner.finalize().masks
    assert dropped == masks.total - masks.kept == round(0.75 * 192)


def test_given_levels_follow_the_schedule() -> None:
    model = net()
    pruner = Gradual(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        recipe(Linear(0, 10, 1), 0.6, allocation=Given({"0": 0.8})),
    )
    train(model, pruner, 1)
    assert float(pruner.masks["0.weight"].float().mean()) > 0.5
    train(model, pruner, 9, 1)
    assert float(pruner.finalize().masks["0.weight"].float().mean()) == pytest.approx(0.2, abs=0.01)


def test_allocations_by_shape_work_gradually() -> None:
    model = net()
    pruner = Gradual(
        model, torch.optim.SGD(model.parameters(), 0.1), recipe(allocation=ErdosRenyi())
    )
    train(model, pruner, 8)
    assert pruner.finalize().masks.kept == round(0.25 * 192)


@pytest.mark.parametrize(
    "more", [{"recovery": (ColumnSweep(), FineTune(2))}, {"rounding": Integer(4)}], ids=repr
)
def test_parts_that_gradual_pruning_cannot_do_are_not_dropped_in_silence(more: Any) -> None:
    model = net()
    wanted = recipe(Polynomial(0, 4, 1), 0.5, criterion=Magnitude(), **more)
    try:
        pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), wanted, data=BATCHES)
    except UsageError:
        return
    train(model, pruner, 4)
    facts = pruner.finalize().facts
    assert any(
        word in n.text for n in facts.notes for word in ("ColumnSweep", "ound", "ignored", "repair")
    )


# -- the model stays an ordinary model ------------------------------------------------------------


def test_parameter_names_stay() -> None:
    model = net()
    names = [n for n, _ in model.named_parameters()]
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())
    assert [n for n, _ in model.named_parameters()] == names
    extra = set(model.state_dict()) - set(names)
    assert extra == {"0.weight_mask", "2.weight_mask"}
    train(model, pruner, 8)
    pruner.finalize()
    assert list(model.state_dict()) == names


def test_deepcopy_and_state_dict_carry_the_masks() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())
    train(model, pruner, 5)
    twin = copy.deepcopy(model)
    assert masks_of(twin) == pruner.masks
    twin[0].weight_mask.fill_(True)
    assert masks_of(twin) != pruner.masks
    fresh = net(seed=9)
    attach_(fresh, Masks({n: torch.ones_like(m) for n, m in pruner.masks.items()}))
    fresh.load_state_dict(model.state_dict())
    assert masks_of(fresh) == pruner.masks
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains(backend: str) -> None:
    torch.compiler.reset()
    model, plain = net(), net()
    compiled = torch.compile(model, backend=backend)
    runs = []
    for forward, owner in ((compiled, model), (plain, plain)):
        pruner = Gradual(owner, torch.optim.SGD(owner.parameters(), 0.1, momentum=0.9), recipe())
        train(forward, pruner, 9)
        runs.append(pruner.finalize())
    assert runs[0].masks == runs[1].masks
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.AdamW(model.parameters(), 0.01), recipe())
    for t in range(9):
        pruner.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(BATCHES[t % 3][0]), BATCHES[t % 3][1])
        loss.backward()
        pruner.optimizer.step()
        pruner.step()
    pruned = pruner.finalize()
    assert pruned.facts.sparsity == 0.75
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in pruned.masks.items())


def test_an_averaged_model_is_masked_again() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())
    average = AveragedModel(model)  # it copies buffers by position, so the masks must be there
    for t in range(8):
        train(model, pruner, 1, t)
        average.update_parameters(model)
    masks = pruner.finalize().masks
    inner = average.module
    assert any(bool((inner.get_parameter(n)[~m] != 0).any()) for n, m in masks.items())
    masks.apply_(inner)
    assert all(bool((inner.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())


def test_hands_off_a_weight_that_torch_prunes_already() -> None:
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())
    assert "0.weight" not in pruner.masks
