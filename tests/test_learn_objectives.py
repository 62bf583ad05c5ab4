"""Objectives: distillation from logits, hidden states and attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Data, FineTune, finetune
from secateur.core.errors import NeedsData, UsageError
from secateur.learn import Distill, Objectives, Task


def bert(layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def tokens(padding: int = 3) -> dict[str, Tensor]:
    own = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (4, 8), generator=own)
    mask = torch.ones_like(ids)
    if padding:
        mask[1:, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}


def test_a_teacher_that_is_the_student_costs_nothing() -> None:
    net = bert().eval()
    loss = Distill(net, hidden=1.0, attention=1.0)(net, tokens())
    assert abs(loss.item()) < 1e-6
    # In training mode, dropout sets them apart: the teacher runs in evaluation mode.
    net.train()
    assert Distill(net)(net, tokens()).item() > 1e-6
    assert net.training


def test_another_teacher_is_felt_in_each_part() -> None:
    net = bert().eval()
    teacher = copy.deepcopy(net)
    with torch.no_grad():
        teacher.bert.encoder.layer[0].attention.self.query.weight.mul_(40)
        teacher.classifier.weight.mul_(3)
    logits = Distill(teacher)(net, tokens()).item()
    hidden = Distill(teacher, hidden=1.0)(net, tokens()).item()
    attention = Distill(teacher, attention=1.0)(net, tokens()).item()
    assert 0 < logits < hidden
    assert logits < attention


def test_parts_by_hand_without_padding() -> None:
    net, teacher = bert().eval(), bert().eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = tokens(padding=0)
    with torch.no_grad():
        s, t = (
            m(**batch, output_hidden_states=True, output_attentions=True) for m in (net, teacher)
        )
    soft = F.kl_div(
        (s.logits / 3).log_softmax(-1), (t.logits / 3).softmax(-1), reduction="batchmean"
    )
    hidden = sum(F.mse_loss(a, b) for a, b in zip(s.hidden_states, t.hidden_states, strict=True))
    maps = sum(F.mse_loss(a, b) for a, b in zip(s.attentions, t.attentions, strict=True))
    by_hand = 0.5 * (9 * soft + 2 * hidden / 3 + 7 * maps / 2)
    found = Distill(teacher, weight=0.5, temperature=3.0, hidden=2.0, attention=7.0)(net, batch)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_soft_targets_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, 0.0]])
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        p, q = (net(x).div(3.0).softmax(-1) for net in (teacher, student))
        by_hand = 0.5 * 9.0 * (p * (p.log() - q.log())).sum(1).mean()
    found = Distill(teacher, weight=0.5, temperature=3.0)(student, x)
    assert found.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert found.item() > 0.01


def test_padded_tokens_count_for_nothing() -> None:
    net, teacher = bert().eval(), bert().eval()
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[7].add_(torch.randn(16))
    batch = tokens()
    batch["input_ids"][batch["input_ids"] == 7] = 8
    assert Distill(teacher, hidden=1.0, attention=1.0)(net, batch).item() < 1e-6
    batch["input_ids"][1, -1] = 7  # padding
    assert Distill(teacher, hidden=1.0, attention=1.0)(net, batch).item() < 1e-6
    batch["input_ids"][1, 0] = 7
    assert Distill(teacher, hidden=1.0, attention=1.0)(net, batch).item() > 1e-3


def test_no_gradient_reaches_the_teacher() -> None:
    net, teacher = bert(), bert()
    Objectives((Task(0.5), Distill(teacher, 0.5, hidden=1.0)))(net, tokens()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert net.classifier.weight.grad is not None


def test_the_network_runs_once_for_all_terms() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.runs = nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            out: Tensor = self.inner(x)
            return out

    net, teacher = Counting(), nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    both = Objectives((Task(0.25), Distill(teacher, 0.75)))(net, batch)
    assert net.runs == 1
    apart = Task(0.25)(net, batch) + Distill(teacher, 0.75)(net, batch)
    assert both.item() == pytest.approx(apart.item())


def test_losses_of_ones_own_are_terms() -> None:
    net, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def smooth(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2)

    found = Objectives((smooth, Distill(teacher, 0.5)))(net, (x, y))
    wanted = smooth(net, (x, y)) + Distill(teacher, 0.5)(net, (x, y))
    assert found.item() == pytest.approx(wanted.item())
    assert Objectives((smooth,))(net, (x, y)).item() == smooth(net, (x, y)).item()

    class Own:  # no more than the protocol asks for
        wants: frozenset[str] = frozenset()

        def of(self, model: nn.Module, output: Tensor, batch: Any) -> Tensor:
            return output.square().mean()

    assert Objectives((Own(),))(net, (x, y)).item() == net(x).square().mean().item()
    for wrong in (Task, 0.5, "task"):
        with pytest.raises(UsageError, match="It should be a term or a loss"):
            Objectives((wrong,))  # type: ignore[arg-type]


def test_an_objective_is_a_loss_of_data() -> None:
    torch.manual_seed(0)
    teacher, net = nn.Linear(3, 4), nn.Linear(3, 4)
    x = torch.randn(64, 3)
    data = Data(train=[x], loss=Objectives((Distill(teacher),)))
    finetune(net, data, FineTune(epochs=200, lr=0.3))
    assert bool((net(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.95)


def test_what_cannot_be_compared_is_refused() -> None:
    net = bert().eval()
    with pytest.raises(UsageError, match="the model has 3 of shape"):
        Distill(bert(layers=1), hidden=1.0)(net, tokens())
    plain = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="takes no output_hidden_states"):
        Distill(plain, hidden=1.0)(plain, torch.zeros(1, 3))
    fast = bert()
    fast.set_attn_implementation("sdpa")
    with pytest.raises(UsageError, match="attn_implementation"):
        Distill(bert(), attention=1.0)(fast, tokens())
    with pytest.raises(NeedsData, match="no target"):
        Task()(plain, torch.zeros(1, 3))
    with pytest.raises(UsageError, match="no term"):
        Objectives(())
    with pytest.raises(UsageError, match="not positive"):
        Distill(plain, temperature=0)
