"""Weights that pass through a learned mask: a torch parametrization, taken off again exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.slots import Slot, device_of
from secateur.learn.learner import Objective


class Part(Protocol):
    """The mask of one weight. Also an :class:`torch.nn.Module`: its parameters are trained."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight as the network sees it; pruned entries are exactly zero."""

    def mask(self, weight: Tensor) -> Tensor:
        """True where the weight is kept."""


class Maker(Protocol):
    """A learner that masks weights one by one."""

    def groups(self, parts: Sequence[Any]) -> list[dict[str, Any]]:
        """Optimizer groups of the parameters of all masks."""

    def part(self, slot: Slot, weight: nn.Parameter) -> nn.Module:
        """The mask of one weight."""

    def penalty(self, parts: Sequence[Any], step: int) -> Tensor | None:
        """The penalty over all masks; ``None`` for none."""


class Gate(torch.autograd.Function):
    """``weight`` where ``mask``, else 0; ``soft`` only receives the gradient of the mask.

    The gradient of a mask that multiplies a weight is ``g * w``, and the straight-through
    estimator hands it on as if the threshold were not there. Whatever ``soft`` is made of is
    trained by it; the value of ``soft`` is never read.

    Example:
        >>> w = torch.tensor([2.0, -3.0], requires_grad=True)
        >>> s = torch.zeros(2, requires_grad=True)
        >>> Gate.apply(w, torch.tensor([True, False]), s).sum().backward()
        >>> w.grad.tolist(), s.grad.tolist()
        ([1.0, 0.0], [2.0, -3.0])
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, soft: Tensor) -> Tensor:
        """Mask the weight."""
        ctx.save_for_backward(weight, mask)
        ctx.kind = soft.dtype
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        """Mask the gradient of the weight; give ``g * w`` to the scores."""
        weight, mask = ctx.saved_tensors
        (grad,) = grads
        return grad.masked_fill(~mask, 0), None, (grad * weight).to(ctx.kind)


class MaskedWeights:
    """The masks of all chosen weights of one model.

    While they are on, ``<module>.weight`` is the masked weight, the trained one is the parameter
    ``<module>.parametrizations.weight.original``, and the parameters of its mask are
    ``<module>.parametrizations.weight.0.*``; these names are also those of ``state_dict()``.
    :meth:`harden_` restores the plain names.

    Args:
        maker: The learner.
        model: Parametrized in place.
        slots: Its parameters; the prunable ones get masks.

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> from secateur.learn.soft_threshold import Str
        >>> net = nn.Linear(2, 1, bias=False)
        >>> masked = MaskedWeights(Str(), net, [Slot("weight", "Linear", (1, 2), LINEAR)])
        >>> sorted(net.state_dict())
        ['parametrizations.weight.0.s', 'parametrizations.weight.original']
        >>> masked.harden_(), sorted(net.state_dict())
        (Masks(1 weights, 2 of 2 kept), ['weight'])
    """

    def __init__(self, maker: Maker, model: nn.Module, slots: Sequence[Slot]) -> None:
        self._maker, self._model = maker, model
        chosen = [slot for slot in slots if slot.prunable]
        for slot in chosen:
            _require_plain(model, slot)
        self._orders = {s.module: list(model.get_submodule(s.module)._parameters) for s in chosen}
        parts = {slot.name: maker.part(slot, slot.tensor(model)) for slot in chosen}
        for slot in chosen:  # only now: nothing was changed if a part could not be made
            owner = model.get_submodule(slot.module)
            parametrize.register_parametrization(
                owner, slot.parameter, parts[slot.name], unsafe=True
            )
        self._parts: dict[str, Any] = parts

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the parameters of all masks."""
        return self._maker.groups(list(self._parts.values()))

    def penalty(self, step: int) -> Tensor:
        """The learner's penalty at ``step``."""
        found = self._maker.penalty(list(self._parts.values()), step)
        return torch.zeros((), device=device_of(self._model)) if found is None else found

    def after_step_(
        self, optimizer: torch.optim.Optimizer, step: int, objective: Objective | None
    ) -> None:
        """Nothing: gradients do it all."""

    @torch.no_grad()
    def masks(self) -> Masks:
        """The masks with which the next forward pass would run."""
        return Masks({n: part.mask(self._original(n)) for n, part in self._parts.items()})

    @torch.no_grad()
    def harden_(self) -> Masks:
        """Write the masked weights into the plain parameters and remove the masks."""
        masks = self.masks()
        self._remove_(leave_masked=True)
        return masks

    def drop_(self) -> None:
        """Remove the masks; the weights are what they were."""
        self._remove_(leave_masked=False)

    def _remove_(self, *, leave_masked: bool) -> None:
        for path in self._orders:
            _own_class_(self._model.get_submodule(path))
        for name in self._parts:
            path, _, attribute = name.rpartition(".")
            owner = self._model.get_submodule(path)
            parametrize.remove_parametrizations(owner, attribute, leave_parametrized=leave_masked)
        for path, order in self._orders.items():
            # torch puts them back at the end; states of optimizers go by the order of parameters.
            owner = self._model.get_submodule(path)
            known = dict(owner._parameters)
            owner._parameters.clear()
            owner._parameters.update({key: known[key] for key in order})

    def facts(self) -> dict[str, Any]:
        """Nothing beside the masks."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: scores and thresholds are in the model's ``state_dict()``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _original(self, name: str) -> Tensor:
        path, _, attribute = name.rpartition(".")
        lists: Any = self._model.get_submodule(path).parametrizations
        original: Tensor = lists[attribute].original
        return original


def obstacle(model: nn.Module, slot: Slot) -> str:
    """Why a weight cannot carry a learned mask; ``""`` if it can.

    Example:
        >>> obstacle(nn.LSTM(2, 2), Slot("weight_ih_l0", "LSTM", (8, 2)))
        'a mask does not reach the list of weights that recurrent layers keep'
    """
    if slot.aliases:
        return f"tied to {', '.join(slot.aliases)}: a learned mask reaches one name only"
    if isinstance(model.get_submodule(slot.module), nn.RNNBase):
        return "a mask does not reach the list of weights that recurrent layers keep"
    return ""


def require_unlearned(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if one of the parameters is part of a learned mask, or the weight behind one.

    Raises:
        UsageError: The weight is named.

    Example:
        >>> require_unlearned(nn.Linear(2, 1), ["weight"])
    """
    names = list(names)
    for learned in learned_weights(model):
        path, _, attribute = learned.rpartition(".")
        inside = ".".join(filter(None, (path, "parametrizations", attribute, "")))
        if any(name.startswith(inside) for name in names):
            raise UsageError(
                f"pruning {learned!r}",
                "it has a learned mask",
                "two masks of one weight would not know each other",
                "call harden() on the first Learned before, or leave the weight out with ignore=",
            )


def learned_weights(model: nn.Module) -> list[str]:
    """The plain names of the weights that have a learned mask.

    Example:
        >>> learned_weights(nn.Linear(2, 1))
        []
    """
    return [
        ".".join(filter(None, (path, attribute)))
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, parts in module.parametrizations.items()
        if any(hasattr(part, "mask") for part in parts)
    ]


def _require_plain(model: nn.Module, slot: Slot) -> None:
    found = obstacle(model, slot)
    if found:
        raise UsageError(
            f"a learned mask for {slot.name!r}", found, "", "leave it out with ignore="
        )


def _own_class_(owner: nn.Module) -> None:
    """Give a parametrized module a class that no copy of it shares.

    torch makes the weight a property of the module's class, takes it off that class at the end, and
    a deep copy has the same class: it would lose its weight.
    """
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
