"""Tensors that keep their numbers in other tensors: quantized weights and optimizer states of torchao."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor keeps its numbers in other tensors: most operations are not for it.

    Example:
        >>> import torch
        >>> is_wrapper(torch.zeros(2)), is_wrapper(torch.nn.Parameter(torch.zeros(2)))
        (False, False)
    """
    return bool(is_traceable_wrapper_subclass(tensor))


def numbers_of(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stands for; itself, unless it is a wrapper that can be dequantized.

    Example:
        >>> import torch
        >>> x = torch.zeros(2)
        >>> numbers_of(x) is x
        True
    """
    coded = is_wrapper(tensor) and type(tensor).dequantize is not Tensor.dequantize
    return tensor.dequantize() if coded else tensor
