"""Where a prunable weight lives inside a torch module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.weight import Axes, Weight

#: How many rows there are -> positions of those that are wanted.
Draw = Callable[[int], Tensor]


class InputRows(Protocol):
    """Rows that multiply a weight, ``(groups, rows, fan_in)``, from one call of its module."""

    def __call__(
        self,
        module: nn.Module,
        inputs: tuple[object, ...],
        output: object,
        draw: Draw | None = None,
        /,
    ) -> Tensor | None:
        """All rows, or those that are drawn; the others are never copied.

        None if no single set of rows is what this weight multiplies.
        """
        ...


@dataclass(frozen=True)
class Slot:
    """One parameter of a network, with what pruning must know about it.

    Args:
        name: Its full name, as in ``state_dict()``.
        kind: The class name of the owning module.
        axes: Its axes, or ``None`` when it is not a weight of a known kind.
        shape: Its shape.
        rows: How to see the inputs that multiply it; ``None`` if they cannot be seen.
        aliases: Other names of the same tensor (tied weights are scored once).
        reason: Why it is left out or not prunable; ``""`` when it takes part.
        sensitive: True for parts that are left out unless asked for.
        transposed: True for transposed convolutions, whose input rows are stuffed with zeros.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    axes: Axes | None = None
    rows: InputRows | None = None
    aliases: tuple[str, ...] = ()
    reason: str = ""
    sensitive: bool = False
    transposed: bool = False

    @property
    def module(self) -> str:
        """Path of the owning module."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Attribute name inside the owning module."""
        return self.name.rpartition(".")[2]

    @property
    def bias_name(self) -> str:
        """Attribute name of what is added to the product, if there is such a thing."""
        if "weight" in self.parameter:  # weight_ih_l0 -> bias_ih_l0 of a recurrent layer
            return self.parameter.replace("weight", "bias")
        return f"{self.parameter}_bias"  # of stacked experts

    @property
    def prunable(self) -> bool:
        """Whether the weight takes part."""
        return self.axes is not None and not self.reason

    def tensor(self, model: nn.Module) -> nn.Parameter:
        """The live parameter.

        Raises:
            UsageError: The model has it no longer.

        Example:
            >>> Slot("0.weight", "Linear", (4, 4)).tensor(nn.Sequential(nn.ReLU()))
            Traceback (most recent call last):
                ...
            secateur.core.errors.UsageError: the weight '0.weight': the model has no such parameter any \
more. ...
        """
        try:
            return model.get_parameter(self.name)
        except AttributeError:
            raise UsageError(
                f"the weight {self.name!r}",
                "the model has no such parameter any more",
                "its module was replaced or taken away, or the weight is computed now (by a "
                "parametrization, a weight norm or torch.nn.utils.prune)",
                "change modules before pruning begins, or after it has ended",
            ) from None

    def owners(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that multiply by it, by path; several if layers are tied.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            >>> net[1].weight = net[0].weight
            >>> list(Slot("0.weight", "Linear", (4, 4), aliases=("1.weight",)).owners(net))
            ['0', '1']
        """
        found: dict[str, nn.Module] = {}
        for name in (self.name, *self.aliases):
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            # One module may have several names, too.
            if all(module is not other for other in found.values()):
                found[path] = module
        return found

    def weight(self, model: nn.Module) -> Weight:
        """The live value as a :class:`Weight` (detached, sharing memory)."""
        assert self.axes is not None, f"{self.name} has no axes"
        return Weight(self.name, self.tensor(model).detach(), self.axes)


def weights(model: nn.Module, slots: Iterable[Slot]) -> list[Weight]:
    """The live weights of ``slots``."""
    return [slot.weight(model) for slot in slots]


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def bare(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of data parallelism and ``torch.compile``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> bare(net) is net, bare(torch.compile(net, backend="eager")) is net
        (True, True)
    """
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return bare(inner) if isinstance(inner, nn.Module) else model
