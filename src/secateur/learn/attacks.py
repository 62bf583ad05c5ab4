"""Perturbations of inputs that raise the loss: FGSM, PGD, and DeepFool with a cut-off."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.arguments import is_number, require_count
from secateur.core.batches import Batch, Loss, evaluating, forward, mapped
from secateur.core.errors import DataError, UsageError
from secateur.core.losses import default_loss, logits_of, read_tensors
from secateur.core.randomness import own_random
from secateur.core.samples import TARGETS
from secateur.core.slots import device_of
from secateur.learn.bounds import Bound, clip, require_bounds, within


class Attack(Protocol):
    """Makes harder inputs out of a batch."""

    def __call__(self, model: nn.Module, batch: Batch, loss: Loss | None = None) -> Batch:
        """The batch with perturbed inputs. Model, gradients and random states stay as they were."""

    def sized(self, size: float) -> Attack:
        """The same attack with perturbations of another size."""


@dataclass(frozen=True)
class Fgsm:
    r"""One step of fixed size along the sign of the gradient.

    **formula** :math:`x + ε \, sign(\nabla_x L)`, clipped to ``[low, high]``
    **Shapes** those of the inputs
    **Units** ε those of the inputs (largest change of an entry)
    **Needs** inputs of floats, targets
    **Source** Goodfellow et al., arXiv 1412.6572

    Args:
        eps: ε.
        low: Smallest valid input; a tuple holds one bound a channel.
        high: Largest valid input.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x, y = Fgsm(0.25)(net, (torch.tensor([[0.5]]), torch.tensor([0])))
        >>> x
        tensor([[0.2500]])
    """

    eps: float
    low: Bound = 0.0
    high: Bound = 1.0

    def __post_init__(self) -> None:
        _require_size(self, "eps")
        require_bounds(self, self.low, self.high)

    def __call__(self, model: nn.Module, batch: Batch, loss: Loss | None = None) -> Batch:
        x = within(inputs_of_floats(batch), self.low, self.high)
        with undisturbed(model):
            slope = _slope(model, batch, x, loss)
        return with_inputs(batch, clip(x + self.eps * slope.sign(), self.low, self.high))

    def sized(self, size: float) -> Fgsm:
        return replace(self, eps=size)


@dataclass(frozen=True)
class Pgd:
    r"""Several steps up the loss, each brought back into the ball around the input.

    **formula** :math:`x_{k+1} = \Pi_{|x' - x| \le ε} (x_k + a \, sign(\nabla L(x_k)))`, clipped to
    ``[low, high]``
    **Shapes** those of the inputs
    **Units** ε and a those of the inputs (largest change of an entry)
    **Needs** inputs of floats, targets
    **Source** Madry et al., arXiv 1706.06083

    Args:
        eps: ε, radius of the ball.
        step: a; by default ``2.5 eps / steps``. It is that of this ε: another size has a step in
            proportion.
        steps: How many.
        low: Smallest valid input; a tuple holds one bound a channel.
        high: Largest valid input.
        start: Share of ε from which a random start is drawn; 0 starts at the input itself. The
            draw has a seed of its own, made of the inputs: the same batch starts alike.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x, y = Pgd(0.25, step=0.2, steps=3)(net, (torch.tensor([[0.5]]), torch.tensor([0])))
        >>> x
        tensor([[0.2500]])
    """

    eps: float
    step: float | None = None
    steps: int = 7
    low: Bound = 0.0
    high: Bound = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        _require_size(self, "eps")
        if self.step is not None:
            _require_size(self, "step")
        require_count("Pgd(steps=...)", self.steps, what="how many steps", write="steps=7")
        if not is_number(self.start) or not 0 <= self.start <= 1:
            raise UsageError(
                f"Pgd(start={self.start!r})",
                "it is no share from 0 to 1",
                "it is the part of eps from which the start is drawn",
                "write start=0.0 to start at the input itself",
            )
        require_bounds(self, self.low, self.high)

    def __call__(self, model: nn.Module, batch: Batch, loss: Loss | None = None) -> Batch:
        x = within(inputs_of_floats(batch), self.low, self.high)
        size = self.step if self.step is not None else 2.5 * self.eps / self.steps
        here = x.clone()
        if self.start:
            # In a training, one draw for all batches would be learned like a part of the images.
            digest = hashlib.sha256(str(float(x.float().sum())).encode()).digest()
            own = torch.Generator(x.device).manual_seed(int.from_bytes(digest[:4], "big"))
            noise = torch.rand(x.shape, generator=own, device=x.device, dtype=x.dtype)
            here = clip(x + self.start * self.eps * (2 * noise - 1), self.low, self.high)
        with undisturbed(model):
            for _ in range(self.steps):
                here = here + size * _slope(model, batch, here, loss).sign()
                here = torch.minimum(torch.maximum(here, x - self.eps), x + self.eps)
                here = clip(here, self.low, self.high)
        return with_inputs(batch, here)

    def sized(self, size: float) -> Pgd:
        grown = size / self.eps if self.eps else 1.0
        # With the step as it was, a large ball would never be filled.
        return replace(self, eps=size, step=None if self.step is None else self.step * grown)


@dataclass(frozen=True)
class DeepFoolCutoff:
    r"""The smallest step across the decision boundary, cut off where it is too long.

    Every sample gets the strength it needs: a perturbation just across its nearest boundary, found
    by DeepFool, shortened to a root mean square of δ. So no strength has to be guessed beforehand.

    **formula** DeepFool: :math:`r \leftarrow r + |f_l| w_l / \|w_l\|^2` for the candidate class l of
    smallest :math:`|f_l| / \|w_l\|`, f and w the differences of logits and of their gradients to
    the predicted class, until the class changes; :math:`η = \mathrm{clip}(x + (1 + o) r) - x` to
    ``[low, high]``, and :math:`x + ρ η \min(1, δ / \mathrm{rms}(η))`
    **Shapes** those of the inputs
    **Units** δ those of the inputs
    **Needs** inputs of floats; one class a sample; a backward pass a candidate and iteration
    **Source** Blind adversarial pruning, arXiv 2004.05913; DeepFool, arXiv 1511.04599

    Args:
        max_iter: DeepFool's iterations.
        overshoot: o, how far beyond the boundary.
        candidates: How many of the likeliest classes are looked at, the predicted one included.
        rho: ρ, from 0.9 to 1 in the source.
        delta: δ, or ``"mean"``: the mean root mean square of the batch.
        low: Smallest valid input; a tuple holds one bound a channel.
        high: Largest valid input.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> attack = DeepFoolCutoff(overshoot=0.02, low=-1.0)
        >>> attack(net, (torch.tensor([[0.5]]), torch.tensor([0])))[0]  # the boundary is at 0
        tensor([[-0.0100]])
    """

    max_iter: int = 5
    overshoot: float = 0.02
    candidates: int = 10
    rho: float = 1.0
    delta: float | str = 1.0
    low: Bound = 0.0
    high: Bound = 1.0

    def __post_init__(self) -> None:
        write = "e.g. max_iter=5; the longest perturbation is delta="
        require_count(
            "DeepFoolCutoff(max_iter=...)", self.max_iter, what="how many iterations", write=write
        )
        what, write = "how many classes", "candidates=10"
        require_count("DeepFoolCutoff(candidates=...)", self.candidates, what=what, write=write)
        if self.candidates < 2:
            raise UsageError(
                f"DeepFoolCutoff(candidates={self.candidates})",
                "the predicted class is one of them",
                "there is no other class to move to",
                "write 2 or more",
            )
        for name in ("overshoot", "rho"):
            _require_size(self, name)
        require_bounds(self, self.low, self.high)
        if isinstance(self.delta, str) and self.delta != "mean":
            raise UsageError(
                f"DeepFoolCutoff(delta={self.delta!r})",
                "delta is a number or 'mean'",
                "it is the longest perturbation allowed, as a root mean square",
                "write e.g. 1.0",
            )
        if not isinstance(self.delta, str):
            _require_size(self, "delta")

    def __call__(self, model: nn.Module, batch: Batch, loss: Loss | None = None) -> Batch:
        x = within(inputs_of_floats(batch), self.low, self.high)
        with undisturbed(model):
            across = x + (1 + self.overshoot) * self._across(model, batch, x)
        eta = clip(across, self.low, self.high) - x
        rms = eta.flatten(1).square().mean(1).sqrt()
        limit = rms.mean() if isinstance(self.delta, str) else torch.full_like(rms, self.delta)
        factor = self.rho * (limit / rms.clamp(min=1e-12)).clamp(max=1)
        moved = x + eta * _each(factor, x)
        return with_inputs(batch, clip(moved, self.low, self.high))

    def sized(self, size: float) -> DeepFoolCutoff:
        return replace(self, delta=size)

    def _across(self, model: nn.Module, batch: Batch, x: Tensor) -> Tensor:
        """The smallest perturbation found that changes the class; samples that did it stop."""
        with torch.no_grad():
            first = _scores(model, batch, x)
        count = min(self.candidates, first.shape[1])
        ranked = first.topk(count, 1).indices
        own, others = ranked[:, :1], ranked[:, 1:]
        total = torch.zeros_like(x)
        for _ in range(self.max_iter):
            here = clip(x + (1 + self.overshoot) * total, self.low, self.high).requires_grad_()
            scores = _scores(model, batch, here)
            stays = scores.argmax(1) == own[:, 0]
            if not bool(stays.any()):
                break
            base = _gradient(scores.gather(1, own).sum(), here)
            shortest = torch.full(stays.shape, math.inf, device=x.device, dtype=torch.float64)
            best = torch.zeros_like(x)
            for k in range(others.shape[1]):
                gap = (scores.gather(1, others[:, k : k + 1]) - scores.gather(1, own))[:, 0]
                w = _gradient(scores.gather(1, others[:, k : k + 1]).sum(), here) - base
                norm = w.flatten(1).double().norm(dim=1)
                gap = gap.detach().abs().double()
                far = torch.where(norm > 0, gap / norm, math.inf)
                nearer = far < shortest
                shortest = torch.where(nearer, far, shortest)
                ratio = torch.where(nearer, gap / norm.square().clamp(min=1e-300), 0.0)
                best = torch.where(_each(nearer, x), w * _each(ratio.to(x), x), best)
            total = total + best * _each(stays.to(x), x)
        return total.detach()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients on; modes and the caller's random state come back.

    In evaluation mode batch normalisations use and keep their running statistics, so perturbed
    inputs do not reach them. Under autocast to float16 it runs in the types of the weights: where the
    network is sure, slopes of a mean are too small for a half, and their sign would be 0.
    """
    kind = device_of(model).type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    whole = torch.autocast(kind, enabled=False) if half else nullcontext()
    with evaluating(model), torch.enable_grad(), own_random(model), whole:
        yield


