"""The recipe of structural pruning."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from secateur.allocate.widths import GivenWidths, RankedWidths, WidthAllocation
from secateur.core.arguments import require_kind, require_part
from secateur.core.budget import Target
from secateur.core.errors import BudgetError, UnknownName, UsageError
from secateur.drive.recipe import (
    Scope,
    describe,
    recovery_named,
    require_one_training,
    require_settings,
)
from secateur.drive.training.finetune import FineTune
from secateur.recover import BatchNorm, Compensation
from secateur.score import GroupCriterion, Grouped, Magnitude

CutStep = Compensation | BatchNorm | FineTune
_ORDER = (Compensation, BatchNorm, FineTune)
_PARTS = {
    "criterion": (
        ("needs", "__call__"),
        "an object that scores groups",
        "e.g. criterion=Grouped(Magnitude())",
    ),
    "allocation": (
        ("needs_scores", "__call__"),
        "an allocation of widths",
        "e.g. allocation=RankedWidths()",
    ),
}
_KINDS: dict[str, tuple[Any, str, str]] = {
    "target": (Target, "a target", "target=Target('macs', 0.5) or Target.parse('macs=50%')"),
    "scope": (Scope, "a scope", "e.g. scope=Scope(ignore=('stem',))"),
    "uniform": (bool, "True or False", "e.g. uniform=True"),
    "align": (Integral, "an integer", "e.g. align=8"),
    "rounds": (Integral, "an integer", "e.g. rounds=1"),
    "seed": (Integral, "an integer", "e.g. seed=0"),
    "engine": (str, "a name", "e.g. engine='torch'"),
}
ENGINES = ("", "onnxruntime", "torch")


@dataclass(frozen=True)
class ShrinkRecipe:
    """Everything that decides a structural pruning run. A plain value, like a Recipe.

    Args:
        criterion: How much each group matters.
        target: How much is left at the end: a share or count of ``params``, ``macs``, ``bytes``, or
            milliseconds of ``latency`` on this machine.
        allocation: How many groups every width keeps.
        recovery: What happens to the survivors: ``Compensation``, ``BatchNorm`` and ``FineTune``, each
            once at most and in this order. What needs data is left out, with a note, where there is
            none.
        scope: Selectors of widths (by their name or by a parameter that they cut).
        uniform: Like widths in all blocks keep equally many groups, so that the configuration of a
            Transformers model can say it.
        align: Kept groups come in multiples of this many; 1 allows any width. By default, ``0``, of
            as many as runtimes like: of 16 channels or neurons, in widths below 64 of the largest
            power of two that is at most a quarter of them (see
            :func:`~secateur.drive.structural.width_steps.step_of`); of a half, a quarter and so on
            where the target would be missed by more than 2 %, with a note. Where the target is
            latency, ``0`` measures what is fast.
        rounds: Score, cut and repair in so many rounds, each a step of equal ratio towards the
            target; the scores of later rounds are those of the network as cut and repaired so far.
        seed: For everything random.
        engine: What measures a target in latency: ``"onnxruntime"`` or ``"torch"``; by default ONNX
            Runtime where it is installed and can run the network.

    Example:
        >>> ShrinkRecipe(target=Target("macs", 0.5)).target.unit
        'macs'
        >>> ShrinkRecipe(target=Target("sparsity", 0.5))
        Traceback (most recent call last):
            ...
        secateur.core.errors.BudgetError: sparsity=0.5: structural pruning was asked. ...
    """

    criterion: GroupCriterion = Grouped(Magnitude(p=2))  # noqa: RUF009 - a frozen value
    target: Target = Target("macs", 0.5)
    allocation: WidthAllocation = RankedWidths()  # noqa: RUF009 - a frozen value
    recovery: tuple[CutStep, ...] = (Compensation(), BatchNorm())
    scope: Scope = Scope()
    uniform: bool = False
    align: int = 0
    rounds: int = 1
    seed: int = 0
    engine: str = ""

    def __post_init__(self) -> None:
        steps: Any = self.recovery
        single = not isinstance(steps, (tuple, list))
        object.__setattr__(self, "recovery", (steps,) if single else tuple(steps))
        _require_parts(self)
        _require_order(self.recovery)
        if self.target.unit == "sparsity":
            raise BudgetError(
                f"sparsity={self.target.value:g}",
                "structural pruning was asked",
                "it leaves no zeros, so its targets are params, macs, bytes and latency",
                "write e.g. macs=50%",
            )
        if self.rounds < 1 or (self.rounds > 1 and self.target.unit == "latency"):
            raise UsageError(
                f"rounds={self.rounds} with a target in {self.target.unit}",
                "rounds are 1 or more, and 1 where the target is latency",
                "a step towards a latency would have to be measured in every round",
                "give rounds=1, or a target in macs",
            )
        if self.rounds > 1 and isinstance(self.allocation, GivenWidths):
            raise UsageError(
                f"rounds={self.rounds} with GivenWidths",
                "it gives shares of the widths, and does not use the target",
                "every round would take its shares of what the last one left",
                "give rounds=1, or UniformWidths or RankedWidths",
            )
        if self.align < 0:
            raise UsageError(
                f"align={self.align}", "it is negative", "widths come in multiples of it", "give 8"
            )
        if self.engine not in ENGINES:
            raise UnknownName("engine", self.engine, [name for name in ENGINES if name])

    @property
    def finetune(self) -> FineTune | None:
        """The fine-tuning step, if any."""
        return next((s for s in self.recovery if isinstance(s, FineTune)), None)

    @property
    def compensation(self) -> Compensation | None:
        """The closed-form repair, if any."""
        return next((s for s in self.recovery if isinstance(s, Compensation)), None)

    def fingerprint(self) -> str:
        """A hash of everything that differs from the defaults; names runs."""
        fields = {
            f.name: describe(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        text = json.dumps({"shrink": fields}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _require_parts(recipe: ShrinkRecipe) -> None:
    for name, (has, what, write) in _PARTS.items():
        asked = f"ShrinkRecipe({name}=...)"
        require_part(asked, getattr(recipe, name), has, what=what, write=write)
    write = "e.g. recovery=(Compensation(), BatchNorm())"
    for step in recipe.recovery:
        require_kind("ShrinkRecipe(recovery=...)", step, _ORDER, what="recoveries", write=write)
    require_settings(recipe, _KINDS)


def _require_order(steps: tuple[CutStep, ...]) -> None:
    require_one_training(steps)
    given = [_ORDER.index(type(step)) for step in steps]
    if given != sorted(set(given)):
        raise UsageError(
            recovery_named(steps),
            "a step comes twice, or before one that a run does earlier",
            "a cut is compensated first, then BatchNorm is measured, then the network trains",
            f"write them as {recovery_named([_ORDER[i]() for i in sorted(set(given))])}",
        )
