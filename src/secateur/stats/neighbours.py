"""How strongly the layers before and after a weight pass on what it reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss
from secateur.core.errors import NeedsData
from secateur.core.groups import Groups, Part, Role
from secateur.core.slots import Slot


@dataclass(frozen=True)
class Neighbours:
    r"""For each weight, the energy of the producers of its input times that of its output's readers.

    Producers and consumers are those of the widths that its axes lie in; an axis in no width (the
    network's input or output, or something pinned) counts 1. A BatchNorm multiplies the side that
    it belongs to with :math:`\gamma^2/(\sigma^2+\epsilon)`. Where producers and consumers have
    different numbers of members (a flatten, shared key-value heads), the energy is spread evenly
    within the group: a filter in front of a flatten has the sum over its pixels, and each of its
    columns the filter's whole energy. A depthwise convolution hides what lies beyond it.

    **formula** :math:`n_{ji} = \sum_{p} \lVert W_p[i, :] \rVert^2 \cdot \sum_{c} \lVert W_c[:, j]
    \rVert^2`
    **Shapes** that of the weight
    **Units** weights to the fourth power
    **Needs** weights and widths
    **Source** LAP, arXiv 2002.04809
    **Differs** on a residual stream all producers before a weight and all consumers behind it (in
    the network's order of parameters) count, in place of 1 for the identity path. The paper has no
    products of activations: here query, key and value count alike as producers of what reads an
    attention, and gate and up of what reads a gated layer, so scaling one of a pair up and the other
    down changes scores though not the network

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> stats = collect_groups(sample.model, sample.groups, [Neighbours()], [])
        >>> stats.at(Neighbours(), "4.weight").shape
        torch.Size([4, 6, 2, 2])
    """

    data: ClassVar[bool] = False

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        """Refuse: slots do not say what is next to what.

        Raises:
            NeedsData: Always.
        """
        raise NeedsData(
            "lookahead scores",
            "only weights were given, not what they are connected to",
            "neighbours are known from the widths of the network",
            "collect with collect_groups(model, groups_of(model, couple(model, example).widths, slots))",
        )

    def measure_groups(
        self, model: nn.Module, groups: Sequence[Groups], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in (p for g in groups for p in g.trained):
            found.setdefault(
                part.parameter, torch.ones_like(part.weight.value, dtype=torch.float64)
            )
        for width in groups:
            gains = _gains(model, width)
            for part in width.having("out", "channel"):
                _multiply_(found, part, _after(part, width, gains))
            for part in width.having("in", "channel"):
                _multiply_(found, part, _before(part, width, gains))
        return found


def _multiply_(found: dict[str, Tensor], part: Part, factor: Tensor | None) -> None:
    """Multiply the positions along the part's axis by ``(groups, members)``; the others by one."""
    if factor is None:
        return
    along = factor.new_ones(part.value.shape[part.axis])
    along[part.index.to(along.device)] = factor
    shape = [1] * part.value.ndim
    shape[part.axis] = -1
    spread = along.reshape(shape).expand(part.value.shape)
    found[part.parameter] = found[part.parameter] * spread.reshape(part.weight.value.shape)


def _before(part: Part, width: Groups, gains: dict[str, Tensor]) -> Tensor | None:
    """Energy that reaches each member of a consumer: ``(groups, members)``."""
    sources = _nearest(part, width.having("out", "channel"), "out", behind=False)
    members = part.index.shape[1]
    found = [_aligned(_energy(p, gains.get(f"after {p.parameter}")), members) for p in sources]
    return _total(found, gains.get(f"before {part.parameter}"), members)


def _after(part: Part, width: Groups, gains: dict[str, Tensor]) -> Tensor | None:
    """Energy with which each member of a producer is read: ``(groups, members)``."""
    readers = _nearest(part, width.having("in", "channel"), "in", behind=True)
    members = part.index.shape[1]
    energies = [_energy(p, gains.get(f"before {p.parameter}")) for p in readers]
    # A mean over the reader's members times how many there are for each of the producer's.
    found = [_aligned(e, members) * (e.shape[1] / members) for e in energies]
    return _total(found, gains.get(f"after {part.parameter}"), members)


def _total(found: list[Tensor], gain: Tensor | None, members: int) -> Tensor | None:
    if not found:
        return None
    total = torch.stack(found).sum(0)
    return total if gain is None else total * _aligned(gain, members)


def _nearest(part: Part, others: Sequence[Part], role: Role, *, behind: bool) -> list[Part]:
    """The producers before a part, or the consumers behind it, up to a depthwise convolution.

    A network that registers its parameters in another order than it uses them may have none on the
    right side; then all of them count.
    """
    sign = 1 if behind else -1
    apart = [p for p in others if p.parameter != part.parameter]
    walk = sorted(
        (p for p in apart if sign * (p.order - part.order) > 0), key=lambda p: sign * p.order
    )
    taken: list[Part] = []
    for other in walk:
        if other.role == "channel":
            return taken or [other]
        taken.append(other)
    return taken or [p for p in apart if p.role == role and part.role != "channel"]


def _energy(part: Part, gain: Tensor | None) -> Tensor:
    """Squares summed over each slice, times a gain: ``(groups, members)``."""
    energy = part.sum(part.value.double().square())
    return energy if gain is None else energy * _aligned(gain, energy.shape[1])


def _aligned(x: Tensor, members: int) -> Tensor:
    """Numbers of one side's members for those of the other: one by one, else their mean."""
    return x if x.shape[1] == members else x.mean(1, keepdim=True).expand(-1, members)


def _gains(model: nn.Module, width: Groups) -> dict[str, Tensor]:
    """What each BatchNorm multiplies a producer's output or a consumer's input with.

    It belongs to the producer right before it in the order of parameters, else to the consumer
    right behind it (pre-activation), else to all producers.
    """
    layers = sorted(width.having("out", "in", "channel"), key=lambda p: p.order)
    gains: dict[str, Tensor] = {}
    for scale in width.having("vector"):
        module = model.get_submodule(scale.module)
        if not scale.batch_norm or scale.bias or not isinstance(module.running_var, Tensor):
            continue
        assert isinstance(module.eps, float)
        gain = scale.value.double().square() / (module.running_var.double() + module.eps)
        values = gain[scale.index.to(gain.device)]
        previous = [p for p in layers if p.order < scale.order][-1:]
        following = [p for p in layers if p.order > scale.order][:1]
        if previous and previous[0].role != "in":
            names = [f"after {previous[0].parameter}"]
        elif following and following[0].role == "in":
            names = [f"before {following[0].parameter}"]
        else:
            names = [f"after {p.parameter}" for p in layers if p.role == "out"]
        for name in names:
            gains[name] = gains[name] * values if name in gains else values
    return gains
