"""What a network returns, in any form, is pinned and compared; also what positions stand for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import secateur
from secateur.core.errors import UsageError
from secateur.drive.pruned import Pruned
from secateur.structure import couple
from secateur.structure.masked import compare
from secateur.structure.outputs import predictions

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Scores:
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor
    hidden: Tensor


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Held:
    """A class of a user's own, with a reference to itself."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.inside = [{"logits": logits}, hidden]
        self.me = self


class Returns(nn.Module):
    """A classifier of ten classes that returns what a function makes of logits and hidden units."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(8, 32), nn.Linear(32, 10), form

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        return self.form(self.b(hidden), hidden)


def shrunk(model: nn.Module, example: Any = X, target: str = "params=40%") -> Pruned:
    torch.manual_seed(0)
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse(target), recovery=())
    return secateur.shrink(model.eval(), recipe, example)


@pytest.mark.parametrize("form", [Scores, Slotted, Pair, Held, lambda y, h: {"a": [y], "state": h}])
def test_outputs_in_any_form_keep_their_size(form: Callable[[Tensor, Tensor], Any]) -> None:
    model = Returns(form)
    assert len(predictions(model(X))) == 2
    with pytest.raises(UsageError, match="reaches the output"):
        shrunk(model)


@pytest.mark.parametrize(
    "form",
    [
        lambda y, h: Scores(y, y.sum(1)),
        lambda y, h: {"state": y},
        lambda y, h: Categorical(logits=y),
        lambda y, h: Independent(Normal(y, y.exp()), 1),
    ],
)
def test_classes_stay_and_hidden_units_go(form: Callable[[Tensor, Tensor], Any]) -> None:
    pruned = shrunk(Returns(form))
    assert pruned.model.b.out_features == 10
    assert pruned.model.a.out_features < 32
    assert pruned.facts.measures["proof"] < 1e-5
    assert not [note for note in pruned.facts.notes if note.topic == "vacuous"]


@pytest.mark.parametrize("form", [lambda y, h: None, lambda y, h: "done", lambda y, h: (1, {})])
def test_an_output_without_tensors_is_refused(form: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(UsageError, match="holds no tensor"):
        couple(Returns(form), X)


def test_an_iterator_in_the_output_is_refused() -> None:
    def later(y: Tensor, h: Tensor) -> Iterator[Tensor]:
        yield y * 2

    for form in (later, lambda y, h: {"a": y, "b": iter([h])}):
        with pytest.raises(UsageError, match=r"iterator.*list or a tuple"):
            couple(Returns(form), X)


@pytest.mark.parametrize(
    "form",
    [
        lambda y, h: y.argmax(-1),
        lambda y, h: y.argmin(-1) + 1,
        lambda y, h: y.max(1)[1],
        lambda y, h: y.min(1).indices,
        lambda y, h: (y.amax(1), y.median(1)),
        lambda y, h: y.sort(1)[1],
        lambda y, h: y.topk(2)[1],
        lambda y, h: torch.view_as_real(torch.complex(y, -y)).argmax(1),
        lambda y, h: y.argmax(),
        lambda y, h: torch.nn.functional.one_hot(y.argmax(1), 10),
    ],
)
def test_classes_that_are_numbered_stay(form: Callable[[Tensor, Tensor], Any]) -> None:
    pruned = shrunk(Returns(form))
    assert pruned.model.b.out_features == 10
    assert pruned.model.a.out_features < 32


@pytest.mark.parametrize(
    "form", [lambda y, h: y.max(1)[0], lambda y, h: y.amin(1), lambda y, h: y.max(1).values.sum()]
)
def test_units_of_which_only_the_largest_value_is_used_can_go(
    form: Callable[[Tensor, Tensor], Any],
) -> None:
    assert ("b.weight", 0) not in couple(Returns(form), X).pinned


class Routed(nn.Module):
    """One of six matrices a sample, by the largest score."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.o = nn.Linear(8, 32), nn.Linear(32, 6), nn.Linear(16, 4)
        self.w = nn.Parameter(torch.randn(6, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        chosen = self.w[self.r(hidden).argmax(-1)]
        return self.o(torch.einsum("bd,bde->be", hidden, chosen).relu())


def test_routes_stay() -> None:
    structure = couple(Routed(), X)
    assert "r" not in structure.by_name
    assert structure.pinned["r.weight", 0] == "the position of one of them is a value"
    pruned = shrunk(Routed())
    assert pruned.model.r.out_features == pruned.model.w.shape[0] == 6
    assert pruned.facts.measures["proof"] < 1e-5


def test_differences_of_any_type_count() -> None:
    truth = torch.arange(10)
    assert compare([truth], [truth]).error == 0
    assert compare([truth.where(truth != 3, 4)], [truth]).error == pytest.approx(0.1)
    assert compare([truth > 4], [truth > 3]).error == pytest.approx(0.1)
    wave = torch.polar(torch.ones(4), torch.arange(4.0))
    assert compare([wave], [wave]).error == 0
    assert compare([wave.conj()], [wave]).error > 1
    assert compare([torch.zeros(0)], [torch.zeros(0)]).error == 0


def test_scores_that_are_masked_out_agree() -> None:
    hidden = torch.tensor([True] * 3 + [False] * 7)
    pruned = shrunk(Returns(lambda y, h: y.masked_fill(hidden, float("-inf"))))
    assert pruned.facts.measures["proof"] < 1e-5
    inf = torch.tensor([float("inf"), 2.0])
    assert compare([inf], [inf]).error == 0
    assert compare([inf.neg()], [inf]).error == float("inf")
    assert compare([inf + 1], [inf]).error == pytest.approx(0.5)
    assert compare([inf.nan_to_num()], [inf]).error == float("inf")
    assert compare([inf * float("nan")], [inf]).error == float("inf")


class Padded(nn.Module):
    """PyTorch fuses its encoder layers without gradients, and gives zeros for padding then."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.stack(x, src_key_padding_mask=padding)
        return out


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_outputs_for_padding_are_compared_in_one_way() -> None:
    torch.manual_seed(0)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    example = torch.randn(2, 5, 8), padding
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse("params=80%"), recovery=())
    pruned = secateur.shrink(Padded().eval(), recipe, example)
    assert pruned.facts.measures["proof"] < 1e-5
