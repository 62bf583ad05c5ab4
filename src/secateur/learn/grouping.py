"""Dynamic structure pruning, stage 1: groups of filters that are learned with the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.arguments import require_amounts, require_numbers
from secateur.core.errors import UsageError
from secateur.core.slots import Slot
from secateur.learn.learner import Learning


@dataclass(frozen=True)
class GroupLearning:
    r"""Groups of filters whose members can do without the same input channels.

    Beside the weights W, logits A ``(groups, filters)`` of each convolution are trained. In every
    step, after the optimizer's own: the penalty with soft groups shrinks W, a virtual step on the
    batch follows, and A descends along the total derivative of loss and penalty at the weights
    reached so; then W is put back, and shrunk with the groups of that moment made hard. At the end
    :func:`~secateur.learn.energy.energy_prune` cuts the input channels of each group.

    **formula** :math:`R = z \sum_g s(p_g) \sum_c \| p_g \odot W_{\cdot c} \|_2`,
    :math:`s(p) = (\sum_i \sqrt{p_i})^2`,
    :math:`z = \sqrt{C_{in} h w / (16 \cdot 32^2)} \, k \, (g / C_{out})^{1.5}`, P a Gumbel softmax of
    A at temperature τ; :math:`dA = \partial_A R(P, W') + \partial_A \partial_W R(P, W_0) \cdot
    (W' - \eta λ \partial_W R(P, W') - \tilde W)` with
    :math:`\tilde W = W_0 - \eta λ \partial_W R(P, W_0)`,
    :math:`W' = \tilde W - \eta \nabla L(\tilde W)`; λ grows linearly over ``ramp`` steps
    **Shapes** A ``(groups, filters)``
    **Units** R those of W
    **Needs** gradients of a training loop, and the loss of each batch once more
    **Source** Park et al., arXiv 2303.09736
    **Differs** the temperature divides logits and noise, as in Gumbel softmax (the source divides
    the logits only); the virtual step is a plain gradient step without momentum; mixed derivatives
    come from automatic differentiation

    Args:
        count: Groups a convolution, 2 to 4 in the source.
        target: Share of the multiply-adds of these convolutions that shall go at the end.
        strength: λ; 2e-3 for ResNet-20 and 5e-4 for ResNet-56 in the source.
        ramp: Steps in which λ grows: the whole training in the source.
        tau: Temperature of the Gumbel softmax.
        filters: Names of weights of which whole filters may go as well; in the source the last
            convolution of each block.

    Example:
        >>> GroupLearning(count=2, ramp=100).at(49)
        0.001
    """

    count: int = 2
    target: float = 0.6
    strength: float = 2e-3
    ramp: int = 1000
    tau: float = 0.5
    filters: tuple[str, ...] = ()
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "filters", tuple(self.filters))
        require_numbers(self, ("count", "target", "strength", "ramp", "tau", "lr", "seed"))
        require_amounts(self, ("strength", "ramp", "lr"))
        if self.count < 2 or not 0 < self.target < 1 or self.tau <= 0:
            raise UsageError(
                f"GroupLearning(count={self.count}, target={self.target:g}, tau={self.tau:g})",
                "count is 2 or more, target between 0 and 1, tau positive",
                "one group is plain channel pruning",
                "correct the value",
            )

    @property
    def penalised(self) -> bool:
        return False

    @property
    def goal(self) -> float | None:
        return None  # the target is a share of multiply-adds, not of weights

    @property
    def needs_objective(self) -> bool:
        return True

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        from secateur.learn.grouped import Grouped

        return Grouped(self, model, slots)

    def at(self, step: int) -> float:
        """λ at a step."""
        return self.strength * (min(1.0, (step + 1) / self.ramp) if self.ramp else 1.0)

    def membership(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A Gumbel softmax over the groups; differentiable in the logits."""
        noise = torch.rand(logits.shape, generator=generator, device=logits.device)
        tiny = torch.finfo(noise.dtype).tiny
        gumbel = -(-noise.clamp(min=tiny).log()).clamp(min=tiny).log()
        return torch.softmax((logits + gumbel) / self.tau, 0)


