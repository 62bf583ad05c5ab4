"""The tensors that a network returns: what they hold is pinned, and compared in a proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import UsageError

# In an output of Transformers these serve as inputs of the next call: they may become narrower.
_CACHES = {"past_key_values", "cache_params", "state", "encoder_last_hidden_state"}
_BY_PRODUCTS = frozenset(_CACHES | {f"{x}_hidden_states" for x in ("image", "audio", "video")})
# Numbers and words are no tensors, though a size that was read in a trace has attributes.
_CLOSED = (nn.Module, type, FunctionType, ModuleType, int, float, complex, str, bytes)


def predictions(output: Any) -> list[Tensor]:
    """All tensors of an output, without the caches and other by-products of Transformers.

    Looked into are tuples, lists, mappings, dataclasses and any other object with attributes, such
    as a distribution.

    Raises:
        UsageError: A part of it is an iterator, which can be read only once, after the run.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> len(predictions({"a": torch.zeros(1), "b": [Normal(torch.zeros(2), torch.ones(2)), 3]}))
        3
    """
    return _tensors(output, set())


def require_predictions(output: Any, model: nn.Module) -> list[Tensor]:
    """:func:`predictions`, of which there must be at least one.

    Raises:
        UsageError: There is none.

    Example:
        >>> require_predictions(3, nn.Linear(1, 1))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: tracing Linear: its output, of type int, holds no tensor...
    """
    found = predictions(output)
    if not found:
        raise UsageError(
            f"tracing {type(model).__name__}",
            f"its output, of type {type(output).__name__}, holds no tensor",
            "what reaches the output keeps its size, and a cut is proved by comparing outputs",
            "return tensors: alone, or in tuples, mappings, dataclasses or objects",
        )
    return found


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen:
        return []
    seen.add(id(value))
    return [x for part in _parts(value) for x in _tensors(part, seen)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        gone = _BY_PRODUCTS if _from_transformers(value) else frozenset()
        return [part for key, part in value.items() if key not in gone]
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, Iterator):
        raise UsageError(
            "following the output of the network",
            f"a part of it is an iterator, of type {type(value).__name__}",
            "what it yields is computed or read later, when the run was recorded already",
            "return a list or a tuple",
        )
    # The other objects of Transformers in an output are caches.
    if isinstance(value, _CLOSED) or _from_transformers(value):
        return []
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = [getattr(value, name) for name in slots if hasattr(value, name)]
    return [*held, *getattr(value, "__dict__", {}).values()]


def _slots(kind: type) -> list[str]:
    listed = vars(kind).get("__slots__", ())
    names = [listed] if isinstance(listed, str) else list(listed)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _from_transformers(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(value).__mro__)
