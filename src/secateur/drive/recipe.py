"""The recipe: a frozen value that binds the five words, and the aliases of published methods."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from secateur.allocate import Allocation, ErdosRenyi, Ranked, Uniform
from secateur.core.arguments import require_kind, require_part
from secateur.core.budget import Target
from secateur.core.errors import BudgetError, UsageError
from secateur.drive.training.finetune import FineTune
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.pattern import NM, Elements, Pattern, PerRow
from secateur.recover import (
    BatchNorm,
    ColumnSweep,
    ExactObs,
    FisherUpdate,
    NoRecovery,
    Recovery,
    Rounding,
)
from secateur.schedule import Alternating, Exponential, OneShot, Polynomial, Schedule
from secateur.score import (
    Criterion,
    Grasp,
    Lamp,
    Lookahead,
    Magnitude,
    Movement,
    Obd,
    ObsSaliency,
    Random,
    Ria,
    Snip,
    SynFlow,
    Wanda,
    WoodFisher,
)

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
            needs the whole network, with one :class:`FineTune` at most. A schedule in steps or epochs
            prunes during the fine-tuning, so there that comes first.
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
    def finetune(self) -> FineTune | None:
        """The fine-tuning step, if any."""
        return next((s for s in self.recovery if isinstance(s, FineTune)), None)

    @property
    def distills(self) -> bool:
        """Whether fine-tuning follows the dense network."""
        return self.finetune is not None and self.finetune.distill > 0

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


def require_recipe(given: object) -> None:
    """Raise unless a recipe (or ``None``, the default one) was given.

    Example:
        >>> require_recipe(magnitude)
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the recipe: the function magnitude, and not its result, was \
given. It is a Recipe. Write e.g. Recipe(target=Target('sparsity', 0.9)) or recipes.magnitude(0.9).
    """
    write = "e.g. Recipe(target=Target('sparsity', 0.9)) or recipes.magnitude(0.9)"
    require_kind("the recipe", given, (Recipe, type(None)), what="a Recipe", write=write)


def require_settings(recipe: Any, kinds: Mapping[str, tuple[Any, str, str]]) -> None:
    """Refuse fields of a recipe that are not of their type.

    Args:
        recipe: Of pruning or of shrinking.
        kinds: Field -> its type or types, what it is in words, and an example.

    Example:
        >>> require_settings(Recipe(), {"seed": (int, "an integer", "seed=0")})
    """
    for name, (kind, what, write) in kinds.items():
        asked = f"{type(recipe).__name__}({name}=...)"
        require_kind(asked, getattr(recipe, name), kind, what=what, write=write)


def _require_order(steps: Sequence[Step], *, trains: bool) -> None:
    """Refuse an order of recoveries that a run would not follow."""
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
    """Refuse several :class:`FineTune` steps: schedules and distillation belong to one training.

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
            "a run trains once, with one course of the learning rate",
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


# Published methods are assemblies of parts. Each alias takes the sparsity and returns a recipe.


def magnitude(sparsity: float = 0.5) -> Recipe:
    """Magnitude, the same sparsity in every layer (Han et al., arXiv 1506.02626)."""
    return Recipe(Magnitude(), target=Target("sparsity", sparsity))


