"""Modules that cannot be cut, whatever a trace says."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from secateur.structure.trace import Trace

_OPAQUE: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "nn.MultiheadAttention computes the size of a head from its width",
}


def opaque(reason: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Mark a module class as not to be cut; everything that its parameters touch is pinned.

    Example:
        >>> @opaque("its kernel was compiled for this width")
        ... class Fixed(nn.Linear):
        ...     pass
        >>> import torch
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(Fixed(4, 8), nn.Linear(8, 2))
        >>> couple(net, torch.zeros(1, 4)).pinned["1.weight", 1]
        'its kernel was compiled for this width'
    """

    def mark(kind: type[nn.Module]) -> type[nn.Module]:
        _OPAQUE[kind] = reason
        return kind

    return mark


def pin_opaque(model: nn.Module, found: Trace) -> None:
    """Pin the parameters of opaque modules."""
    for path, module in model.named_modules():
        reason = next((text for kind, text in _OPAQUE.items() if isinstance(module, kind)), None)
        if reason is None:
            continue
        inside = f"{path}." if path else ""
        for (name, _), ids in found.axes.items():
            if name.startswith(inside):
                found.ledger.pin(ids, reason)
