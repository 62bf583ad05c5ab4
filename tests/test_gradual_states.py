"""What others do to a network in gradual pruning: states loaded, values changed, optimizers replaced."""

from __future__ import annotations

import copy

import pytest
import regrow_cases as regrow
import torch
import torch.nn.functional as F
from gradual_cases import BATCHES, net, recipe, train
from torch import nn

from secateur import Gradual, Masks, Pruned, Recipe, Scope, TopKast
from secateur.core.errors import UsageError
from secateur.drive.training.regrow import Regrow
from secateur.schedule import Linear, OneShot, Polynomial
from secateur.score import Taylor


def sgd(*parts: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for part in parts for p in part.parameters()], 0.1, momentum=0.9)


def start(what: Recipe | None = None) -> tuple[nn.Sequential, Gradual]:
    model = net()
    return model, Gradual(model, sgd(model), what or recipe())


def true_masks(pruned: Pruned) -> Masks:
    return Masks({n: pruned.model.get_parameter(n) != 0 for n in pruned.masks})


def test_states_may_be_loaded_in_any_order() -> None:
    model, pruner = start()
    train(model, pruner, 9)
    saved = copy.deepcopy([model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()])
    for order in ([0, 1, 2], [2, 1, 0]):
        other, later = start()
        parts = [other, later.optimizer, later]
        for place in order:
            parts[place].load_state_dict(saved[place])
        train(other, later, 3, 9)
        pruned = later.finalize()
        assert pruned.masks == true_masks(pruned)
        assert pruned.facts.sparsity == pytest.approx(0.75, abs=0.01)


def test_weights_of_an_earlier_moment_keep_its_masks_and_are_no_result() -> None:
    model, pruner = start()
    train(model, pruner, 4)
    best = copy.deepcopy(model.state_dict())
    train(model, pruner, 6, 4)
    model.load_state_dict(best)
    with pytest.raises(UsageError, match="state of the model from another moment was loaded"):
        pruner.finalize()
    pruned = pruner.finalize(early=True)
    assert pruned.masks == true_masks(pruned)
    assert 0 < pruned.facts.sparsity < 0.7
    (note,) = (n for n in pruned.facts.notes if n.topic == "target")
    assert note.text.endswith("the masks are those of another moment than the last update")


def test_weights_of_a_later_moment_are_a_result() -> None:
    model, pruner = start()
    train(model, pruner, 9)
    best = copy.deepcopy(model.state_dict())
    train(model, pruner, 3, 9)
    model.load_state_dict(best)
    pruned = pruner.finalize()
    assert torch.equal(pruned.model[0].weight, best["0.weight"])


def test_masks_stay_held_when_parameters_are_replaced() -> None:
    model, pruner = start()
    train(model, pruner, 9)
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    pruner.step()
    assert int((model[0].weight != 0).sum()) == int(pruner.masks["0.weight"].sum())


def test_another_number_of_steps_in_an_epoch_is_another_schedule() -> None:
    in_epochs = recipe(Polynomial(0, 2, 1, unit="epochs"))

    def begin(steps: int) -> Gradual:
        model = net()
        return Gradual(model, sgd(model), in_epochs, steps_per_epoch=steps)

    state = begin(8).state_dict()
    begin(8).load_state_dict(state)
    with pytest.raises(UsageError, match="saved with steps_per_epoch=8"):
        begin(4).load_state_dict(state)


def test_weights_of_another_optimizer_are_named() -> None:
    model = net()
    pruner = Gradual(model, sgd(model[0], model[4]), recipe())
    (note,) = (n for n in pruner.facts.notes if n.topic == "optimizer")
    assert note.where == "2.weight"


@pytest.mark.parametrize("part", [Regrow(frequency=2), TopKast(frequency=2)])
def test_an_exchange_needs_all_weights_in_its_optimizer(part: Regrow | TopKast) -> None:
    model = net()
    with pytest.raises(UsageError, match=r"does not train '2\.weight'"):
        Gradual(model, sgd(model[0], model[4]), recipe(regrow=part), steps=40)
    assert not list(model.buffers())
    model[2].requires_grad_(False)  # a frozen one takes no part
    Gradual(model, sgd(model[0], model[4]), recipe(regrow=part), steps=40)


