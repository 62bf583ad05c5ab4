"""What a group of a width owns, as tensors: the view that group criteria read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.core.slots import Slot
from secateur.core.weight import LINEAR, Weight
from secateur.core.widths import Slices, Width

#: What a slice is to its group. ``out``: rows of a weight that produces the units; ``in``: columns
#: of a weight that consumes them; ``channel``: kernels of a depthwise convolution, which does both;
#: ``vector``: a bias or the scale of a normalisation; ``buffer``: statistics of a normalisation;
#: ``other``: a parameter whose axes have no known meaning, such as stacked experts.
Role = Literal["out", "in", "channel", "vector", "buffer", "other"]


@dataclass(frozen=True)
class Part:
    """What the groups of one width own of one tensor along one axis.

    Args:
        parameter: Its name (that of a buffer for the role ``buffer``).
        kind: Class name of the module that owns it.
        role: What it is to the groups.
        value: The whole tensor, detached, sharing memory with the network.
        axis: Which axis is cut.
        index: ``(groups, members)``: positions along that axis.
        order: Place in the network's order of parameters.
        slot: What the frontend knows about it.
        batch_norm: True for scale, shift and buffers of a BatchNorm.
    """

    parameter: str
    kind: str
    role: Role
    value: Tensor
    axis: int
    index: Tensor
    order: int = 0
    slot: Slot | None = None
    batch_norm: bool = False

    @property
    def module(self) -> str:
        """Path of the owning module."""
        return self.parameter.rpartition(".")[0]

    @property
    def attribute(self) -> str:
        """Attribute name inside the owning module."""
        return self.parameter.rpartition(".")[2]

    @property
    def trained(self) -> bool:
        """Whether it is a parameter and not a buffer."""
        return self.role != "buffer"

    @property
    def known(self) -> bool:
        """Whether its axes have names, so that it multiplies inputs in a known way."""
        return self.slot is not None and self.slot.axes is not None and self.value.ndim > 1

    @property
    def seen(self) -> bool:
        """Whether statistics of its inputs can be collected."""
        return self.known and self.slot is not None and self.slot.rows is not None

    @property
    def bias(self) -> bool:
        """Whether it is an additive vector: a bias, or the shift of a normalisation."""
        return self.role == "vector" and "bias" in self.attribute

    @cached_property
    def weight(self) -> Weight:
        """It as a weight: with its own axes if known, else as a matrix of its first axis.

        A vector is a matrix of one column, so that element criteria read anything.
        """
        if self.known and self.slot is not None and self.slot.axes is not None:
            return Weight(self.parameter, self.value, self.slot.axes)
        return Weight(self.parameter, self.value.reshape(len(self.value), -1), LINEAR)

    def take(self, x: Tensor) -> Tensor:
        """The slices of a tensor like :attr:`value`: ``(groups, members, rest)``.

        Example:
            >>> part = Part("w", "Linear", "in", torch.zeros(2, 3), 1, torch.tensor([[2], [0]]))
            >>> part.take(torch.arange(6.0).reshape(2, 3)).flatten(1)
            tensor([[2., 5.],
                    [0., 3.]])
        """
        moved = x.reshape(self.value.shape).movedim(self.axis, 0)
        groups, members = self.index.shape
        return moved[self.index.to(moved.device)].reshape(groups, members, -1)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the slices of a tensor like :attr:`value`: ``(groups, members)``, in float64.

        The other axes are summed before anything is gathered, so large weights are not copied.

        Example:
            >>> part = Part("w", "Linear", "in", torch.zeros(2, 3), 1, torch.tensor([[2], [0]]))
            >>> part.sum(torch.arange(6.0).reshape(2, 3)).flatten()
            tensor([7., 3.], dtype=torch.float64)
        """
        moved = x.reshape(self.value.shape).movedim(self.axis, 0)
        sums = moved.reshape(len(moved), -1).sum(1, dtype=torch.float64)
        return sums[self.index.to(sums.device)]

    def mean(self, x: Tensor) -> Tensor:
        """Means over the slices of a tensor like :attr:`value`: ``(groups, members)``."""
        return self.sum(x) * (self.value.shape[self.axis] / self.value.numel())


@dataclass(frozen=True)
class Groups:
    """A width with the tensors behind it: all that a group criterion may look at.

    Args:
        width: The groups.
        parts: One per slice of the width, in its order.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> one = torch.arange(3)[:, None]
        >>> slices = (Slices("0.weight", 0, one), Slices("0.bias", 0, one), Slices("2.weight", 1, one))
        >>> axes = [Slot("0.weight", "Linear", (3, 4), LINEAR), Slot("2.weight", "Linear", (2, 3), LINEAR)]
        >>> (groups,) = groups_of(net, [Width("0", slices, torch.arange(3))], axes)
        >>> groups.count, [part.role for part in groups.parts]
        (3, ['out', 'vector', 'in'])
    """

    width: Width
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The name of the width."""
        return self.width.name

    @property
    def count(self) -> int:
        """How many groups there are."""
        return self.width.groups

    @property
    def trained(self) -> tuple[Part, ...]:
        """The parts that are parameters."""
        return tuple(part for part in self.parts if part.trained)

    @property
    def heads(self) -> bool:
        """Whether one group holds several units of its producers and its consumers, as a head does.

        The neurons of a fused gate and projection have two rows each, and one column; channels that go
        together because of convolution groups are none.
        """
        made = self.having("out")
        several = all(part.index.shape[1] > 1 for part in (*made, *self.having("in")))
        grouped = any(p.weight.axes.convolves and p.weight.axes.groups > 1 for p in made)
        return bool(made) and several and not grouped

    def having(self, *roles: Role) -> tuple[Part, ...]:
        """The parts with one of these roles."""
        return tuple(part for part in self.parts if part.role in roles)


def groups_of(model: nn.Module, widths: Iterable[Width], slots: Sequence[Slot]) -> list[Groups]:
    """Look at widths of a network.

    Args:
        model: The network; its tensors are shared, not copied.
        widths: What can be made narrower.
        slots: What the frontend knows about its parameters (``discover(model)``).
    """
    known = {alias: slot for slot in slots for alias in (slot.name, *slot.aliases)}
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return [
        Groups(width, tuple(_part(model, s, known.get(s.parameter), order) for s in width.slices))
        for width in widths
    ]


def _part(model: nn.Module, slices: Slices, slot: Slot | None, order: dict[str, int]) -> Part:
    path, _, attribute = slices.parameter.rpartition(".")
    module = model.get_submodule(path)
    found = module._parameters.get(attribute)
    value = module.get_buffer(attribute) if found is None else found
    role: Role = "buffer" if found is None else _role(slices, slot, value)
    return Part(
        slices.parameter,
        type(module).__name__,
        role,
        value.detach(),
        slices.axis,
        slices.index,
        order.get(slices.parameter, len(order)),
        slot,
        isinstance(module, nn.modules.batchnorm._BatchNorm),
    )


def _role(slices: Slices, slot: Slot | None, value: Tensor) -> Role:
    if value.ndim < 2:
        return "vector"
    if slot is None or slot.axes is None:
        return "other"
    axes = slot.axes
    name = axes.names[slices.axis]
    if axes.groups > 1 and axes.cube(value).shape[:2] == (axes.groups, 1):
        return "channel" if name in ("out", "in") else "other"
    return "out" if name == "out" else "in" if name == "in" else "other"
