"""Every run of a layer in a forward pass, as something that can be timed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.attention import PrunedAttention, open_attention
from secateur.core.batches import Batch, evaluating, forward, to_device
from secateur.core.slots import device_of
from secateur.runtime.layer_times import Layer
from secateur.stats.attention import projected

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Use:
    """One run of a layer in a forward pass.

    Args:
        weight: Name of its parameter.
        layer: At its full widths.
        axes: Of the weight: that of the outputs and that of the inputs.
    """

    weight: str
    layer: Layer
    axes: tuple[int, int] = (0, 1)

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Inputs and outputs of the layer if its weight has this shape."""
        return shape[self.axes[1]] * self.layer.groups, shape[self.axes[0]]


@torch.no_grad()
def layers_of(model: nn.Module, example: Batch) -> tuple[Use, ...]:
    """Every run of a convolution or linear layer, or a projection of attention, in order.

    Transposed convolutions, recurrent layers and what is no layer are left to the rest.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 2))
        >>> [use.layer.macs for use in layers_of(net, torch.zeros(1, 3, 4, 4))]
        [864.0, 64.0]
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[Use] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names.get(id(module.weight))
        if name is not None and args and isinstance(args[0], Tensor):
            found.append(_use(name, module, args[0]))

    # Transformers' Conv1D is a linear layer with a transposed weight.
    known = [
        module
        for module in model.modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear))
        or (hasattr(module, "nf") and isinstance(getattr(module, "weight", None), Tensor))
    ]
    hooks = [module.register_forward_pre_hook(hook) for module in known]

    def projects(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for weight, positions in projected(module, args, kwargs).items():
            outputs, inputs = module.get_parameter(weight).shape
            name = names[id(module.get_parameter(weight))]
            found.append(Use(name, Layer(inputs, outputs, round(positions))))

    try:
        with evaluating(model), open_attention(model):
            attention = [m for m in model.modules() if type(m) is PrunedAttention]
            hooks += [m.register_forward_pre_hook(projects, with_kwargs=True) for m in attention]
            forward(model, to_device(example, device_of(model)))
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(found)


def _use(name: str, module: Any, x: Tensor) -> Use:
    if not isinstance(module, _CONVOLUTIONS):
        axes = (0, 1) if isinstance(module, nn.Linear) else (1, 0)
        shape = module.weight.shape
        rows = math.prod(x.shape[:-1])
        return Use(name, Layer(int(shape[axes[1]]), int(shape[axes[0]]), rows), axes)
    ndim = len(module.kernel_size)
    # "same" stands for numbers, which torch keeps here, last axis first.
    sides = module._reversed_padding_repeated_twice
    layer = Layer(
        inputs=module.in_channels,
        outputs=module.out_channels,
        rows=int(x.shape[0]) if x.ndim == ndim + 2 else 1,
        size=tuple(x.shape[-ndim:]),
        kernel=module.kernel_size,
        stride=module.stride,
        padding=tuple(sides[::-2][i] for i in range(ndim)),
        dilation=module.dilation,
        groups=module.groups,
    )
    return Use(name, layer)
