"""How often weights are used that no known layer holds: seen in the products themselves.

A weight may be a parameter of the user's own module, may be computed from parameters (weight
normalisation, a mask), or may belong to a cell that is called in a loop. All of them end as an operand
of a matrix product or a convolution below autograd, and there they are counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.slots import device_of


def _bilinear(first: Tensor, weight: Tensor, second: Tensor, *_: Any, out_val: Tensor) -> int:
    """Of ``nn.Bilinear``, which PyTorch's table lacks: as there, two for a multiply-add."""
    return 2 * weight.numel() * (first.numel() // first.shape[-1])


_FLOPS: Mapping[Any, Any] = {**flop_registry, torch.ops.aten._trilinear: _bilinear}


class _Products(TorchDispatchMode):
    """Multiply-adds of products, by the parameter that one of their operands is, or comes from."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        # A dispatch mode cannot work without its parent's state.
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: dict[str, float] = {}
        # Place in memory -> name and size of the parameter; an empty name is not to be counted.
        self._known: dict[int, tuple[int, str]] = {}
        self._held: list[Tensor] = []  # while they live, nothing else can lie in their place
        for name, x in (*model.named_buffers(), *model.named_parameters()):
            self._know(x, (x.numel(), name if name in names else ""))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = [self._known.get(_place(x)) for x in operands]
        flops = _FLOPS.get(func._overloadpacket)
        if operands and None not in known:  # computed from parameters alone
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._know(x, max(each for each in known if each is not None))
        elif flops is not None:
            name = max((each for each in known if each is not None), default=(0, ""))[1]
            if name:
                macs = flops(*args, **kwargs, out_val=out) / 2
                self.counted[name] = self.counted.get(name, 0.0) + macs
        return out

    def _know(self, x: Tensor, about: tuple[int, str]) -> None:
        if x.numel() and _place(x) not in self._known:
            self._known[_place(x)] = about
            self._held.append(x)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@torch.no_grad()
def product_uses(model: nn.Module, batch: Batch, names: Collection[str]) -> dict[str, float]:
    """Multiply-adds per element and sample of parameters, wherever they are multiplied.

    Args:
        model: Run once, in evaluation mode; not at all if there are no names.
        batch: Whatever it runs on.
        names: Parameters that count. A product with several counts for the largest.

    Returns:
        Name of a parameter -> multiply-adds of a sample over its number of elements, for those that
        take part in a product.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> net = weight_norm(nn.Linear(4, 3))
        >>> product_uses(net, torch.zeros(2, 5, 4), ["parametrizations.weight.original1"])
        {'parametrizations.weight.original1': 5.0}
    """
    if not names:
        return {}
    mode = _Products(model, names)
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a setting of other devices
        # Fused recurrent kernels of oneDNN hide their products.
        with torch.backends.mkldnn.flags(enabled=False), mode:
            forward(model, to_device(batch, device_of(model)))
    sizes = {name: x.numel() for name, x in model.named_parameters()}
    samples = max(1, size_of(batch))
    return {name: macs / samples / sizes[name] for name, macs in mode.counted.items()}
