"""Masks that live on a model: boolean buffers beside the weights, enforced in place.

No forward hook, no wrapper, no renamed parameter: the pruned entries simply are zero, and
:class:`Held` puts them back to zero after each optimizer step. So the model deep-copies, compiles,
runs under autocast, and its ``state_dict()`` has the same parameter names as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.plain import numbers_of
from secateur.drive.training import ranks

SUFFIX = "_mask"

#: Where a module says which of its masks are ours, and not buffers of its own. A plain list of names, so
#: that copies of the module say it too.
_OURS = "_secateur_masks"


def attach_(model: nn.Module, masks: Masks) -> None:
    """Register each mask as the buffer ``<parameter>_mask`` next to its parameter, and apply it.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> attach_(net, Masks({"weight": torch.tensor([[True, False]])}))
        >>> sorted(net.state_dict())
        ['bias', 'weight', 'weight_mask']
        >>> float(net.weight[0, 1].detach())
        0.0
    """
    ranks.require_whole(model)
    require_free(model, masks)
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        if mask.shape != parameter.shape:
            raise UsageError(
                f"a mask for {name!r}",
                f"its shape is {tuple(mask.shape)}, the parameter's {tuple(parameter.shape)}",
                "a mask has the shape of its weight",
                "make the mask for this model",
            )
    for name, mask in masks.items():
        module, attribute = _place(model, name)
        existing = module._buffers.get(attribute + SUFFIX)
        if existing is not None:
            existing.copy_(mask)
        else:
            device = model.get_parameter(name).device
            module.register_buffer(attribute + SUFFIX, mask.to(device, copy=True))
            listed = module.__dict__.setdefault(_OURS, [])
            if attribute not in listed:
                listed.append(attribute)
    masks.apply_(model)


def require_free(model: nn.Module, names: Iterable[str]) -> None:
    """Raise unless the place of each mask is free, or holds a mask that :func:`attach_` put there.

    Raises:
        UsageError: A module has something of its own under that name.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.register_buffer("weight_mask", torch.ones(1, 2, dtype=torch.bool))
        >>> require_free(net, ["weight"])
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: a mask for 'weight': its module (Linear) has a 'weight_mask' \
of its own. ...
    """
    for name in names:
        module, attribute = _place(model, name)
        if hasattr(module, attribute + SUFFIX) and attribute not in _ours(module):
            raise UsageError(
                f"a mask for {name!r}",
                f"its module ({type(module).__name__}) has a {attribute + SUFFIX!r} of its own",
                "masks are kept under that name while a network trains; the module computes with its "
                "own, or another pruning tool holds this weight (torch.nn.utils.prune does so)",
                "rename it in the module, make that pruning permanent (torch.nn.utils.prune.remove), "
                "or leave the weight out with ignore=",
            )


def require_all(masks: Masks, names: Iterable[str], asked: str) -> None:
    """Raise if the mask of a weight is no longer on the model.

    Raises:
        UsageError: The first such weight is named.

    Example:
        >>> require_all(Masks({"weight": torch.tensor([True])}), ["weight"], "pruning")
    """
    lost = sorted(set(names) - set(masks))
    if lost:
        raise UsageError(
            asked,
            f"the mask of {lost[0]!r} is no longer on the model",
            "detach_ was called, its module was replaced (merging adapters does so), torch.nn.utils.prune "
            "put a mask of its own there, or another pruner of the same weights was finalized",
            "leave masks and modules to the pruner until its own finalize(); let one pruner hold a weight",
        )


def untrained(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> list[str]:
    """Those of some weights that are not frozen, and that an optimizer does not train.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> untrained(net, torch.optim.SGD([net.bias], 0.1), ["weight", "bias"])
        ['weight']
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    free = (name for name in names if model.get_parameter(name).requires_grad)
    return [name for name in free if id(model.get_parameter(name)) not in trained]


