"""Where the native library is, and its C interface (``native/include/secateur.h``) for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from secateur.core.errors import FormatError, MissingNative, SecateurError, UsageError

#: Version of the interface that this package speaks; ``SECATEUR_ABI`` in the header.
ABI = 1

_PATH = Path(__file__).with_name("libsecateur.so")


class CSpec(ctypes.Structure):
    """``secateur_spec``: the shape of a layer."""

    _fields_ = (
        ("kind", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("groups", c_int32),
        ("kernel", c_int32 * 2),
        ("stride", c_int32 * 2),
        ("dilation", c_int32 * 2),
        ("pads", c_int32 * 4),
        ("activation", c_int32),
        ("alpha", c_float),
        ("beta", c_float),
    )


class CWeights(ctypes.Structure):
    """``secateur_weights``: where weights lie, and how."""

    _fields_ = (
        ("layout", c_int32),
        ("dtype", c_int32),
        ("values", c_void_p),
        ("count", c_int64),
        ("index", c_void_p),
        ("index_bytes", c_int64),
        ("bias", c_void_p),
    )


class CVariant(ctypes.Structure):
    """``secateur_variant``: which kernel."""

    _fields_ = (
        ("family", c_int32),
        ("rows", c_int32),
        ("vectors", c_int32),
        ("columns", c_int32),
    )


class CAttention(ctypes.Structure):
    """``secateur_attention``: sizes of queries, keys, values and mask."""

    _fields_ = (
        ("batch", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("heads", c_int32),
        ("size", c_int32),
        ("value_size", c_int32),
        ("scale", c_float),
        ("mask_batch", c_int64),
        ("mask_heads", c_int32),
    )


# name -> (result, arguments). Task functions travel as addresses: Python never calls or writes one.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "secateur_abi": (c_int, ()),
    "secateur_last_error": (c_char_p, ()),
    "secateur_isa": (c_char_p, ()),
    "secateur_isas": (c_char_p, ()),
    "secateur_lanes": (c_int, (c_char_p,)),
    "secateur_has_half": (c_int, (c_char_p,)),
    "secateur_candidates": (
        c_int,
        (POINTER(CSpec), c_int64, c_double, c_char_p, POINTER(CVariant), c_int),
    ),
    "secateur_layer_create": (
        c_int,
        (POINTER(CSpec), POINTER(CWeights), POINTER(CVariant), c_char_p, POINTER(c_void_p)),
    ),
    "secateur_layer_destroy": (None, (c_void_p,)),
    "secateur_layer_shape": (c_int, (c_void_p, POINTER(c_int64), POINTER(c_int64))),
    "secateur_layer_run": (
        c_int,
        (
            *(c_void_p, c_void_p, POINTER(c_int64), c_void_p, c_void_p),
            *(c_void_p, c_void_p, c_int),
        ),
    ),
    "secateur_layer_normalise": (c_int, (c_void_p, c_void_p, c_void_p, c_float)),
    "secateur_chain_create": (c_int, (POINTER(c_void_p), c_int, POINTER(c_void_p))),
    "secateur_chain_destroy": (None, (c_void_p,)),
    "secateur_chain_shape": (c_int, (c_void_p, POINTER(c_int64), POINTER(c_int64))),
    "secateur_chain_run": (
        c_int,
        (
            *(c_void_p, c_void_p, POINTER(c_int64), c_void_p, c_void_p),
            *(c_void_p, c_void_p, c_int),
        ),
    ),
    "secateur_attention_run": (
        c_int,
        (
            *(POINTER(CAttention), c_char_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_void_p, c_void_p, c_int),
        ),
    ),
    "secateur_layer_nonzeros": (c_int64, (c_void_p,)),
    "secateur_layer_bytes": (c_int64, (c_void_p,)),
    "secateur_pool_create": (c_void_p, (c_int,)),
    "secateur_pool_destroy": (None, (c_void_p,)),
    "secateur_pool_threads": (c_int, (c_void_p,)),
    "secateur_pool_run": (None, (c_void_p, c_void_p, c_size_t, c_void_p)),
    "secateur_team_create": (c_void_p, (c_void_p, c_int)),
    "secateur_team_destroy": (None, (c_void_p,)),
    "secateur_team_run": (None, (c_void_p, c_void_p, c_size_t, c_void_p)),
}


def library_path() -> Path:
    """The file of the native library, for those who register it with ONNX Runtime themselves.

    Raises:
        MissingNative: It was not built.

    Example:
        >>> library_path().name
        'libsecateur.so'
    """
    if not _PATH.is_file():
        raise MissingNative(f"there is no {_PATH.name} in {_PATH.parent}")
    return _PATH


@cache
def load() -> ctypes.CDLL:
    """The loaded library with the signatures of its functions. Calls release Python's lock.

    Raises:
        MissingNative: It was not built, cannot be loaded, or is of another version.

    Example:
        >>> load().secateur_abi() == ABI
        True
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # cannot be loaded; lacks a function
        raise MissingNative(f"{path.name} cannot be used: {error}") from error
    abi = library.secateur_abi()
    if abi != ABI:
        raise MissingNative(f"{path.name} has interface {abi}, this package needs {ABI}")
    return library


def available() -> bool:
    """Whether the native library is there and can be used.

    Example:
        >>> available() in (True, False)
        True
    """
    try:
        load()
    except MissingNative:
        return False
    return True


def check(code: int, asked: str, why: str = "", do: str = "") -> None:
    """Turn an error code of the library into the error that it stands for.

    Args:
        code: What a function of the library has just returned to this thread.
        asked: What was wanted, for the message.
        why: Why that cannot be, for the message.
        do: What helps, for the message.

    Raises:
        UsageError: Something that was asked makes no sense.
        FormatError: Packed weights are damaged.
        MemoryError: There is not enough memory.

    Example:
        >>> check(0, "a layer")
    """
    if code == 0:
        return
    found = (load().secateur_last_error() or b"").decode() or f"error {code} of the native library"
    if code == _NO_MEMORY:
        raise MemoryError(f"{asked}: {found}")
    kinds: dict[int, type[SecateurError]] = {INVALID: UsageError, _DAMAGED: FormatError}
    raise kinds.get(code, SecateurError)(asked, found, why, do)


INVALID, _DAMAGED, _NO_MEMORY = 1, 2, 3
