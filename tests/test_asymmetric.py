"""Least squares to what the dense network makes of its own inputs, against NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import Pruned, Recipe, Scope, Target, prune
from secateur.core.errors import UsageError
from secateur.recover import BiasCorrection, ColumnSweep, LeastSquares
from secateur.schedule import Exponential
from secateur.score import Magnitude, ObsSaliency

EXACT = LeastSquares(asymmetric=True, damp=0.0)


def recipe(*steps: Any, sparsity: float = 0.6, **more: Any) -> Recipe:
    settings = {"sequential": True, "scope": Scope(sensitive=True), **more}
    return Recipe(target=Target("sparsity", sparsity), recovery=steps, **settings)


class Twice(nn.Module):
    """One layer that is called twice, with unlike inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(torch.relu(self.first(x)))
        return y + self.shared(x)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Tokens, some of which are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.embed(input_ids))))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """What a layer was given is changed behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        z = self.last(y)
        y += 3
        return y * z


class Routed(nn.Module):
    """A layer that is given the samples that the hidden values send there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        chosen = (y[:, 0] > y[:, 1]).nonzero()[:, 0]
        return y.index_add(0, chosen, self.expert(y[chosen]))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 4))


def images() -> nn.Module:
    grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    back = nn.ConvTranspose2d(4, 3, 2)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), grouped, nn.ReLU(), back
    )


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    mask = (torch.arange(5) < torch.randint(2, 6, (24, 1))).long()
    return Tokens(), {"input_ids": torch.randint(9, (24, 5)), "attention_mask": mask}


CASES: dict[str, Any] = {
    "chain": lambda: (chain(), torch.randn(60, 8)),
    "images": lambda: (images(), torch.randn(20, 2, 9, 9)),
    "in place": lambda: (InPlace(), torch.randn(50, 6)),
    "twice": lambda: (Twice(), torch.randn(50, 6)),
    "text": text,
}