def require_trains(
    model: nn.Module, optimizer: Any, names: list[str], *, whole: bool = False
) -> None:
    """Raise if an optimizer is certainly that of another model.

    Frozen weights need none, and one that trains only some of the weights will do.

    Args:
        model: With the weights.
        optimizer: The caller's.
        names: Of the weights.
        whole: It must train all of them that are not frozen.

    Raises:
        UsageError: It trains none of those of ``names`` that are not frozen, or is no optimizer.

    Example:
        >>> net, twin = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> require_trains(net, torch.optim.SGD(net.parameters(), 0.1), ["weight"])
        >>> require_trains(net, torch.optim.SGD(twin.parameters(), 0.1), ["weight"])
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: pruning with this optimizer (SGD): it does not train \
'weight', nor ...
    """
    asked = f"pruning with this optimizer ({type(optimizer).__name__})"
    if not isinstance(optimizer, torch.optim.Optimizer):
        why = "momenta and moments of pruned weights are in its state"
        raise UsageError(asked, "it is no torch.optim.Optimizer", why, "pass that of the model")
    free = [name for name in names if model.get_parameter(name).requires_grad]
    others = untrained(model, optimizer, names)
    if others and whole and others != free:
        raise UsageError(
            f"exchanging weights with this optimizer ({type(optimizer).__name__})",
            f"it does not train {others[0]!r}"
            + (f", nor {len(others) - 1} more of the weights to be pruned" if others[1:] else ""),
            "an exchange reads gradients before its steps, and clears momenta in its state",
            "train all pruned weights with one optimizer, in groups of its own settings, or leave "
            "these out with ignore=",
        )
    if others and others == free:
        raise UsageError(
            asked,
            f"it does not train {free[0]!r}, nor another of the {len(free)} weights to be pruned",
            "momenta of pruned weights are kept at zero, in the optimizer that trains them; this one may "
            "be that of a copy",
            "make the optimizer from the parameters of this model",
        )


def detach_(model: nn.Module, names: Iterable[str] | None = None) -> Masks:
    """Remove the mask buffers again and return them; the weights keep their zeros.

    Args:
        model: With masks, or without.
        names: Of the weights that lose their masks; by default all.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> attach_(net, Masks({"weight": torch.tensor([[True, False]])}))
        >>> detach_(net)["weight"].tolist(), sorted(net.state_dict())
        ([[True, False]], ['bias', 'weight'])
    """
    masks = masks_of(model, names)
    for name in masks:
        module, attribute = _place(model, name)
        delattr(module, attribute + SUFFIX)
        listed = module.__dict__[_OURS]
        listed.remove(attribute)
        if not listed:
            del module.__dict__[_OURS]
    return masks


def masks_of(model: nn.Module, names: Iterable[str] | None = None) -> Masks:
    """The masks that a model carries (empty if none).

    Args:
        model: With masks, or without.
        names: Only those of these weights, as far as they have masks.

    Example:
        >>> masks_of(nn.Linear(2, 1))
        Masks(0 weights, 0 of 0 kept)
    """
    wanted = None if names is None else set(names)
    found = {}
    for path, module in model.named_modules():
        for attribute in _ours(module):
            name = f"{path}.{attribute}" if path else attribute
            if wanted is None or name in wanted:
                found[name] = module.get_buffer(attribute + SUFFIX).clone()
    return Masks(found)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _ours(module: nn.Module) -> list[str]:
    """The parameters of a module whose masks are ours.

    A mask of numbers is that of torch.nn.utils.prune, which puts it in the place of ours.
    """
    listed: list[str] = module.__dict__.get(_OURS, [])
    masks = {name: module._buffers.get(name + SUFFIX) for name in listed}
    return [n for n, mask in masks.items() if mask is not None and mask.dtype == torch.bool]


@dataclass(frozen=True)
class _Place:
    """A weight and its mask as they were when the mask was read."""

    module: nn.Module
    attribute: str
    parameter: object
    mask: Tensor
    version: int

    @staticmethod
    def of(model: nn.Module, name: str) -> _Place:
        module, attribute = _place(model, name)
        mask = module.get_buffer(attribute + SUFFIX)
        return _Place(module, attribute, module._parameters.get(attribute), mask, mask._version)

    @property
    def changed(self) -> bool:
        """Whether the mask was written to, or one of them replaced by another of its kind."""
        parameter = self.module._parameters.get(self.attribute)
        if self.module._buffers.get(self.attribute + SUFFIX) is not self.mask:
            return True
        moved = parameter is not None and parameter is not self.parameter
        return moved or self.mask._version != self.version


