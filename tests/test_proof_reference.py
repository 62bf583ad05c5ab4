"""The masked network that a cut is proved against: what it reduces, normalises and draws."""

import copy
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur.allocate.widths import UniformWidths
from secateur.core.errors import DataError
from secateur.structure import apply_, couple, cuts_for, prove


class Middle(nn.Module):
    """A function between two convolutions; the units between them can be cut."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def error(net: nn.Module, example: Tensor = X, name: str = "a") -> float:
    """Of the cut that keeps every other unit, and the first ones."""
    net.eval()
    structure = couple(net, example)
    assert name in structure.by_name, structure.pinned
    groups = structure.by_name[name].groups
    keep = {name: (torch.arange(groups) % 2 == 0) | (torch.arange(groups) < groups // 4)}
    small = copy.deepcopy(net)
    apply_(small, cuts_for(small, structure, keep))
    return prove(net, small, structure, keep, example).error


REDUCED = {
    "median": lambda x: x * x.median(1, keepdim=True).values,
    "prod": lambda x: x * (x.sigmoid() + 0.5).prod(1, keepdim=True),
    "max of negative numbers": lambda x: x * (-x.exp()).max(1, keepdim=True)[0],
    "min": lambda x: x * x.exp().min(1, keepdim=True)[0],
    "amin": lambda x: x * x.exp().amin(1, keepdim=True),
    "norm": lambda x: x / torch.norm(x + 1, dim=1, keepdim=True),
    "std_mean": lambda x: x * torch.std_mean(x + 1, dim=1, keepdim=True)[0],
    "all": lambda x: x * (x + 9 > 0).all(1, keepdim=True),
    "all at once": lambda x: x * (x + 1).median() * x.exp().min(),
    "over channels and rows": lambda x: x * (x + 1).std((1, 2), keepdim=True),
}


@pytest.mark.parametrize("middle", REDUCED.values(), ids=REDUCED)
def test_reductions_see_kept_units_only(middle: Callable[[Tensor], Tensor]) -> None:
    assert error(Middle(middle)) < 1e-5


def test_a_norm_over_several_axes_sees_kept_units_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.LayerNorm([16, 6, 6]), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        net[1].weight.normal_()
        net[1].bias.normal_()
    assert error(net, name="0") < 1e-5


DRAWN = {
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand_like": lambda x: x * torch.rand_like(x),
    "dropout": lambda x: F.dropout(x, 0.5),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "in place": lambda x: x + torch.empty_like(x).normal_() + torch.empty_like(x).uniform_(),
    "a generator": lambda x: x + torch.empty_like(x).exponential_(generator=torch.Generator()),
    "gumbel": lambda x: x * F.gumbel_softmax(x.flatten(2), dim=-1).view(x.shape),
    "two draws": lambda x: (x + torch.randn_like(x)) * torch.randn_like(x.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("middle", DRAWN.values(), ids=DRAWN)
def test_kept_units_draw_the_same_numbers(middle: Callable[[Tensor], Tensor]) -> None:
    net, random = Middle(middle), torch.random.get_rng_state()
    assert error(net) < 1e-5
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_wrong_cut_of_a_network_that_draws_is_found() -> None:
    net = Middle(DRAWN["randn_like"]).eval()
    structure = couple(net, X)
    keep = {"a": torch.arange(16) < 8}
    small = copy.deepcopy(net)
    apply_(small, cuts_for(small, structure, {"a": torch.arange(16) >= 8}))
    assert prove(net, small, structure, keep, X).error > 0.1


class Misread(nn.Module):
    """Two widths, and a function of the first that is wrong after a cut of it."""

    def __init__(self, middle: Callable[["Misread", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(24, 4)
        self.middle, self.width = middle, 32

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.b(self.middle(self, self.a(x).relu())).relu())
        return out


COMPUTED = "its code computes with their number, 32"
MISREAD = {
    "sum by width": (lambda _, x: x * (x.sum(1, keepdim=True) / x.size(1)), COMPUTED),
    "root of width": (lambda _, x: x * x.shape[1] ** -0.5, COMPUTED),
    "inverse of width": (lambda _, x: x * (1 / x.shape[1]), COMPUTED),
    "width times": (lambda _, x: x.shape[1] * x, COMPUTED),
    "width as a float": (lambda _, x: x * float(x.shape[1]), COMPUTED),
    "root by math": (lambda _, x: x / math.sqrt(x.shape[1]), COMPUTED),
    "number of elements": (lambda _, x: x / x.numel() * 100, "is not understood"),
    "literal slice": (
        lambda _, x: torch.cat([x[:, :16].tanh(), x[:, 16:]], 1),
        "its code slices them at the number 16",
    ),
    "literal part": (
        lambda _, x: x * x[:, :16].mean(1, keepdim=True),
        "its code slices them at the number 16",
    ),
    "attribute": (
        lambda net, x: x.view(len(x), net.width) * math.sqrt(net.width),
        "its code computes with the value of width",
    ),
}


@pytest.mark.parametrize(("middle", "why"), MISREAD.values(), ids=MISREAD)
def test_what_cannot_be_proved_is_pinned_with_a_note(
    middle: Callable[[Misread, Tensor], Tensor], why: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target.parse("params=70%"), allocation=UniformWidths(), recovery=()
    )
    pruned = secateur.shrink(Misread(middle), recipe, x)
    assert pruned.model.a.out_features == 32
    assert pruned.model.b.out_features < 24
    assert pruned.facts.measures["proof"] < 1e-5
    told = [n.text for n in pruned.facts.notes if n.topic == "pinned" and n.where == "a"]
    assert len(told) == 1, told
    assert told[0].startswith("cut to ")
    assert "differs from the masked one" in told[0]
    assert told[0].endswith(why)


def test_a_network_that_differs_from_run_to_run_is_refused() -> None:
    def noisy(_: Misread, x: Tensor) -> Tensor:
        return x * random.random()

    net = Misread(noisy)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError, match="Two runs of the uncut network"):
        secateur.shrink_(net, secateur.ShrinkRecipe(recovery=()), torch.randn(4, 8))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_widths_that_are_wrong_only_together_are_refused() -> None:
    class Tied(Misread):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            both = self.a.out_features < 32 and self.b.out_features < 24
            return out + 1 if both else out

    recipe = secateur.ShrinkRecipe(
        target=secateur.Target.parse("params=50%"), allocation=UniformWidths(), recovery=()
    )
    with pytest.raises(DataError, match="differs from the masked one"):
        secateur.shrink(Tied(lambda _, x: x), recipe, torch.randn(4, 8))


class Latent(nn.Module):
    """A variational autoencoder; its latent units can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.mu, self.var = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.d, self.o = nn.Linear(8, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x).relu()
        mean, wide = self.mu(h), self.var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * wide)
        return self.o(self.d(z).relu()).sigmoid()


def test_an_autoencoder_that_draws_is_cut() -> None:
    torch.manual_seed(0)
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse("params=50%"), recovery=())
    pruned = secateur.shrink(Latent(), recipe, torch.randn(4, 16))
    assert pruned.facts.measures["proof"] < 1e-5
    assert bool(pruned.model(torch.randn(4, 16)).isfinite().all())
