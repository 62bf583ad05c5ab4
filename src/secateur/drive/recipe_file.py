"""Recipes as plain data and YAML: names from the catalogues, unknown keys refused."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from secateur.allocate import ALLOCATIONS
from secateur.core.budget import Target
from secateur.core.errors import FormatError, UnknownName, UsageError
from secateur.drive.finetune import FineTune
from secateur.drive.recipe import ALIASES, Recipe, Scope
from secateur.pattern import NM, PATTERNS
from secateur.recover import RECOVERIES, ROUNDINGS
from secateur.schedule import SCHEDULES
from secateur.score import CRITERIA

VERSION = 1
STEPS: dict[str, type] = {**RECOVERIES, "finetune": FineTune}
CATALOGUES: dict[str, Mapping[str, type]] = {
    "criterion": CRITERIA,
    "pattern": PATTERNS,
    "allocation": ALLOCATIONS,
    "schedule": SCHEDULES,
    "recovery": STEPS,
    "rounding": ROUNDINGS,
}
_KEYS = ("version", "method", "target", "scope", "sequential", "seed", *CATALOGUES)
_LARGEST = 1 << 20


def from_plain(data: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain data.

    ``method`` names an alias to start from; all other keys replace its parts. A part is a name, or a
    mapping from the name to its arguments. Patterns may be written ``"2:4"`` (kept:of) or ``"4x1"``.

    Raises:
        UnknownName: A name or key that does not exist, with the nearest ones.

    Example:
        >>> recipe = from_plain({"criterion": {"magnitude": {"p": 2}}, "target": "90%"})
        >>> recipe.criterion, recipe.target.value
        (Magnitude(p=2), 0.9)
        >>> from_plain({"criterion": "magnitud"})
        Traceback (most recent call last):
            ...
        secateur.core.errors.UnknownName: criterion 'magnitud': there is no criterion of that name. ...
    """
    if not isinstance(data, Mapping):
        raise UsageError(
            "a recipe",
            f"a {type(data).__name__}",
            "a recipe is a mapping of keys",
            "write e.g. criterion: magnitude",
        )
    unknown = next((str(key) for key in data if key not in _KEYS), None)
    if unknown is not None:
        raise UnknownName("recipe key", unknown, _KEYS)
    if data.get("version", VERSION) != VERSION:
        raise FormatError(
            f"a recipe of version {data['version']}",
            f"this secateur reads version {VERSION}",
            "the meaning of keys may have changed",
            "use the secateur that wrote it, or rewrite the recipe",
        )
    target = Target.parse(data["target"]) if data.get("target") is not None else None
    changes: dict[str, Any] = {}
    if "method" in data:
        base = _alias(data["method"], target)
        changes = {f.name: getattr(base, f.name) for f in dataclasses.fields(Recipe)}
    for key in CATALOGUES:
        if data.get(key) is not None and key != "recovery":
            changes[key] = part(key, data[key])
    if isinstance(changes.get("pattern"), NM):
        changes["target"] = None  # N:M fixes the sparsity, whatever the alias asked for
    if target is not None:
        changes["target"] = target
    if data.get("recovery") is not None:
        steps = data["recovery"] if isinstance(data["recovery"], list) else [data["recovery"]]
        changes["recovery"] = tuple(part("recovery", step) for step in steps)
    if data.get("scope") is not None:
        changes["scope"] = _construct("scope", Scope, data["scope"])
    for key, hint in (("sequential", bool), ("seed", int)):
        if key in data:
            changes[key] = _value(f"recipe key {key!r}", hint, data[key])
    return Recipe(**changes)


def _alias(spec: Any, target: Target | None) -> Recipe:
    name, arguments = _named("method", spec)
    if name not in ALIASES:
        raise UnknownName("method", name, ALIASES)
    function = ALIASES[name]
    if target is not None and target.unit == "sparsity":
        arguments.setdefault("sparsity", target.value)
    if isinstance(arguments.get("pattern"), (str, Mapping)):
        arguments["pattern"] = part("pattern", arguments["pattern"])
    _known_arguments(f"method {name!r}", function, arguments)
    return function(**arguments)


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
    name, arguments = _named(kind, spec)
    if name not in catalogue:
        raise UnknownName(kind, name, catalogue)
    return _construct(f"{kind} {name!r}", catalogue[name], arguments)


def _named(kind: str, spec: Any) -> tuple[str, dict[str, Any]]:
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


def _construct(what: str, cls: type, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(arguments, Mapping):
        raise UsageError(
            what, f"its arguments are {arguments!r}", "arguments are a mapping", "write key: value"
        )
    _known_arguments(what, cls, arguments)
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
    return cls(**{k: _value(f"{what}, argument {k!r}", hints[k], v) for k, v in arguments.items()})


def _known_arguments(what: str, function: Any, arguments: Mapping[str, Any]) -> None:
    known = list(inspect.signature(function).parameters)
    for key in arguments:
        if key not in known:
            raise UnknownName(f"argument of {what}", str(key), known or ["(none)"])


def _value(what: str, hint: Any, value: Any) -> Any:
    for kind, name in (
        ("criterion", "Criterion"),
        ("allocation", "Allocation"),
        ("recovery", "Recovery"),
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
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and value is None:
        return None
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            what,
            f"{value!r} was given",
            first["msg"],
            f"give a value of type {getattr(hint, '__name__', hint)}",
        ) from None


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data that :func:`from_plain` reads back to an equal recipe.

    Example:
        >>> from secateur.drive.recipe import wanda
        >>> from_plain(to_plain(wanda(0.6))) == wanda(0.6)
        True
    """
    plain: dict[str, Any] = {"version": VERSION}
    assert recipe.target is not None
    plain["target"] = {recipe.target.unit: recipe.target.value}
    for key in ("criterion", "pattern", "allocation", "schedule"):
        plain[key] = _plain_part(key, getattr(recipe, key))
    if recipe.recovery:
        plain["recovery"] = [_plain_part("recovery", step) for step in recipe.recovery]
    if recipe.rounding is not None:
        plain["rounding"] = _plain_part("rounding", recipe.rounding)
    if recipe.scope != Scope():
        scope = dataclasses.asdict(recipe.scope)
        plain["scope"] = {k: list(v) if isinstance(v, tuple) else v for k, v in scope.items()}
    plain["sequential"], plain["seed"] = recipe.sequential, recipe.seed
    return plain


def _plain_part(kind: str, value: Any) -> Any:
    name = next((n for n, cls in CATALOGUES[kind].items() if cls is type(value)), None)
    if name is None:
        # A part of the user's own: recorded by its import path; such a recipe is a record, not a file.
        return f"{type(value).__module__}.{type(value).__qualname__}"
    fields = {}
    for f in dataclasses.fields(value):
        entry = getattr(value, f.name)
        fields[f.name] = _plain_value(entry)
    return {name: fields} if fields else name


def _plain_value(value: Any) -> Any:
    for kind in ("criterion", "allocation", "recovery"):
        if type(value) in CATALOGUES[kind].values():
            return _plain_part(kind, value)
    if isinstance(value, tuple):
        return [_plain_value(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


def read_recipe(path: str | Path) -> Recipe:
    r"""Read a recipe from a YAML file.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = path.write_text("method: wanda\ntarget: 60%")
        >>> read_recipe(path).target.value
        0.6

    Raises:
        FormatError: The file is missing, too large, or not YAML.
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
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"reading {str(path)!r}",
            str(error).replace("\n", " "),
            "it must be a YAML file",
            "check the path and text",
        ) from None
    return from_plain(data or {})
