"""Recipes as plain data and YAML: names from the catalogues, unknown keys refused."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core.budget import Target, number
from secateur.core.errors import UnknownName, UsageError
from secateur.drive.methods import ALIASES
from secateur.drive.parts import (
    VERSION,
    build,
    known_arguments,
    named,
    part,
    plain_part,
    read_plain,
    require_readable,
    typed,
)
from secateur.drive.recipe import Recipe, Scope
from secateur.pattern import NM

PARTS = ("criterion", "pattern", "allocation", "schedule", "recovery", "rounding", "regrow")
_KEYS = ("version", "method", "target", "scope", "sequential", "seed", *PARTS)


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
    if isinstance(data, Mapping) and data.get("shrink"):
        raise UsageError(
            "a recipe of prune",
            "it says shrink: true, as those of shrink do",
            "prune makes zeros, and shrink removes filters and heads; their recipes have other parts",
            "use secateur shrink --recipe, or read_shrink_recipe of "
            "secateur.drive.structural.recipe_file",
        )
    require_readable(data, _KEYS)
    target = Target.parse(data["target"]) if data.get("target") is not None else None
    changes: dict[str, Any] = {}
    if "method" in data:
        base = _alias(data["method"], target, data.get("pattern"))
        changes = {f.name: getattr(base, f.name) for f in dataclasses.fields(Recipe)}
    for key in PARTS:
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
        changes["scope"] = build("scope", Scope, data["scope"])
    for key, hint in (("sequential", bool), ("seed", int)):
        if key in data:
            changes[key] = typed(f"recipe key {key!r}", hint, data[key])
    return Recipe(**changes)


def _alias(spec: Any, target: Target | None, pattern: Any = None) -> Recipe:
    name, arguments = named("method", spec)
    if name not in ALIASES:
        raise UnknownName("method", name, ALIASES)
    function = ALIASES[name]
    if isinstance(arguments.get("sparsity"), str):
        arguments["sparsity"] = number(arguments["sparsity"])
    if target is not None and target.unit == "sparsity":
        arguments.setdefault("sparsity", target.value)
    if target is not None and "sparsity" in arguments:
        _require_one_target(name, arguments["sparsity"], target)
    if pattern is not None and "pattern" in inspect.signature(function).parameters:
        arguments.setdefault("pattern", pattern)  # the method's other parts depend on it
    if isinstance(arguments.get("pattern"), (str, Mapping)):
        arguments["pattern"] = part("pattern", arguments["pattern"])
    known_arguments(f"method {name!r}", function, arguments)
    return function(**arguments)


def _require_one_target(method: str, sparsity: Any, target: Target) -> None:
    if target != Target("sparsity", sparsity):
        raise UsageError(
            f"method {method!r} with sparsity {sparsity:g}, and the target {target.unit} {target.value:g}",
            "these are two targets",
            "a run has one",
            "leave one of them out",
        )


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data that :func:`from_plain` reads back to an equal recipe.

    Example:
        >>> from secateur.drive.methods import wanda
        >>> from_plain(to_plain(wanda(0.6))) == wanda(0.6)
        True
    """
    plain: dict[str, Any] = {"version": VERSION}
    assert recipe.target is not None
    plain["target"] = {recipe.target.unit: recipe.target.value}
    for key in ("criterion", "pattern", "allocation", "schedule"):
        plain[key] = plain_part(key, getattr(recipe, key))
    if recipe.recovery:
        plain["recovery"] = [plain_part("recovery", step) for step in recipe.recovery]
    if recipe.rounding is not None:
        plain["rounding"] = plain_part("rounding", recipe.rounding)
    if recipe.regrow is not None:
        plain["regrow"] = plain_part("regrow", recipe.regrow)
    if recipe.scope != Scope():
        scope = dataclasses.asdict(recipe.scope)
        plain["scope"] = {k: list(v) if isinstance(v, tuple) else v for k, v in scope.items()}
    plain["sequential"], plain["seed"] = recipe.sequential, recipe.seed
    return plain


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
    return from_plain(read_plain(path))
