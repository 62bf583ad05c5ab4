"""Fine-tuning: masks hold, the student moves towards its teacher, and what cannot be trained."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradual_cases import BATCHES, X, Y, net, recipe

from secateur import Data, FineTune, Scope, attach_, finetune, masks_of, prune, recipes
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.schedule import Linear, Polynomial


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


def test_no_gradients_are_left_behind() -> None:
    tuned = dataclasses.replace(recipes.magnitude(0.5), recovery=(FineTune(1, lr=0.01),))
    for wanted in (tuned, recipes.gmp(0.5, epochs=1), recipes.rigl(0.5, epochs=1)):
        pruned = prune(net(), wanted, BATCHES)
        assert all(p.grad is None for p in pruned.model.parameters())
    model = net()
    with pytest.raises(DataError):
        finetune(model, Data(train=[*BATCHES, (X[:0], Y[:0])]))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("on_nan", ["raise", "rollback"])
def test_an_empty_batch_is_told_as_such(on_nan: str) -> None:
    with pytest.raises(DataError, match="it has no samples"):
        finetune(net(), Data(train=[*BATCHES, (X[:0], Y[:0])]), FineTune(1, on_nan=on_nan))


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
    with pytest.raises(UsageError, match="only once"):
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
