"""Masks that live on a model: boolean buffers beside the weights, enforced in place.

No forward hook, no wrapper, no renamed parameter: the pruned entries simply are zero, and
:class:`Held` puts them back to zero after each optimizer step. So the model deep-copies, compiles,
runs under autocast, and its ``state_dict()`` has the same parameter names as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks

SUFFIX = "_mask"


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
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = getattr(module, attribute)
        if mask.shape != parameter.shape:
            raise UsageError(
                f"a mask for {name!r}",
                f"its shape is {tuple(mask.shape)}, the parameter's {tuple(parameter.shape)}",
                "a mask has the shape of its weight",
                "make the mask for this model",
            )
        existing = getattr(module, attribute + SUFFIX, None)
        if isinstance(existing, Tensor) and existing.dtype != torch.bool:
            raise UsageError(
                f"a mask for {name!r}",
                f"the module already has {attribute + SUFFIX!r} of type {existing.dtype}",
                "another pruning tool seems to hold this weight (torch.nn.utils.prune does so)",
                "make its pruning permanent first (torch.nn.utils.prune.remove)",
            )
        buffer = mask.to(parameter.device)
        if isinstance(existing, Tensor):
            existing.copy_(buffer)
        else:
            module.register_buffer(attribute + SUFFIX, buffer.clone())
    masks.apply_(model)


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
        path, _, attribute = name.rpartition(".")
        del model.get_submodule(path)._buffers[attribute + SUFFIX]
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
    known = {name for name, _ in model.named_parameters()}
    wanted = known if names is None else known & set(names)
    return Masks(
        {
            name.removesuffix(SUFFIX): buffer.clone()
            for name, buffer in model.named_buffers()
            if name.endswith(SUFFIX)
            and buffer.dtype == torch.bool
            and name.removesuffix(SUFFIX) in wanted
        }
    )


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
        self.refresh()

    def refresh(self, wide: Mapping[str, Tensor] | None = None) -> None:
        """Read the masks from the model again, after they changed.

        Args:
            wide: Where optimizer state may live, if that is more than the mask.
        """
        wide = wide or {}
        self._holes = [
            (self._model.get_parameter(n), ~m, ~wide[n] if n in wide else ~m)
            for n, m in masks_of(self._model, self._names).items()
        ]

    @torch.no_grad()
    def hold_(self) -> None:
        """Zero pruned entries of weights, momenta and Adam moments, in place."""
        state = self._optimizer.state if self._optimizer is not None else {}
        for parameter, hole, unused in self._holes:
            parameter.masked_fill_(hole, 0)
            for value in _shaped_like(parameter, state.get(parameter, {}).values()):
                value.masked_fill_(unused, 0)


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
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]


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
                state[name].zero_()
