"""Mistakes that people make: each is an error in four parts that says what to write."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader

import secateur
from secateur import (
    Data,
    FineTune,
    Gradual,
    Recipe,
    Regrow,
    ShrinkRecipe,
    Target,
    compare,
    export_onnx,
    finetune,
    masks_of,
    measure,
    plan,
    prune,
    recipes,
    shrink,
)
from secateur.allocate import Ranked, Sensitivity, Tolerance
from secateur.core.errors import BudgetError, DataError, UsageError
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import Shrinking
from secateur.drive.training.learn_masks import learn_masks
from secateur.drive.training.learned import Learned
from secateur.drive.training.regrow import TopKast
from secateur.experiments import (
    Damage,
    Disturbance,
    TicketPlan,
    Training,
    connectivity,
    find_ticket,
)
from secateur.learn import GroupLearning, Leap, Slimming, SoftMovement, Str
from secateur.pattern import NM, Blocks
from secateur.recover import ColumnSweep, FisherUpdate, Integer, LeastSquares
from secateur.runtime import accelerate
from secateur.schedule import SCHEDULES, Cyclic, OneShot
from secateur.score import (
    BatchNormScale,
    Grasp,
    GroupTaylor,
    Magnitude,
    Obd,
    Smoothed,
    Snip,
    Taylor,
    Wanda,
    WoodFisher,
)
from secateur.stats import Stats
from secateur.structure import couple
from secateur.testing import sample_groups

GIVEN = torch.Generator().manual_seed(0)
BATCHES = [(x, x[:, :4].argmax(1)) for x in torch.randn(4, 16, 16, generator=GIVEN)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def finetune_on_batches(net: nn.Module) -> Any:
    return finetune(net, BATCHES)


def whole(error: pytest.ExceptionInfo[Any]) -> str:
    """The message, all of whose parts are there."""
    assert error.value.asked
    assert error.value.found
    assert error.value.why
    assert error.value.do
    return str(error.value)


# -- networks and data in the wrong place -------------------------------------------------------------


@pytest.mark.parametrize("call", [measure, lambda net: compare(mlp(), net), finetune_on_batches])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("net", "a str was given"),
        (None, "None was given"),
        (mlp, "the function mlp"),
        (nn.Linear, "the class Linear"),
        (nn.Linear(16, 4, device="meta"), "'weight' is on the device 'meta'"),
        (nn.LazyLinear(4), "'weight' has no shape yet"),
    ],
)
def test_what_is_no_network_is_not_measured_or_trained(call: Any, given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        call(given)
    whole(error)


@pytest.mark.parametrize("given", [Data(train=BATCHES), DataLoader(BATCHES, batch_size=None)])  # type: ignore[arg-type]
def test_data_in_place_of_the_example(given: Any) -> None:
    with pytest.raises(UsageError, match="Pass batches as data=") as error:
        shrink(mlp(), None, given)
    whole(error)


def test_a_batch_of_several_targets_is_told_how_it_is_read() -> None:
    batch = (*BATCHES[0], torch.zeros(16))
    with pytest.raises(DataError, match="Of the 3 parts of the batch the last is taken"):
        prune(mlp(), Recipe(Snip()), [batch])
    with pytest.raises(DataError, match="Check the shapes"):
        prune(mlp(), Recipe(Snip()), [(BATCHES[0][0][:, :3], BATCHES[0][1])])


# -- pruners, searches and trainings ----------------------------------------------------------------


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def learned(how: Any, *, optimizer: Any = sgd) -> Any:
    model = mlp()
    return Learned(model, optimizer(model), how)


def ticket(**given: Any) -> Any:
    return find_ticket(**{"model": mlp, "data": BATCHES, "folder": "unused", **given})


def shrinking(**given: Any) -> Any:
    model = mlp()
    pace = Pace(steps_per_epoch=4)
    whole = {"optimizer": sgd(model), "recipe": ShrinkRecipe(), "pace": pace, **given}
    return Shrinking(model, example_inputs=torch.zeros(1, 16), **whole)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: learned(Leap), "the class Leap"),
        (lambda: learned("leap"), "'leap', a str"),
        (lambda: learned(Leap(), optimizer=lambda _: None), "torch.optim.AdamW"),
        (lambda: learn_masks(mlp(), BATCHES, Leap(), 3), "FineTune(epochs=2)"),  # type: ignore[arg-type]
        (lambda: ticket(folder=None), "None was given"),
        (lambda: ticket(plan=TicketPlan), "the class TicketPlan"),
        (lambda: ticket(recipe=0.9), "It should be a Recipe"),
        (lambda: ticket(model=None), "A network is a torch.nn.Module"),
        (lambda: ticket(model=lambda: 3), "an int. A network is"),
        (lambda: connectivity(mlp(), mlp(), mlp(), BATCHES, points="a"), "points=11"),  # type: ignore[arg-type]
        (lambda: connectivity(mlp(), mlp(), mlp(), BATCHES, points=1), "two ends"),
        (lambda: connectivity("net", {}, {}, BATCHES), "A network is a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: Disturbance(mlp(), None, Damage), "the class Damage"),  # type: ignore[arg-type]
        (lambda: Disturbance(mlp, None, Damage()), "A network is a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: finetune(mlp(), BATCHES, FineTune), "the class FineTune"),  # type: ignore[arg-type]
        (lambda: finetune(mlp, BATCHES), "the function mlp"),  # type: ignore[arg-type]
        (lambda: export_onnx(mlp(), "net.onnx", torch.zeros(1, 16)), "'net.onnx')"),  # type: ignore[arg-type]
        (lambda: finetune(mlp(), BATCHES, checkpoint=3), "the name of a folder"),  # type: ignore[arg-type]
        (lambda: Gradual(mlp(), sgd(mlp()), None), "It should be a Recipe"),  # type: ignore[arg-type]
        (lambda: Gradual(None, sgd(mlp()), Recipe()), "A network is"),  # type: ignore[arg-type]
        (lambda: shrinking(recipe=Recipe()), "It should be a ShrinkRecipe"),
        (lambda: shrinking(pace=None), "It should be a Pace"),
        (lambda: shrinking(optimizer=None), "It should be the optimizer"),
        (lambda: Regrow(fraction="all"), "fraction is a finite number, not 'all'"),  # type: ignore[arg-type]
        (lambda: TopKast(extra=float("nan")), "extra is a finite number, not nan"),
        (lambda: Leap("0.9"), "sparsity is a finite number, not '0.9'"),  # type: ignore[arg-type]
        (lambda: Leap(threshold_lr="fast"), "threshold_lr is"),  # type: ignore[arg-type]
        (lambda: Str(lr=float("nan")), "lr is a finite number, not nan"),
        (lambda: Slimming(strength=None), "strength is"),  # type: ignore[arg-type]
        (lambda: SoftMovement(ramp="long"), "ramp is"),  # type: ignore[arg-type]
        (lambda: GroupLearning(target="half"), "target is"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_pruners_and_trainings(make: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert said in str(error.value)
    assert error.value.found
    assert error.value.do


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Leap, ("lr", "threshold_lr", "lambda_max", "lambda_min", "lambda_rest")),
        (SoftMovement, ("strength", "ramp", "lr")),
        (Slimming, ("strength",)),
        (Str, ("lr", "weight_decay")),
        (GroupLearning, ("strength", "ramp", "lr")),
    ],
)
def test_strengths_and_rates_of_learners_are_not_negative(kind: Any, names: Any) -> None:
    for name in names:
        kind(**{name: 0})
        with pytest.raises(UsageError, match="Write 0 or more") as error:
            kind(**{name: -1})
        assert f"{kind.__name__}({name}=-1): it is negative" in whole(error)


# -- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*SCHEDULES.values()}, key=lambda kind: kind.__name__))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "10", None, True])
def test_times_of_a_schedule_are_numbers(kind: Any, value: Any) -> None:
    names = {field.name for field in fields(kind)} & {"begin", "end", "frequency", "power"}
    for name in sorted(names):
        with pytest.raises(UsageError) as error:
            kind(**{name: value})
        assert f"{kind.__name__}(...): {name} is a finite number, not {value!r}" in whole(error)


@pytest.mark.parametrize("value", [1.5, 2.0, 0, -1, float("nan"), "2", True, None])
def test_waves_are_counted(value: Any) -> None:
    with pytest.raises(UsageError, match=r"Cyclic\(cycles=\.\.\.\)") as error:
        Cyclic(cycles=value)
    assert "a whole number of waves, 1 or more. Write cycles=2" in whole(error)


@pytest.mark.parametrize("value", ["5", -5, 0, 2.5, True, float("nan")])
@pytest.mark.parametrize("name", ["steps_per_epoch", "steps"])
def test_steps_are_counted(name: str, value: Any) -> None:
    model = mlp()
    calls: dict[str, Callable[[], object]] = {
        "Gradual": lambda: Gradual(model, sgd(model), recipes.gmp(0.5), **{name: value}),
        "Pace": lambda: Pace(**{name: value}),
    }
    for kind, call in calls.items():
        with pytest.raises(UsageError) as error:
            call()
        assert f"{kind}({name}=...)" in whole(error)
    assert not masks_of(model)


# -- data of a training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda data: finetune(mlp(), data),
        lambda data: learn_masks(mlp(), data, Leap()),
        lambda data: shrink(mlp(), ShrinkRecipe(recovery=(FineTune(1),)), data=data),
    ],
)
def test_labels_beyond_the_classes(run: Any) -> None:
    batches = [(x, y + 9) for x, y in BATCHES]
    with pytest.raises(DataError, match=r"its own loss fails.*out of bounds"):
        run(batches)


# -- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("target", 0.9, "Target('sparsity', 0.9)"),
        ("target", "90%", "'90%', a str"),
        ("criterion", Magnitude, "the class Magnitude"),
        ("criterion", Wanda, "the class Wanda"),
        ("criterion", "magnitude", "criterion=Magnitude()"),
        ("pattern", "2:4", "NM(2, 4)"),
        ("pattern", NM, "the class NM"),
        ("allocation", Ranked, "the class Ranked"),
        ("allocation", "global", "allocation=Ranked()"),
        ("schedule", OneShot, "the class OneShot"),
        ("schedule", 3, "3, an int"),
        ("recovery", FineTune, "the class FineTune"),
        ("recovery", (LeastSquares, FineTune(1)), "the class LeastSquares"),
        ("recovery", "finetune", "'finetune', a str"),
        ("scope", "0.*", "Scope(include="),
        ("rounding", "int8", "Integer(8)"),
        ("regrow", "gradient", "Regrow()"),
        ("sequential", "yes", "True or False"),
        ("seed", "a", "an integer"),
        ("seed", 1.5, "an integer"),
    ],
)
def test_fields_of_a_recipe(field: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Recipe(**{field: value})
    assert f"Recipe({field}=...)" in whole(error)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", 0.5),
        ("criterion", Magnitude),
        ("criterion", "magnitude"),
        ("allocation", Ranked),
        ("recovery", FineTune),
        ("recovery", LeastSquares()),
        ("scope", "0.*"),
        ("align", 2.5),
        ("rounds", "2"),
        ("uniform", 1),
        ("engine", 3),
    ],
)
def test_fields_of_a_recipe_of_shrinking(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as error:
        ShrinkRecipe(**{field: value})
    assert f"ShrinkRecipe({field}=...)" in whole(error)


@pytest.mark.parametrize("given", [0.9, "magnitude", recipes.magnitude, Recipe, ShrinkRecipe()])
def test_what_is_no_recipe(given: Any) -> None:
    for call in (lambda: prune(mlp(), given), lambda: plan(mlp(), given)):
        with pytest.raises(UsageError) as error:
            call()
        assert "recipes.magnitude(0.9)" in whole(error)
    if not isinstance(given, ShrinkRecipe):
        with pytest.raises(UsageError) as error:
            shrink(mlp(), given, torch.zeros(1, 16))
        assert "ShrinkRecipe(" in whole(error)


def test_targets_are_numbers() -> None:
    for value in ("90%", None, True):
        with pytest.raises(BudgetError) as error:
            Target("sparsity", value)  # type: ignore[arg-type]
        assert "Target.parse('90%')" in whole(error)
    with pytest.raises(BudgetError, match=r"Target\.parse"):
        recipes.magnitude("90%")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [FineTune, Training])
@pytest.mark.parametrize("field", ["epochs", "lr", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", None, -1])
def test_settings_of_a_training(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        kind(**{field: value})


# -- models ---------------------------------------------------------------------------------------


def normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        net = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 4))
    return net


def pruned_by_torch() -> nn.Module:
    net = mlp()
    torch_prune.random_unstructured(net[0], "weight", 0.5)
    return net


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mlp().state_dict(), "load_state_dict"),
        (lambda: None, "None"),
        (lambda: nn.Linear, "the class Linear"),
        (lambda: "net.pt", "a str"),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8)), "'0.weight' has no shape yet"),
        (lambda: mlp().to("meta"), "'0.weight' is on the device 'meta'"),
        (lambda: torch.jit.trace(mlp(), BATCHES[0][0]), "TorchScript"),
        (normed, "remove_weight_norm"),
        (pruned_by_torch, "0.weight is computed from other tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit")
def test_what_is_no_network(make: Any, said: str) -> None:
    model = make()
    calls = (lambda: prune(model), lambda: shrink(model, None, torch.zeros(1, 16)))
    for call in calls:
        with pytest.raises(UsageError) as error:
            call()
        assert said in whole(error)


def test_a_result_of_pruning_is_told_from_its_network(tmp_path: Path) -> None:
    pruned: Any = prune(mlp())
    sgd, x = torch.optim.SGD(pruned.model.parameters(), 0.1), torch.zeros(1, 16)
    calls: list[Callable[[], object]] = [
        lambda: prune(pruned),
        lambda: couple(pruned, x),
        lambda: secateur.load(pruned, pruned.save(tmp_path / "out")),
        lambda: secateur.Gradual(pruned, sgd, secateur.recipes.gmp(0.5), steps_per_epoch=4),
        lambda: secateur.export_onnx(pruned, x, tmp_path / "net.onnx"),
        lambda: accelerate(pruned),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"a Pruned.*Pass its \.model"):
            call()


# -- data and losses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"training": BATCHES}, "data key 'training'"),
        (5, "an int"),
        (BATCHES[0], "a tuple of tensors, which is a single batch"),
        ({"input_ids": BATCHES[0][0]}, "a dict of tensors, which is a single batch"),
        ({"train": {"x": BATCHES[0][0]}}, "a dict of tensors, which is a single batch"),
        ({"train": BATCHES[0][0]}, "rows would be taken for batches"),
        (BATCHES[0][0], "rows would be taken for batches"),
    ],
)
def test_what_is_no_data(given: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        prune(mlp(), recipes.wanda(0.5), given)
    assert said in str(error.value)


@pytest.mark.parametrize("value", [1.5, -1, 0, "10"])
def test_calibration_counts_samples(value: Any) -> None:
    with pytest.raises(UsageError) as error:
        Data(train=BATCHES, calibration=value)
    assert "1 or more" in whole(error)


def test_a_loss_of_outputs_is_no_loss_of_a_model() -> None:
    with pytest.raises(UsageError, match="lambda model, batch") as error:
        Data(train=BATCHES, loss=nn.CrossEntropyLoss())
    whole(error)


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: None,
        lambda m, b: m(b[0]).mean().item(),
        lambda m, b: m(b[0]).mean(0),
        lambda m, b: m(b[0]).mean().detach(),
    ],
)
def test_losses_without_a_gradient(loss: Any) -> None:
    for recipe in (Recipe(recovery=FineTune(1)), recipes.obd(0.5), recipes.grasp(0.5)):
        with pytest.raises(UsageError, match="the loss of a batch") as error:
            prune(mlp(), recipe, Data(train=BATCHES, loss=loss))
        whole(error)
    with pytest.raises(UsageError, match="the loss of a batch") as error:
        shrink(mlp(), ShrinkRecipe(GroupTaylor()), data=Data(train=BATCHES, loss=loss))
    whole(error)


def test_training_needs_no_gradients_of_the_caller() -> None:
    recipe = Recipe(recovery=FineTune(1))
    with torch.no_grad():
        inside = prune(mlp(), recipe, BATCHES)
    assert torch.equal(inside.model[0].weight, prune(mlp(), recipe, BATCHES).model[0].weight)


def test_scalars_in_a_batch_are_not_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) * scale

    data = Data(train=[(torch.tensor(2.0), x, y) for x, y in BATCHES], calibration=20)
    assert prune(Scaled(), recipes.wanda(0.5), data).facts.sparsity == 0.5


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: ColumnSweep(block=0), "ColumnSweep(block=...)"),
        (lambda: ColumnSweep(block=2.5), "ColumnSweep(block=...)"),
        (lambda: LeastSquares(iterations=0), "LeastSquares(iterations=...)"),
        (lambda: FisherUpdate(block=0), "FisherUpdate(block=...)"),
        (lambda: FisherUpdate(samples=0), "FisherUpdate(samples=...)"),
        (lambda: WoodFisher(block=-1), "WoodFisher(block=...)"),
        (lambda: WoodFisher(samples=0), "WoodFisher(samples=...)"),
        (lambda: Obd(samples=0), "Obd(samples=...)"),
        (lambda: Taylor(samples=0), "Taylor(samples=...)"),
        (lambda: GroupTaylor(samples=0), "GroupTaylor(samples=...)"),
        (lambda: Tolerance(inner=0), "Tolerance(inner=...)"),
        (lambda: Tolerance(outer=0), "Tolerance(outer=...)"),
        (lambda: Sensitivity(()), "Sensitivity(levels=())"),
        (lambda: Grasp(temperature=0), "Grasp(temperature=0)"),
        (lambda: Smoothed(Magnitude(), beta=1.5), "Smoothed(beta=1.5)"),
        (lambda: Blocks(0, 4), "Blocks(0, 4)"),
        (lambda: Integer(bits=1), "Integer(bits=1, group=0)"),
        (lambda: BatchNormScale()(sample_groups("heads").groups[0], Stats()), "BatchNormScale on"),
    ],
)
def test_settings_of_parts(build: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert said in whole(error)


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("given", [iter(BATCHES), (x for x in BATCHES), "test.csv"])
def test_data_that_can_be_read_only_once_or_are_no_batches_are_refused(
    name: str, given: Any
) -> None:
    # A metric would find nothing left, and call that the value of the network.
    with pytest.raises(UsageError, match=r"only once|the text 'test\.csv'"):
        Data(**{name: given})
