"""Masks learned in a training of our own: a copy is trained together with them, then hardened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_kind
from secateur.core.batches import Batch, Loss, as_data, size_of
from secateur.core.errors import NeedsData
from secateur.core.losses import default_loss
from secateur.drive.network import copy_of
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Scope
from secateur.drive.training.finetune import FineTune, finetune
from secateur.drive.training.learned import Learned
from secateur.drive.training.recorder import Tally
from secateur.learn import Distill, Learner, Objectives, Task


def learn_masks(
    model: nn.Module,
    data: Any,
    how: Learner,
    training: FineTune | None = None,
    *,
    scope: Scope | None = None,
    checkpoint: Any = None,
) -> Pruned:
    """Train a copy of ``model`` together with its masks, and harden it.

    ``facts.history`` has the mean loss of each epoch, and beside it the mean penalty if the learner has
    one.

    Args:
        model: Any torch module. It is not changed; with ``training.distill`` it is the teacher.
        data: :class:`~secateur.core.batches.Data`, or an iterable of training batches.
        how: A learner.
        training: Epochs, learning rate of the weights and so on. The learning rate of the masks is
            the learner's; both follow the same warm-up and cosine.
        scope: Which weights take part.
        checkpoint: As in :func:`~secateur.drive.training.finetune.finetune`.

    Example:
        >>> from secateur.learn import Leap
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(x := torch.randn(16, 8), (x[:, 0] > 0).long()) for _ in range(20)]
        >>> pruned = learn_masks(net, batches, Leap.short(0.8), FineTune(15, optimizer="adamw"))
        >>> abs(pruned.facts.sparsity - 0.8) < 0.02
        True
    """
    found = as_data(data)
    if found is None or found.train is None:
        raise NeedsData(
            "learn_masks(...)", "no training data", "masks learn from batches", "pass batches"
        )
    write, kinds = "e.g. FineTune(epochs=2)", (FineTune, type(None))
    require_kind("learn_masks(training=...)", training, kinds, what="a FineTune", write=write)
    training = training or FineTune()
    copied = copy_of(model)
    live: list[_Stepping] = []
    base = _towards(found.loss, model, training)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        penalty = live[0].learned.penalty()
        live[0].batch, live[0].penalty = batch, penalty.detach()
        return base(network, batch) + penalty

    def attach(optimizer: torch.optim.Optimizer, per_epoch: int) -> _Stepping:
        plain = replace(found, loss=base)
        learned = Learned(copied, optimizer, how, scope=scope, data=plain)
        live.append(_Stepping(learned, per_epoch, training.distill))
        return live[0]

    history = finetune(
        copied,
        replace(found, loss=loss),
        replace(training, distill=0.0),  # the loss distils itself: the penalty is not shared out
        attach=attach,
        checkpoint=checkpoint,
    )
    live[0].fill_(history)
    pruned = live[0].learned.harden()
    pruned.facts.history = history
    return pruned


def _towards(loss: Loss | None, teacher: nn.Module, training: FineTune) -> Loss:
    """The loss, and distillation from the dense network if the training asks for it."""
    share = training.distill
    if not share:
        return loss or default_loss
    term = Distill(teacher, weight=share, temperature=training.temperature)
    if share == 1:
        return term
    if loss is None:  # one forward pass serves both
        return Objectives((Task(1 - share), term))
    return lambda network, batch: (1 - share) * loss(network, batch) + term(network, batch)


class _Stepping:
    """What runs after each step of a fine-tuning: it knows the batch, and watches the masks."""

    def __init__(self, learned: Learned, per_epoch: int, distill: float) -> None:
        self.learned, self._per_epoch = learned, per_epoch
        self._terms = Tally(terms={"distill": distill})  # the loop is told of none
        self.batch: Batch = None
        self.penalty = torch.zeros(())
        self._penalties = Tally()  # of this epoch
        self._seen: list[dict[str, float]] = []

    def step(self) -> None:
        self.learned.step(self.batch)
        self._penalties.count(float(self.penalty), size_of(self.batch))
        if self.learned.steps % self._per_epoch == 0:
            self._seen.append(self._epoch())
            self._penalties = Tally()

    def _epoch(self) -> dict[str, float]:
        found = {"sparsity": self.learned.sparsity}
        if self.learned.how.penalised:
            found["penalty"] = self._penalties.losses / max(1, self._penalties.seen)
        return found

    def fill_(self, history: list[dict[str, Any]]) -> None:
        """Add what was seen, and take the penalty out of the losses."""
        whole = [*self._seen, self._epoch()]  # the last epoch may be a part of one
        for record, seen in zip(history, whole, strict=False):
            record.update(seen)
            record["loss"] -= seen.get("penalty", 0.0)

    def state_dict(self) -> dict[str, Any]:
        kept = {"seen": [dict(seen) for seen in self._seen], "terms": self._terms.terms}
        penalties = [self._penalties.losses, self._penalties.seen]
        return {"learned": self.learned.state_dict(), "penalties": penalties, **kept}

    def require_fit(self, state: Mapping[str, Any]) -> None:
        self.learned.require_fit(state["learned"])
        self._terms.require_fit(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned.load_state_dict(state["learned"])
        self._seen = [dict(seen) for seen in state["seen"]]
        losses, seen = state["penalties"]
        self._penalties = Tally(losses=float(losses), seen=int(seen))
