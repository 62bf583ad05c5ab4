"""From construction to finalize(): several pruners, what is refused, and what an error leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Gradual, Recipe, Regrow, Scope, Target, attach_, detach_, masks_of
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.pattern import Rows
from secateur.schedule import Polynomial

HALF = Target("sparsity", 0.5)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def recipe(end: int = 8, **more: Any) -> Recipe:
    return Recipe(**{"target": HALF, "schedule": Polynomial(0, end, 2), **more})


def only(name: str) -> Scope:
    return Scope(include=(name,))


def train(model: nn.Module, optimizer: Any, pruners: Any, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
        for pruner in pruners:
            pruner.step()


# -- several pruners on one model -----------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pruners_of_disjoint_weights_do_not_know_each_other(order: tuple[int, int]) -> None:
    wanted = [recipe(4, scope=only("0")), recipe(10, scope=only("2"), pattern=Rows())]
    model = net()
    optimizer = sgd(model)
    pruners = [Gradual(model, optimizer, r) for r in wanted]
    train(model, optimizer, pruners, 12)
    assert [list(p.masks) for p in pruners] == [["0.weight"], ["2.weight"]]
    done = {i: pruners[i].finalize() for i in order}
    for i, name in enumerate(("0.weight", "2.weight")):
        assert list(done[i].masks) == [name]
        assert [layer.name for layer in done[i].facts.layers] == [name]
        assert done[i].facts.sparsity == pytest.approx(0.5, abs=0.01)
        assert not model.get_parameter(name)[~done[i].masks[name]].any()
    assert not masks_of(model)


def test_one_pruner_goes_on_after_another_has_ended() -> None:
    model = net()
    optimizer = sgd(model)
    first = Gradual(model, optimizer, recipe(4, scope=only("0")))
    second = Gradual(model, optimizer, recipe(12, scope=only("2")))
    train(model, optimizer, [first, second], 6)
    first.finalize()
    train(model, optimizer, [second], 6, begin=6)
    assert second.finalize().facts.sparsity == pytest.approx(0.5, abs=0.01)


def test_weights_that_another_pruner_grows_are_not_held_down() -> None:
    """Each holds its own masks only: the second one saw the first mask of the other."""

    def run(with_second: bool) -> dict[str, torch.Tensor]:
        model = net()
        optimizer = sgd(model)
        wanted = Recipe(target=HALF, regrow=Regrow("random", frequency=2), scope=only("0"))
        pruners = [Gradual(model, optimizer, wanted, steps=12)]
        if with_second:
            never = recipe(1000, scope=only("2"), schedule=Polynomial(999, 1000, 1))
            pruners.append(Gradual(model, optimizer, never))
        train(model, optimizer, pruners, 12)
        pruners[0].finalize()
        return {n: p.detach() for n, p in model.named_parameters()}

    alone, together = run(False), run(True)
    assert all(torch.equal(alone[n], together[n]) for n in alone)


def test_masks_of_an_earlier_run_on_other_weights_stay() -> None:
    model = net()
    given = Masks({"0.weight": torch.arange(72).reshape(12, 6) % 3 > 0})
    attach_(model, given)
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe(scope=only("2")))
    train(model, optimizer, [pruner], 8)
    assert not model[0].weight[~given["0.weight"]].any()
    pruned = pruner.finalize()
    assert set(pruned.masks) == {"0.weight", "2.weight"}
    assert torch.equal(pruned.masks["0.weight"], given["0.weight"])
    assert not masks_of(model)


def test_a_copy_of_a_model_has_masks_and_no_pruner() -> None:
    model = net()
    pruner = Gradual(model, sgd(model), recipe(scope=only("0")))
    twin = copy.deepcopy(model)
    other = Gradual(twin, sgd(twin), recipe(scope=only("2")))
    assert set(other.masks) == {"0.weight", "2.weight"}
    assert set(pruner.masks) == {"0.weight"}


def test_masks_that_were_taken_away_are_missed() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe())
    detach_(model)
    with pytest.raises(UsageError, match=r"mask of '0\.weight' is no longer on the model"):
        train(model, optimizer, [pruner], 2)


# -- the end --------------------------------------------------------------------------------------


def test_a_result_is_complete_after_finalize() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe())
    train(model, optimizer, [pruner], 4)
    with pytest.raises(UsageError, match="the schedule ends at 8"):
        pruner.finalize()
    train(model, optimizer, [pruner], 4, begin=4)  # that was no end
    pruned = pruner.finalize()
    layers = list(pruned.facts.layers)
    for act in (pruner.finalize, lambda: pruner.finalize(early=True), pruner.step):
        with pytest.raises(UsageError, match=r"finalize\(\) was called before, at step 8"):
            act()
    assert pruned.facts.layers == layers
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("how", [{}, {"regrow": Regrow("random", frequency=2)}], ids=repr)
def test_no_step_follows_an_early_end(how: Any) -> None:
    model = net()
    optimizer = sgd(model)
    schedule = {} if how else {"schedule": Polynomial(0, 16, 2)}
    pruner = Gradual(model, optimizer, Recipe(target=HALF, **schedule, **how), steps=16)
    train(model, optimizer, [pruner], 5)
    pruner.finalize(early=True)
    with pytest.raises(UsageError, match=r"step\(\): finalize\(\) was called before"):
        train(model, optimizer, [pruner], 3)
