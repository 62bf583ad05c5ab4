"""Measuring and comparing: planted differences must be seen, planted equality must not."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.batches import Data
from secateur.core.errors import DataError, UsageError
from secateur.core.masks import Masks
from secateur.evaluate import Speed, compare, cost_of, measure, race
from secateur.evaluate.accuracy import answer, divergence
from secateur.evaluate.compare import identical
from secateur.evaluate.cost import file_bytes
from secateur.evaluate.verdict import verdict


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def labelled(model: nn.Module, count: int = 200) -> list[tuple[Tensor, Tensor]]:
    """Batches on which ``model`` is always right."""
    x = torch.randn(count, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    return list(zip(x.split(64), y.split(64), strict=True))


# --- accuracy ----------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_right_answers() -> None:
    net = network()
    batches = labelled(net)
    found = measure(net, batches, latency=False)
    assert (found.accuracy, found.samples, found.split) == (1.0, 200, "train")
    wrong = [(x, torch.where(torch.arange(len(y)) == 0, (y + 1) % 3, y)) for x, y in batches]
    assert measure(net, wrong, latency=False).accuracy == 1 - len(batches) / 200


def test_swapped_labels_are_seen() -> None:
    net = network()
    swapped = [(x, (y + 1) % 3) for x, y in labelled(net)]
    assert measure(net, swapped, latency=False).accuracy == 0.0


def test_the_test_set_is_preferred_and_the_loss_is_a_mean_over_samples() -> None:
    net = network()
    x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    data = Data(train=[(x, (y + 1) % 3)], test=[(x[:4], y[:4]), (x[4:], y[4:])])
    found = measure(net, data, latency=False)
    assert found.split == "test"
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(net(x), y).detach()), rel=1e-5
    )


def test_tokens_are_counted_and_ignored_ones_are_not() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[..., 2] = 1.0
    target = torch.tensor([[2, -100, 0], [-100, 2, 2]])
    found = answer(nn.Identity(), (logits, target))
    assert found.right is not None
    assert found.right.tolist() == [True, False, True, True]
    assert found.sample.tolist() == [0, 0, 1, 1]
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(logits.reshape(-1, 5), target.reshape(-1)))
    )


def test_pixels_have_their_classes_on_the_second_axis() -> None:
    logits = torch.zeros(1, 2, 3, 4)
    logits[0, 1, 0] = 1.0
    target = torch.zeros(1, 3, 4, dtype=torch.long)
    target[0, 0] = 1
    found = answer(nn.Identity(), (logits, target))
    assert found.right is not None
    assert len(found.right) == 12
    assert bool(found.right.all())


def test_one_logit_is_right_when_its_sign_is() -> None:
    logits, target = torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([1, 0, 0])
    found = answer(nn.Identity(), (logits, target))
    assert found.right is not None
    assert found.right.tolist() == [True, True, False]


def test_regression_has_a_loss_and_no_accuracy() -> None:
    found = measure(nn.Linear(4, 1), [(torch.randn(6, 4), torch.randn(6, 1))], latency=False)
    assert found.accuracy is None
    assert found.loss is not None
    assert math.isfinite(found.loss)


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        measure(network(), [], latency=False)
    with pytest.raises(UsageError, match="neither test nor train"):
        measure(network(), Data(), latency=False)


# --- cost --------------------------------------------------------------------------------------


def test_multiply_adds_equal_the_formula() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.Flatten(),
        nn.Linear(4 * 3 * 3, 5),
    )  # fmt: skip
    cost = cost_of(net, example=torch.randn(3, 2, 8, 8))
    assert cost.macs_dense == 64 * 4 * 2 * 9 + 9 * 4 * 2 * 9 + 36 * 5
    with torch.no_grad():
        net[0].weight[0] = 0  # type: ignore[index, operator]
    assert cost_of(net, example=torch.randn(1, 2, 8, 8)).macs == cost.macs_dense - 64 * 2 * 9
    assert cost.uncounted == ()


def test_weights_out_of_sight_are_named() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 8))

        def forward(self, x: Tensor) -> Tensor:  # a product that no operator of products makes
            return (x[:, None] * self.w).sum(-1)

    assert cost_of(Weighted(), example=(torch.randn(4, 8), torch.zeros(1))).uncounted == ("w",)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multiply_adds_of_attention_equal_the_formula(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    batch = (torch.randn(3, 3, 8), torch.zeros(3))  # of one axis are samples, of one tokens
    cost = cost_of(layer, example=batch)
    assert cost.macs_dense == 3 * (4 * 8 * 8 + 2 * 8 * 16)
    assert cost.uncounted == ()
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    cost = cost_of(decoder, example=(torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.zeros(2)))
    assert cost.macs_dense == pytest.approx(5 * (6 * 8 * 8 + 2 * 8 * 16) + 7 * 2 * 8 * 8)


def test_bytes_are_those_of_the_bundle(tmp_path: Any) -> None:
    pruned = secateur.prune(network(), secateur.recipes.magnitude(0.9))
    pruned.save(tmp_path / "out")
    found = measure(pruned, latency=False)
    assert found.cost.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.cost.pruned_sparsity == pytest.approx(0.9, abs=0.01)
    assert file_bytes(pruned.model) > found.cost.bytes


def test_attached_masks_are_not_counted_as_tensors() -> None:
    net, masks = network(), {}
    masks["2.weight"] = torch.rand(32, 32) > 0.9
    plain = copy.deepcopy(net)
    Masks(masks).apply_(plain)
    secateur.attach_(net, Masks(masks))
    assert file_bytes(net, Masks(masks)) == file_bytes(plain, Masks(masks))
    assert measure(net, latency=False).cost.bytes == file_bytes(plain, Masks(masks))


# --- comparison --------------------------------------------------------------------------------


def test_one_changed_weight_is_not_identical() -> None:
    net = network()
    other = copy.deepcopy(net)
    assert identical(net, other)
    with torch.no_grad():
        other[2].weight[3, 4] += 1e-6  # type: ignore[index, operator]
    assert not identical(net, other)
    found = compare(net, other, labelled(net), latency=False)
    assert not found.identical
    assert found.kl is not None
    assert 0 < found.kl < 1e-6


def test_equal_networks_differ_in_nothing() -> None:
    net = network()
    found = compare(net, copy.deepcopy(net), labelled(net), latency=False)
    assert found.identical
    assert (found.difference, found.agreement, found.kl) == (0.0, 1.0, 0.0)
    assert [gain.real for gain in found.verdict] == [False, True]


def test_agreement_is_the_share_of_equal_choices() -> None:
    class Flips(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, x, -x)

    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [2.0, 5.0], [1.0, 0.0]])
    found = compare(nn.Identity(), Flips(), [x], latency=False)
    assert found.agreement == 0.75
    assert found.difference is None


@pytest.mark.parametrize("classes", [1, 3])
def test_a_nan_is_no_answer(classes: int) -> None:
    """The largest of numbers with a NaN is the NaN: of such a network, its place would be right."""
    net = nn.Linear(4, classes)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    broken = copy.deepcopy(net)
    torch.nn.init.constant_(broken.bias[:1], float("nan"))
    x, y = torch.randn(30, 4), torch.arange(30) % 2
    found = compare(net, broken, [(x, y)], latency=False)
    assert (found.a.accuracy, found.b.accuracy, found.agreement) == (0.5, 0.0, 0.0)
    assert not found.gain("accuracy").real  # type: ignore[union-attr]
    assert compare(broken, broken, [(x, y)], latency=False).agreement == 0.0


def test_swapped_labels_do_not_change_the_agreement() -> None:
    net = network()
    swapped = [(x, (y + 1) % 3) for x, y in labelled(net)]
    found = compare(net, copy.deepcopy(net), swapped, latency=False)
    assert (found.a.accuracy, found.b.accuracy, found.agreement) == (0.0, 0.0, 1.0)


def test_divergence_has_a_direction_and_ignores_constants() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = a.softmax(1), b.softmax(1)
    assert float(divergence(a, b)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert float(divergence(a, b)) != pytest.approx(float(divergence(b, a)))
    assert float(divergence(a, a + 7)) == pytest.approx(0, abs=1e-9)


def test_paired_error_equals_the_formula_for_samples_and_for_groups() -> None:
    class Fixed(nn.Module):
        def __init__(self, answers: list[int]) -> None:
            super().__init__()
            self.answers = torch.tensor(answers)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(self.answers[x.long()], 2).float()

    truth = [0, 1, 0, 1, 0, 1, 0, 1]
    other = [0, 1, 1, 1, 0, 0, 0, 0]
    x, y = torch.arange(8), torch.tensor(truth)
    found = compare(Fixed(truth), Fixed(other), [(x[:5], y[:5]), (x[5:], y[5:])], latency=False)
    changes = torch.tensor([float(a == t) - 1 for a, t in zip(other, truth, strict=True)])
    assert found.difference == pytest.approx(float(changes.mean()))
    assert found.difference_error == pytest.approx(float(changes.std()) / 8**0.5)
    # The same eight answers as two texts of four tokens: two independent units, not eight.
    texts = compare(Fixed(truth), Fixed(other), [(x.view(2, 4), y.view(2, 4))], latency=False)
    assert texts.difference == pytest.approx(found.difference)
    sums = changes.view(2, 4).mean(1)
    assert texts.difference_error == pytest.approx(float(sums.std()) / 2**0.5)


def test_a_ruined_network_loses_and_is_told() -> None:
    net = network()
    ruined = copy.deepcopy(net)
    with torch.no_grad():
        ruined[4].weight.zero_()  # type: ignore[operator, union-attr]
    found = compare(net, ruined, labelled(net), latency=False)
    gain = found.gain("accuracy")
    assert gain is not None
    assert not gain.real
    assert "lost" in gain.text
    assert found.agreement is not None
    assert found.agreement < 1


def test_zeros_without_masks_do_not_make_the_file_smaller() -> None:
    net = network()
    pruned = secateur.prune(net, secateur.recipes.magnitude(0.9))
    bare = compare(net, pruned.model, latency=False).gain("smaller")
    assert bare is not None
    assert not bare.real
    assert "save it as a bundle" in bare.text
    whole = compare(net, pruned, latency=False)
    gain = whole.gain("smaller")
    assert gain is not None
    assert gain.real
    assert whole.size_ratio > 1.5


# --- speed -------------------------------------------------------------------------------------


def test_speed_needs_more_than_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    a = (1 + 0.3 * torch.rand(101, generator=generator)).tolist()
    b = (1 + 0.3 * torch.rand(101, generator=generator)).tolist()
    assert Speed.of(a, b).verdict == "same"
    assert Speed.of(a, [x / 2 for x in b]).verdict == "faster"
    assert Speed.of([x / 2 for x in a], b).verdict == "slower"
    # A clear but tiny gain is inside what the place in memory can do.
    assert Speed.of([1.02] * 101, [1.0] * 101).verdict == "same"


def test_race_takes_turns_and_leaves_the_mode() -> None:
    order: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            order.append(self.name)
            return x

    a, b = Named("a"), Named("b")
    times = race([a, b], torch.zeros(1, 1), seconds=0)
    assert [len(t) for t in times] == [11, 11]
    assert "".join(order[-8:]) in ("abbaabba", "baabbaab")
    assert a.training
    assert b.training


def test_slower_is_said_and_sparse_networks_are_told_why() -> None:
    net = network()
    pruned = secateur.prune(net, secateur.recipes.magnitude(0.9))
    a, b = measure(net, latency=False), measure(pruned, latency=False)
    speed = Speed(1.0, 0.99, 1.01)
    gain = next(g for g in verdict(a, b, None, None, speed) if g.name == "faster")
    assert not gain.real
    assert "multiplies the zeros" in gain.text
    same = next(g for g in verdict(a, a, None, None, speed) if g.name == "faster")
    assert "multiplies the zeros" not in same.text
    assert verdict(a, b, None, None, Speed(2.0, 1.9, 2.1))[-1].real


def test_a_network_that_was_timed_can_still_be_trained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), None

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.arange(4.0)
            return self.layer(x) * self.scale

    net = Net()
    compare(net, Net(), example=torch.zeros(1, 4))
    net(torch.ones(1, 4)).sum().backward()
    assert net.layer.weight.grad is not None


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_a_mask_of_the_network_itself_is_stored_and_counted(
    kind: torch.dtype, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    net[0].register_buffer("weight_mask", torch.ones(32, 16, dtype=kind))
    pruned = secateur.prune(net)
    file = pruned.save(tmp_path / "b") / "model.safetensors"
    assert measure(pruned, latency=False).cost.bytes == file.stat().st_size


def test_classes_of_pixels_may_lie_on_either_axis() -> None:
    own = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=own)
    target = torch.randint(3, (2, 4, 5), generator=own)
    wanted = float((logits.argmax(1) == target).double().mean())
    wanted_loss = float(nn.functional.cross_entropy(logits, target))
    for given in (logits, logits.movedim(1, -1)):
        found = measure(nn.Identity(), [(given, target)], latency=False)
        assert found.accuracy == pytest.approx(wanted)
        assert found.loss == pytest.approx(wanted_loss, rel=1e-5)
