"""Attacks on batches and outputs of other kinds: targets anywhere, nested inputs, one logit, pixels."""

from __future__ import annotations

import pytest
import torch
from test_attacks import ATTACKS, batch, network
from torch import Tensor, nn

from secateur.core.batches import Data, Loss
from secateur.core.errors import DataError, NeedsData
from secateur.evaluate.robustness import robustness
from secateur.learn import DeepFoolCutoff, Fgsm, Pgd
from secateur.learn.attacks import Attack


class Named(nn.Module):
    """Inputs by name, as models of Transformers take them; targets of floats are possible."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        logits = self.inner(pixel_values)
        if labels.is_floating_point():
            return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("labels", [torch.arange(4) % 3, torch.rand(4, 3)], ids=["int", "float"])
@pytest.mark.parametrize("name", ATTACKS)
def test_inputs_are_perturbed_wherever_the_targets_lie(name: str, labels: Tensor) -> None:
    net, x = Named(), torch.rand(4, 6)
    first = {
        "labels": labels,
        "index": torch.arange(4),
        "pixel_values": x,
    }  # as collators have them
    last = dict(reversed(first.items()))
    found, wanted = (ATTACKS[name](net, batch) for batch in (first, last))
    assert list(found) == list(first)
    assert found["labels"] is labels
    assert not torch.equal(found["pixel_values"], x)
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])


@pytest.mark.parametrize("name", ATTACKS)
def test_inputs_inside_other_parts_are_perturbed_and_targets_are_not(name: str) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 3)

        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            return torch.as_tensor(self.inner(parts["x"]))

    net, x, y = Nested(), torch.rand(4, 6), torch.arange(4) % 3
    parts, labels = ATTACKS[name](net, ({"x": x}, y))
    assert labels is y
    assert torch.equal(parts["x"], ATTACKS[name](net.inner, (x, y))[0])


def test_a_target_that_is_the_input_itself_stays() -> None:
    net, x = nn.Linear(6, 6), torch.rand(4, 6)
    moved, target = Fgsm(0.1)(net, (x, x))
    assert target is x
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("flat", [False, True])
def test_deepfool_takes_one_logit_as_class_one_against_class_zero(flat: bool) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(6, 1), nn.Linear(6, 2)
    with torch.no_grad():
        two.weight.copy_(torch.cat([torch.zeros(1, 6), one.weight]))
        two.bias.copy_(torch.cat([torch.zeros(1), one.bias]))
    net = nn.Sequential(one, nn.Flatten(0)) if flat else one
    x = torch.randn(20, 6)
    data = (x, (one(x)[:, 0] > 0).long())
    attack = DeepFoolCutoff(delta=9.0, low=-9.0, high=9.0)
    moved, _ = attack(net, data)
    assert torch.allclose(moved, attack(two, data)[0], atol=1e-6)
    assert bool(((one(moved) > 0) != (one(x) > 0)).all())
    facts = robustness(net, [data], attack, sizes=[9.0])
    assert facts.curves[0].natural == 1.0
    assert facts.curves[0].accuracy == (0.0,)


def test_deepfool_needs_one_class_a_sample() -> None:
    pixels = (torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))
    with pytest.raises(DataError, match=r"puts out \(2, 5, 4, 4\) for 2 samples"):
        DeepFoolCutoff()(nn.Conv2d(3, 5, 1), pixels)


@pytest.mark.parametrize("name", ATTACKS)
def test_inputs_beyond_the_bounds_are_refused(name: str) -> None:
    """Clipping would move them by itself, by many times the size of the attack."""
    net, (x, y) = network(), batch()
    with pytest.raises(DataError) as error:
        ATTACKS[name](net, (4 * x - 2, y))
    said = str(error.value)
    assert f"from {float(4 * x.min() - 2):.4g} to {float(4 * x.max() - 2):.4g}" in said
    assert "low=0.0 and high=1.0" in said
    nearly = x.clone()
    nearly[0, 0, 0, 0] = 1.004  # bounds are often rounded
    assert float(ATTACKS[name](net, (nearly, y))[0].max()) <= 1


class Bare(Named):
    """The same, without a loss of its own."""

    def forward(self, pixel_values: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(pixel_values)}


def judged(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(**batch)["logits"], batch["labels"])


@pytest.mark.parametrize("attack", [Fgsm(0.0), Pgd(0.0, steps=3)])
def test_robustness_follows_the_loss_of_the_user_where_there_is_no_other(attack: Attack) -> None:
    torch.manual_seed(0)
    batches = [{"pixel_values": torch.rand(64, 6), "labels": torch.arange(64) % 3}]

    def curve(net: nn.Module, loss: Loss | None) -> tuple[float, ...]:
        facts = robustness(net, Data(test=batches, loss=loss), attack, sizes=[0.1, 0.3])
        return facts.curves[0].accuracy

    wanted = curve(Named(), None)
    assert wanted[0] != wanted[1]
    assert curve(Bare(), judged) == wanted
    assert curve(Named(), lambda net, batch: -judged(net, batch)) == wanted
    with pytest.raises(NeedsData, match=r"Data\(loss=...\)"):
        curve(Bare(), None)
