"""In which order data reaches the modules of a network, and which BatchNorms read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.attention import open_attention
from secateur.core.batches import Batch, evaluating, forward, to_device
from secateur.core.slots import Slot, device_of


def calls_in_order(model: nn.Module, batch: Batch) -> Counter[str]:
    """Modules in the order in which data reaches them first, and how often it does.

    Example:
        >>> net = nn.Sequential(nn.ReLU(), nn.Identity())
        >>> dict(calls_in_order(net, torch.zeros(1)))
        {'': 1, '0': 1, '1': 1}
    """
    seen: Counter[str] = Counter()
    handles = []
    for path, module in model.named_modules():

        def note(_: nn.Module, __: Any, path: str = path) -> None:
            seen[path] += 1

        handles.append(module.register_forward_pre_hook(note))
    _run_once(model, batch, handles)
    return seen


def in_order(model: nn.Module, slots: Sequence[Slot], batches: Iterable[Batch]) -> list[Slot]:
    """Slots in the order in which data reaches them; the others are left out.

    Args:
        model: Run on one batch after another, until all slots were reached.
        slots: Weights of it.
        batches: Not every one need reach every slot: experts are chosen by the data.

    Example:
        >>> from secateur.frontends import discover
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> [slot.name for slot in in_order(net, discover(net)[::-1], [torch.zeros(1)])]
        ['0.weight', '1.weight']
    """
    owners = {slot.name: list(slot.owners(model)) for slot in slots}
    wanted = {path for paths in owners.values() for path in paths}
    order: list[str] = []
    for batch in batches:
        order = _joined(order, [path for path in calls_in_order(model, batch) if path in wanted])
        if all(any(path in order for path in paths) for paths in owners.values()):
            break
    rank = {path: place for place, path in enumerate(order)}
    places = [(s, [rank[path] for path in owners[s.name] if path in rank]) for s in slots]
    return [s for s, found in sorted(places, key=lambda r: min(r[1], default=0)) if found]


def _joined(order: list[str], calls: list[str]) -> list[str]:
    """Two orders as one: what is new stands behind what came before it."""
    joined, known, place = list(order), set(order), 0
    if known.issuperset(calls):
        return joined
    for path in calls:
        if path in known:
            place = joined.index(path) + 1
        else:
            joined.insert(place, path)
            place += 1
    return joined


def following_norms(model: nn.Module, batch: Batch, has: str) -> dict[str, str]:
    """Layers whose output goes straight into a BatchNorm: path of the layer -> path of the norm.

    Args:
        model: Run once.
        batch: Whatever it runs on.
        has: What the norm must have: its ``"running_mean"``, or a ``"weight"``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        >>> following_norms(net, torch.zeros(1, 1, 2, 2), has="running_mean")
        {'0': '1'}
    """
    produced: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, str] = {}
    handles = []
    for path, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and getattr(module, has) is not None:

            def reads(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                if args and id(args[0]) in produced:
                    found.setdefault(produced[id(args[0])], path)

            handles.append(module.register_forward_pre_hook(reads))
        elif hasattr(module, "weight") and not list(module.children()):

            def writes(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                if isinstance(out, Tensor):
                    produced[id(out)] = path
                    alive.append(out)  # an address is not used again meanwhile

            handles.append(module.register_forward_hook(writes))
    _run_once(model, batch, handles)
    return found


def _run_once(model: nn.Module, batch: Batch, hooks: Sequence[RemovableHandle]) -> None:
    """One forward pass, after which the hooks are off."""
    try:
        with evaluating(model), open_attention(model), torch.no_grad():
            forward(model, to_device(batch, device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
