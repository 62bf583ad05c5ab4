"""Structural pruning: what the proof finds, what is refused, and what is pinned by the network's code."""

import copy
from typing import Any

import pytest
import torch
from shrink_cases import Residual, build
from torch import Tensor, nn

import secateur
from secateur.core.errors import BudgetError, DataError, NeedsData, SelectorError, UsageError
from secateur.drive.structural import cutting
from secateur.score import GroupTaylor
from secateur.structure import apply_, couple, cuts_for
from secateur.structure.masked import Proof


@pytest.fixture
def net() -> Residual:
    return build()


def test_a_silent_network_is_not_called_proved(net: Residual) -> None:
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    pruned = secateur.shrink(net, secateur.ShrinkRecipe(recovery=()), torch.zeros(1, 3, 8, 8))
    assert "vacuous" in {note.topic for note in pruned.facts.notes}
    assert "vacuous" not in {
        note.topic
        for note in secateur.shrink(
            Residual(), secateur.ShrinkRecipe(recovery=()), torch.zeros(1, 3, 8, 8)
        ).facts.notes
    }


def test_a_failed_proof_returns_nothing(net: Residual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "prove", lambda *_: Proof(0.5, 10))
    before = copy.deepcopy(net.state_dict())
    recipe = secateur.ShrinkRecipe(recovery=())
    with pytest.raises(DataError, match=r"differs from the masked one by 0\.5"):
        secateur.shrink_(net, recipe, torch.zeros(1, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_error_does_not_hide_behind_half_precision(
    net: Residual, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 1 % would, if the proof ran in the type of the weights."""
    example, recipe = torch.randn(2, 3, 8, 8).to(dtype), secateur.ShrinkRecipe(recovery=())
    pruned = secateur.shrink(net.to(dtype), recipe, example)
    assert pruned.facts.measures["proof"] < 1e-5
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}

    def spoilt(model: nn.Module, cuts: Any) -> None:
        apply_(model, cuts)
        model.get_submodule("head").weight.data.mul_(1.01)

    monkeypatch.setattr(cutting, "apply_", spoilt)
    with pytest.raises(DataError, match=r"differs from the masked one by 0\.0"):
        secateur.shrink(net, recipe, example)


def test_errors(net: Residual) -> None:
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(BudgetError, match="its targets are params, macs, bytes and latency"):
        secateur.ShrinkRecipe(target=secateur.Target("sparsity", 0.5))
    with pytest.raises(BudgetError, match="remain"):
        secateur.shrink(net, secateur.ShrinkRecipe(target=secateur.Target("params", 10.0)), example)
    with pytest.raises(UsageError, match="its own forward fails"):
        secateur.shrink(net, None, torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageError, match="neither example_inputs nor training batches"):
        secateur.shrink(net)
    with pytest.raises(NeedsData, match="GroupTaylor"):
        secateur.shrink(net, secateur.ShrinkRecipe(GroupTaylor()), example)
    unknown = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("nothing.*",)))
    with pytest.raises(SelectorError):
        secateur.shrink(net, unknown, example)
    nothing = secateur.ShrinkRecipe(scope=secateur.Scope(ignore=("*",)))
    with pytest.raises(UsageError, match="none of 3 widths takes part"):
        secateur.shrink(net, nothing, example)
    structure = couple(net, example)
    with pytest.raises(UsageError, match="nothing would be left"):
        cuts_for(net, structure, {"a.0": torch.zeros(16, dtype=torch.bool)})
    with pytest.raises(UsageError, match="none has this name"):
        cuts_for(net, structure, {"z": torch.ones(16, dtype=torch.bool)})


class Fours(nn.Module):
    """Its code wants a number of units that no operator shows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 16), nn.Linear(16, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.one.out_features % 16:
            raise ValueError("one must have sixteen units\nor more of them")
        found: Tensor = self.three(self.two(self.one(x).relu()).relu())
        return found


def test_a_width_that_the_code_cannot_do_without_is_pinned_and_told() -> None:
    torch.manual_seed(0)
    net, x = Fours().eval(), torch.randn(4, 6)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    pruned = secateur.shrink(net, recipe, x)
    assert pruned.model.get_submodule("one").out_features == 16
    assert (
        pruned.facts.measures["target"]["reached"] <= 0.5 * pruned.facts.measures["target"]["dense"]
    )
    (note,) = [n for n in pruned.facts.notes if n.topic == "pinned" and n.where == "one"]
    assert "of 16 the network raises ValueError: one must have sixteen units" in note.text
    assert pruned.model(x).shape == (4, 3)


def test_a_network_in_which_nothing_can_be_cut_says_why() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features != 16:
                raise ValueError("sixteen units")
            found: Tensor = self.two(self.one(x))
            return found

    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    with pytest.raises(UsageError, match="the network raises ValueError: sixteen units"):
        secateur.shrink(Stubborn().eval(), recipe, torch.randn(4, 6))


def test_cuts_that_only_fail_together_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.one.out_features != 16 and self.two.out_features != 16:
                raise ValueError("both")
            found: Tensor = self.three(self.two(self.one(x).relu()).relu())
            return found

    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.3), recovery=())
    with pytest.raises(UsageError, match="does with each cut alone"):
        secateur.shrink(Tied().eval(), recipe, torch.randn(4, 6))
