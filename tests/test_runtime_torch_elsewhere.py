"""Accelerated models given to the rest of the package: measured as they are, and pruned only restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch_runtime_cases import net, prune_

import secateur
from secateur.core.errors import UsageError
from secateur.evaluate import cost_of
from secateur.runtime import accelerate, library
from secateur.runtime.torch_layers import SparseLayer
from secateur.structure import couple

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

RECIPE = secateur.recipes.magnitude(0.9)
HALF = secateur.ShrinkRecipe(target=secateur.Target("macs", 0.5))


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: secateur.prune(model, RECIPE),
        lambda model: secateur.prune(nn.DataParallel(model), RECIPE),
        lambda model: secateur.prune_(model, RECIPE),
        secateur.plan,
        lambda model: secateur.shrink(model, HALF, images()),
        lambda model: secateur.Gradual(
            model,
            torch.optim.SGD(model.parameters()),
            replace(RECIPE, schedule=secateur.schedule.Polynomial(0, 10, 1)),
        ),
        lambda model: couple(model, images()),
        lambda model: secateur.export_onnx(model, images(), "never.onnx"),
    ],
)
def test_what_changes_weights_asks_to_restore_first(ask: Callable[[nn.Module], object]) -> None:
    ours = accelerate(prune_(net()))
    with pytest.raises(
        UsageError, match=r"it is accelerated .*SparseLayer.*restore\(\) first"
    ) as e:
        ask(ours)
    assert all(e.value.parts().values())


def test_what_is_measured_are_the_weights_that_are_packed() -> None:
    module = prune_(net())
    ours = accelerate(copy.deepcopy(module))
    batches = [(images(), torch.randint(10, (2,)))]
    assert cost_of(ours, example=images()) == cost_of(module, example=images())
    assert cost_of(module).parameters > cost_of(module).nonzeros
    found = secateur.compare(module, ours, batches, latency=False)
    assert found.a.cost == found.b.cost
    assert found.identical
    assert found.agreement == 1
    assert secateur.measure(ours, batches).latency is not None
    assert any(isinstance(layer, SparseLayer) for layer in ours.modules())
