"""Parts of recipes as plain data: names from the catalogues, with typed arguments."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from secateur.allocate import ALLOCATIONS
from secateur.allocate.widths import WIDTH_ALLOCATIONS
from secateur.core.budget import number
from secateur.core.errors import FormatError, UnknownName, UsageError, kind_of
from secateur.drive.training.finetune import FineTune
from secateur.drive.training.regrow import REGROWTHS
from secateur.pattern import PATTERNS
from secateur.recover import RECOVERIES, ROUNDINGS, BatchNorm, Compensation
from secateur.schedule import SCHEDULES
from secateur.score import CRITERIA, GROUP_CRITERIA

VERSION = 1
STEPS: dict[str, type] = {**RECOVERIES, "finetune": FineTune}
CATALOGUES: dict[str, Mapping[str, type]] = {
    "criterion": CRITERIA,
    "pattern": PATTERNS,
    "allocation": ALLOCATIONS,
    "schedule": SCHEDULES,
    "recovery": STEPS,
    "rounding": ROUNDINGS,
    "regrow": REGROWTHS,
    "group_criterion": GROUP_CRITERIA,
    "width_allocation": WIDTH_ALLOCATIONS,
    "cut_recovery": {
        "compensation": Compensation,
        "batchnorm": BatchNorm,
        "finetune": FineTune,
    },
}
_LARGEST = 1 << 20
_VALUES = {"target": "target: 90%", "pattern": "pattern: 2:4", "seed": "seed: 0"}


def require_readable(data: Any, keys: Sequence[str]) -> None:
    """Raise unless ``data`` is a mapping of known keys, of a version that is read here.

    Example:
        >>> require_readable({"target": "90%"}, ("version", "target"))
        >>> require_readable({"targt": "90%"}, ("version", "target"))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UnknownName: recipe key 'targt': there is no recipe key of that name. ...
    """
    if not isinstance(data, Mapping):
        raise UsageError(
            "a recipe",
            kind_of(data),
            "a recipe is a mapping of keys",
            "write e.g. criterion: magnitude",
        )
    unknown = next((str(key) for key in data if key not in keys), None)
    if unknown is not None:
        raise UnknownName("recipe key", unknown, keys)
    bare = next((str(key) for key, value in data.items() if value is None), None)
    if bare is not None:
        raise UsageError(
            f"recipe key {bare!r}",
            "nothing stands behind it",
            "a key says what to do, and what is left out is the default",
            f"write its value, e.g. {_VALUES.get(bare, f'{bare}: ...')}, or leave the key out",
        )
    if type(data.get("version", VERSION)) not in (int, float):
        raise UsageError(
            "recipe key 'version'",
            f"{data['version']!r} was given",
            "a version is a number",
            f"write version: {VERSION}",
        )
    if data.get("version", VERSION) != VERSION:
        raise FormatError(
            f"a recipe of version {data['version']}",
            f"this secateur reads version {VERSION}",
            "the meaning of keys may have changed",
            "use the secateur that wrote it, or rewrite the recipe",
        )


def part(kind: str, spec: Any) -> Any:
    """Build one part from its catalogue.

    Example:
        >>> part("pattern", "2:4"), part("pattern", "4x1"), part("schedule", {"cubic": {"end": 10}}).end
        (NM(keep=2, of=4, rows=1), Blocks(rows=4, cols=1), 10.0)
    """
    catalogue = CATALOGUES[kind]
    if kind == "pattern" and isinstance(spec, str):
        for mark, name, keys in ((":", "nm", ("keep", "of")), ("x", "blocks", ("rows", "cols"))):
            left, found, right = spec.partition(mark)
            if found and left.isdigit() and right.isdigit():
                spec = {name: dict(zip(keys, (int(left), int(right)), strict=True))}
                break
    name, arguments = named(kind, spec)
    if name not in catalogue:
        raise UnknownName(kind, name, catalogue)
    return build(f"{kind} {name!r}", catalogue[name], arguments)


def named(kind: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """A part as its name and arguments, from ``name`` or ``{name: arguments}``.

    Example:
        >>> named("pattern", {"nm": {"keep": 2}})
        ('nm', {'keep': 2})
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, arguments),) = spec.items()
        if arguments is None or isinstance(arguments, Mapping):
            return str(name), dict(arguments or {})
    raise UsageError(
        f"{kind} {spec!r}",
        "it is neither a name nor one name with its arguments",
        "a part is written as magnitude, or as magnitude: {p: 2}",
        "rewrite it in one of the two forms",
    )


def build(what: str, cls: type, arguments: Mapping[str, Any]) -> Any:
    """An object of a class from plain arguments, each checked against its annotation.

    Example:
        >>> build("fine-tuning", FineTune, {"epochs": 2}).epochs
        2.0
    """
    if not isinstance(arguments, Mapping):
        raise UsageError(
            what, f"its arguments are {arguments!r}", "arguments are a mapping", "write key: value"
        )
    known_arguments(what, cls, arguments)
    missing = [
        name
        for name, p in inspect.signature(cls).parameters.items()
        if p.default is inspect.Parameter.empty and name not in arguments
    ]
    if missing:
        raise UsageError(
            what,
            f"it lacks {', '.join(missing)}",
            "it is made from other parts",
            f"write e.g. {{lamp: {{{missing[0]}: magnitude}}}}",
        )
    hints = typing.get_type_hints(cls)
    return cls(**{k: typed(f"{what}, argument {k!r}", hints[k], v) for k, v in arguments.items()})