class Held:
    """Keeps pruned weights and their optimizer state at zero.

    Args:
        model: A model whose masks are attached.
        optimizer: Its optimizer, if one is running.
        names: The weights whose masks are this one's own; by default all that there are.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> attach_(net, Masks({"weight": torch.tensor([[True, False]])}))
        >>> held = Held(net)
        >>> _ = net.weight.data.fill_(1.0)
        >>> held.hold_()
        >>> net.weight.tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        names: Iterable[str] | None = None,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._names = None if names is None else frozenset(names)
        if names is not None:
            _HOLDERS.setdefault(model, WeakValueDictionary()).update(dict.fromkeys(names, self))
        self._holes: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._wide: Mapping[str, Tensor] = {}
        self._read: dict[str, _Place] = {}
        self.refresh()
        if self._read:
            ranks.require_whole(model)

    def refresh(self, wide: Mapping[str, Tensor] | None = None) -> None:
        """Read the masks from the model again, after they changed.

        Args:
            wide: Where optimizer state may live, if that is more than the mask.
        """
        self._wide = wide = wide or {}
        masks = masks_of(self._model, self._names)
        self._holes = [
            (self._model.get_parameter(n), ~m, ~wide[n] if n in wide else ~m)
            for n, m in masks.items()
        ]
        self._read = {name: _Place.of(self._model, name) for name in masks}

    def live(self) -> dict[str, Tensor]:
        """The masks as they are on the model, not copied."""
        self._reread()
        return {name: place.mask for name, place in self._read.items()}

    def _reread(self) -> None:
        # A state may have been loaded since, or the model moved.
        if any(place.changed for place in self._read.values()):
            self.refresh(self._wide)

    @torch.no_grad()
    def hold_(self) -> None:
        """Zero pruned entries of weights, momenta and Adam moments, in place."""
        self._reread()
        state = self._optimizer.state if self._optimizer is not None else {}
        for parameter, hole, unused in self._holes:
            parameter.masked_fill_(hole, 0)
            for value in _shaped_like(parameter, state.get(parameter, {}).values()):
                _clear_(value, unused)


#: Who holds which mask, so that several pruners can work on one model. Both are held weakly: nothing
#: is left of a pruner that is gone, and a copy of a model has no pruner.
_HOLDERS: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Held]] = WeakKeyDictionary()


def unheld(model: nn.Module) -> list[str]:
    """Names of the masked weights that no pruner has for its own.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> attach_(net, Masks({"weight": torch.tensor([[True, False]])}))
        >>> unheld(net)
        ['weight']
        >>> held = Held(net, names=["weight"])
        >>> unheld(net)
        []
        >>> del held
        >>> unheld(net)
        ['weight']
    """
    taken: Collection[str] = _HOLDERS.get(model, ())
    return [name for name in masks_of(model) if name not in taken]


def _shaped_like(parameter: nn.Parameter, values: Iterable[object]) -> list[Tensor]:
    # Whole numbers are codes of a table, in which 0 may stand for the largest value.
    tensors = (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    return [v for v in tensors if v.shape == parameter.shape]


def _clear_(value: Tensor, hole: Tensor) -> None:
    try:
        value.masked_fill_(hole, 0)
    except NotImplementedError:
        # State in 8 bits or less, as torchao's, can only be written as a whole.
        value.copy_(numbers_of(value).masked_fill(hole, 0))


@torch.no_grad()
def reset_momentum_(optimizer: torch.optim.Optimizer) -> None:
    """Set running means of the gradient to zero, in place; second moments stay.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        >>> net(torch.ones(1, 1)).sum().backward()
        >>> sgd.step()
        >>> reset_momentum_(sgd)
        >>> [float(s["momentum_buffer"].sum()) for s in sgd.state.values()]
        [0.0, 0.0]
    """
    for state in optimizer.state.values():
        for name in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(name), Tensor):
                _clear_(state[name], torch.ones_like(state[name], dtype=torch.bool))
