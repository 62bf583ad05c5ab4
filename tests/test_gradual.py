"""Gradual pruning and fine-tuning: zeros stay zero, whatever the loop around them does."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from secateur import (
    Data,
    FineTune,
    Gradual,
    Masks,
    Recipe,
    Scope,
    Target,
    attach_,
    finetune,
    masks_of,
    prune,
    recipes,
)
from secateur.allocate import ErdosRenyi, Given, Ranked
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.pattern import NM, Rows
from secateur.recover import ColumnSweep, Integer
from secateur.schedule import (
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    OneShot,
    Polynomial,
    events,
    share_at,
)
from secateur.score import (
    Magnitude,
    Movement,
    Obd,
    ObsSaliency,
    Smoothed,
    Snip,
    Taylor,
    Wanda,
)

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
Y = torch.arange(24) % 3
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
        )


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


def recipe(schedule: Any = None, sparsity: float = 0.75, **more: Any) -> Recipe:
    return Recipe(
        target=Target("sparsity", sparsity), schedule=schedule or Polynomial(0, 8, 2), **more
    )


def train(model: nn.Module, pruner: Gradual, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        x, y = BATCHES[t % 3]
        pruner.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.optimizer.step()
        pruner.step()


# -- schedules ------------------------------------------------------------------------------------


def test_cubic_is_zhu_and_guptas() -> None:
    schedule = Polynomial(begin=20, end=120, frequency=10)
    for final in (0.5, 0.9):
        for t in range(20, 121):
            paper = final + (0 - final) * (1 - (t - 20) / 100) ** 3
            assert final * share_at(schedule, t, final) == pytest.approx(paper)
    assert share_at(schedule, 20, 0.9) == 0.0
    assert share_at(schedule, 120, 0.9) == share_at(schedule, 500, 0.9) == 1.0


def test_exponential_keeps_the_same_fraction_each_round() -> None:
    schedule = Exponential(begin=0, end=4)
    kept = [1 - 0.9 * share_at(schedule, t, 0.9) for t in range(5)]
    assert [b / a for a, b in itertools.pairwise(kept)] == pytest.approx([0.1**0.25] * 4)


def test_synflow_makes_the_rounds_it_promises() -> None:
    for rounds in (1, 2, 100):
        schedule = recipes.synflow(0.9, rounds=rounds).schedule
        assert sum(share_at(schedule, t, 0.9) > 0 for t in events(schedule)) == rounds


@pytest.mark.parametrize(
    "build",
    [
        lambda: Polynomial(begin=5, end=4),
        lambda: Linear(begin=-1, end=4),
        lambda: Cosine(0, 4, frequency=0),
        lambda: Linear(0, 4, 1, unit="step"),
        lambda: OneShot(unit="step"),
        lambda: OneShot(begin=-1),
        lambda: Polynomial(power=-1),
    ],
)
def test_schedules_that_cannot_run_are_refused(build: Any) -> None:
    with pytest.raises(UsageError):
        build()


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


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_epoch", "schedule", "epochs"),
    [
        (3, Polynomial(0, 2, 0.5, unit="epochs"), 2),
        (7, Polynomial(0.5, 2.3, 0.21, unit="epochs"), 3),
        (4, Linear(1, 1.1, 0.05, unit="epochs"), 2),
        (3, OneShot(1, "epochs"), 2),
        (2, Cosine(0, 3, 10, unit="epochs"), 3),
        (3, recipes.window(6), 3),
    ],
)
def test_schedules_in_epochs(per_epoch: int, schedule: Any, epochs: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Gradual(model, optimizer, recipe(schedule, 0.6), steps_per_epoch=per_epoch)
    levels = []
    for t in range(per_epoch * epochs):
        train(model, pruner, 1, t)
        levels.append(pruner.masks.sparsity)
        time = (t + 1) / per_epoch
        reached = 0.6 * share_at(schedule, time, 0.6)
        assert levels[-1] <= reached + 2 / 192
    assert levels == sorted(levels)
    assert levels[-1] == pytest.approx(0.6, abs=2 / 192)
    pruner.finalize()


def test_units_are_not_mixed() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match="steps_per_epoch"):
        Gradual(model, optimizer, recipe(Linear(0, 2, 1, unit="epochs")))
    with pytest.raises(UsageError, match="rounds"):
        Gradual(model, optimizer, recipe(Exponential(end=3)))


def test_finalize_too_early() -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(Linear(0, 8, 2)))
    train(model, pruner, 4)
    with pytest.raises(UsageError, match=r"step 4.*ends at 8.*50 %"):
        pruner.finalize()
    assert masks_of(model).total == 192, "a refused finalize() changes nothing"
    pruned = pruner.finalize(early=True)
    assert pruned.facts.sparsity == pytest.approx(0.375, abs=0.01)


@pytest.mark.parametrize("criterion", [Movement(), Snip()], ids=repr)
def test_step_without_gradients(criterion: Any) -> None:
    model = net()
    pruner = Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe(criterion=criterion))

    def two_steps() -> None:
        for _ in range(2):
            pruner.optimizer.step()
            pruner.step()

    with pytest.raises(NeedsData, match="radient"):
        two_steps()


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(UsageError, match="no parameter takes part"):
        Gradual(model, torch.optim.SGD(model.parameters(), 0.1), recipe())


# -- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
@pytest.mark.parametrize(
    "criterion",
    [Magnitude(), Movement(), Snip(), Smoothed(Magnitude()), Smoothed(Movement(), 0.5)],
    ids=repr,
)
def test_a_resumed_run_is_the_uninterrupted_run(criterion: Any, stop: int) -> None:
    wanted = recipe(Polynomial(0, 9, 2), 0.7, criterion=criterion, allocation=Ranked())

    def start() -> tuple[nn.Module, Gradual]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        return model, Gradual(model, optimizer, wanted)

    whole, pruner = start()
    train(whole, pruner, 12)
    expected = pruner.finalize()

    model, pruner = start()
    train(model, pruner, stop)
    saved = copy.deepcopy((model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()))
    model, pruner = start()
    model.load_state_dict(saved[0])
    pruner.optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    train(model, pruner, 12 - stop, stop)
    found = pruner.finalize()
    assert found.masks == expected.masks
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_recipe_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = Gradual(model, optimizer, recipe()).state_dict()
    other = Gradual(net(), optimizer, recipe(sparsity=0.5))
    with pytest.raises(UsageError, match="Another recipe"):
        other.load_state_dict(state)


# -- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_finetune_holds_the_masks(kind: str) -> None:
    model = net()
    masks = prune(model, recipes.magnitude(0.7)).masks
    attach_(model, masks)
    history = finetune(model, Data(train=BATCHES), FineTune(8, 0.05, kind, weight_decay=0.01))
    assert masks_of(model) == masks
    assert all(bool((model.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())
    assert len(history) == 8
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["sparsity"] == pytest.approx(masks.sparsity)


def test_distillation_moves_towards_the_teacher() -> None:
    teacher = net().train()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)
    student = prune(teacher, recipes.magnitude(0.7)).model.eval()
    x = torch.randn(64, 6)

    def distance() -> float:
        with torch.no_grad():
            p, q = F.log_softmax(teacher(x), -1), F.log_softmax(student(x), -1)
            return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))

    before, state = distance(), copy.deepcopy(teacher.state_dict())
    how = FineTune(20, 0.05, distill=1.0, temperature=2.0)
    finetune(student, Data(train=[(x[:32],), (x[32:],)]), how, teacher=teacher)
    assert distance() < 0.5 * before
    assert all(torch.equal(t, state[n]) for n, t in teacher.state_dict().items())
    assert teacher.training
    assert not student.training


def test_the_distillation_loss_is_hintons() -> None:
    student, teacher = net(1), net(2)
    x, y = BATCHES[0]
    how = FineTune(epochs=1, lr=1e-9, distill=0.3, temperature=3.0)
    with torch.no_grad():
        s, t = student(x), teacher(x)
        p = F.softmax(t / 3, -1)
        kl = (p * (F.log_softmax(t / 3, -1) - F.log_softmax(s / 3, -1))).sum(-1).mean()
        expected = 0.7 * F.cross_entropy(s, y) + 0.3 * 9 * kl
    history = finetune(student, Data(train=[(x, y)]), how, teacher=teacher)
    assert history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_finetune_in_a_recipe_with_a_schedule() -> None:
    wanted = dataclasses.replace(recipes.gmp(0.8, epochs=4), scope=Scope(sensitive=True))
    pruned = prune(net(), wanted, BATCHES)
    assert pruned.facts.sparsity == pytest.approx(0.8, abs=1 / 222)
    assert pruned.masks.kept == round(0.2 * 222)
    for name, mask in pruned.masks.items():
        assert bool((pruned.model.get_parameter(name)[~mask] == 0).all())


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2.5])
def test_a_schedule_that_ends_with_training_is_reached(epochs: float) -> None:
    schedule = Polynomial(0, epochs, 0.1, unit="epochs")
    wanted = recipe(schedule, 0.5, recovery=(FineTune(epochs),))
    assert prune(net(), wanted, BATCHES).facts.sparsity == pytest.approx(0.5)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(NeedsData, match="no training data"):
        finetune(net(), Data())
    with pytest.raises(NeedsData, match="no teacher"):
        finetune(net(), Data(train=BATCHES), FineTune(distill=0.5))
    with pytest.raises(DataError, match="no batches"):
        finetune(net(), Data(train=iter(BATCHES)))
    bad = [(X * torch.inf, Y)]
    with pytest.raises(DataError, match=r"step 1.*nan"):
        finetune(net(), Data(train=bad))
    with pytest.raises(UsageError, match="no fine-tuning step"):
        prune(net(), recipe(), BATCHES)
    with pytest.raises(UsageError, match="ends at epoch 5"):
        prune(net(), recipe(Linear(0, 5, 1, unit="epochs"), recovery=(FineTune(2),)), BATCHES)
    with pytest.raises(UsageError, match=r"step|epoch"):
        prune(net(), recipe(Linear(0, 500, 1), recovery=(FineTune(2),)), BATCHES)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FineTune(epochs=0),
        lambda: FineTune(lr=-1),
        lambda: FineTune(optimizer="adam"),
        lambda: FineTune(distill=1.5),
        lambda: FineTune(temperature=0),
    ],
)
def test_wrong_fine_tuning_is_refused(build: Any) -> None:
    with pytest.raises(UsageError):
        build()


def test_allocations_by_shape_work_gradually() -> None:
    model = net()
    pruner = Gradual(
        model, torch.optim.SGD(model.parameters(), 0.1), recipe(allocation=ErdosRenyi())
    )
    train(model, pruner, 8)
    assert pruner.finalize().masks.kept == round(0.25 * 192)
