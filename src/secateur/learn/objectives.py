"""What a network is trained towards: a sum of terms that plugs into ``Data(loss=...)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.arguments import require_part
from secateur.core.batches import Batch, Loss, evaluating, inputs_of, real_tokens
from secateur.core.errors import UsageError
from secateur.core.losses import (
    IGNORED,
    classes_last,
    default_loss,
    logits_of,
    loss_of,
    targets_of,
)
from secateur.learn.attacks import Attack


class Term(Protocol):
    """One term of an objective, already weighted."""

    @property
    def wants(self) -> frozenset[str]:
        """What the output must hold beside logits: ``"hidden"``, ``"attention"``."""

    def of(self, model: nn.Module, output: Any, batch: Batch) -> Tensor:
        """The term, given what ``model`` put out on ``batch``."""


@dataclass(frozen=True)
class Objectives:
    """The sum of terms; the network runs once on the batch, whatever their number.

    Args:
        terms: Each with its own weight. A loss of your own, ``(model, batch) -> scalar``, may be among
            them; it runs the network itself.

    Raises:
        UsageError: There is none, or one of them is something else.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> objective = Objectives((Task(0.5), Distill(net, weight=0.5)))
        >>> loss = objective(net, (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    terms: tuple[Term | Loss, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        for term in self.terms:
            has = ("wants", "of") if hasattr(term, "of") else ("__call__",)
            what, write = "a term or a loss", "e.g. Task(0.5) or lambda model, batch: ..."
            require_part("Objectives(terms)", term, has, what=what, write=write)
        if not self.terms:
            raise UsageError(
                "Objectives(())", "no term", "there is nothing to train towards", "add Task()"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        known: list[Any] = [term for term in self.terms if hasattr(term, "of")]
        others: list[Any] = [term for term in self.terms if not hasattr(term, "of")]
        found = [loss(model, batch) for loss in others]
        if known:
            output = run(model, batch, frozenset().union(*(term.wants for term in known)))
            found += [term.of(model, output, batch) for term in known]
        return torch.stack(found).sum()


@dataclass(frozen=True)
class Task:
    """The model's own loss if it returns one, else cross-entropy or squared error to the target.

    Args:
        weight: Factor.

    Example:
        >>> Task(2.0)(nn.Identity(), (torch.zeros(1, 2), torch.tensor([0])))
        tensor(1.3863)
    """

    weight: float = 1.0

    @property
    def wants(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.of(model, run(model, batch), batch)

    def of(self, model: nn.Module, output: Any, batch: Batch) -> Tensor:
        return self.weight * loss_of(output, batch)


@dataclass(frozen=True)
class Distill:
    r"""Towards a teacher: its logits, and if wanted its hidden states and attention maps.

    **formula** :math:`w \, (T^2 \, \mathrm{KL}(p_t^{1/T} \| p_s^{1/T}) + h \, \mathrm{mean}_l
    \mathrm{MSE}(H_t, H_s) + a \, \mathrm{mean}_l \mathrm{MSE}(A_t, A_s))`
    **Shapes** scalar
    **Units** loss
    **Needs** a teacher of the same shape where hidden states or attention are compared
    **Source** Hinton et al., arXiv 1503.02531; TinyBERT, arXiv 1909.10351
    **Differs** attention maps are compared after the softmax; padded tokens count for nothing; outputs
    that are numbers and no classes have their squared error in place of the first term

    Args:
        teacher: Run in evaluation mode, without gradients.
        weight: w, factor of the whole term.
        temperature: T.
        hidden: h; needs a model of Transformers, which puts out hidden states.
        attention: a; needs such a model with ``attn_implementation="eager"``.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> abs(Distill(net)(net, torch.ones(3, 4)).item()) < 1e-6
        True
    """

    teacher: nn.Module
    weight: float = 1.0
    temperature: float = 2.0
    hidden: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(
                f"Distill(temperature={self.temperature:g})",
                "it is not positive",
                "logits are divided by it",
                "write e.g. 2.0",
            )

    @property
    def wants(self) -> frozenset[str]:
        pairs = {"hidden": self.hidden, "attention": self.attention}
        return frozenset(name for name, share in pairs.items() if share)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.of(model, run(model, batch, self.wants), batch)

    def of(self, model: nn.Module, output: Any, batch: Batch) -> Tensor:
        with torch.no_grad(), evaluating(self.teacher):
            taught = run(self.teacher, batch, self.wants)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        student, teacher = logits_of(output), logits_of(taught)
        total = distance(student, teacher, batch, self.temperature, of=self.teacher)
        if self.hidden:
            pairs = _paired(output, taught, "hidden_states")
            far = [_squared(s, t, _tokens(mask, s)) for s, t in pairs]
            total = total + self.hidden * torch.stack(far).mean()
        if self.attention:
            pairs = _paired(output, taught, "attentions")
            far = [_squared(s, t, _maps(mask, s)) for s, t in pairs]
            total = total + self.attention * torch.stack(far).mean()
        return self.weight * total


@dataclass(frozen=True)
class Adversarial:
    r"""The task on clean and on perturbed inputs.

    **formula** :math:`w \, ((1 - s) L(x) + s L(x_{adv}))`; no gradient passes through the making of
    :math:`x_{adv}`
    **Shapes** scalar
    **Units** loss
    **Needs** inputs of floats, targets
    **Source** Goodfellow et al., arXiv 1412.6572; blind adversarial pruning, arXiv 2004.05913

    Args:
        attack: Makes the perturbed inputs, anew in each step.
        share: s.
        weight: w.
        loss: L, a function of model and batch; by default that of :class:`Task`. It is what the attack
            raises, too, if that follows a loss.

    Example:
        >>> from secateur.learn.attacks import Fgsm
        >>> net, batch = nn.Linear(4, 2), (torch.rand(3, 4), torch.tensor([0, 1, 0]))
        >>> objective = Adversarial(Fgsm(0.1))
        >>> bool(objective(net, batch) > Task()(net, batch))
        True
    """

    attack: Attack
    share: float = 0.5
    weight: float = 1.0
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(
                f"Adversarial(share={self.share:g})",
                "it is not between 0 and 1",
                "share is how much the perturbed inputs count",
                "write e.g. 0.5",
            )

    @property
    def wants(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.share == 1:  # the clean inputs need not run
            return self.weight * self._harder(model, batch)
        return self.of(model, run(model, batch) if self.loss is None else None, batch)

    def of(self, model: nn.Module, output: Any, batch: Batch) -> Tensor:
        clean = loss_of(output, batch) if self.loss is None else self.loss(model, batch)
        return self.weight * ((1 - self.share) * clean + self.share * self._harder(model, batch))

    def _harder(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.loss or default_loss)(model, self.attack(model, batch, self.loss))


def run(model: nn.Module, batch: Batch, wants: frozenset[str] = frozenset()) -> Any:
    """Run ``model`` on a batch and ask for hidden states or attention maps where wanted."""
    names = {"hidden": "output_hidden_states", "attention": "output_attentions"}
    args, kwargs = inputs_of(batch)
    flags = {names[want]: True for want in sorted(wants)}
    try:
        return model(*args, **kwargs, **flags)
    except TypeError as error:
        refused = [flag for flag in flags if f"argument '{flag}'" in str(error)]
        if not refused:
            raise
        raise UsageError(
            f"distilling {refused[0].removeprefix('output_')}",
            f"{type(model).__name__} takes no {refused[0]}=True",
            "this needs models of Transformers, which put them out if asked",
            "set this share to 0, or give forward that argument",
        ) from error


def distance(
    student: Tensor, teacher: Tensor, batch: Batch, temperature: float, *, of: nn.Module
) -> Tensor:
    """How far the outputs on a batch are from a teacher's: :func:`softened`, mean over its answers.

    A single logit is that of class 1 against class 0. Where the targets are floats (but for shares of
    classes), and for one number a sample without labels, the squared error is taken.

    Args:
        student: Outputs of the model.
        teacher: Outputs of its teacher.
        batch: Its targets tell numbers from classes; tokens of padding count for nothing.
        temperature: Of the logits.
        of: The teacher; decoders behind an encoder have padding of their own.

    Raises:
        UsageError: The outputs have different shapes.

    Example:
        >>> x, y = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0])
        >>> far = distance(x, -x, (None, y), 1.0, of=nn.Identity())
        >>> abs(far - (x * (1 - 2 * torch.sigmoid(-x))).mean()) < 1e-6
        tensor(True)
    """
    if student.shape != teacher.shape:
        raise UsageError(
            "distilling the outputs",
            f"the model puts out {tuple(student.shape)}, its teacher {tuple(teacher.shape)}",
            "they are compared answer by answer",
            "use a teacher of the same task",
        )
    target = targets_of(batch)
    if _numbers(student, target):
        return F.mse_loss(student.float(), teacher.float())
    labels = None if target is None or target.is_floating_point() else target
    if labels is not None and student.numel() == labels.numel():
        student, teacher = (x.reshape(*labels.shape, 1) for x in (student, teacher))
    student, teacher = (classes_last(x, labels) for x in (student, teacher))
    if student.shape[-1] == 1:
        student, teacher = (F.pad(x, (1, 0)) for x in (student, teacher))
    return softened(student, teacher, temperature, _answers(of, batch, student))


def _numbers(output: Tensor, target: Tensor | None) -> bool:
    """Whether outputs are numbers to be hit, and not scores of classes."""
    if target is None:
        return output.numel() == len(output)
    if not target.is_floating_point():
        return False
    classes = target.shape == output.shape and target.ndim > 1 and target.shape[1] > 1
    shares = classes and bool((target >= 0).all()) and bool((target.sum(1) - 1).abs().max() < 1e-2)
    return not shares  # mixed or smoothed labels


def _answers(teacher: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
    """Which answers count: those on tokens that are no padding; None for all."""
    if not getattr(getattr(teacher, "config", None), "is_encoder_decoder", False):
        return real_tokens(teacher, batch, logits)
    target = targets_of(batch)  # the mask of an encoder says nothing of what its decoder answers
    fits = target is not None and target.shape == logits.shape[:-1]
    return target != IGNORED if target is not None and fits else None


def softened(
    student: Tensor, teacher: Tensor, temperature: float, counts: Tensor | None = None
) -> Tensor:
    """``T² KL(teacher || student)`` of logits at a temperature, mean over the rows that count.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> float(softened(x, x, 2.0)), bool(softened(x.flip(1), x, 2.0) > 0.1)
        (0.0, True)
    """
    p, q = (F.log_softmax(x.float() / temperature, -1) for x in (teacher, student))
    far = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
    if counts is None:
        return far.mean()
    return (far * counts).sum() / counts.sum().clamp(min=1)


def _paired(student: Any, teacher: Any, name: str) -> Sequence[tuple[Tensor, Tensor]]:
    own, taught = (tuple(getattr(x, name, None) or ()) for x in (student, teacher))
    if any(not isinstance(x, Tensor) for x in (*own, *taught)) or not own or not taught:
        eager = ' loaded with attn_implementation="eager"' if name == "attentions" else ""
        raise UsageError(
            f"distilling {name}",
            "the model or its teacher does not put them out",
            f"this needs models of Transformers{eager}",
            "set this share to 0, or load the models so",
        )
    shapes = [(s.shape, t.shape) for s, t in zip(own, taught, strict=False)]
    if len(own) != len(taught) or any(s != t for s, t in shapes):
        raise UsageError(
            f"distilling {name}",
            f"the model has {len(own)} of shape {tuple(own[0].shape)}, "
            f"its teacher {len(taught)} of shape {tuple(taught[0].shape)}",
            "they are compared layer by layer",
            "use a teacher of the same shape, or set this share to 0",
        )
    return list(zip(own, taught, strict=True))


def _squared(student: Tensor, teacher: Tensor, counts: Tensor | None) -> Tensor:
    far = (student.float() - teacher.float()).square()
    if counts is None:
        return far.mean()
    wide = counts.to(far).expand_as(far)
    return (far * wide).sum() / wide.sum().clamp(min=1)


def _tokens(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Which entries of hidden states ``(N, T, d)`` belong to real tokens."""
    fits = mask is not None and mask.shape == hidden.shape[:2]
    return mask[:, :, None] if fits and mask is not None else None


def _maps(mask: Tensor | None, attention: Tensor) -> Tensor | None:
    """Which entries of attention maps ``(N, heads, T, T)`` are between real tokens."""
    if mask is None or attention.ndim != 4 or mask.shape[1] != attention.shape[-1]:
        return None
    return mask[:, None, :, None] * mask[:, None, None, :]
