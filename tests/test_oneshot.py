"""One-shot runs from end to end: inputs stay, errors come before the work, facts are true."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oneshot_cases import CHOSEN, IMAGES, ROWS, alias, convnet, mlp, sound
from torch import Tensor, nn

from secateur import Data, FineTune, Recipe, Scope, Target, attach_, masks_of, plan, prune, recipes
from secateur.allocate import Given
from secateur.core.errors import (
    BudgetError,
    DataError,
    NeedsData,
    NonFinite,
    SelectorError,
    UsageError,
)
from secateur.drive.oneshot import prune_
from secateur.evaluate import cost_of
from secateur.frontends import discover
from secateur.pattern import NM, Columns, PerRow, Rows
from secateur.recover import BatchNorm, BiasCorrection, ColumnSweep, LeastSquares
from secateur.schedule import Exponential
from secateur.score import Magnitude, Movement, Obd, Taylor, Wanda, WoodFisher
from secateur.stats import Positions, collect

# -- the input stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "sparsegpt", "woodfisher", "synflow", "gmp"])
def test_prune_leaves_its_input_untouched(name: str) -> None:
    net = convnet().train()
    net[1].eval()
    net(IMAGES[0][0]).sum().backward()
    frozen = net[11].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    modes = [m.training for m in net.modules()]
    images = [(x.clone(), y.clone()) for x, y in IMAGES]
    pruned = prune(net, alias(name), IMAGES)
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(torch.equal(net.get_parameter(n).grad, g) for n, g in grads.items())  # type: ignore[arg-type]
    assert [m.training for m in net.modules()] == modes
    assert not frozen.requires_grad
    assert all(
        torch.equal(a, b)
        for p, q in zip(images, IMAGES, strict=True)
        for a, b in zip(p, q, strict=True)
    )
    sound(pruned, net)


def test_prune_leaves_the_random_state_of_the_caller() -> None:
    state = torch.get_rng_state()
    prune(mlp(), recipes.magnitude(0.5))
    torch.set_rng_state(state)
    net = mlp()
    before = torch.get_rng_state()
    prune(net, recipes.magnitude(0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_prune_in_place_changes_the_model_itself() -> None:
    net = mlp()
    pruned = prune_(net, recipes.magnitude(0.5))
    assert pruned.model is net
    assert float((net[0].weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("name", sorted(recipes.ALIASES))
def test_the_same_seed_gives_the_same_masks(name: str) -> None:
    torch.manual_seed(3)
    net, made = convnet(), alias(name)
    one = prune(net, made, IMAGES)
    torch.manual_seed(99)
    two = prune(net, made, IMAGES)
    assert one.masks == two.masks
    assert one.facts.fingerprint == two.facts.fingerprint


# -- scope ----------------------------------------------------------------------------------------


def taking_part(scope: Scope) -> list[str]:
    return [s.name for s in plan(convnet(), Recipe(scope=scope)).chosen]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope(), CHOSEN),
        (Scope(include=("6",)), ["6.weight"]),
        (Scope(include=("6.weight", "11")), ["6.weight", "11.weight"]),
        (Scope(include=("1*",)), ["11.weight", "13.weight"]),
        (Scope(include=("re:[36]\\.",)), ["3.weight", "6.weight"]),
        (Scope(include=("Linear",)), ["11.weight", "13.weight"]),
        (Scope(ignore=("Conv2d",)), ["11.weight"]),
        (Scope(ignore=("re:.*",), include=("6",)), []),
        (Scope(sensitive=True), ["0.weight", *CHOSEN, "13.weight"]),
        (Scope(sensitive=True, ignore=("0",)), [*CHOSEN, "13.weight"]),
        (Scope(include=("0.weight",)), ["0.weight"]),
    ],
    ids=repr,
)
def test_scope(scope: Scope, expected: list[str]) -> None:
    assert taking_part(scope) == expected


@pytest.mark.parametrize("selector", ["7.wait", "conv*", "re:^x", "Conv3d", "3.weights", "linear"])
def test_a_selector_that_matches_nothing(selector: str) -> None:
    for scope in (Scope(include=(selector,)), Scope(ignore=("6", selector))):
        with pytest.raises(SelectorError, match="matches none") as caught:
            prune(convnet(), Recipe(scope=scope))
        assert repr(selector) in str(caught.value)


def test_a_selector_that_cannot_be_read() -> None:
    with pytest.raises(SelectorError, match="expression cannot be read"):
        prune(convnet(), Recipe(scope=Scope(include=("re:(",))))


def test_levels_by_selector_in_a_run() -> None:
    recipe = Recipe(allocation=Given({"Conv2d": 0.5, "6": 0.9}), target=Target("sparsity", 0.6))
    kept = {x.name: x.sparsity for x in prune(convnet(), recipe).facts.layers}
    assert kept["3.weight"] == pytest.approx(0.5, abs=0.01)
    assert kept["6.weight"] == pytest.approx(0.9, abs=0.01)


# -- errors come before the work ------------------------------------------------------------------


@pytest.mark.parametrize("value", [90, -0.1, 1.0, math.nan])
def test_impossible_sparsity(value: float) -> None:
    with pytest.raises(BudgetError, match=r"not in \[0, 1\)"):
        recipes.magnitude(value)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(Wanda()),
        Recipe(Movement()),
        Recipe(WoodFisher()),
        Recipe(recovery=(LeastSquares(),)),
        Recipe(recovery=(BatchNorm(),)),
        Recipe(recovery=(FineTune(),)),
        Recipe(target=Target("macs", 0.5)),
        recipes.gmp(),
        recipes.synflow(),
    ],
    ids=lambda r: r.fingerprint(),
)
@pytest.mark.parametrize("data", [None, Data()], ids=["None", "empty"])
def test_what_needs_data_says_so(recipe: Recipe, data: Any) -> None:
    with pytest.raises(NeedsData, match=r"no data was given|no training batches"):
        prune(mlp(), recipe, data)


def test_gradients_need_targets() -> None:
    with pytest.raises(NeedsData, match="no target"):
        prune(mlp(), Recipe(Obd()), [ROWS[0][0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "4.weight"])
def test_weights_that_are_not_finite_are_named(name: str, bad: float) -> None:
    net = mlp()
    with torch.no_grad():
        net.get_parameter(name).flatten()[:2] = bad
    with pytest.raises(NonFinite, match=rf"'{name}'.*2 of its"):
        prune(net, recipes.magnitude())


def test_activations_that_are_not_finite_are_named() -> None:
    x = torch.randn(16, 12)
    x[3, 4] = math.inf
    with pytest.raises(NonFinite, match=r"'0\.weight'.*1 of 192"):
        prune(mlp(), recipes.wanda(), [x])


@pytest.mark.parametrize(
    ("net", "recipe", "words"),
    [
        (nn.Sequential(nn.ReLU()), Recipe(), "no parameters"),
        (nn.Sequential(nn.BatchNorm1d(3)), Recipe(), "a normalisation"),
        (nn.Embedding(4, 3), Recipe(), "an embedding"),
        (nn.Linear(10, 3), Recipe(pattern=NM(2, 4)), "10 is not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=2), Recipe(pattern=Columns()), "2 groups"),
        (nn.Linear(4, 4), Recipe(scope=Scope(ignore=("Linear",))), "ignored by 'Linear'"),
    ],
)
def test_nothing_to_prune(net: nn.Module, recipe: Recipe, words: str) -> None:
    with pytest.raises(UsageError, match="no parameter takes part") as caught:
        prune(net, recipe)
    assert words in str(caught.value)


def test_errors_leave_the_model_as_it_was() -> None:
    net = mlp()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the data ran out")
        return model(batch[0]).square().mean()

    with pytest.raises(DataError, match=r"its own loss fails .*ran out"):
        prune_(net, Recipe(Taylor()), Data(train=ROWS * 3, loss=loss))
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(p.grad is not None for p in net.parameters())


# -- facts ----------------------------------------------------------------------------------------


def test_output_errors_are_those_of_the_calibration_data() -> None:
    net, x = mlp(), torch.randn(400, 12)
    pruned = prune(net, recipes.magnitude(0.5), [x])
    layer = pruned.facts.layers[0]
    dense, sparse = net[0].weight, pruned.model[0].weight
    exact = float(((x @ (dense - sparse).T).square().sum() / (x @ dense.T).square().sum()).detach())
    assert layer.output_error == pytest.approx(exact, rel=0.5)
    assert prune(net, recipes.magnitude(0.5)).facts.layers[0].output_error is None


def test_repairs_lower_the_error_of_the_network() -> None:
    net, x = mlp(), torch.randn(200, 12) @ torch.randn(12, 12)
    errors = []
    for recovery in ((), (BiasCorrection(),), (LeastSquares(), BiasCorrection()), (ColumnSweep(),)):
        recipe = dataclasses.replace(
            recipes.magnitude(0.7), recovery=recovery, sequential=True, scope=Scope(sensitive=True)
        )
        model = prune(net, recipe, [x]).model
        errors.append(float((model(x) - net(x)).square().mean().detach()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] < errors[0]


def test_sequential_runs_see_what_is_pruned_already() -> None:
    """With sequential=True the second layer's statistics are those behind the pruned first one."""
    net, x = mlp(), torch.randn(300, 12)
    recipe = Recipe(Wanda(), PerRow(), Target("sparsity", 0.8), sequential=True)
    pruned = prune(net, recipe, [x])
    half = copy.deepcopy(net)
    half[0].load_state_dict(pruned.model[0].state_dict())
    norms = half[:2](x).square().mean(0).sqrt().detach()
    scores = net[2].weight.detach().abs() * norms
    kept = scores >= scores.sort(1, descending=True).values[:, 3:4]
    assert torch.equal(kept, pruned.masks["2.weight"])
    apart = prune(net, dataclasses.replace(recipe, sequential=False), [x])
    norms = net[:2](x).square().mean(0).sqrt().detach()
    scores = net[2].weight.detach().abs() * norms
    assert torch.equal(
        scores >= scores.sort(1, descending=True).values[:, 3:4], apart.masks["2.weight"]
    )