@pytest.mark.parametrize("part", [Regrow(frequency=3), TopKast(frequency=3)])
def test_an_optimizer_that_never_steps_exchanged_nothing(part: Regrow | TopKast) -> None:
    model, pruner = regrow.start(regrow.recipe(part))
    regrow.train(model, pruner, 20)
    other = sgd(model)  # made anew, as people do after unfreezing layers
    for t in range(20, 40):
        regrow.backward(model, pruner, t)
        other.step()
        pruner.step()
    with pytest.raises(UsageError, match="stepped last at step 20"):
        pruner.finalize()
    assert pruner.finalize(early=True).facts.sparsity == pytest.approx(0.75, abs=0.01)


def test_top_kast_takes_over_what_others_do_to_the_weights() -> None:
    model, pruner = regrow.start(regrow.recipe(TopKast(frequency=100)))
    regrow.train(model, pruner, 5)
    best = copy.deepcopy(model.state_dict())
    regrow.train(model, pruner, 5, 5)
    with torch.no_grad():
        model[0].weight.clamp_(-0.05, 0.05)
    for group in pruner.optimizer.param_groups:
        group["lr"] = 0.0
    regrow.train(model, pruner, 1, 10)
    assert float(model[0].weight.detach().abs().max()) <= 0.05 + 1e-7
    model.load_state_dict(best)
    regrow.train(model, pruner, 1, 11)
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[name])


def test_a_mean_of_gradients_is_of_the_steps_since_the_last_update() -> None:
    wanted = recipe(Linear(0, 8, 4), criterion=Taylor())
    model, pruner = start(wanted)
    train(model, pruner, 4)
    saved = copy.deepcopy([model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()])
    layers = (model[0], model[2])
    squares = [torch.zeros_like(layer.weight) for layer in layers]
    for t in range(4, 8):
        x, y = BATCHES[t % 3]
        pruner.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        squares = [s + v.weight.grad.square() for s, v in zip(squares, layers, strict=True)]
        pruner.optimizer.step()
        values = [layer.weight.detach().clone() for layer in layers]
        before = pruner.masks
        pruner.step()
    pairs = zip(pruner.masks.items(), values, squares, strict=True)
    for (name, found), value, square in pairs:
        scores = (value.square() * square * before[name]).flatten()
        best = torch.zeros_like(found.flatten())
        best[scores.topk(int(found.sum())).indices] = True
        assert torch.equal(found.flatten(), best)
    # What a state of between the updates is continued with is the same.
    other, resumed = start(wanted)
    for part, state in zip((other, resumed.optimizer, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(other, resumed, 4, 4)
    assert resumed.masks == pruner.masks


@pytest.mark.parametrize("part", [Regrow(frequency=3), TopKast(frequency=3)])
def test_weights_with_sparse_gradients_are_exchanged(part: Regrow | TopKast) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(30, 16, sparse=True), nn.Flatten(), nn.Linear(48, 3, bias=False)
    )
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    wanted = recipe(regrow=part, scope=Scope(sensitive=True), schedule=OneShot(unit="steps"))
    pruner = Gradual(model, optimizer, wanted, steps=20)
    ids = torch.arange(30).reshape(10, 3)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(ids), torch.arange(10) % 3).backward()
        optimizer.step()
        pruner.step()
    pruned = pruner.finalize()
    assert pruned.masks == true_masks(pruned)
    assert pruned.facts.sparsity == pytest.approx(0.75, abs=0.01)
    kept = pruned.masks["0.weight"]
    assert not torch.equal(pruned.model[0].weight[kept], before[kept])
    assert sum(int(event["grown"]) for event in pruned.facts.history) > 0


def test_notes_of_before_an_interruption_are_in_the_facts_of_the_resumed_run() -> None:
    model, pruner = start()
    train(model, pruner, 3)
    pruner.facts.note("unseen", "0.weight", "the data of a mask update did not show its inputs")
    _, resumed = start()
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert resumed.facts.notes == pruner.facts.notes
    assert resumed.facts.history == pruner.facts.history
