"""The dense weight of an accelerated layer, which is unpacked when its numbers are needed.

Code of others asks a layer for the type of its weight at every call, as the feed-forward layers of T5 in
Transformers do, three times. Unpacking for that would take longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from secateur.core.errors import UsageError

# What can be told of a tensor without its numbers.
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad"),
    *("is_meta", "is_cuda", "is_sparse", "is_quantized"),
)
_METHODS = (
    *("size", "dim", "stride", "numel", "nelement", "element_size", "__len__"),
    *("is_contiguous", "is_floating_point", "is_complex"),
)
_KNOWN = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        *(getattr(Tensor, name) for name in _METHODS),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    }
)
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined] # torch declares it as a tensor


def assigned() -> UsageError:
    """What is said where the weight of an accelerated layer is replaced.

    Example:
        >>> assigned().do.partition(";")[0]
        'use load_state_dict, or restore() the module first'
    """
    return UsageError(
        "assigning the weight of an accelerated layer",
        "it has no dense weight, only the values that are not zero",
        "the kernels run from those",
        "use load_state_dict, or restore() the module first; of what torch.func.functional_call "
        "is given, leave the weights of such layers out",
    )


class UnreadWeight(Tensor):
    """A tensor that is unpacked at its first use, and then stays so for as long as it lives.

    Type, shape, device and the like are known before.

    Args:
        shape: Of the tensor.
        order: Its strides.
        values: A tensor of its type and on its device.
        unpack: Gives the tensor.

    Example:
        >>> weight = UnreadWeight((2, 3), (3, 1), torch.empty(0), lambda: torch.ones(2, 3))
        >>> weight.shape, weight.dtype, weight.is_unpacked
        (torch.Size([2, 3]), torch.float32, False)
        >>> weight.sum(), weight.is_unpacked
        (tensor(6.), True)
    """

    _unpack: Callable[[], Tensor]
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        order: tuple[int, ...],
        values: Tensor,
        unpack: Callable[[], Tensor],
    ) -> UnreadWeight:
        """A tensor without memory of its own."""
        made = Tensor._make_wrapper_subclass(
            cls, shape, order, dtype=values.dtype, device=values.device
        )
        made._unpack, made._whole = unpack, None
        return made

    @property
    def is_unpacked(self) -> bool:
        """Whether its numbers were used."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """The tensor itself."""
        if self._whole is None:
            # Where it is read says nothing about where it will be used.
            with torch.inference_mode(False), torch.no_grad():
                self._whole = self._unpack()
        return self._whole

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what is known; else do it with the unpacked tensor."""
        if func == _SET_DATA:  # adapters are merged so; the layer would go on without them
            raise assigned()
        if func in _KNOWN and not args[0].is_unpacked:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it as if of an instance
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same operation with the unpacked tensor; below autograd, for code in C++."""
        given = tree_map_only(cls, cls.whole, (args, dict(kwargs or {})))
        return func(*given[0], **given[1])