def inputs_of_floats(batch: Batch) -> Tensor:
    """The inputs of a batch that are perturbed: its first tensor of floats that is no target.

    Raises:
        DataError: There is none.

    Example:
        >>> inputs_of_floats({"labels": torch.tensor([0]), "pixel_values": torch.zeros(1, 3)}).shape
        torch.Size([1, 3])
    """
    return _perturbed(batch).detach()


def with_inputs(batch: Batch, x: Tensor) -> Batch:
    """The batch with the inputs of :func:`inputs_of_floats` replaced; gradients reach ``x``.

    Example:
        >>> with_inputs((torch.zeros(2), torch.tensor(1)), torch.ones(2))
        (tensor([1., 1.]), tensor(1))
    """
    old = _perturbed(batch)

    def swapped(part: object) -> object:
        return mapped(part, lambda found: x if found is old else found)

    if isinstance(batch, Tensor):
        return x
    if isinstance(batch, Mapping):
        return {k: v if k == TARGETS else swapped(v) for k, v in batch.items()}
    inputs = max(1, len(batch) - 1)
    return (*map(swapped, batch[:inputs]), *batch[inputs:])


def _perturbed(batch: Batch) -> Tensor:
    inputs = read_tensors(batch)
    found = next((x for x in inputs if x.dtype.is_floating_point and x.ndim), None)
    if found is None:
        raise DataError(
            "an adversarial perturbation",
            f"the inputs are {', '.join(sorted({str(x.dtype) for x in inputs})) or 'no tensors'}",
            "only inputs of floats can be moved a little",
            "perturb images or features, not token numbers",
        )
    return found


