"""Layers whose weight is no parameter: quantized, and packed into buffers or objects of their own."""

from __future__ import annotations

from torch import nn

#: How layers name the sizes of a weight that they do not have as a parameter.
_SIZES = (
    ("in_features", "out_features"),
    ("infeatures", "outfeatures"),
    ("in_channels", "out_channels"),
)


def packed_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that have the sizes of a weight, whole numbers in its place, and no weight.

    Example:
        >>> import torch
        >>> layer = nn.Module()
        >>> layer.in_features, layer.out_features = 64, 8
        >>> packed_layers(nn.Sequential(nn.Linear(8, 64), layer))
        ()
        >>> layer.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.uint8))
        >>> packed_layers(nn.Sequential(nn.Linear(8, 64), layer))
        ('1',)
    """
    return tuple(path for path, module in model.named_modules() if _is_packed(module))


def _is_packed(module: nn.Module) -> bool:
    sized = any(all(isinstance(getattr(module, n, None), int) for n in pair) for pair in _SIZES)
    if not sized or any(p.ndim > 1 for p in module.parameters()):
        return False
    codes = any(b.ndim > 1 and not b.is_floating_point() for b in module.buffers())
    return codes or ".quantized" in type(module).__module__  # torch's keep an object
