"""How often the projections of PyTorch's attention are used, which are no modules of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.core.attention import PrunedAttention, open_attention
from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.slots import device_of


def projected(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, float]:
    """How many rows each weight that makes queries, keys and values multiplies in one call.

    Of a weight that holds all three it is the mean: each is a third of it, after a cut, too.

    Example:
        >>> q, k = torch.zeros(2, 5, 4), torch.zeros(2, 8, 4)
        >>> projected(nn.MultiheadAttention(4, 2), (q, k), {"value": k})
        {'in_proj_weight': 14.0}
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    rows = [float(given[name].shape[:-1].numel()) for name in ("query", "key", "value")]
    if module.in_proj_weight is not None:
        return {"in_proj_weight": sum(rows) / len(rows)}
    return dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), rows, strict=True))


@torch.no_grad()
def projection_uses(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Multiply-adds per weight and sample of queries, keys and values.

    Args:
        model: Run once, in evaluation mode.
        batch: Whatever it runs on.

    Returns:
        Name of a weight -> positions of a sample, for every ``nn.MultiheadAttention`` that runs.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> projection_uses(layer, torch.zeros(3, 5, 8))
        {'self_attn.in_proj_weight': 5.0}
    """
    found: dict[str, float] = {}
    samples = max(1, size_of(batch))
    handles = []
    with evaluating(model), open_attention(model):
        for path, module in model.named_modules():
            if type(module) is not PrunedAttention:
                continue

            def seen(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path
            ) -> None:
                for name, rows in projected(module, args, kwargs).items():
                    whole = f"{path}.{name}" if path else name
                    found[whole] = found.get(whole, 0.0) + rows / samples

            handles.append(module.register_forward_pre_hook(seen, with_kwargs=True))
        try:
            if handles:
                forward(model, to_device(batch, device_of(model)))
        finally:
            for handle in handles:
                handle.remove()
    return found