def group_norms(weight: Tensor, member: Tensor, scale: float = 1.0) -> Tensor:
    r"""The regulariser of one convolution.

    **formula** :math:`z \sum_g (\sum_f \sqrt{p_{gf}})^2 \sum_c \sqrt{\sum_{f,taps} (p_{gf} W_{fc})^2}`
    **Shapes** weight ``(filters, channels, ...)``, member ``(groups, filters)``
    **Units** those of the weight
    **Needs** nothing
    **Source** Park et al., arXiv 2303.09736

    Args:
        weight: Of a convolution.
        member: How much each filter belongs to each group.
        scale: z, see :func:`layer_scale`.

    Example:
        >>> w = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)
        >>> float(group_norms(w, torch.tensor([[1.0, 1.0], [0.0, 0.0]])))  # 4 * 5
        20.0
    """
    energy = weight.flatten(2).square().sum(2)  # (filters, channels)
    squares = member.square() @ energy  # (groups, channels)
    norms = _root(squares).sum(1)
    sizes = _root(member).sum(1).square()
    return scale * (sizes * norms).sum()


def layer_scale(weight: Tensor, count: int, pixels: int) -> float:
    """z: makes the penalties of convolutions of different sizes comparable.

    Args:
        weight: Of the convolution.
        count: Groups.
        pixels: Height times width of its input.

    Example:
        >>> layer_scale(torch.zeros(2, 16, 3, 3), 2, 32 * 32)
        3.0
    """
    volume = weight.shape[1] * pixels / (16 * 32 * 32)
    return float(volume**0.5 * weight.shape[2] * (count / weight.shape[0]) ** 1.5)


def _root(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, twice differentiable elsewhere."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def logit_gradients(
    member: Mapping[str, Tensor],
    logits: Sequence[Tensor],
    *,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> tuple[Tensor, ...]:
    """The total derivative of loss and penalty by the logits, divided by λ.

    Args:
        member: Soft groups, which depend on ``logits``.
        logits: A of each convolution.
        before: Weights W0 before the soft penalty.
        after: Weights W' after the virtual step.
        moved: How far the weights went from the penalised ones, virtual step and penalty together.
        scales: z of each convolution.

    Example:
        >>> a = torch.zeros(2, 3, requires_grad=True)
        >>> w = {"c": torch.ones(3, 2, 1, 1)}
        >>> still = {"c": torch.zeros(3, 2, 1, 1)}
        >>> found, = logit_gradients({"c": a.softmax(0)}, [a], before=w, after=w, moved=still,
        ...                          scales={"c": 1.0})
        >>> bool(found.abs().max() < 1e-6)  # all filters alike: no direction is better
        True
    """
    total = torch.zeros(())
    for name, p in member.items():
        total = total.to(p.device) + group_norms(after[name].to(p.dtype), p, scales[name])
        weight = before[name].clone().to(p.dtype).requires_grad_()
        own = group_norms(weight, p, scales[name])
        (slope,) = torch.autograd.grad(own, weight, create_graph=True)
        total = total + (slope * moved[name].to(p.dtype)).sum()
    return torch.autograd.grad(total, list(logits))


def hard(logits: Tensor) -> Tensor:
    """Each filter wholly in its likeliest group (the first among equals).

    Example:
        >>> hard(torch.tensor([[0.1, 2.0], [0.3, 1.0]])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    return F.one_hot(groups_of(logits), len(logits)).T.to(logits.dtype)


def groups_of(logits: Tensor) -> Tensor:
    """The likeliest group of each filter (the first among equals).

    Example:
        >>> groups_of(torch.tensor([[0.1, 2.0, 1.0], [0.3, 1.0, 1.0]])).tolist()
        [1, 0, 0]
    """
    best = logits.max(0, keepdim=True).values
    return (logits == best).to(torch.uint8).argmax(0)
