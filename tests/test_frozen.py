"""Frozen layers, and layers that the forward pass never reaches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, Gradual, Recipe, Target, prune, recipes
from secateur.core.errors import UsageError
from secateur.experiments import TicketPlan, Training, find_ticket
from secateur.schedule import Polynomial
from secateur.score import Movement

GIVEN = torch.Generator().manual_seed(0)
BATCHES = [(x, x[:, :4].argmax(1)) for x in torch.randn(6, 16, 16, generator=GIVEN)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def half_frozen() -> nn.Sequential:
    net = mlp()
    net[0].requires_grad_(False)
    return net


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.dead = nn.Linear(16, 32), nn.Linear(32, 32)
        self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_movement_leaves_frozen_layers_out_with_a_note() -> None:
    pruned = prune(half_frozen(), recipes.movement(0.5, epochs=2), BATCHES)
    assert list(pruned.masks) == ["2.weight"]
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.01)
    (note,) = (n for n in pruned.facts.notes if n.where == "0.weight")
    assert note.topic == "left-out"
    assert "frozen" in note.text
    assert "Movement" in note.text


def test_gradual_leaves_frozen_layers_out_too() -> None:
    net = half_frozen()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    recipe = Recipe(Movement(), target=Target("sparsity", 0.5), schedule=Polynomial(2, 6, 2))
    pruner = Gradual(net, optimizer, recipe)
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        pruner.step()
    assert list(pruner.finalize().masks) == ["2.weight"]


def test_movement_of_a_frozen_network_says_so() -> None:
    net = mlp().requires_grad_(False)
    optimizer = torch.optim.SGD(mlp().parameters(), 0.1)
    with pytest.raises(UsageError, match="frozen"):
        Gradual(net, optimizer, Recipe(Movement(), schedule=Polynomial(0, 4, 1)))


def test_other_criteria_prune_frozen_layers() -> None:
    for recipe in (recipes.grasp(0.5), recipes.snip(0.5), recipes.gmp(0.5, epochs=2)):
        net = half_frozen()
        assert list(prune(net, recipe, BATCHES).masks) == ["0.weight", "2.weight"]
        assert not net[0].weight.requires_grad
    free, frozen = (prune(net, recipes.grasp(0.5), BATCHES) for net in (mlp(), half_frozen()))
    assert free.masks == frozen.masks


def test_a_weight_that_is_never_reached_has_the_gradient_zero() -> None:
    pruned = prune(Unused(), recipes.movement(0.5, epochs=2), BATCHES)
    assert list(pruned.masks) == ["a.weight", "dead.weight", "b.weight"]
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("recipe", [Recipe(recovery=FineTune(1)), recipes.gmp(0.5, epochs=1)])
def test_a_frozen_network_is_not_trained(recipe: Recipe) -> None:
    with pytest.raises(UsageError, match="all 6 parameters are frozen"):
        prune(mlp().requires_grad_(False), recipe, BATCHES)


def test_tickets_of_a_frozen_network_are_refused(tmp_path: object) -> None:
    data = Data(train=BATCHES, test=BATCHES)
    plan = TicketPlan(training=Training(epochs=1), levels=(0.5,))
    with pytest.raises(UsageError, match="all 6 parameters are frozen"):
        find_ticket(
            lambda: mlp().requires_grad_(False), Recipe(), data, folder=str(tmp_path), plan=plan
        )