def known_arguments(what: str, function: Any, arguments: Mapping[str, Any]) -> None:
    """Raise if a function has no such argument.

    Example:
        >>> known_arguments("print", print, {"sep": " "})
    """
    known = list(inspect.signature(function).parameters)
    for key in arguments:
        if key not in known:
            raise UnknownName(f"argument of {what}", str(key), known or ["(none)"])


def typed(what: str, hint: Any, value: Any) -> Any:
    """A value checked against (and converted to) an annotation; parts are built by name.

    Example:
        >>> typed("seed", int, "3")
        3
    """
    for kind, name in (
        ("criterion", "Criterion"),
        ("allocation", "Allocation"),
        ("recovery", "Recovery"),
        ("group_criterion", "GroupCriterion"),
    ):
        if getattr(hint, "__name__", "") == name:
            return part(kind, value)
        inner = typing.get_args(hint)
        if inner and getattr(inner[0], "__name__", "") == name:
            if typing.get_origin(hint) is tuple:
                if not isinstance(value, (list, tuple)):
                    raise UsageError(what, f"{value!r} was given", "it is a list", "write [a, b]")
                return tuple(part(kind, v) for v in value)
            return None if value is None else part(kind, value)
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    if union and value is None:
        return None
    if isinstance(value, bool) and bool not in kinds and {int, float}.intersection(kinds):
        # pydantic takes it for 0 or 1
        raise UsageError(
            what, f"{value} was given", "it should be a number", "write one, without yes or true"
        )
    try:
        return pydantic.TypeAdapter(hint).validate_python(_as_written(hint, value))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            what,
            f"{value!r} was given",
            first["msg"],
            f"give a value of type {getattr(hint, '__name__', hint)}",
        ) from None


def _as_written(hint: Any, value: Any) -> Any:
    """What people write in a file: 40% for a share, and one name for a list of names."""
    inner = typing.get_args(hint)
    if isinstance(value, str) and hint is float and value.strip().endswith("%"):
        return number(value)
    if isinstance(value, str) and typing.get_origin(hint) is tuple and inner[0] is str:
        return [value]
    if isinstance(value, Mapping) and float in inner:
        return {key: _as_written(float, held) for key, held in value.items()}
    return value


def plain_part(kind: str, value: Any) -> Any:
    """A part as plain data that :func:`part` reads back.

    Example:
        >>> plain_part("schedule", part("schedule", {"linear": {"end": 4}}))["linear"]["end"]
        4.0
    """
    name = next((n for n, cls in CATALOGUES[kind].items() if cls is type(value)), None)
    if name is None:
        # A part of the user's own: recorded by its import path; such a recipe is a record, not a file.
        return f"{type(value).__module__}.{type(value).__qualname__}"
    fields = {}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        fields[f.name] = plain_value(entry)
    return {name: fields} if fields else name


def plain_value(value: Any) -> Any:
    """A field of a part as plain data.

    Example:
        >>> plain_value((1, 2))
        [1, 2]
    """
    for kind in ("criterion", "allocation", "recovery", "group_criterion"):
        if type(value) in CATALOGUES[kind].values():
            return plain_part(kind, value)
    if isinstance(value, tuple):
        return [plain_value(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """YAML in which ``2:4`` is text: version 1.1 reads a number to base 60."""


_Loader.yaml_implicit_resolvers = {
    mark: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *found] if mark.isdigit() else found
    for mark, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def plain_text(text: str) -> Any:
    """YAML as plain data; patterns need no quotes.

    Raises:
        yaml.YAMLError: It is no YAML.

    Example:
        >>> plain_text("pattern: 2:4"), plain_text("{sparsegpt: {pattern: 2:4}}")
        ({'pattern': '2:4'}, {'sparsegpt': {'pattern': '2:4'}})
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a safe loader


def read_plain(path: str | Path) -> Mapping[str, Any]:
    """A YAML file as plain data; anchors, keys given twice and files of over a megabyte are refused.

    Raises:
        FormatError: The file is missing, too large, empty, or not YAML.

    Example:
        >>> read_plain("gone.yaml")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading 'gone.yaml': [Errno 2] No such file or directory...
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise FormatError(
                f"reading {str(path)!r}",
                f"it has {path.stat().st_size:,} bytes",
                f"a recipe is never larger than {_LARGEST:,} bytes",
                "check that this is the right file",
            )
        text = path.read_text(encoding="utf-8")
        if any(isinstance(t, (yaml.AliasToken, yaml.AnchorToken)) for t in yaml.scan(text)):
            raise FormatError(
                f"reading {str(path)!r}",
                "it uses YAML anchors",
                "recipes are plain",
                "write the values out",
            )
        twice = _twice(yaml.compose(text, yaml.SafeLoader))
        if twice is not None:
            raise FormatError(
                f"reading {str(path)!r}",
                f"the key {twice!r} is written twice",
                "YAML would silently take the last one",
                "leave one of them out",
            )
        data = plain_text(text)
    # ValueError: of 2001-99-99, no date; RecursionError: of thousands of brackets
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"reading {str(path)!r}",
            str(error).replace("\n", " "),
            "it must be a YAML file",
            "check the path and text",
        ) from None
    if data is None:
        raise FormatError(
            f"reading {str(path)!r}",
            "nothing is written in it",
            "a recipe is a mapping of keys",
            "write e.g. target: 90%",
        )
    return data  # type: ignore[no-any-return]


def _twice(node: yaml.Node | None) -> str | None:
    """The first key that stands twice in one mapping."""
    if not isinstance(node, yaml.CollectionNode):
        return None
    inner = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if repeated is not None:
            return str(repeated)
        inner = [value for _, value in node.value]
    return next((found for found in map(_twice, inner) if found is not None), None)
