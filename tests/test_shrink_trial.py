"""What a trial before a cut finds out, in evaluation and in training mode."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.allocate.widths import GivenWidths, UniformWidths
from secateur.core.errors import SelectorError, UsageError
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Scope

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Helped(nn.Module):
    """A second classifier that helps in training, at units in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 24)
        self.drop, self.o, self.aux = nn.Dropout(), nn.Linear(24, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.a(x)).relu())
        out: Tensor = self.o(self.b(hidden).relu())
        return out + 0.3 * self.aux(hidden) if self.training else out


class Picky(Helped):
    """It does not run in training mode on inputs alone."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        assert target is not None or not self.training
        out: Tensor = self.o(self.b(self.norm(self.a(x)).relu()).relu())
        return out


def shrunk(model: nn.Module, x: Tensor = X) -> Pruned:
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target.parse("params=70%"), allocation=UniformWidths(), recovery=()
    )
    return secateur.shrink(model, recipe, x)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_only_training_uses_still_runs(rows: int) -> None:
    torch.manual_seed(0)
    net = Helped()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    random = torch.random.get_rng_state()
    pruned = shrunk(net, X[:rows])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert int(pruned.model.state_dict()["norm.num_batches_tracked"]) == 0
    told = [note.text for note in pruned.facts.notes if note.where == "a"]
    assert len(told) == 1
    assert "in training mode" in told[0]
    assert pruned.model.a.out_features == 32
    assert pruned.model.b.out_features < 24
    assert pruned.model.train()(X).shape == pruned.model.eval()(X).shape


def test_a_network_that_only_evaluates_is_tried_so() -> None:
    pruned = shrunk(Picky())
    assert pruned.model.a.out_features < 32
    with pytest.raises(AssertionError):
        pruned.model.train()(X)


def test_where_nothing_is_left_the_reason_is_told() -> None:
    class Only(Helped):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.o = nn.Identity(), nn.Linear(32, 4)

    with pytest.raises(UsageError, match="in training mode"):
        shrunk(Only())


def test_an_allocation_that_names_such_a_width_is_told_why() -> None:
    recipe = secateur.ShrinkRecipe(allocation=GivenWidths({"a": 0.5}), recovery=())
    with pytest.raises(SelectorError, match=r"a: cut to 16 of 32 .*in training mode"):
        secateur.shrink(Helped(), recipe, X)
    recipe = secateur.ShrinkRecipe(allocation=GivenWidths({"z": 0.5}), recovery=())
    with pytest.raises(SelectorError, match="matches none"):
        secateur.shrink(Helped(), recipe, X)


@pytest.mark.parametrize("share", [67, 69, 75])
def test_what_was_told_of_a_choice_that_was_given_up_is_not_told(share: int) -> None:
    """A width that breaks the network is as one that was left out: the same cost, the same notes."""
    target = secateur.Target.parse(f"params={share}%")
    recipe = secateur.ShrinkRecipe(target=target, allocation=UniformWidths(), recovery=())
    torch.manual_seed(0)
    net = Helped()
    found = secateur.shrink(net, recipe, X).facts
    recipe = replace(recipe, scope=Scope(ignore=("a",)))
    wanted = secateur.shrink(net, recipe, X).facts
    assert found.measures["target"] == wanted.measures["target"]
    told = [[n for n in facts.notes if not n.where] for facts in (found, wanted)]
    assert told[0] == told[1]
