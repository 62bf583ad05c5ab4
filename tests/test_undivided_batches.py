"""Batches whose samples are not the rows of tensors: lists of images, graphs, concatenated targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import secateur
from secateur.core.batches import divisible, micro_batches, narrow, size_of
from secateur.core.errors import DataError
from secateur.score import Obd


class Detector(nn.Module):
    """Reads a list of images of unequal size, and computes its losses in training, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> object:
        found = [self.head(self.body(image[None])).mean((2, 3)) for image in images]
        if targets is None:
            return [{"scores": x.softmax(1), "labels": x.argmax(1)} for x in found]
        losses = [F.cross_entropy(x, y["labels"][:1]) for x, y in zip(found, targets, strict=True)]
        return {"classes": torch.stack(losses).sum()}


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return self.head(torch.relu(self.second(x)))  # type: ignore[no-any-return]


def images(count: int = 4, start: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(start)
    shown = [torch.randn(3, 9 + k, 12 - k, generator=draw) for k in range(count)]
    return shown, [
        {"boxes": torch.rand(1 + k, 4, generator=draw), "labels": torch.full((1 + k,), k % 4)}
        for k in range(count)
    ]


def graph(start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(start)
    edges = torch.randint(20, (2, 50), generator=draw)
    return torch.randn(20, 8, generator=draw), edges, torch.randint(3, (20,), generator=draw)


def loss(model: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]]) -> Tensor:
    return model(*batch)["classes"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_images_with_targets_of_their_own_are_the_samples(kind: type, count: int) -> None:
    shown, targets = images(count)
    batch = kind(shown), kind(targets)
    assert size_of(batch) == count
    pieces = list(micro_batches([batch], 1))
    assert [x for piece in pieces for x in piece[0]] == shown
    assert [y for piece in pieces for y in piece[1]] == targets
    stacked = {"pixel_values": torch.rand(count, 3, 8, 8), "labels": targets}
    short = narrow(stacked, 1, count - 1)
    assert torch.equal(short["pixel_values"], stacked["pixel_values"][count - 1 :])
    assert short["labels"] == targets[count - 1 :]


def test_a_list_of_mappings_that_is_input_holds_batches() -> None:
    pair = [{"ids": torch.arange(6)}, {"ids": torch.arange(6, 12)}]
    batch = pair, torch.zeros(6)
    assert size_of(batch) == 6
    assert [part["ids"].tolist() for part in narrow(batch, 2)[0]] == [[0, 1], [6, 7]]


def test_calibration_counts_images() -> None:
    data = secateur.Data(train=[images(4, k) for k in range(4)], calibration=6)
    assert [len(shown) for shown, _ in data.sample()] == [4, 2]
    assert all(image.shape[0] == 3 for shown, _ in data.sample() for image in shown)


def test_a_detector_is_scored_on_single_images() -> None:
    data = secateur.Data(train=[images(4)], loss=loss)
    single = secateur.Data(train=[([x], [y]) for x, y in zip(*images(4), strict=True)], loss=loss)
    recipe = secateur.Recipe(Obd())
    assert secateur.prune(Detector(), recipe, data).masks == (
        secateur.prune(Detector(), recipe, single).masks
    )


@pytest.mark.parametrize(
    "batch",
    [
        graph(),
        (torch.randn(4, 30, 8), torch.tensor([5, 4, 3, 5]), torch.ones(17)),  # CTC's long form
        (torch.randn(30, 4, 8), torch.zeros(4)),  # time first
        {"input_ids": torch.ones(2, 7), "pixel_values": torch.ones(48, 6)},
        (pack_padded_sequence(torch.randn(3, 5, 2), torch.tensor([5, 4, 1]), True), torch.ones(3)),
    ],
    ids=["graph", "ctc", "time first", "patches", "packed"],
)
def test_what_has_other_rows_stays_whole(batch: object) -> None:
    assert not divisible(batch)
    assert narrow(batch, 1) is batch
    assert list(micro_batches([batch], None)) == [batch]
    assert secateur.Data(train=[batch, batch], calibration=1).sample() == [batch]
    with pytest.raises(DataError, match="at a time"):
        list(micro_batches([batch], 1))


def test_a_graph_is_measured_shrunk_and_exported(tmp_path: object) -> None:
    net, data = Graph(), secateur.Data(train=[graph(1)], test=[graph(2)], calibration=10)
    small = secateur.shrink(net, secateur.ShrinkRecipe(recovery=()), None, data)
    found = secateur.compare(net, small, data, latency=False)
    assert found.a.samples == 20
    assert found.b.cost.macs is not None
    assert found.b.cost.macs < (found.a.cost.macs or 0)
    assert secateur.prune(net, secateur.recipes.wanda(0.5), data).masks.sparsity == 0.5
    with pytest.raises(DataError, match="20, 2, 20 rows"):
        secateur.prune(net, secateur.Recipe(Obd()), data)
    done = secateur.export_onnx(net, graph(2), f"{tmp_path}/graph.onnx")
    assert done.error < 1e-4
    assert done.notes == ("without a row for each sample, inputs keep their shape: edges (2, 50)",)


def hits(model: nn.Module, batches: Any) -> float:
    pairs = [pair for shown, targets in batches for pair in zip(model(shown), targets, strict=True)]
    return sum(int(x["labels"] == y["labels"][0]) for x, y in pairs) / len(pairs)


def test_own_losses_and_metrics_judge_what_is_no_tensor() -> None:
    net, test = Detector(), [images(4, 1), images(2, 2)]
    pruned = secateur.prune(net, secateur.recipes.magnitude(0.5))
    both = secateur.compare(
        net, pruned, secateur.Data(test=test, loss=loss, metric=hits), latency=False
    )
    with torch.no_grad():
        losses = [float(loss(net, batch)) for batch in test]
    assert both.a.loss == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6)
    assert both.a.accuracy == hits(net, test)
    assert both.a.samples == 6
    for data in ({"metric": hits}, {"loss": loss}):
        assert secateur.measure(net, secateur.Data(test=test, **data), latency=False).samples == 6
    with pytest.raises(DataError, match="predictions of a model"):
        secateur.measure(net, test, latency=False)


def test_a_batch_of_another_kind_is_refused_everywhere() -> None:
    for call in (secateur.measure, lambda net, data: secateur.prune(net, None, data)):
        with pytest.raises(DataError, match="a Generator without any tensor"):
            call(Graph(), [torch.Generator()])