def case(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, batch = CASES[name]()
    if isinstance(batch, Tensor):
        batch = batch.double()
    return model.double(), batch


def seen(model: nn.Module, path: str, batch: Any) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a module, a pair a call."""
    found = []
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda _, a, y: found.append((a[0].clone(), y.clone())))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return found


def flat(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Input rows, one matrix a convolution group."""
    if isinstance(module, nn.ConvTranspose2d):
        size = module.kernel_size
        x = functional.pad(x, (size[1] - 1, size[1] - 1, size[0] - 1, size[0] - 1))
        return [functional.unfold(x, size).mT.flatten(0, 1)]
    if isinstance(module, nn.Conv2d):
        parts = x.chunk(module.groups, 1)
        how: Any = {"padding": module.padding, "stride": module.stride}
        return [functional.unfold(p, module.kernel_size, **how).mT.flatten(0, 1) for p in parts]
    return [x.flatten(0, -2)]


def outputs(module: Any, y: Tensor) -> Tensor:
    """Output rows without the bias."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        y = y.movedim(1, -1)
    return y.flatten(0, -2) - (0 if module.bias is None else module.bias.detach())


def matrix(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, nn.ConvTranspose2d):  # a convolution with the kernel turned
        x = x.transpose(0, 1).flip(2, 3)
    return x.detach().flatten(1)


def compared(dense: nn.Module, done: Pruned, path: str, batch: Any) -> tuple[Any, Any, Any, Any]:
    """Rows a group, wanted outputs, fitted weights and mask of a layer, of real tokens."""
    module = done.model.get_submodule(path)
    pairs = zip(seen(done.model, path, batch), seen(dense, path, batch), strict=True)
    rows, wanted = [], []
    for (x, _), (_, y) in pairs:
        real = batch["attention_mask"].flatten().bool() if isinstance(batch, dict) else slice(None)
        rows.append([part[real] for part in flat(module, x)])
        wanted.append(outputs(dense.get_submodule(path), y)[real])
    groups = [torch.cat(parts).numpy() for parts in zip(*rows, strict=True)]
    mask = matrix(module, done.masks[f"{path}.weight"]).numpy()
    return groups, torch.cat(wanted).numpy(), matrix(module, module.weight).numpy(), mask


@pytest.mark.parametrize("name", CASES)
def test_each_layer_is_numpys_fit_to_the_dense_outputs(name: str) -> None:
    dense, batch = case(name)
    before = copy.deepcopy(dense.state_dict())
    done = prune(dense.train(), recipe(EXACT), [batch])
    assert dense.training
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    for layer in done.facts.layers:
        path = layer.name.removesuffix(".weight")
        groups, wanted, found, mask = compared(dense, done, path, batch)
        size = len(found) // len(groups)
        lost = 0.0
        for i, (w, kept) in enumerate(zip(found, mask, strict=True)):
            x = groups[i // size]
            best = np.zeros_like(w)
            best[kept] = np.linalg.lstsq(x[:, kept], wanted[:, i], rcond=None)[0]
            assert not w[~kept].any()
            np.testing.assert_allclose(x @ w, x @ best, atol=1e-5)  # inputs may be dead or alike
            lost += np.square(x @ w - wanted[:, i]).sum()
        assert layer.output_error == pytest.approx(lost / np.square(wanted).sum(), rel=1e-6)


def test_under_autocast_products_are_those_of_single_precision() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    dense, x = Half(), torch.randn(200, 8)
    done = prune(dense, recipe(EXACT), [x])
    rows, before = (seen(net, "layers.2", x)[0][0].double() for net in (done.model, dense))
    old = dense.layers[2].weight.detach().double()  # type: ignore[index]
    wanted = (before @ old.T).numpy()
    found = done.model.layers[2].weight.detach().double()  # type: ignore[index, union-attr]
    kept = done.masks["layers.2.weight"].numpy()
    for i in range(7):
        best = np.linalg.lstsq(rows[:, kept[i]].numpy(), wanted[:, i], rcond=None)[0]
        np.testing.assert_allclose(found[i, kept[i]], best, atol=1e-5)


def test_damping_is_that_of_a_ridge_regression() -> None:
    dense, batch = case("chain")
    done = prune(dense, recipe(LeastSquares(asymmetric=True, damp=0.3)), [batch])
    (x,), wanted, found, mask = compared(dense, done, "2", batch)
    old = matrix(dense[2], dense[2].weight).numpy()  # type: ignore[index]
    ridge = 0.3 * np.square(x).mean()
    for i, kept in enumerate(mask):
        # As many more rows, which hold every survivor where it was.
        more = np.sqrt(ridge * len(x)) * np.eye(len(kept))[kept][:, kept]
        a, b = np.vstack([x[:, kept], more]), np.r_[wanted[:, i], more @ old[i, kept]]
        best = np.linalg.lstsq(a, b, rcond=None)[0]
        np.testing.assert_allclose(found[i, kept], best, atol=1e-5)


def test_it_makes_good_what_earlier_layers_lost() -> None:
    torch.manual_seed(1)
    layers = [part for _ in range(6) for part in (nn.Linear(24, 24, bias=False), nn.ReLU())]
    dense, x = nn.Sequential(*layers), torch.randn(400, 24)

    def far(step: LeastSquares) -> float:
        pruned = prune(dense, recipe(step), [x]).model
        return float((pruned(x) - dense(x)).square().sum().detach())

    assert far(LeastSquares(asymmetric=True)) < 0.9 * far(LeastSquares())


def test_later_rounds_still_fit_the_network_as_it_was() -> None:
    dense, batch = case("chain")
    plan = recipe(EXACT, schedule=Exponential(begin=0, end=3), criterion=Magnitude())
    done = prune(dense, plan, [batch])
    (x,), wanted, found, mask = compared(dense, done, "4", batch)
    best = np.linalg.lstsq(x[:, mask[1]], wanted[:, 1], rcond=None)[0]
    np.testing.assert_allclose(found[1, mask[1]], best, atol=1e-5)


def test_a_bias_after_it_keeps_the_means_of_the_dense_network() -> None:
    dense, batch = case("chain")
    for steps in ((EXACT, BiasCorrection()), (BiasCorrection(inner=EXACT),)):
        done = prune(dense, recipe(*steps), [batch])
        means = [net(batch).mean(0) for net in (done.model, dense)]
        torch.testing.assert_close(*means)
    alone = prune(dense, recipe(LeastSquares(), BiasCorrection()), [batch]).model
    assert not torch.allclose(alone(batch).mean(0), dense(batch).mean(0), atol=1e-4)


def test_rows_that_are_not_the_same_are_fitted_to_what_they_give() -> None:
    torch.manual_seed(0)
    dense, x = Routed().double(), torch.randn(64, 6).double()
    done = prune(dense, recipe(EXACT, sparsity=0.5), [x])
    noted = [note.where for note in done.facts.notes if "not the same rows" in note.text]
    assert noted == ["expert.weight"]
    rows = seen(done.model, "expert", x)[0][0].numpy()
    assert len(rows) != len(seen(dense, "expert", x)[0][0])
    old = dense.expert.weight.detach().numpy()
    kept = done.masks["expert.weight"].numpy()
    found = done.model.expert.weight.detach().numpy()  # type: ignore[union-attr]
    for i in range(8):
        best = np.linalg.lstsq(rows[:, kept[i]], rows @ old[i], rcond=None)[0]
        error = [
            np.square(rows @ old[i] - rows[:, kept[i]] @ w).sum() for w in (best, found[i, kept[i]])
        ]
        assert error[1] == pytest.approx(error[0], rel=1e-6, abs=1e-12)


def test_after_a_sweep_its_masks_stay() -> None:
    dense, batch = case("chain")
    sweep = prune(dense, recipe(ColumnSweep(), criterion=ObsSaliency()), [batch])
    both = prune(dense, recipe(ColumnSweep(), EXACT, criterion=ObsSaliency()), [batch])
    assert both.masks["0.weight"].equal(sweep.masks["0.weight"])
    far = [(net(batch) - dense(batch)).square().sum() for net in (both.model, sweep.model)]
    assert bool(far[0] < far[1])


@pytest.mark.parametrize("step", [EXACT, BiasCorrection(inner=EXACT)])
def test_it_wants_a_sequential_run(step: Any) -> None:
    with pytest.raises(UsageError, match="Add sequential=True to the recipe"):
        recipe(step, sequential=False)


def test_damping_below_zero() -> None:
    with pytest.raises(UsageError, match=r"damp=-1\): it is negative"):
        LeastSquares(asymmetric=True, damp=-1.0)
