"""Pruners under optimizers that compute, scale or drop gradients inside their own step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import Gradual, Recipe, Target
from secateur.allocate import Ranked
from secateur.core.errors import NeedsData
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.schedule import Alternating, Polynomial
from secateur.score import Movement, Snip
from secateur.stats.steps import before_update

STEPS = 24
GENERATOR = torch.Generator().manual_seed(1)
BATCHES = [(x, x[:, :4].argmax(1)) for x in torch.randn(8, 16, 12, generator=GENERATOR)]
TARGET = Target("sparsity", 0.8)
RECIPES = {
    "magnitude": Recipe(target=TARGET, schedule=Polynomial(0, 12, 3)),
    "movement": Recipe(
        Movement(), target=TARGET, allocation=Ranked(), schedule=Polynomial(3, 12, 3)
    ),
    "snip": Recipe(Snip(), target=TARGET, allocation=Ranked(), schedule=Polynomial(3, 12, 3)),
    "top-kast": Recipe(target=TARGET, regrow=TopKast(extra=0.1, frequency=5)),
    "set": Recipe(target=TARGET, regrow=Regrow("random", frequency=4)),
    "rigl": Recipe(target=TARGET, regrow=Regrow("gradient", frequency=4)),
    "rigl, all steps": Recipe(
        target=TARGET, regrow=Regrow("gradient", frequency=4, skip_step=False)
    ),
    "ac/dc": Recipe(target=TARGET, schedule=Alternating(0, 16, 4)),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)
    )


def sgd(model: nn.Module, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adamw(model: nn.Module, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)


def trained(
    recipe: Recipe,
    make: Callable[..., torch.optim.Optimizer],
    how: str = "plain",
    scaler: torch.amp.GradScaler | None = None,
    overflows: int = 0,
    **more: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and weights after a training; ``how``: with a closure, by place or name, or without.

    The gradients of the first steps, and of two later ones, overflow if that is asked for.
    """
    model = net()
    optimizer = make(model, **more)
    pruner = Gradual(model, optimizer, recipe, steps=STEPS)
    for step in range(STEPS):
        x, y = BATCHES[step % len(BATCHES)]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if scaler is not None:
            closure()
            if step < overflows or (overflows and step in {9, 16}):
                model.get_parameter("0.weight").grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        elif how == "plain":
            closure()
            optimizer.step()
        else:
            loss = optimizer.step(closure) if how == "closure" else optimizer.step(closure=closure)
            assert loss is not None
        pruner.step()
    masks = dict(pruner.finalize().masks.items())
    return masks, {n: p.detach() for n, p in model.named_parameters()}


def require_same(
    found: tuple[dict[str, Tensor], dict[str, Tensor]],
    wanted: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("how", ["closure", "named"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_closure_changes_nothing(name: str, how: str, make: Any) -> None:
    require_same(trained(RECIPES[name], make, how), trained(RECIPES[name], make))


@pytest.mark.parametrize("name", RECIPES)
def test_scaled_gradients_change_nothing(name: str) -> None:
    # A power of two: scaling loses no bit.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    require_same(
        trained(RECIPES[name], adamw, scaler=scaler, fused=True),
        trained(RECIPES[name], adamw, fused=True),
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_steps_that_a_scaler_leaves_out(name: str, fused: bool) -> None:
    """Gradients overflow in the first steps: those are dropped, and training ends as it should."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    masks, weights = trained(RECIPES[name], adamw, scaler=scaler, overflows=5, fused=fused)
    assert scaler.get_scale() == 2.0**3
    kept = sum(int(m.sum()) for m in masks.values())
    assert kept == pytest.approx(0.2 * sum(m.numel() for m in masks.values()), abs=2)
    for key, mask in masks.items():
        assert torch.isfinite(weights[key]).all()
        assert not weights[key][~mask].any()


def test_criteria_wait_for_the_first_step_of_a_scaler() -> None:
    recipe = Recipe(Movement(), target=TARGET, allocation=Ranked(), schedule=Polynomial(0, 12, 1))
    masks, _ = trained(recipe, sgd, scaler=torch.amp.GradScaler("cpu"), overflows=5)
    assert all(0 < int(m.sum()) < m.numel() for m in masks.values())


def test_a_loop_that_never_steps_is_told() -> None:
    model = net()
    recipe = Recipe(Movement(), target=TARGET, schedule=Polynomial(0, 4, 1))
    pruner = Gradual(model, sgd(model), recipe)
    for _ in range(3):
        pruner.step()
    with pytest.raises(NeedsData, match="no gradient was seen in 4 steps"):
        pruner.step()


def test_only_the_first_call_of_a_closure_counts() -> None:
    model, (x, y) = net(), BATCHES[0]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    calls: list[str] = []
    handle = before_update(optimizer, lambda _: calls.append("act"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append("loss")
        return loss

    optimizer.step(closure)
    assert calls[:2] == ["loss", "act"]
    assert calls.count("act") == 1 < calls.count("loss")
    handle.remove()
    optimizer.step(closure)
    assert calls.count("act") == 1


def test_a_step_left_out_leaves_the_values_of_topkast() -> None:
    model, scaler = net(), torch.amp.GradScaler("cpu")
    optimizer = adamw(model, fused=True)
    pruner = Gradual(model, optimizer, RECIPES["top-kast"], steps=STEPS)

    def values() -> dict[str, Tensor]:
        state = pruner.state_dict()["regrow"]["values"]
        return {name: value.clone() for name, value in state.items()}

    for step in range(3):
        before = values()
        x, y = BATCHES[step]
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if step == 1:
            model.get_parameter("0.weight").grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert all(torch.equal(v, before[n]) for n, v in values().items()) == (step == 1)
        assert any(bool(v[model.get_parameter(n) == 0].any()) for n, v in values().items())
