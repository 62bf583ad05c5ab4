"""Compensation-aware scores against least squares by brute force."""

import pytest
import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.groups import groups_of
from secateur.frontends import discover
from secateur.score import Reconstruction
from secateur.stats.groups import collect_groups
from secateur.structure import couple

UNITS = 6


def net(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(5, UNITS), nn.ReLU(), nn.Linear(UNITS, 4)), torch.randn(
            400, 5
        )
    model = nn.Sequential(nn.Conv2d(2, UNITS, 3), nn.ReLU(), nn.Conv2d(UNITS, 4, 2))
    return model, torch.randn(40, 2, 6, 6)


def scores(model: nn.Module, x: Tensor, criterion: Reconstruction) -> Tensor:
    structure = couple(model, x[:1])
    groups = groups_of(model, structure.widths, discover(model))
    stats = collect_groups(model, groups, criterion.needs, [(x, None)])
    return criterion(groups[0], stats)


def rows(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Centred inputs of the last layer, its weight as a matrix, and columns a unit."""
    with torch.no_grad():
        hidden = model[:2](x)  # type: ignore[index]
        if hidden.ndim == 4:
            hidden = nn.functional.unfold(hidden, 2).transpose(1, 2).flatten(0, 1)
    hidden = hidden.double()
    weight = model[2].weight.detach().double().flatten(1)  # type: ignore[index]
    return hidden - hidden.mean(0), weight, weight.shape[1] // UNITS


def lost(model: nn.Module, x: Tensor, gone: list[int]) -> float:
    """Share of the output energy that no choice of the other columns can bring back."""
    inputs, weight, taps = rows(model, x)
    wanted = inputs @ weight.T
    kept = [c for c in range(weight.shape[1]) if c // taps not in gone]
    fitted = inputs[:, kept] @ torch.linalg.lstsq(inputs[:, kept], wanted, driver="gelsd").solution
    return float((wanted - fitted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_cheapest_group_costs_what_least_squares_says(kind: str) -> None:
    model, x = net(kind)
    found = scores(model, x, Reconstruction(damping=1e-9))
    wanted = [lost(model, x, [group]) for group in range(UNITS)]
    first = int(found.argmin())
    assert first == min(range(UNITS), key=wanted.__getitem__)
    assert float(found[first]) == pytest.approx(wanted[first], rel=1e-3)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_next_one_is_judged_after_the_refit(kind: str) -> None:
    model, x = net(kind)
    found = scores(model, x, Reconstruction(damping=1e-9))
    first, second = found.argsort()[:2].tolist()
    alone = lost(model, x, [first])
    together = {g: lost(model, x, [first, g]) for g in range(UNITS) if g != first}
    assert second == min(together, key=together.__getitem__)
    assert float(found[second]) == pytest.approx(max(together[second] - alone, alone), rel=1e-2)


def test_one_of_two_copies_is_free_and_the_other_is_not() -> None:
    model, x = net("linear")
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[1]  # type: ignore[index]
        model[0].bias[3] = model[0].bias[1]  # type: ignore[index]
    found = scores(model, x, Reconstruction(damping=1e-9))
    copies = sorted(found[[1, 3]].tolist())
    assert copies[0] < 1e-6
    assert copies[1] > 1e-3


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="damping"):
        Reconstruction(damping=0)
    with pytest.raises(UsageError, match="steps"):
        Reconstruction(steps=0)
