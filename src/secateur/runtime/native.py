"""One sparse layer in the native library, called with NumPy or PyTorch arrays.

This is the bottom of the runtime: everything here is a thin, checked wrapper of a function in
``native/include/secateur.h``. Arrays are not copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.runtime.library import INVALID, CVariant, CWeights, check, load
from secateur.runtime.spec import ACTIVATIONS, FAMILIES, KINDS, Norm, Spec, Variant
from secateur.runtime.stored import DTYPES, LAYOUTS, Stored, store
from secateur.runtime.threads import Pool, Workers, destroyed_with

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "KINDS",
    "Layer",
    "Norm",
    "Pool",
    "Spec",
    "Variant",
    "candidates",
    "has_half",
    "isa",
    "isas",
    "lanes",
]

_MOST_CANDIDATES = 64

Array = TypeVar("Array", "np.ndarray[Any, Any]", Tensor)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weights are packed for one kernel. Safe to run from many threads at once.

    Example:
        >>> weight = np.eye(3, dtype=np.float32)
        >>> spec = Spec("linear", 3, 3, activation="relu")
        >>> layer = Layer.from_dense(weight, spec, candidates(spec, positions=2, density=1 / 3)[0])
        >>> layer.run(np.array([[1, -2, 3], [-4, 5, -6]], np.float32)).tolist()
        [[1.0, 0.0, 3.0], [0.0, 5.0, 0.0]]
        >>> layer.nonzeros
        3
    """

    spec: Spec
    variant: Variant
    address: int

    @staticmethod
    def from_dense(
        weight: np.ndarray[Any, Any] | Tensor,
        spec: Spec,
        variant: Variant,
        bias: np.ndarray[Any, Any] | Tensor | None = None,
        isa: str | None = None,
        layout: str = "dense",
    ) -> Layer:
        """Pack a weight.

        Args:
            weight: ``(outputs, inputs, height, width)`` or ``(outputs, columns)`` in float32,
                bfloat16 or float16. Zeros are left out.
            spec: Shape of the layer.
            variant: The kernel.
            bias: Float32, ``(outputs,)``.
            isa: One of :func:`isas`; None for the one in use.
            layout: How the library is given the weight: ``"dense"``, ``"bitmask"`` or ``"csr"``.

        Raises:
            UsageError: Something does not fit, or the kernel cannot run this layer.
            FormatError: The library found the packed form damaged.
        """
        shape = tuple(weight.shape)
        if not shape or shape[0] != spec.outputs or np.prod(shape) != spec.outputs * spec.columns:
            raise UsageError(
                f"a layer with a weight of shape {shape}",
                f"its spec has {spec.outputs} rows of {spec.columns} columns",
                "the weight is that matrix",
                "give the weight of this layer, or its spec",
            )
        return Layer.from_stored(store(weight, layout), spec, variant, bias, isa)

    @staticmethod
    def from_stored(
        stored: Stored,
        spec: Spec,
        variant: Variant,
        bias: np.ndarray[Any, Any] | Tensor | None = None,
        isa: str | None = None,
    ) -> Layer:
        """Pack a weight that is stored sparse; it is never dense in memory.

        Args:
            stored: Values and index of the matrix ``(outputs, columns)``.
            spec: Shape of the layer.
            variant: The kernel.
            bias: Float32, ``(outputs,)``.
            isa: One of :func:`isas`; None for the one in use.

        Raises:
            UsageError: Something does not fit, or the kernel cannot run this layer.
            FormatError: The library found values and index damaged.
        """
        pointer = None
        if bias is not None:
            pointer = _floats("the bias", bias, shape=(spec.outputs,))
        packed = CWeights(
            layout=LAYOUTS[stored.layout],
            dtype=DTYPES[stored.values.dtype],
            values=stored.values.data_ptr(),
            count=stored.values.numel(),
            index=stored.index.data_ptr(),
            index_bytes=stored.index.numel(),
            bias=pointer,
        )
        library, address = load(), ctypes.c_void_p()
        check(
            library.secateur_layer_create(
                spec.c(), packed, variant.c(), _name(isa), ctypes.byref(address)
            ),
            f"{variant} for {spec}",
        )
        layer = Layer(spec, variant, int(address.value or 0))
        destroyed_with(layer, library.secateur_layer_destroy)
        return layer

    def run(
        self,
        x: Array,
        residual: Array | None = None,
        pool: Workers | None = None,
        threads: int | None = None,
    ) -> Array:
        """The output for one input.

        Args:
            x: Float32, contiguous, in main memory: ``(n, groups * inputs, h, w)`` for a
                convolution, ``(..., inputs)`` for a linear layer.
            residual: Added before the activation; of the output's shape.
            pool: Threads; None runs on this one.
            threads: How many threads to split the work for; None for all of the pool.

        Returns:
            An array of the kind of ``x``. PyTorch records no gradient.

        Raises:
            UsageError: The type, the order in memory or the shape does not fit.
        """
        source = _floats("the input", x)
        dims, shape = self._shapes(tuple(x.shape))
        added = None if residual is None else _floats("the residual", residual, shape=shape)
        library = load()
        work = context = None
        if pool is not None:
            work, context = pool.run, pool.address
        if threads is None:
            threads = 1 if pool is None else pool.threads
        y: Array
        if isinstance(x, Tensor):
            y = torch.empty(shape, dtype=torch.float32)
            target = y.data_ptr()
        else:
            y = np.empty(shape, np.float32)
            target = y.ctypes.data
        check(
            library.secateur_layer_run(
                self.address, source, dims, added, target, work, context, threads
            ),
            f"running a sparse layer on an input of shape {tuple(x.shape)}",
        )
        return y

    @property
    def nonzeros(self) -> int:
        """How many weights are not zero."""
        return int(load().secateur_layer_nonzeros(self.address))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form in memory."""
        return int(load().secateur_layer_bytes(self.address))

    def _shapes(self, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
        """The dimensions that the library is told, and the shape of the output."""
        spec = self.spec
        channels = spec.inputs * spec.groups
        if spec.kind == "linear":
            if not shape or shape[-1] != channels:
                raise _unfit("the input", shape, f"(..., {channels})")
            tokens = int(np.prod(shape[:-1], dtype=np.int64))
            return (ctypes.c_int64 * 3)(tokens, 1, 1), (*shape[:-1], spec.outputs)
        if len(shape) != 4 or shape[1] != channels:
            raise _unfit("the input", shape, f"(n, {channels}, h, w)")
        dims, out = (ctypes.c_int64 * 3)(shape[0], *shape[2:]), (ctypes.c_int64 * 3)()
        asked = f"running a sparse layer on an input of shape {shape}"
        check(load().secateur_layer_shape(self.address, dims, out), asked)
        return dims, (out[0], spec.outputs, out[1], out[2])


def candidates(spec: Spec, positions: int, density: float, isa: str | None = None) -> list[Variant]:
    """Kernels worth timing for a layer, best guess first.

    Args:
        spec: Shape of the layer.
        positions: Positions of its output in one image (height times width), or tokens.
        density: Share of weights that are not zero.
        isa: One of :func:`isas`; None for the one in use.

    Raises:
        UsageError: The instruction set is unknown.

    Example:
        >>> spec = Spec("linear", 64, 64)
        >>> candidates(spec, positions=128, density=0.1)[0].family in FAMILIES
        True
    """
    found = (CVariant * _MOST_CANDIDATES)()
    count = load().secateur_candidates(
        spec.c(), positions, density, _name(isa), found, _MOST_CANDIDATES
    )
    if count <= 0:
        check(INVALID, f"kernels for {spec}")
    names = list(FAMILIES)
    return [
        Variant(names[c.family], c.rows, c.vectors, c.columns)
        for c in found[: min(count, _MOST_CANDIDATES)]
    ]


def isas() -> Sequence[str]:
    """The instruction sets that kernels exist for and that run here, best first.

    Example:
        >>> {"baseline", "neon"} & set(isas()) != set()
        True
    """
    return tuple(load().secateur_isas().decode().split(","))


def isa() -> str:
    """The instruction set in use: the best one, or that of ``SECATEUR_ISA`` in the environment.

    Raises:
        UsageError: ``SECATEUR_ISA`` names one that does not exist or does not run here.

    Example:
        >>> isa() in isas()
        True
    """
    name = load().secateur_isa()
    if name is None:
        check(
            INVALID,
            "the instruction set that SECATEUR_ISA names",
            "kernels are compiled for a few sets, and run where the processor knows theirs",
            "unset it, or name one of these",
        )
    return str(name.decode())


def lanes(isa: str | None = None) -> int:
    """Floats in a vector of an instruction set; None for the one in use.

    Raises:
        UsageError: It does not exist or does not run here.

    Example:
        >>> lanes() in (4, 8, 16)
        True
    """
    count = int(load().secateur_lanes(_name(isa)))
    if count <= 0:
        check(INVALID, f"the instruction set {isa or 'in use'}")
    return count


def has_half(isa: str | None = None) -> bool:
    """Whether an instruction set multiplies float16 (family ``"half"``); None for the one in use.

    Example:
        >>> has_half("baseline")
        False
    """
    return bool(load().secateur_has_half(_name(isa)))


def _name(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


def _unfit(what: str, shape: tuple[int, ...], expected: str) -> UsageError:
    return UsageError(
        f"running a sparse layer on {what} of shape {shape}",
        f"the layer needs {expected}",
        "the shape of the layer is fixed when its weights are packed",
        "reshape it, or make another layer",
    )


def _floats(
    what: str, x: np.ndarray[Any, Any] | Tensor, shape: tuple[int, ...] | None = None
) -> int:
    """The address of an array, after checking that the library can read it as it lies there."""
    asked = f"running a sparse layer on {what} of shape {tuple(x.shape)}"
    if isinstance(x, Tensor):
        if x.device.type != "cpu" or x.layout != torch.strided:
            why = "the kernels read dense arrays in main memory"
            raise UsageError(asked, f"it is {x.layout} on {x.device}", why, "use .to_dense().cpu()")
        contiguous, dtype, address = x.is_contiguous(), str(x.dtype), x.data_ptr()
        do = "use .contiguous()"
    else:
        contiguous, dtype, address = x.flags.c_contiguous, str(x.dtype), x.ctypes.data
        do = "use numpy.ascontiguousarray"
    if dtype.removeprefix("torch.") != "float32":
        raise UsageError(
            asked, f"its type is {dtype}", "the kernels compute in float32", "convert it to float32"
        )
    if not contiguous:
        raise UsageError(
            asked, "it is not contiguous", "the kernels read rows one after another", do
        )
    if shape is not None and tuple(x.shape) != shape:
        raise _unfit(what, tuple(x.shape), str(shape))
    return address
