"""Distillation of whatever networks put out: one logit, classes per pixel or per token, numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, finetune
from secateur.core.errors import UsageError
from secateur.learn import Distill


def by_hand(student: Tensor, teacher: Tensor, axis: int, temperature: float = 2.0) -> Tensor:
    """KL to the teacher along an axis, for each answer."""
    q, p = (F.log_softmax(x / temperature, axis) for x in (student, teacher))
    return temperature**2 * (p.exp() * (p - q)).sum(axis)


def pair(make: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return make(), make()


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 1), flat], ids=["column", "flat"])
def test_one_logit_is_class_one_against_class_zero(make: Any) -> None:
    net, teacher = pair(make)
    x, y = torch.randn(16, 6), torch.arange(16) % 2
    with torch.no_grad():
        two = [torch.stack([torch.zeros(16), f(x).flatten()], 1) for f in (net, teacher)]
    wanted = by_hand(*two, axis=1).mean().item()
    assert wanted > 0.01
    assert Distill(teacher)(net, (x, y)).item() == pytest.approx(wanted, rel=1e-4)
    how = FineTune(1, lr=1e-9, distill=1.0)
    assert finetune(net, Data(train=[(x, y)]), how, teacher=teacher)[0]["loss"] == pytest.approx(
        wanted, rel=1e-4
    )


def test_classes_of_pixels_are_the_second_axis() -> None:
    net, teacher = pair(lambda: nn.Conv2d(3, 4, 1))
    x, y = torch.randn(2, 3, 5, 6), torch.zeros(2, 5, 6, dtype=torch.long)
    with torch.no_grad():
        wanted = by_hand(net(x), teacher(x), axis=1).mean().item()
    for batch in (x, (x, y)):
        assert Distill(teacher)(net, batch).item() == pytest.approx(wanted, rel=1e-4)


def test_classes_of_tokens_are_the_last_axis_unless_the_labels_say_otherwise() -> None:
    net, teacher = pair(lambda: nn.Linear(6, 4))
    x, y = torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        wanted = by_hand(net(x), teacher(x), axis=2).mean().item()
    for batch in (x, (x, y)):
        assert Distill(teacher)(net, batch).item() == pytest.approx(wanted, rel=1e-4)
    found = Distill(nn.Sequential(teacher, Turned()))(nn.Sequential(net, Turned()), (x, y))
    assert found.item() == pytest.approx(wanted, rel=1e-4)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


@pytest.mark.parametrize("outputs", [1, 3])
def test_numbers_are_compared_as_numbers(outputs: int) -> None:
    net, teacher = pair(lambda: nn.Linear(6, outputs))
    x, y = torch.randn(16, 6), torch.randn(16, outputs)
    with torch.no_grad():
        wanted = F.mse_loss(net(x), teacher(x)).item()
    assert Distill(teacher)(net, (x, y)).item() == pytest.approx(wanted, rel=1e-5)
    if outputs == 1:  # one number a sample says so itself
        assert Distill(teacher)(net, (x,)).item() == pytest.approx(wanted, rel=1e-5)


def test_mixed_labels_are_those_of_classes() -> None:
    net, teacher = pair(lambda: nn.Linear(6, 3))
    x, y = torch.randn(16, 6), torch.randn(16, 3).softmax(1)
    with torch.no_grad():
        wanted = by_hand(net(x), teacher(x), axis=1).mean().item()
    assert Distill(teacher)(net, (x, y)).item() == pytest.approx(wanted, rel=1e-4)


def test_a_decoder_has_padding_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=30, decoder_start_token_id=0, **sizes)
    net, teacher = pair(lambda: transformers.T5ForConditionalGeneration(config).eval())
    ids, labels = torch.randint(2, 30, (2, 2, 6)).unbind()
    mask = torch.ones_like(ids)
    mask[0, 2:], labels[1, 3:] = 0, -100  # as long as the sentences, by chance
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        far = by_hand(net(**batch).logits, teacher(**batch).logits, axis=2)
    wanted = far[labels != -100].mean().item()
    assert wanted != pytest.approx(far[mask == 1].mean().item(), rel=1e-3)
    assert Distill(teacher)(net, batch).item() == pytest.approx(wanted, rel=1e-4)


def test_outputs_of_other_shapes_are_told_as_such() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(UsageError, match=r"\(2, 4\), its teacher \(2, 3\)"):
        Distill(nn.Linear(6, 3))(nn.Linear(6, 4), x)
    with pytest.raises(UsageError, match="takes no output_hidden_states"):
        Distill(nn.Linear(6, 3), hidden=1.0)(nn.Linear(6, 3), x)


def test_an_error_of_the_network_itself_stays_what_it_is() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, output_hidden_states: bool = False) -> Tensor:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        Distill(nn.Linear(6, 3), hidden=1.0)(Broken(), torch.randn(2, 6))
