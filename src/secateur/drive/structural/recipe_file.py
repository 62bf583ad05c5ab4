"""Recipes of structural pruning as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from secateur.core.budget import Target
from secateur.core.errors import UnknownName
from secateur.drive.parts import (
    VERSION,
    build,
    part,
    plain_part,
    read_plain,
    require_readable,
    typed,
)
from secateur.drive.recipe import Scope
from secateur.drive.structural.methods import SHRINK_ALIASES
from secateur.drive.structural.recipe import ShrinkRecipe

_PARTS = {"criterion": "group_criterion", "allocation": "width_allocation"}
_KEYS = ("version", "shrink", "method", "target", "recovery", "scope", "uniform", "align", "rounds", "seed",
         "engine", *_PARTS)  # fmt: skip


def from_plain(data: Mapping[str, Any]) -> ShrinkRecipe:
    """Build a recipe from plain data; parts are written as in a masking recipe.

    Raises:
        UnknownName: A name or key that does not exist, with the nearest ones.

    Example:
        >>> from_plain({"target": "macs=50%", "allocation": "uniform"}).allocation
        UniformWidths(floor=0.0)
        >>> from_plain({"criterion": "grouppe"})
        Traceback (most recent call last):
            ...
        secateur.core.errors.UnknownName: group_criterion 'grouppe': there is no group_criterion of \
that name. ...
    """
    require_readable(data, _KEYS)
    changes: dict[str, Any] = {}
    if data.get("method") is not None:
        name = str(data["method"])
        if name not in SHRINK_ALIASES:
            raise UnknownName("method", name, SHRINK_ALIASES)
        base = SHRINK_ALIASES[name]()
        changes = {f.name: getattr(base, f.name) for f in dataclasses.fields(ShrinkRecipe)}
    for key, kind in _PARTS.items():
        if data.get(key) is not None:
            changes[key] = part(kind, data[key])
    if data.get("target") is not None:
        changes["target"] = Target.parse(data["target"])
    if data.get("recovery") is not None:
        steps = data["recovery"] if isinstance(data["recovery"], list) else [data["recovery"]]
        changes["recovery"] = tuple(part("cut_recovery", s) for s in steps if s != "none")
    if data.get("scope") is not None:
        changes["scope"] = build("scope", Scope, data["scope"])
    for key, hint in (
        ("uniform", bool),
        ("align", int),
        ("rounds", int),
        ("seed", int),
        ("engine", str),
    ):
        if key in data:
            changes[key] = typed(f"recipe key {key!r}", hint, data[key])
    return ShrinkRecipe(**changes)


def to_plain(recipe: ShrinkRecipe) -> dict[str, Any]:
    """A recipe as plain data that :func:`from_plain` reads back to an equal recipe.

    Example:
        >>> from_plain(to_plain(ShrinkRecipe(align=8))) == ShrinkRecipe(align=8)
        True
    """
    plain: dict[str, Any] = {"version": VERSION, "shrink": True}
    plain["target"] = {recipe.target.unit: recipe.target.value}
    for key, kind in _PARTS.items():
        plain[key] = plain_part(kind, getattr(recipe, key))
    plain["recovery"] = [plain_part("cut_recovery", step) for step in recipe.recovery]
    if recipe.scope != Scope():
        scope = dataclasses.asdict(recipe.scope)
        plain["scope"] = {k: list(v) if isinstance(v, tuple) else v for k, v in scope.items()}
    settings = ("uniform", "align", "rounds", "seed", "engine")
    return plain | {key: getattr(recipe, key) for key in settings}


def read_shrink_recipe(path: str) -> ShrinkRecipe:
    r"""Read a recipe from a YAML file.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = path.write_text("target: macs=40%\nallocation: uniform")
        >>> read_shrink_recipe(path).target.value
        0.4
    """
    return from_plain(read_plain(path))
