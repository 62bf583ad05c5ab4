"""Our kernels as PyTorch operators: ``secateur::sparse_linear`` and ``secateur::sparse_conv``.

An operator is given the stored weight, as two plain tensors, and nothing else to remember. So
``torch.compile`` and ``torch.export`` see an ordinary call, and an exported program that is saved
works in another process, where ``import secateur.runtime`` makes the operators known. A third,
``secateur::dense_weight``, stands where code reads the weight of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.masks import unpack_bits
from secateur.formats.layouts import LAYOUTS
from secateur.runtime.native import Spec
from secateur.runtime.stored import DTYPES
from secateur.runtime.torch_packed import Operands, Way, packed

_WEIGHT = "Tensor values, Tensor index, Tensor? bias"

_SCHEMAS = {
    "sparse_linear": f"(Tensor x, {_WEIGHT}, int outputs, int inputs, int threads=0, "
    "bool measure=True) -> Tensor",
    "sparse_conv": f"(Tensor x, {_WEIGHT}, int[4] weight, int[2] stride, int[4] pads, "
    "int[2] dilation, int groups, int threads=0, bool measure=True) -> Tensor",
    "dense_weight": "(Tensor values, Tensor index, Tensor? negative, int[] shape, int[] order) "
    "-> Tensor",
}


def sparse_linear(  # noqa: PLR0913, PLR0917 - the operator's schema
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    outputs: int,
    inputs: int,
    threads: int = 0,
    measure: bool = True,
) -> Tensor:
    """``x @ weight.T + bias`` for a weight stored under a bit mask.

    Args:
        x: Of the type of the weight (float32, bfloat16 or float16), ``(..., inputs)``.
        values: The kept weights, flat, row after row.
        index: One bit an entry, lowest first, as bytes.
        bias: ``(outputs,)`` or None.
        outputs: Rows of the weight.
        inputs: Columns.
        threads: 0 for as many as ``torch.get_num_threads()`` says.
        measure: Time the kernels once for each size of input; else take the first guess.

    Example:
        >>> values, index = torch.tensor([2.0, 3.0]), torch.tensor([0b1001], dtype=torch.uint8)
        >>> torch.ops.secateur.sparse_linear(torch.ones(1, 2), values, index, None, 2, 2)
        tensor([[2., 3.]])
    """
    x = _ready("sparse_linear", x, values)
    asked = ask_linear(x, values, index, bias, outputs, inputs)
    return _run(asked, x, threads, measure)


def sparse_conv(  # noqa: PLR0913, PLR0917 - the operator's schema
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    threads: int = 0,
    measure: bool = True,
) -> Tensor:
    """A two-dimensional convolution with a weight stored under a bit mask.

    Args:
        x: Of the type of the weight (float32, bfloat16 or float16), ``(n, channels, height, width)``.
        values: The kept weights, flat, row after row.
        index: One bit an entry, lowest first, as bytes.
        bias: ``(outputs,)`` or None.
        weight: Shape of the weight: outputs, inputs of a group, height, width.
        stride: Rows and columns.
        pads: Zeros at the top, left, bottom and right.
        dilation: Rows and columns.
        groups: Of channels.
        threads: 0 for as many as ``torch.get_num_threads()`` says.
        measure: Time the kernels once for each size of input; else take the first guess.
    """
    x = _ready("sparse_conv", x, values)
    asked = ask_conv(x, values, index, bias, weight, stride, pads, dilation, groups)
    return _run(asked, x, threads, measure)


def dense_weight(
    values: Tensor,
    index: Tensor,
    negative: Tensor | None,
    shape: Sequence[int],
    order: Sequence[int],
) -> Tensor:
    """A stored weight as it was before.

    Args:
        values: The kept weights, flat, row after row.
        index: One bit an entry, lowest first, as bytes.
        negative: Which entries are a negative zero, likewise; None if there are none.
        shape: Of the weight.
        order: Its strides.

    Example:
        >>> values, index = torch.tensor([2.0, 3.0]), torch.tensor([0b1001], dtype=torch.uint8)
        >>> torch.ops.secateur.dense_weight(values, index, None, (2, 2), (2, 1))
        tensor([[2., 0.],
                [0., 3.]])
    """
    whole = _fake_weight(values, index, negative, shape, order)
    if whole.is_meta:
        return whole
    parts, shape = {"values": values, "bitmask": index}, tuple(shape)
    value, _ = LAYOUTS["bitmask"].unpack(parts, shape, values.dtype)
    if negative is not None:
        value[unpack_bits(negative, shape)] = -0.0
    return whole.copy_(value)


@dataclass(frozen=True, eq=False)
class Asked:
    """What a call asks for.

    Args:
        stored: The layer.
        shape: Of the output.
        positions: How many of an image, or how many tokens, which the choice of a kernel goes by.
    """

    stored: Operands
    shape: tuple[int, ...]
    positions: int

    @property
    def work(self) -> int:
        """Multiply-adds, zeros included."""
        return math.prod(self.shape) * self.stored.spec.columns


def ask_linear(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, inputs: int
) -> Asked:
    """What a call of ``sparse_linear`` asks for.

    Raises:
        UsageError: The input does not fit the weight.

    Example:
        >>> parts = torch.ones(1), torch.tensor([1], dtype=torch.uint8), None
        >>> asked = ask_linear(torch.ones(3, 5, 4), *parts, 2, 4)
        >>> asked.shape, asked.positions, asked.work
        ((3, 5, 2), 15, 120)
    """
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise UsageError(
            f"sparse_linear on an input of shape {tuple(x.shape)}",
            f"the weight is {outputs} x {inputs}",
            f"the last axis of the input is to have {inputs} features",
            "transpose or reshape the input, or give the parts of another layer",
        )
    stored = Operands(Spec("linear", outputs, inputs), values, index, bias)
    return Asked(stored, (*x.shape[:-1], outputs), math.prod(x.shape[:-1]))


def ask_conv(  # noqa: PLR0913, PLR0917 - as the operator
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Asked:
    """What a call of ``sparse_conv`` asks for.

    Raises:
        UsageError: The input does not fit the weight.
    """
    shape = _conv_shape(x, weight, stride, pads, dilation)
    if x.shape[1] != weight[1] * groups:
        raise UsageError(
            f"sparse_conv on an input of shape {tuple(x.shape)}",
            f"the weight is {tuple(weight)} in {groups} groups",
            f"the input is to have {weight[1] * groups} channels",
            "permute the input to (n, c, h, w), or give the parts of another layer",
        )
    if min(shape[2:]) <= 0:
        raise UsageError(
            f"sparse_conv on an input of shape {tuple(x.shape)}",
            f"its output would be {shape[2]} x {shape[3]}",
            "the kernel is larger than the padded input",
            "give a larger image, or more padding",
        )
    spec = Spec(
        "conv",
        weight[0],
        weight[1],
        groups,
        kernel=(weight[2], weight[3]),
        stride=(stride[0], stride[1]),
        dilation=(dilation[0], dilation[1]),
        pads=(pads[0], pads[1], pads[2], pads[3]),
    )
    return Asked(Operands(spec, values, index, bias), shape, shape[2] * shape[3])


def _run(asked: Asked, x: Tensor, threads: int, measure: bool) -> Tensor:
    if not x.numel() and 0 in asked.shape:
        return x.new_empty(asked.shape)
    way = Way(threads, measure)
    return packed(asked.stored).run(asked.stored, x, asked.positions, way)


def _fake_weight(
    values: Tensor, _index: Tensor, _negative: Tensor | None, *where: Sequence[int]
) -> Tensor:
    return values.new_empty_strided(*where)


def _fake_linear(x: Tensor, *stored: Any, **_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], stored[3]))


def _fake_conv(x: Tensor, *stored: Any, **_: Any) -> Tensor:
    return x.new_empty(_conv_shape(x, *stored[3:7]))


def _register(name: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Make an operator known; once in a process, also if this file is read a second time."""
    if hasattr(torch.ops.secateur, name):
        return
    torch.library.define(f"secateur::{name}", _SCHEMAS[name])
    torch.library.impl(f"secateur::{name}", "cpu", kernel)
    torch.library.register_fake(f"secateur::{name}", fake)


