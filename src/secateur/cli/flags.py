"""Recipes out of flags."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import yaml

from secateur.core.errors import UsageError
from secateur.drive.methods import ALIASES, window
from secateur.drive.parts import named, plain_text
from secateur.drive.recipe import Recipe
from secateur.drive.recipe_file import from_plain, read_recipe, to_plain
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.training.finetune import FineTune
from secateur.pattern import NM
from secateur.schedule import OneShot

_R = TypeVar("_R", Recipe, ShrinkRecipe)
_EXAMPLES = {"epochs": "5", "lr": "0.01"}
_SHORT_PATTERN = re.compile(r"\d+[:x]\d+")


@dataclass(frozen=True)
class Flags:
    """The flags that make a recipe, as they were given."""

    recipe: str | None = None
    method: str | None = None
    sparsity: str | None = None
    target: str | None = None
    criterion: str | None = None
    pattern: str | None = None
    allocation: str | None = None
    schedule: str | None = None
    recovery: tuple[str, ...] = ()
    sequential: bool | None = None
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    epochs: float | None = None
    lr: float | None = None
    distill: float | None = None
    seed: int | None = None


def part(kind: str, text: str) -> str | dict[str, Any]:
    """A part as plain data, from ``name`` or ``name:key=value,key=value``.

    Values are read as YAML, so numbers are numbers and ``{...}`` nests.

    Example:
        >>> part("criterion", "magnitude:p=2"), part("pattern", "2:4")
        ({'magnitude': {'p': 2}}, '2:4')
        >>> part("criterion", "lamp:inner={magnitude: {p: 2}}")
        {'lamp': {'inner': {'magnitude': {'p': 2}}}}
    """
    name, colon, rest = text.partition(":")
    if not colon or (kind == "pattern" and _SHORT_PATTERN.fullmatch(text)):
        return text
    arguments: dict[str, Any] = {}
    for piece in _pieces(rest):
        key, equals, value = piece.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"--{kind} {text!r}",
                f"{piece!r} is not key=value",
                "arguments follow the name as name:key=value,key=value",
                f"see secateur inspect --{_plural(kind)}",
            )
        try:
            arguments[key.strip()] = plain_text(value)
        except yaml.YAMLError as error:
            raise UsageError(
                f"--{kind} {text!r}",
                f"the value {value!r} cannot be read ({' '.join(str(error).split())[:120]})",
                "values are read as YAML",
                "write numbers, names, true, false, [lists] or {key: value}",
            ) from None
    return {name: arguments}


def recipe_from(flags: Flags) -> Recipe:
    """The recipe that the flags describe.

    ``--epochs`` is handed to a method that counts epochs itself. Else, without a schedule, it means:
    prune gradually over the first half and fine-tune with the masks held. Methods that prune at
    once (those that repair weights, measure data, or count rounds) are followed by that many epochs
    of fine-tuning instead.

    Example:
        >>> recipe = recipe_from(Flags(sparsity="90%", epochs=4))
        >>> type(recipe.schedule).__name__, recipe.schedule.end, recipe.finetune.epochs
        ('Polynomial', 2.0, 4)
        >>> type(recipe_from(Flags(method="acdc", epochs=4)).schedule).__name__
        'Alternating'
    """
    if flags.recipe is not None:
        require_alone(flags.recipe, {n: v for n, v in vars(flags).items() if n != "recipe"})
        return read_recipe(flags.recipe)
    if flags.sparsity is not None and _SHORT_PATTERN.fullmatch(flags.sparsity.strip()):
        raise UsageError(
            f"--sparsity {flags.sparsity}",
            "that is a pattern",
            "a sparsity is the share of zeros; N:M and blocks say which weights go together",
            f"write --pattern {flags.sparsity}",
        )
    if flags.sparsity is not None and flags.target is not None:
        raise UsageError(
            f"--sparsity {flags.sparsity} --target {flags.target}",
            "these are two targets",
            "a run has one",
            "leave one of them out",
        )
    _require_trainable({"epochs": flags.epochs, "lr": flags.lr})
    return _trained(from_plain(_plain(flags)), flags)


def require_alone(recipe: str, others: Mapping[str, Any]) -> None:
    """Refuse flags beside a recipe file; those that were not given are None or empty.

    Example:
        >>> require_alone("r.yaml", {"epochs": None, "ignore": ()})
        >>> require_alone("r.yaml", {"epochs": None, "seed": 0})
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: --recipe r.yaml: --seed was given too. A recipe file says \
everything. Change the file, or leave --recipe out.
    """
    given = [f"--{name}" for name, value in others.items() if value not in (None, (), [])]
    if given:
        raise UsageError(
            f"--recipe {recipe}",
            f"{', '.join(given)} was given too",
            "a recipe file says everything",
            "change the file, or leave --recipe out",
        )


def _plain(flags: Flags) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    if flags.method is not None:
        plain["method"] = _method(flags.method, flags.epochs)
    target = flags.target if flags.target is not None else flags.sparsity
    if target is not None:
        plain["target"] = target
    for kind in ("criterion", "pattern", "allocation", "schedule"):
        text = getattr(flags, kind)
        if text is not None:
            plain[kind] = part(kind, text)
    if flags.recovery:
        plain["recovery"] = [part("recovery", text) for text in flags.recovery]
    if flags.sequential is not None:
        plain["sequential"] = flags.sequential
    scope: dict[str, Any] = {}
    if flags.ignore:
        scope["ignore"] = list(flags.ignore)
    if flags.include:
        scope["include"] = list(flags.include)
    if scope:
        plain["scope"] = scope
    if flags.seed is not None:
        plain["seed"] = flags.seed
    return plain


def _method(text: str, epochs: float | None) -> dict[str, Any]:
    """A method and its arguments; ``--epochs`` is one of them where the method has epochs."""
    name, arguments = named("method", part("method", text))
    if epochs is not None and _has_epochs(name):
        own = arguments.setdefault("epochs", epochs)
        if own != epochs:
            raise UsageError(
                f"--method {text} --epochs {epochs:g}",
                f"the method is given {own} epochs, and the run {epochs:g}",
                "the method makes its schedule for the epochs of the run",
                "leave one of them out",
            )
    return {name: arguments}


def _has_epochs(method: str) -> bool:
    return method in ALIASES and "epochs" in inspect.signature(ALIASES[method]).parameters


def _trained(recipe: Recipe, flags: Flags) -> Recipe:
    """Add the fine-tuning that the flags ask for, and prune gradually while it trains."""
    asked = {"epochs": flags.epochs, "lr": flags.lr, "distill": flags.distill}
    own = flags.method is not None and _has_epochs(flags.method.partition(":")[0])
    if flags.epochs is not None and flags.schedule is None and not own and _may_be_gradual(recipe):
        recipe = replace(recipe, schedule=window(flags.epochs))
    return with_training(recipe, asked, flags.recovery)


def with_training(
    recipe: _R, asked: Mapping[str, float | None], recovery: Sequence[str] = ()
) -> _R:
    """Add fine-tuning to a recipe, or change what it has.

    Args:
        recipe: Of pruning or of shrinking.
        asked: Settings of :class:`~secateur.drive.training.finetune.FineTune`; None leaves one as
            it is.
        recovery: The flags of that name that the recipe was made from.

    Raises:
        UsageError: Settings are given, but neither the recipe nor they say for how long to train;
            or ``--recovery finetune:...`` says otherwise.
    """
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if not given:
        return recipe
    _require_trainable(given)
    _require_agreement(given, recovery)
    own = recipe.finetune
    if own is None and "epochs" not in given:
        raise UsageError(
            " ".join(f"--{key} {value:g}" for key, value in given.items()),
            "the run does not train",
            "these are settings of fine-tuning",
            "add --epochs N",
        )
    how: Any = FineTune(**given) if own is None else replace(own, **given)
    steps: tuple[Any, ...] = (*recipe.recovery, how)
    if own is not None:
        steps = tuple(how if step is own else step for step in recipe.recovery)
    elif isinstance(recipe, Recipe) and recipe.schedule.unit != "rounds":
        steps = (how, *recipe.recovery)  # training prunes, and all else comes after it
    return replace(recipe, recovery=steps)


def _require_trainable(given: Mapping[str, float | None]) -> None:
    """Refuse lengths and rates in the words of the flags, before a schedule is made of them."""
    for key in ("epochs", "lr"):
        value = given.get(key)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"--{key} {value:g}",
                f"{value:g} is not a finite number above 0",
                "training takes some time, in steps of some size",
                f"write e.g. --{key} {_EXAMPLES[key]}",
            )


def _require_agreement(given: Mapping[str, float], recovery: Sequence[str]) -> None:
    for text in recovery:
        name, own = named("recovery", part("recovery", text))
        for key, value in given.items():
            if name == "finetune" and own.get(key, value) != value:
                raise UsageError(
                    f"--{key} {value:g} --recovery {text}",
                    f"{key} is {value:g} in one and {own[key]} in the other",
                    "the run trains once",
                    "leave one of them out",
                )


def _may_be_gradual(recipe: Recipe) -> bool:
    if recipe.schedule.unit == "epochs":
        return True
    # What repairs weights or is measured on the untrained network is meant to happen at once.
    at_once = isinstance(recipe.schedule, OneShot) and not recipe.sequential
    if recipe.finetune is not None and recipe.recovery[0] is not recipe.finetune:
        return False
    return at_once and not recipe.repairs and not recipe.criterion.needs


def _pieces(text: str) -> list[str]:
    """Split at commas outside brackets."""
    pieces, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            pieces.append(text[start:index])
            start = index + 1
    return [*pieces, text[start:]]


def _plural(kind: str) -> str:
    return {"criterion": "criteria", "recovery": "recoveries"}.get(kind, kind + "s")


def describe(recipe: Recipe) -> list[tuple[str, str]]:
    """A recipe as lines of name and value, for people; defaults are left out.

    Example:
        >>> describe(Recipe(pattern=NM(1, 4)))[:2]
        [('criterion', 'magnitude'), ('pattern', '1:4')]
    """
    plain = to_plain(recipe)
    rows = []
    for kind in ("criterion", "pattern", "allocation", "schedule"):
        rows.append((kind, _words(plain[kind], getattr(recipe, kind))))
        if kind == "pattern" and isinstance(recipe.pattern, NM):
            rows[-1] = (kind, _runs(recipe.pattern))
    pairs = zip(plain.get("recovery", []), recipe.recovery, strict=True)
    rows.append(("recovery", ", then ".join(_words(*pair) for pair in pairs) or "none"))
    if recipe.sequential:
        rows.append(("sequential", "each weight on the network as pruned so far"))
    if recipe.rounding is not None:
        rows.append(("rounding", _words(plain["rounding"], recipe.rounding)))
    if recipe.regrow is not None:
        # What tells RigL from SET is said, though one of them is the default.
        rows.append(("regrow", _words(plain["regrow"], recipe.regrow, always=("grow",))))
    return rows


def _runs(pattern: NM) -> str:
    """As it is written everywhere else: ``2:4``, not ``nm`` with what is no default."""
    rows = f" (rows={pattern.rows})" if pattern.rows > 1 else ""
    return f"{pattern.keep}:{pattern.of}{rows}"


def _words(spec: Any, value: Any, always: tuple[str, ...] = ()) -> str:
    """A part in the form of a flag, with the arguments that are not defaults, and some always."""
    if not isinstance(spec, Mapping):
        return str(spec)
    ((name, arguments),) = spec.items()
    defaults = {f.name: f.default for f in fields(value)}
    inside = []
    for key, text in (arguments or {}).items():
        own = getattr(value, key)
        if own != defaults.get(key) or key in always:
            nested = isinstance(text, Mapping) and is_dataclass(own)
            inside.append(f"{key}={_words(text, own) if nested else _number(text)}")
    return f"{name} ({', '.join(inside)})" if inside else str(name)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
