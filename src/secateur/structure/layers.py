"""Sizes that the standard layers keep beside their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Shape = tuple[int, ...]
_PARAMETRIZED = ".parametrizations."


def layer_sizes(
    model: nn.Module, kept: Mapping[str, Mapping[int, list[int]]]
) -> dict[str, dict[str, int]]:
    """The attributes that standard layers must have after a cut.

    Args:
        model: Uncut.
        kept: Name of a parameter -> axis -> kept positions.

    Returns:
        Path of a module -> attribute -> new value.

    Example:
        >>> layer_sizes(nn.Sequential(nn.Linear(4, 3)), {"0.weight": {0: [0, 2]}})
        {'0': {'out_features': 2}}
    """
    found: dict[str, dict[str, int]] = {}
    touched = {name.partition(".parametrizations.")[0] for name in kept if _PARAMETRIZED in name}
    touched |= {name.rpartition(".")[0] for name in kept if _PARAMETRIZED not in name}
    for path in touched:
        module: Any = model.get_submodule(path)
        shapes = {}
        for name, parameter in module.named_parameters():
            shape = list(parameter.shape)
            for axis, positions in kept.get(f"{path}.{name}" if path else name, {}).items():
                shape[int(axis)] = len(positions)
            # A weight norm keeps the direction, which has the shape of the weight, as the last one.
            owner = name.split(".")[1] if name.startswith("parametrizations.") else name
            shapes[owner] = tuple(shape)
        sizes = {k: v for k, v in _sizes(module, shapes).items() if getattr(module, k) != v}
        if sizes:
            found[path] = sizes
    return found


def _sizes(module: Any, shapes: Mapping[str, Shape]) -> dict[str, int]:
    weight = shapes.get("weight", ())
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(module, weight, transposed=False)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return _convolution(module, weight, transposed=True)
    if isinstance(module, nn.modules.batchnorm._NormBase) and weight:
        return {"num_features": weight[0]}
    if isinstance(module, nn.GroupNorm) and weight:
        return {"num_channels": weight[0]}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"embedding_dim": weight[1]}
    if isinstance(module, nn.Bilinear):
        return {
            "out_features": weight[0],
            "in1_features": weight[1],
            "in2_features": weight[2],
        }
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}
    if isinstance(module, nn.RNNBase):
        return {
            "input_size": shapes["weight_ih_l0"][1],
            **({"proj_size": shapes["weight_hr_l0"][0]} if module.proj_size else {}),
            "hidden_size": shapes["weight_hr_l0" if module.proj_size else "weight_hh_l0"][1],
        }
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, shapes)
    if hasattr(module, "nf") and hasattr(module, "nx") and len(weight) == 2:
        return {"nx": weight[0], "nf": weight[1]}
    return {}


def _attention(module: Any, shapes: Mapping[str, Shape]) -> dict[str, int]:
    packed = shapes.get("in_proj_weight")
    three = [packed] * 3 if packed else [shapes[f"{x}_proj_weight"] for x in "qkv"]
    inner = three[0][0] // (3 if packed else 1)
    query, key, value = (shape[1] for shape in three)
    heads = inner // module.head_dim
    return {"embed_dim": query, "kdim": key, "vdim": value, "num_heads": heads}


def _convolution(module: Any, weight: Shape, *, transposed: bool) -> dict[str, int]:
    groups = module.groups
    # A depthwise layer loses whole groups: its number of groups is its number of rows.
    if groups > 1 and groups == module.in_channels:
        per_group = 1 if transposed else module.out_channels // groups
        groups = weight[0] // per_group
    first, second = (weight[0], weight[1] * groups)
    inputs, outputs = (first, second) if transposed else (second, first)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}
