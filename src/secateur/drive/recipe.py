"""The recipe: a frozen value that binds the five words, and the aliases of published methods."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from secateur.allocate import Allocation, Uniform
from secateur.core.arguments import require_kind, require_part
from secateur.core.budget import Target
from secateur.core.errors import BudgetError, UsageError
from secateur.drive.training.finetune import FineTune
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.pattern import NM, Elements, Pattern
from secateur.recover import BatchNorm, NoRecovery, Recovery, Rounding
from secateur.schedule import OneShot, Schedule
from secateur.score import Criterion, Magnitude
from secateur.stats import OutputGap

Step = Recovery | BatchNorm | FineTune
# Field -> attributes that its value must have, what it is in words, and an example.
_PARTS = {
    "criterion": (
        ("needs", "__call__"),
        "an object that scores weights",
        "e.g. criterion=Magnitude()",
    ),
    "pattern": (("fold", "unfold", "quota"), "a pattern", "e.g. pattern=NM(2, 4)"),
    "allocation": (("needs_scores", "__call__"), "an allocation", "e.g. allocation=Ranked()"),
    "schedule": (
        ("share", "unit", "end"),
        "a schedule",
        "e.g. schedule=Polynomial(begin=0, end=10, frequency=1, unit='epochs')",
    ),
}
# They need the whole network; all others repair one weight at a time.
_WHOLE = (BatchNorm, FineTune)


@dataclass(frozen=True)
class Scope:
    """Which weights take part.

    Args:
        include: Selectors; only what they match takes part, and parts that are left out by default
            (embeddings, the first convolution, the classifier, routers) come in when named here.
        ignore: Selectors of what stays dense.
        sensitive: True also prunes what is left out by default, without naming it.

    Example:
        >>> Scope(ignore=("layer1.*",)).sensitive
        False
    """

    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    sensitive: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            value: Any = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))


# Field -> its type or types, what it is in words, and an example.
_KINDS: dict[str, tuple[Any, str, str]] = {
    "target": (
        (Target, type(None)),
        "a target",
        "target=Target('sparsity', 0.9) or Target.parse('90%')",
    ),
    "scope": (Scope, "a scope", "e.g. scope=Scope(include=('layer1.*',))"),
    "sequential": (bool, "True or False", "e.g. sequential=True"),
    "seed": (Integral, "an integer", "e.g. seed=0"),
    "regrow": ((Regrow, TopKast, type(None)), "how weights come back", "e.g. regrow=Regrow()"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a pruning run. A plain value: compare it, hash it, save it.

    Args:
        criterion: How much each weight matters.
        pattern: Which weights go together.
        target: How much is left at the end; ``None`` for a pattern that fixes it (N:M).
        allocation: How much each weight pays.
        schedule: When. In ``rounds`` before any training, in ``steps`` or ``epochs`` during
            fine-tuning.
        recovery: What happens to the survivors, in order: repairs of single weights first, then what
            needs the whole network. A schedule in steps or epochs prunes during the fine-tuning, so
            there that comes first, and there is one.
        scope: Which weights take part.
        rounding: Values that the survivors must take, e.g. int8.
        sequential: Measure each weight's inputs with all earlier weights already pruned.
        seed: For everything random.
        regrow: How pruned weights come back while the network trains; by default they do not. Then
            the default schedule is :class:`OneShot` before the first *step*.

    Example:
        >>> recipe = Recipe(target=Target("sparsity", 0.9))
        >>> recipe.fingerprint() == Recipe(target=Target("sparsity", 0.9), seed=0).fingerprint()
        True
    """

    criterion: Criterion = Magnitude()
    pattern: Pattern = Elements()
    target: Target | None = None
    allocation: Allocation = Uniform()
    schedule: Schedule = OneShot()
    recovery: tuple[Step, ...] = ()
    scope: Scope = Scope()
    rounding: Rounding | None = None
    sequential: bool = False
    seed: int = 0
    regrow: Regrow | TopKast | None = None

    def __post_init__(self) -> None:
        # Lists and single steps are what people write; the value itself is always a tuple.
        steps: Any = self.recovery
        single = not isinstance(steps, (tuple, list))
        object.__setattr__(self, "recovery", (steps,) if single else tuple(steps))
        _require_parts(self)
        if self.regrow is not None and self.schedule == OneShot():
            object.__setattr__(self, "schedule", OneShot(unit="steps"))
        if self.regrow is not None and self.schedule.unit == "rounds":
            raise UsageError(
                f"regrow={type(self.regrow).__name__}(...) with {type(self.schedule).__name__}(...)",
                "the schedule is in rounds",
                "weights are exchanged while the network trains, and rounds come before training",
                "give the schedule in steps or epochs",
            )
        _require_order(self.recovery, trains=self.schedule.unit != "rounds")
        if self.rounding is not None and self.finetune is not None:
            raise UsageError(
                f"rounding={type(self.rounding).__name__}(...) with FineTune(...)",
                "the recipe rounds weights, and then trains them",
                "training would undo the rounding at its first step",
                "leave one of them out; to have both, train first and round with a second recipe",
            )
        if self.asymmetric and not self.sequential:
            raise UsageError(
                f"{recovery_named(self.recovery)}, asymmetric, with sequential=False",
                "every weight's inputs are measured before any is pruned",
                "they are then those of the dense network, and nothing is left to make good",
                "add sequential=True to the recipe",
            )
        if self.target is not None and self.target.unit == "latency":
            raise BudgetError(
                "a target in latency, for masks",
                "masks make zeros, and remove nothing",
                "zeros are as slow as other numbers, but for a sparse runtime, and no time can be "
                "promised before its kernels are chosen",
                "use shrink, which removes whole channels; or prune to macs=50%, say, and measure with "
                "bench",
            )
        fixed = self.pattern.sparsity if isinstance(self.pattern, NM) else None
        if self.target is None and fixed is None:
            object.__setattr__(self, "target", Target("sparsity", 0.5))
        elif self.target is None and fixed is not None:
            object.__setattr__(self, "target", Target("sparsity", fixed))
        elif fixed is not None and self.target != Target("sparsity", fixed):
            assert isinstance(self.pattern, NM)
            raise BudgetError(
                f"{self.target.unit}={self.target.value:g} with {self.pattern.keep}:{self.pattern.of}",  # type: ignore[union-attr]
                f"{self.pattern.keep}:{self.pattern.of} keeps {self.pattern.keep} of {self.pattern.of}, "
                f"which is sparsity {fixed:g}",
                "an N:M pattern fixes the sparsity of every weight",
                "leave the target out, or choose another pattern",
            )
        if fixed is not None and not isinstance(self.allocation, Uniform):
            raise UsageError(
                f"allocation {type(self.allocation).__name__} with an N:M pattern",
                "N:M fixes the sparsity of every weight",
                "there is nothing left to allocate",
                "leave the allocation out",
            )

    @property
    def repairs(self) -> tuple[Recovery, ...]:
        """The steps that repair one weight at a time."""
        return tuple(s for s in self.recovery if not isinstance(s, (*_WHOLE, NoRecovery)))

    @property
    def asymmetric(self) -> bool:
        """Whether a repair fits what the dense network makes of its own inputs."""
        return any(OutputGap() in step.needs for step in self.repairs)

    @property
    def finetune(self) -> FineTune | None:
        """The first fine-tuning step, if any."""
        return next((s for s in self.recovery if isinstance(s, FineTune)), None)

    @property
    def distills(self) -> bool:
        """Whether fine-tuning follows the dense network."""
        return any(isinstance(s, FineTune) and s.distill > 0 for s in self.recovery)

    def fingerprint(self) -> str:
        """A hash of everything that differs from the defaults; names runs."""
        text = json.dumps(describe(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _require_parts(recipe: Recipe) -> None:
    """Refuse what is no part of a recipe: texts, numbers, classes in place of objects."""
    for name, (has, what, write) in _PARTS.items():
        require_part(f"Recipe({name}=...)", getattr(recipe, name), has, what=what, write=write)
    for step in recipe.recovery:
        if not isinstance(step, _WHOLE):
            write = "e.g. recovery=(LeastSquares(), FineTune(epochs=2))"
            require_part("Recipe(recovery=...)", step, ("needs",), what="recoveries", write=write)
    if recipe.rounding is not None:
        what, write = "a rounding", "e.g. rounding=Integer(8)"
        require_part("Recipe(rounding=...)", recipe.rounding, ("fit",), what=what, write=write)
    require_settings(recipe, _KINDS)


def require_recipe(given: object, *, default: bool = True) -> None:
    """Raise unless a recipe (or ``None``, where there is a default one) was given.

    Example:
        >>> from secateur.drive.methods import magnitude
        >>> require_recipe(magnitude)
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the recipe: the function magnitude, and not its result, was \
given. It should be a Recipe. Write e.g. Recipe(target=Target('sparsity', 0.9)) or recipes.magnitude(0.9).
    """
    write = "e.g. Recipe(target=Target('sparsity', 0.9)) or recipes.magnitude(0.9)"
    kinds = (Recipe, type(None)) if default else Recipe
    require_kind("the recipe", given, kinds, what="a Recipe", write=write)


def require_settings(recipe: Any, kinds: Mapping[str, tuple[Any, str, str]]) -> None:
    """Refuse fields of a recipe that are not of their type, and seeds that no generator takes.

    Args:
        recipe: Of pruning or of shrinking.
        kinds: Field -> its type or types, what it is in words, and an example.

    Example:
        >>> require_settings(Recipe(), {"seed": (int, "an integer", "seed=0")})
    """
    for name, (kind, what, write) in kinds.items():
        asked = f"{type(recipe).__name__}({name}=...)"
        require_kind(asked, getattr(recipe, name), kind, what=what, write=write)
    if not -(1 << 63) <= recipe.seed < 1 << 63:
        raise UsageError(
            f"{type(recipe).__name__}(seed=...)",
            f"{recipe.seed} was given",
            "a seed is an integer of 64 bits: at most 2**63 - 1 either way",
            "write e.g. seed=0",
        )


def _require_order(steps: Sequence[Step], *, trains: bool) -> None:
    """Refuse an order of recoveries that a run would not follow."""
    if trains:
        require_one_training(steps)
    repaired = [i for i, s in enumerate(steps) if not isinstance(s, (*_WHOLE, NoRecovery))]
    whole = [i for i, s in enumerate(steps) if isinstance(s, _WHOLE)]
    if repaired and whole and repaired[-1] > whole[0]:
        raise UsageError(
            recovery_named(steps),
            f"{type(steps[repaired[-1]]).__name__} comes after {type(steps[whole[0]]).__name__}",
            "it repairs a weight at the moment at which that is pruned, before the network is trained "
            "or measured as a whole",
            f"put {type(steps[repaired[-1]]).__name__} first",
        )
    trained = [i for i in whole if isinstance(steps[i], FineTune)]
    if trains and trained and trained[0] > whole[0]:
        raise UsageError(
            f"{recovery_named(steps)} with a schedule in steps or epochs",
            f"{type(steps[whole[0]]).__name__} comes before FineTune",
            "weights are pruned while the network trains, so there is nothing to repair before that",
            "put FineTune first",
        )


def require_one_training(steps: Sequence[Any]) -> None:
    """Refuse several :class:`FineTune` steps, where one training prunes or there is but one.

    Example:
        >>> require_one_training((FineTune(1), FineTune(3)))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: recovery=(FineTune, FineTune): there are 2 FineTune steps. ...
    """
    trainings = sum(isinstance(step, FineTune) for step in steps)
    if trainings > 1:
        raise UsageError(
            recovery_named(steps),
            f"there are {trainings} FineTune steps",
            "the training of this run is one, with one course of the learning rate",
            "give one FineTune with all epochs, or prune the result again with recovery=FineTune(...)",
        )


def recovery_named(steps: Sequence[Any]) -> str:
    """Recoveries as an error names them.

    Example:
        >>> recovery_named([BatchNorm(), FineTune()])
        'recovery=(BatchNorm, FineTune)'
    """
    return f"recovery=({', '.join(type(step).__name__ for step in steps)})"


def describe(part: Any) -> Any:
    """A part as plain data: its class name and the fields that differ from their defaults.

    Example:
        >>> describe(Recipe(criterion=Magnitude(p=2)))["criterion"]
        {'Magnitude': {'p': 2}}
    """
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {}
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.type == "float" and isinstance(value, int):
                value = float(value)  # 10 and 10.0 are one value
            if value != default:
                fields[f.name] = describe(value)
        return fields if isinstance(part, Recipe) else {type(part).__name__: fields}
    if isinstance(part, (tuple, list)):
        return [describe(p) for p in part]
    if isinstance(part, dict):
        return {k: describe(v) for k, v in part.items()}
    return part
