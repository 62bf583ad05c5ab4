"""Modules that cannot be cut, whatever a trace says."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.core.attention import PrunedAttention, is_plain
from secateur.structure.trace import Trace

_SPECTRAL = "a spectral norm divides by one number of the whole weight: take it off before with "
_OPAQUE: dict[type[nn.Module], str] = {
    _SpectralNorm: f"{_SPECTRAL}torch.nn.utils.parametrize.remove_parametrizations",
}
#: Hooks that compute a weight before each call, and why their layers stay.
_HOOKS: dict[type, str] = {
    SpectralNorm: f"{_SPECTRAL}torch.nn.utils.remove_spectral_norm",
    WeightNorm: "its old weight norm is a hook: use torch.nn.utils.parametrizations.weight_norm",
    BasePruningMethod: "a hook masks its weight: make that permanent with torch.nn.utils.prune.remove",
}
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


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
        reason = reason or _rewritten(module) or _hooked(module)
        if reason is None:
            continue
        inside = f"{path}." if path else ""
        for (name, _), ids in found.axes.items():
            if name.startswith(inside):
                found.ledger.pin(ids, reason)


def _rewritten(module: nn.Module) -> str | None:
    """Why an attention stays whose code is not PyTorch's, so that no other code can take its place."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if is_plain(module) or type(module) is PrunedAttention:
        return None
    return (
        "it changes the code of nn.MultiheadAttention, which takes its number of heads from its width: "
        "use that class itself, or linear layers and scaled_dot_product_attention"
    )


def _hooked(module: nn.Module) -> str | None:
    """Why a layer stays whose ``weight`` is neither a parameter nor made by a parametrization."""
    for hook in module._forward_pre_hooks.values():
        for kind, reason in _HOOKS.items():
            if isinstance(hook, kind):
                return reason
    if not isinstance(module, _LAYERS) or "weight" in module._parameters or is_parametrized(module):
        return None
    return "its weight is computed before each call from other parameters"