def gmp(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """Gradual magnitude pruning with fine-tuning (Zhu and Gupta, arXiv 1710.01878).

    The window follows "Pruning for success": prune over the first half of the epochs, hold the mask
    and fine-tune for the rest.
    """
    return Recipe(
        Magnitude(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=window(epochs),
        recovery=(FineTune(epochs=epochs),),
    )


def window(epochs: float) -> Schedule:
    """The default pruning window: cubic, over the first half of the epochs, in fifty updates."""
    return Polynomial(begin=0, end=epochs / 2, frequency=epochs / 100, unit="epochs")


def wanda(sparsity: float = 0.5) -> Recipe:
    """Weights times input norms, compared within rows (arXiv 2306.11695).

    Every layer sees the inputs that all pruned layers before it leave; the authors' code measures once
    a block, before any layer of the block is pruned.
    """
    return Recipe(Wanda(), PerRow(), Target("sparsity", sparsity), sequential=True)


def ria(sparsity: float = 0.5) -> Recipe:
    """Relative importance and activations, compared within each layer (ICLR 2024).

    Measured layer by layer, as :func:`wanda` is.
    """
    return Recipe(Ria(), Elements(), Target("sparsity", sparsity), sequential=True)


def sparsegpt(sparsity: float = 0.5, pattern: Pattern | None = None) -> Recipe:
    """Optimal-brain column sweep, layer after layer (arXiv 2301.00774).

    Measured layer by layer, as :func:`wanda` is.
    """
    pattern = pattern or Elements()
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    return Recipe(ObsSaliency(), pattern, target, recovery=(ColumnSweep(),), sequential=True)


def obc(sparsity: float = 0.5) -> Recipe:
    """Exact optimal brain compression with dense activations (arXiv 2208.11580)."""
    return Recipe(ObsSaliency(), Elements(), Target("sparsity", sparsity), recovery=(ExactObs(),))


def snip(sparsity: float = 0.9) -> Recipe:
    """Connection sensitivity, ranked globally (arXiv 1810.02340)."""
    return Recipe(Snip(), target=Target("sparsity", sparsity), allocation=Ranked())


def grasp(sparsity: float = 0.9) -> Recipe:
    """Gradient signal preservation, ranked globally (arXiv 2002.07376)."""
    return Recipe(Grasp(), target=Target("sparsity", sparsity), allocation=Ranked())


def synflow(sparsity: float = 0.9, rounds: int = 100) -> Recipe:
    """Iterative synaptic flow, ranked globally (arXiv 2006.05467)."""
    schedule = Exponential(begin=0, end=rounds) if rounds > 1 else OneShot()
    return Recipe(
        SynFlow(), target=Target("sparsity", sparsity), allocation=Ranked(), schedule=schedule
    )


def lamp(sparsity: float = 0.9) -> Recipe:
    """Layer-adaptive magnitude (arXiv 2010.07611)."""
    return Recipe(Lamp(Magnitude()), target=Target("sparsity", sparsity), allocation=Ranked())


def lap(sparsity: float = 0.9) -> Recipe:
    """Lookahead pruning, the same sparsity in every layer (arXiv 2002.04809)."""
    return Recipe(Lookahead(), target=Target("sparsity", sparsity))


def erk_magnitude(sparsity: float = 0.9) -> Recipe:
    """Magnitude with Erdős-Rényi-kernel layer densities (arXiv 1911.11134)."""
    return Recipe(Magnitude(), target=Target("sparsity", sparsity), allocation=ErdosRenyi())


def woodfisher(sparsity: float = 0.9, rounds: int = 4) -> Recipe:
    """Block Fisher saliency, ranked globally, in rounds, with its update (arXiv 2004.14340)."""
    return Recipe(
        WoodFisher(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=Exponential(begin=0, end=rounds) if rounds > 1 else OneShot(),
        recovery=(FisherUpdate(),),
    )


def obd(sparsity: float = 0.9) -> Recipe:
    """Damped diagonal Fisher saliency, ranked globally (LeCun et al. 1989)."""
    return Recipe(Obd(), target=Target("sparsity", sparsity), allocation=Ranked())


def movement(sparsity: float = 0.9, epochs: float = 6) -> Recipe:
    """Movement pruning while fine-tuning (arXiv 2005.07683)."""
    return Recipe(
        Movement(),
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=window(epochs),
        recovery=(FineTune(epochs=epochs, optimizer="adamw", lr=3e-5),),
    )


def rigl(sparsity: float = 0.9, epochs: float = 10, pattern: Pattern | None = None) -> Recipe:
    """Sparse from a random start, grown by dense gradients (RigL, arXiv 1911.11134).

    For networks that are not trained yet: the first mask is random.
    """
    return _sparse(
        sparsity, epochs, Regrow("gradient", frequency=epochs / 50, unit="epochs"), pattern
    )


def set_(sparsity: float = 0.9, epochs: float = 10, pattern: Pattern | None = None) -> Recipe:
    """Sparse from a random start, grown at random (SET, arXiv 1707.04780).

    For networks that are not trained yet. Everything but the growth is as in :func:`rigl`.
    """
    return _sparse(
        sparsity, epochs, Regrow("random", frequency=epochs / 50, unit="epochs"), pattern
    )


def static_sparse(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """A random mask at Erdős-Rényi-kernel densities, held: what sparse training must beat."""
    return dataclasses.replace(_sparse(sparsity, epochs, None), criterion=Random())


def topkast(sparsity: float = 0.9, epochs: float = 10, extra: float = 0.1) -> Recipe:
    """Forward with the largest weights, train those and ``extra`` more (arXiv 2106.03517)."""
    regrow = TopKast(extra, frequency=epochs / 50, unit="epochs")
    return dataclasses.replace(_sparse(sparsity, epochs, regrow), allocation=Uniform())


def acdc(sparsity: float = 0.9, epochs: float = 10) -> Recipe:
    """Dense and compressed phases in turn, ranked globally (AC/DC, arXiv 2106.12379).

    As for ImageNet: a dense tenth, phases of a twentieth, a last dense tenth, sparse from 85 % on.
    """
    return Recipe(
        target=Target("sparsity", sparsity),
        allocation=Ranked(),
        schedule=Alternating(0.05 * epochs, 0.85 * epochs, 0.05 * epochs, "epochs"),
        recovery=(FineTune(epochs=epochs, lr=0.1),),
    )


def _sparse(
    sparsity: float,
    epochs: float,
    regrow: Regrow | TopKast | None,
    pattern: Pattern | None = None,
) -> Recipe:
    """Sparse before the first step, and trained from scratch."""
    pattern = pattern or Elements()
    fixed = isinstance(pattern, NM)
    return Recipe(
        pattern=pattern,
        target=None if fixed else Target("sparsity", sparsity),
        allocation=Uniform() if fixed else ErdosRenyi(),
        schedule=OneShot(unit="epochs"),
        recovery=(FineTune(epochs=epochs, lr=0.1),),
        regrow=regrow,
    )


ALIASES = {
    "magnitude": magnitude,
    "gmp": gmp,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "obc": obc,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    "lamp": lamp,
    "lap": lap,
    "erk_magnitude": erk_magnitude,
    "woodfisher": woodfisher,
    "obd": obd,
    "movement": movement,
    "ria": ria,
    "rigl": rigl,
    "set": set_,
    "static_sparse": static_sparse,
    "topkast": topkast,
    "acdc": acdc,
}
