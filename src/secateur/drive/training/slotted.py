"""The state of an optimizer by the names of the parameters, so that their order does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.drive.training.ranks import bare_optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Settings of every parameter group and the slots of every parameter, by name.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 2)).sum().backward(); sgd.step()
        >>> state = optimizer_state(net, sgd)
        >>> state["groups"][0]["params"], state["groups"][0]["settings"]["lr"]
        (['weight', 'bias'], 0.1)
        >>> state["slots"]["weight"]["momentum_buffer"].tolist()
        [[1.0, 1.0]]
    """
    optimizer = bare_optimizer(optimizer)
    names = _names(model, optimizer)
    groups = [
        {
            "params": [names[p] for p in group["params"]],
            "settings": {k: v for k, v in group.items() if k not in ("params", "param_names")},
        }
        for group in optimizer.param_groups
    ]
    slots = {names[p]: dict(slots) for p, slots in optimizer.state.items() if p in names}
    return {"kind": type(optimizer).__name__, "groups": groups, "slots": slots}


def restore_optimizer_(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Inverse of :func:`optimizer_state`, in place.

    Raises:
        UsageError: The optimizer is of another kind, or its groups hold other parameters; nothing
            was changed.
    """
    optimizer = bare_optimizer(optimizer)
    names = _names(model, optimizer)
    own = [sorted(names[p] for p in group["params"]) for group in optimizer.param_groups]
    saved = [sorted(group["params"]) for group in state["groups"]]
    asked = f"restoring the state of {type(optimizer).__name__}"
    if state["kind"] != type(optimizer).__name__:
        why = "their states have different slots"
        found = f"the checkpoint is of {state['kind']}"
        raise UsageError(asked, found, why, "use the optimizer of the run")
    if own != saved:
        differ = sorted(set(chain(*own)) ^ set(chain(*saved)))
        found = f"{len(own)} groups, in the checkpoint {len(saved)}"
        found += f"; only one side has {', '.join(differ[:4])}" if differ else ""
        why = "each parameter must find its group again"
        raise UsageError(asked, found, why, "make the groups as they were")
    parameters = {name: p for p, name in names.items()}
    on_device: dict[str, bool] = {}
    for group, kept in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(kept["settings"])
        on_device |= dict.fromkeys(
            kept["params"], bool(group.get("capturable") or group.get("fused"))
        )
    optimizer.state.clear()
    for name, slots in state["slots"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            # torch keeps the count of steps on the CPU unless the group is capturable or fused.
            slot: _moved(value, parameter if slot != "step" or on_device[name] else None)
            for slot, value in slots.items()
        }


def _moved(value: Any, parameter: Tensor | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(parameter.device if parameter is not None else "cpu", copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, parameter) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, parameter) for key, item in value.items()}
    return value


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Any, str]:
    known = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):  # a parameter of a loss, say: by its place
            found[parameter] = known.get(parameter, f"group {g}, parameter {i}")
    return found
