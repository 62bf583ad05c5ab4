"""The two text files of a bundle, a recipe in YAML and facts in JSON. Neither is trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from secateur.core.errors import FormatError, UsageError, kind_of, with_article
from secateur.core.facts import Facts
from secateur.formats.table import read_json

RECIPE_LIMIT = 1_000_000
FACTS_LIMIT = 64_000_000
#: Scalars, lists and mappings in one recipe. PyYAML is slow: this many take about a second.
NODE_LIMIT = 20_000
DEPTH_LIMIT = 32

_FIX = "write the file again, or copy it again from where it came"


def recipe_text(recipe: Mapping[str, Any]) -> str:
    r"""A recipe as YAML that :func:`parse_recipe` reads back.

    Raises:
        UsageError: It holds something else than text, numbers, flags, lists and mappings, or it
            is too large to be read back.

    Example:
        >>> recipe_text({"criterion": "magnitude", "target": {"sparsity": 0.9}})
        'criterion: magnitude\ntarget:\n  sparsity: 0.9\n'
    """
    try:
        plain = _plain(recipe, 0)
        if (count := _events(plain)) > NODE_LIMIT - 4:
            raise ValueError(f"it has {count} parts, at most {NODE_LIMIT - 4} can be read back")
        # Escapes instead of Unicode: PyYAML writes a bare U+0085 and reads it as a line break.
        text = str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=False))
        parse_recipe(text.encode())
    except (ValueError, yaml.YAMLError) as error:
        raise _unwritable("recipe", str(error)) from error
    except FormatError as error:
        raise _unwritable("recipe", error.found) from error
    return text


def parse_recipe(data: bytes) -> dict[str, Any]:
    """A recipe out of the bytes of a YAML file.

    Anchors, aliases and tags are refused before any object is built: a recipe needs none of
    them, and a few hundred bytes of aliases can stand for gigabytes.

    Raises:
        FormatError: It is no such recipe.

    Example:
        >>> parse_recipe(b"pattern: '2:4'")
        {'pattern': '2:4'}
    """
    _require_size("the recipe", data, RECIPE_LIMIT)
    try:
        text = data.decode("utf-8")
        depth = 0
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            _require_simple(event, count, depth)
        recipe = _plain(yaml.safe_load(text), 0)
    except (yaml.YAMLError, RecursionError) as error:
        found = f"it is not YAML ({' '.join(str(error).split())[:160]})"
        raise FormatError("the recipe", found, "a recipe is one YAML mapping", _FIX) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # PyYAML raises these for values such as 2001-99-99 or 0b_.
        found = f"it holds a value that cannot be ({str(error)[:160]})"
        raise FormatError("the recipe", found, "recipes hold plain values", _FIX) from error
    if not isinstance(recipe, dict):
        found = f"it is {kind_of(recipe)}"
        raise FormatError("the recipe", found, "it must be a mapping", _FIX)
    return recipe


def facts_text(facts: Facts) -> str:
    """Facts as JSON that :func:`parse_facts` reads back.

    Raises:
        UsageError: They hold something that JSON cannot hold.

    Example:
        >>> parse_facts(facts_text(Facts(fingerprint="ab")).encode()).fingerprint
        'ab'
    """
    try:
        text = json.dumps(facts.to_dict(), indent=1)
        parse_facts(text.encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise _unwritable("facts", str(error)) from error
    except FormatError as error:
        raise _unwritable("facts", error.found) from error
    return text + "\n"


def parse_facts(data: bytes) -> Facts:
    """Facts out of the bytes of a JSON file.

    Raises:
        FormatError: They are no facts.
    """
    _require_size("the facts", data, FACTS_LIMIT)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"they are not UTF-8 ({error})"
        raise FormatError("the facts", found, "JSON is UTF-8 text", _FIX) from error
    plain = read_json(text, "the facts")
    try:
        facts = Facts.from_dict(plain)
        kinds = {"recipe": dict, "fingerprint": str, "measures": dict}
        kinds |= {"history": list, "environment": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(facts, name), kind):
                raise TypeError(f"{name!r} is not {with_article(kind.__name__)}")
        for layer in facts.layers:
            if not all(type(n) is int for n in (*layer.shape, layer.total, layer.kept)):
                raise TypeError(f"the sizes of layer {str(layer.name)[:80]!r} are not integers")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        found = f"a field is wrong ({str(error)[:160]})"
        raise FormatError("the facts", found, "fields have fixed names and types", _FIX) from error
    return facts


def read_limited(path: Path, limit: int) -> bytes:
    """At most ``limit + 1`` bytes of a regular file; more than ``limit`` is refused by the parsers.

    Raises:
        FormatError: There is no such file, or it cannot be read.
    """
    asked = f"reading {str(path)!r}"
    if not path.is_file():
        raise FormatError(asked, "there is no such file", "a bundle has three files", _FIX)
    try:
        with path.open("rb") as stream:
            return stream.read(limit + 1)
    except OSError as error:
        found = f"it cannot be read ({error.strerror})"
        raise FormatError(asked, found, "all three files are needed", _FIX) from error


def _plain(value: Any, depth: int) -> Any:
    """A copy out of fresh dicts and lists, so that no two places share an object."""
    if depth >= DEPTH_LIMIT and isinstance(value, (Mapping, list, tuple)):
        raise ValueError(f"it is nested deeper than {DEPTH_LIMIT}")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key is not text")
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"{str(value)[:80]!r} is {kind_of(value)}")


def _events(value: Any) -> int:
    """How many YAML events a plain value makes (a document adds four)."""
    if isinstance(value, dict):
        return 2 + sum(1 + _events(item) for item in value.values())
    return 2 + sum(map(_events, value)) if isinstance(value, list) else 1


def _require_simple(event: yaml.Event, count: int, depth: int) -> None:
    # PyYAML's time grows with the square of the depth: 15 kB of "[" take a minute.
    if count > NODE_LIMIT or depth > DEPTH_LIMIT:
        raise ValueError(f"it has more than {NODE_LIMIT} parts or {DEPTH_LIMIT} levels")
    line = event.start_mark.line + 1 if event.start_mark else 0
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError(f"there is an anchor or alias in line {line}")
    if getattr(event, "tag", None) is not None:
        raise ValueError(f"there is a tag in line {line}")


def _require_size(what: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        found = f"the file has more than {limit:,} bytes"
        raise FormatError(what, found, "larger ones are not read", "make it smaller")


def _unwritable(what: str, found: str) -> UsageError:
    why = "it must be readable again by any tool"
    return UsageError(f"writing the {what} of a bundle", found[:300], why, "use plain values only")