def test_rows_pattern_prunes_filters() -> None:
    pruned = prune(convnet(), Recipe(Magnitude(2), Rows(), Target("sparsity", 0.5)))
    for mask in pruned.masks.values():
        rows = mask.flatten(1)
        assert bool((rows.all(1) == rows.any(1)).all())
        assert int(rows.all(1).sum()) == 4


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[str, float, float]] = []
    recipe = Recipe(schedule=Exponential(end=4), recovery=(FineTune(2),))
    prune(mlp(), recipe, ROWS, progress=lambda *args: seen.append(args))
    for stage in ("pruning", "fine-tuning"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps
        assert steps[-1][0] == steps[-1][1]
        assert [d for d, _ in steps] == sorted(d for d, _ in steps)


def test_fine_tuning_after_pruning_keeps_the_masks() -> None:
    recipe = Recipe(target=Target("sparsity", 0.7), recovery=(FineTune(5, 0.1),))
    net = mlp()
    pruned = prune(net, recipe, ROWS)
    sound(pruned, net)
    assert pruned.facts.history[-1]["loss"] < pruned.facts.history[0]["loss"]
    assert pruned.facts.sparsity == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "lamp", "snip"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    pruned = prune(net, alias(name), [(ROWS[0][0].to(dtype), ROWS[0][1])])
    sound(pruned, net)
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.02)


