"""What a configuration states about the number of layers, and editing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

_PLAIN = (int, float, str, type(None))


def statements(config: Any, size: int, gone: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ways in which a configuration may state the number of entries, likeliest first.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_layers=3, layer_types=["a", "b", "a"])
        >>> next(statements(config, 3, [0]))
        {'num_layers': [3, 2], 'layer_types': [['a', 'b', 'a'], ['b', 'a']]}
    """
    left = [i for i in range(size) if i not in gone]
    counts: list[dict[str, Any]] = []
    lists: dict[str, Any] = {}
    for key, value in _values(config):
        if type(value) is int and value == size and "layer" in key:
            counts.append({key: [value, len(left)]})
        elif isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value):
            if len(value) == size and "layer" in key:
                lists[key] = [list(value), [value[i] for i in left]]
            for place, entry in enumerate(value):
                if type(entry) is int and entry == size:
                    counts.append({f"{key}[{place}]": [entry, len(left)]})
    counts.sort(key=lambda statement: "num_hidden_layers" not in next(iter(statement)))
    for count in counts:
        yield {**count, **{k: v for k, v in lists.items() if k not in count}}
        if lists:
            yield count
    # One count may be said twice, e.g. as num_hidden_layers and as encoder_layers.
    together = {k: v for count in counts for k, v in count.items()}
    if len(counts) > 1:
        yield {**lists, **together}


def edited(model: nn.Module, stated: Mapping[str, Any]) -> dict[int, Any]:
    """New configurations, by the identity of the old ones; modules share them as before.

    Raises:
        LookupError: The model has no configuration that says so.

    Example:
        >>> edited(nn.Linear(1, 1), {})
        {}
    """
    root = getattr(model, "config", None)
    if not stated:
        return {}
    memo: dict[int, Any] = {}
    old = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    new = {key: copy.deepcopy(config, memo) for key, config in old.items()}
    for key, (before, after) in stated.items():
        *parts, name = key.split(".")
        holder = root
        for part in parts:
            holder = getattr(holder, part, None)
        if holder is None or _value(holder, name) != before:
            found = (
                f"{key!r} of its configuration is {_value(holder, name)!r:.60}, not {before!r:.60}"
            )
            raise LookupError(found)
        for config in _objects(new.values()):
            if type(config) is type(holder) and _value(config, name) == before:
                _set_(config, name, after)
    return new


def undeleted_(config: Any, details: Mapping[str, Any]) -> None:
    """Give a configuration the values that it had before entries were deleted.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=3)
        >>> undeleted_(config, {"config": {"num_hidden_layers": [4, 3]}})
        >>> config.num_hidden_layers
        4
    """
    for key, (before, _) in details["config"].items():
        *parts, name = key.split(".")
        holder = config
        for part in parts:
            holder = getattr(holder, part)
        _set_(holder, name, before)


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if key.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(config: Any, name: str) -> Any:
    """A key such as ``num_hidden_layers`` or ``depths[1]``."""
    plain, _, place = name.partition("[")
    value = getattr(config, plain, None)
    value = list(value) if isinstance(value, tuple) else value
    if not place:
        return value
    index = int(place.rstrip("]"))
    return value[index] if isinstance(value, list) and index < len(value) else None


def _set_(config: Any, name: str, after: Any) -> None:
    plain, _, place = name.partition("[")
    old = getattr(config, plain)
    if place:
        values = list(old)
        values[int(place.rstrip("]"))] = after
        after = values
    setattr(config, plain, tuple(after) if isinstance(old, tuple) else after)


def _objects(configs: Any) -> list[Any]:
    """Configurations and their parts, each once."""
    found: dict[int, Any] = {}
    todo = list(configs)
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return list(found.values())
