"""Loaders that have no length: a DataLoader over an IterableDataset, whose ``__len__`` raises."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typer.testing import CliRunner

from secateur import Data, FineTune, Recipe, Target, prune, recipes
from secateur.cli.main import app
from secateur.core.batches import length_of
from secateur.core.errors import DataError, UsageError
from secateur.drive.training.hosts import TransformersCallback
from secateur.evaluate.robustness import robustness
from secateur.experiments import TicketPlan, Training, find_ticket
from secateur.learn import Fgsm
from secateur.schedule import Polynomial

SAMPLES = [(x, x[:4].argmax()) for x in torch.randn(64, 16, generator=torch.Generator())]


class Rows(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(SAMPLES)


class Named(IterableDataset[dict[str, Tensor]]):
    """As the Trainer wants them, and longer than any training."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"x": x, "labels": y} for _ in range(50) for x, y in SAMPLES)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.mid(self.body(x).relu()).relu())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def test_such_a_loader_has_no_length() -> None:
    assert length_of(DataLoader(Rows(), 16)) is None
    assert length_of(DataLoader(SAMPLES, 16)) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(recovery=FineTune(2)), recipes.gmp(0.5, epochs=2), recipes.wanda(0.5)],
    ids=["finetune", "gmp", "wanda"],
)
def test_prune_counts_the_batches_of_a_stream(recipe: Recipe) -> None:
    stream = prune(mlp(), recipe, DataLoader(Rows(), 16))
    batches = prune(mlp(), recipe, list(DataLoader(Rows(), 16)))
    assert stream.masks == batches.masks
    assert torch.equal(stream.model[2].weight, batches.model[2].weight)


def test_tickets_are_found_on_a_stream(tmp_path: Path) -> None:
    data = Data(train=DataLoader(Rows(), 16), test=list(DataLoader(Rows(), 16)))
    plan = TicketPlan(training=Training(epochs=1), levels=(0.5,))
    found = find_ticket(mlp, Recipe(), data, folder=tmp_path, plan=plan)
    assert [level.sparsity for level in found.levels] == pytest.approx([0.5])


def train(recipe: Recipe) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback = TransformersCallback(recipe)
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=8, per_device_train_batch_size=8, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    transformers.Trainer(Net(), arguments, train_dataset=Named(), callbacks=[callback]).train()
    return callback


def test_the_trainer_streams_with_a_schedule_in_steps() -> None:
    recipe = Recipe(target=Target("sparsity", 0.75), schedule=Polynomial(0, 6, 2))
    assert train(recipe).pruned.masks.sparsity == pytest.approx(0.75)


def test_epochs_of_a_stream_are_refused() -> None:
    recipe = Recipe(schedule=Polynomial(0, 1, 0.25, unit="epochs"))
    with pytest.raises(UsageError, match="the training loader has no length"):
        train(recipe)


@pytest.mark.parametrize("recipe", [recipes.wanda(0.5), recipes.snip(0.5)], ids=["wanda", "snip"])
def test_what_the_network_cannot_take_is_told_of_a_stream_too(recipe: Recipe) -> None:
    net = nn.Sequential(nn.Linear(15, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    with pytest.raises(DataError, match="its own forward fails"):
        prune(net, recipe, DataLoader(Rows(), 16))


def test_robustness_is_measured_on_a_stream() -> None:
    stream = robustness(mlp(), DataLoader(Rows(), 16), Fgsm(0, low=-9, high=9), sizes=[0.1])
    known = robustness(mlp(), DataLoader(SAMPLES, 16), Fgsm(0, low=-9, high=9), sizes=[0.1])  # type: ignore[arg-type]
    assert stream == known


def test_the_structure_is_traced_on_a_stream(tmp_path: Path) -> None:
    here = tmp_path / "net.py"
    here.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.utils.data import DataLoader, IterableDataset\n"
        "from secateur import Data\n"
        "class Rows(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        return iter([(torch.ones(16), 1)] * 4)\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))\n"
        "def data():\n"
        "    return Data(test=DataLoader(Rows(), 2))\n"
    )
    words = ["inspect", f"{here}:net", "--structure", "--data", f"{here}:data"]
    ends = CliRunner().invoke(app, words)
    assert ends.exit_code == 0, ends.output