def test_recurrent_networks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0][:, -1])

    net = Net()
    data = [(torch.randn(8, 5, 6), torch.arange(8) % 3)]
    build: Callable[[], Recipe]
    for build in (recipes.wanda, recipes.sparsegpt, recipes.snip, recipes.magnitude):
        pruned = prune(net, build(0.5), data)
        sound(pruned, net)
        assert len(pruned.masks) == 8


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_that_a_loop_calls(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    net, data = Net(), [(torch.randn(8, 5, 6), torch.arange(8) % 3)]
    for build in (recipes.magnitude, recipes.snip):
        pruned = prune(net, build(0.5), data)
        sound(pruned, net)
        assert list(pruned.masks) == ["cell.weight_ih", "cell.weight_hh"]
    with pytest.raises(UsageError, match="2 x its inputs could not be seen on the data"):
        prune(net, recipes.wanda(0.5), data)


def test_positions_of_a_convolutional_network() -> None:
    net = convnet()
    slots = [s for s in discover(net) if s.rows is not None]
    stats = collect(net, slots, [Positions()], [IMAGES[0][0]])
    found = [float(stats(Positions(), s.weight(net))) for s in slots]
    assert found == [64.0, 64.0, 16.0, 1.0, 1.0]


def test_masks_of_an_earlier_run_on_other_weights_are_kept() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2))
    first = prune(net, Recipe(scope=Scope(include=("0",))))
    attach_(first.model, first.masks)
    second = prune(first.model, Recipe(scope=Scope(include=("2",))))
    assert set(second.masks) == {"0.weight", "2.weight"}
    assert torch.equal(second.masks["0.weight"], first.masks["0.weight"])
    assert not masks_of(second.model)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        recipes.sparsegpt(0.5),
        recipes.snip(0.5),
        recipes.synflow(0.5, rounds=2),
        Recipe(target=Target("macs", 0.6)),
        Recipe(pattern=Rows()),
    ],
    ids=lambda r: type(r.criterion).__name__,
)
def test_a_layer_without_any_weights_stays_out(recipe: Recipe) -> None:
    """What a network looks like after another tool has taken all units of a layer."""
    with warnings.catch_warnings():  # torch's own: there is nothing to initialise
        warnings.simplefilter("ignore")
        net = nn.Sequential(
            nn.Linear(4, 8), nn.Linear(8, 0), nn.Linear(0, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        )
    pruned = prune(net, recipe, [(torch.randn(8, 4), torch.arange(8) % 2)])
    cost = cost_of(pruned.model, example=torch.zeros(1, 4))
    assert set(pruned.masks) == {"0.weight", "3.weight"}
    assert {n.where for n in pruned.facts.notes if n.text == "it is empty"} == {
        "1.weight",
        "2.weight",
    }
    assert cost.macs_dense == 32 + 16 + 8
    assert cost.uncounted == ()