_register("sparse_linear", sparse_linear, _fake_linear)
_register("sparse_conv", sparse_conv, _fake_conv)
_register("dense_weight", dense_weight, _fake_weight)


def _conv_shape(
    x: Tensor,
    weight: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    if x.dim() != 4:
        raise UsageError(
            f"sparse_conv on an input of shape {tuple(x.shape)}",
            f"it has {x.dim()} axes",
            "the kernels read images as (n, c, h, w)",
            "give a batch of images: x.unsqueeze(0) for one",
        )
    height, width = (
        (x.shape[2 + i] + pads[i] + pads[2 + i] - dilation[i] * (weight[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in (0, 1)
    )
    return x.shape[0], weight[0], height, width


def _ready(name: str, x: Tensor, values: Tensor) -> Tensor:
    """The input as the kernels read it; in another order in memory it is copied."""
    if values.dtype not in DTYPES:
        raise UsageError(
            f"secateur::{name}",
            f"the weight is {values.dtype}",
            "there are kernels for float32, bfloat16 and float16",
            f"convert the module, e.g. with .float(), or use secateur.runtime.restore, which leaves "
            f"it {values.dtype}",
        )
    if x.dtype != values.dtype:
        raise UsageError(
            f"secateur::{name}",
            f"the input is {x.dtype}, and the weight {values.dtype}",
            "both are float32, or both bfloat16 or float16: rounding and widening are left to the "
            "caller",
            "convert the input, leave autocast out, or use secateur.runtime.restore",
        )
    return x.contiguous()