def _slope(model: nn.Module, batch: Batch, x: Tensor, loss: Loss | None) -> Tensor:
    here = x.detach().requires_grad_()
    changed = with_inputs(batch, here)
    (slope,) = torch.autograd.grad((loss or default_loss)(model, changed), here)
    return slope


def _scores(model: nn.Module, batch: Batch, x: Tensor) -> Tensor:
    """Logits ``(samples, classes)``; a single one is that of class 1 against class 0."""
    logits = logits_of(forward(model, with_inputs(batch, x)))
    if logits.numel() == len(x):
        return F.pad(logits.reshape(-1, 1), (1, 0))
    if logits.ndim != 2:
        raise DataError(
            "an attack with DeepFool",
            f"the network puts out {tuple(logits.shape)} for {len(x)} samples",
            "it looks for the nearest boundary of the class of a sample, and needs one class a sample",
            "take Fgsm or Pgd, which follow the loss",
        )
    return logits


def _gradient(scalar: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(scalar, x, retain_graph=True)
    return found


def _each(values: Tensor, x: Tensor) -> Tensor:
    """One value a sample, shaped to multiply ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _require_size(attack: Attack, name: str) -> None:
    value = getattr(attack, name)
    if not is_number(value) or value < 0:
        raise UsageError(
            f"{type(attack).__name__}({name}={value!r})",
            "it is no number, negative or not finite",
            "it says how large a perturbation is",
            f"write e.g. {name}={getattr(type(attack), name, None) or 0.03}",
        )
