"""The network that is given to a run: without wrappers, and copied where it must stay as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.arguments import require_dense, require_network
from secateur.core.errors import UsageError, kind_of
from secateur.core.slots import bare
from secateur.drive.training import ranks


def network_of(model: nn.Module) -> nn.Module:
    """The plain network to work on, from inside wrappers of ``torch.compile`` or data parallelism.

    Its weights have their plain names, so what is saved loads into the plain network; and its
    modules can be watched, which compiled code does not allow.

    Raises:
        UsageError: It is no network, none with values and layers that can be seen, an accelerated
            one, or one whose parameters are shared out among processes.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> network_of(torch.compile(net, backend="eager")) is net
        True
    """
    if isinstance(model, nn.Module):
        model = bare(model)
    found = _obstacle(model)
    if found is not None:
        raise UsageError("the model", *found)
    require_dense("the model", model)
    ranks.require_whole(model)
    return model


def _obstacle(model: object) -> tuple[str, str, str] | None:
    """What was found, why that cannot be pruned, and what to do; ``None`` if nothing is wrong."""
    if isinstance(model, type):
        return f"the class {model.__name__}", "it is no network yet", f"write {model.__name__}(...)"
    if isinstance(model, Mapping):
        found, why = kind_of(model), "weights alone do not say what computes with them"
        return found, why, "build the network and call load_state_dict"
    if not isinstance(model, nn.Module):
        found = "None" if model is None else kind_of(model)
        inside = isinstance(getattr(model, "model", None), nn.Module)
        do = "pass its .model" if inside else "pass the module itself"
        return found, "a network is a torch.nn.Module", do
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            found = f"{name!r} is TorchScript" if name else "it is TorchScript"
            return (
                found,
                "its layers cannot be seen or changed",
                "prune the network it was made from",
            )
    return _without_values(model)


def require_values(asked: str, model: object) -> None:
    """Raise unless this is a network that computes: not a name, a class, a result, or without values.

    Raises:
        UsageError: It is something else, lazy, or on the device ``meta``.

    Example:
        >>> require_values("measuring", nn.Linear(2, 1, device="meta"))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: measuring: 'weight' is on the device 'meta'. ...
    """
    require_network(asked, model)
    assert isinstance(model, nn.Module)
    found = _without_values(model)
    if found is not None:
        raise UsageError(asked, *found)


def _without_values(model: nn.Module) -> tuple[str, str, str] | None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            found, why = (
                f"{name!r} has no shape yet",
                "lazy modules get theirs from the first batch",
            )
            return found, why, "run the network once on a batch"
        if tensor.is_meta:
            found, why = f"{name!r} is on the device 'meta'", "it has no values to compare"
            return found, why, "load the weights first, e.g. with load_state_dict(..., assign=True)"
    return None


def _require_copyable(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise UsageError(
                    "a copy of the model",
                    f"{path + '.' if path else ''}{name} is computed from other tensors, with its graph",
                    "torch does not copy such tensors; the old weight_norm, spectral_norm and "
                    "torch.nn.utils.prune leave them behind",
                    "remove these first (remove_weight_norm, remove_spectral_norm, prune.remove), or "
                    "use torch.nn.utils.parametrizations; detach what the network keeps for itself",
                )


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of :func:`network_of`, to be changed.

    Raises:
        UsageError: It holds tensors with their graph, or other things that cannot be copied.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> copy_of(net) is net
        False
    """
    plain = network_of(model)
    _require_copyable(plain)
    try:
        return copy.deepcopy(plain)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            "a copy of the model",
            f"copy.deepcopy fails ({type(error).__name__}: {str(error)[:200]})",
            "all work is done on a copy, so that the model stays as it is",
            "keep locks, files, generators and the like outside of the network",
        ) from error
