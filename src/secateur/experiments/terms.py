"""What a search for lottery tickets is told: how to train, where to go back to, which levels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from secateur.core.arguments import odd_number
from secateur.core.errors import BudgetError, UsageError
from secateur.drive.recipe import Recipe
from secateur.pattern import NM

REWINDS = ("weights", "rate", "finetune", "reinit")
#: Share of the remaining weights that one level removes, if the levels are not given.
SHARE = 0.2
#: What the learning rate ends at, relative to its peak: fine-tuning goes on with it.
LAST = 0.01


@dataclass(frozen=True)
class Training:
    r"""How the network is trained, the first time and after every pruning.

    The rate rises linearly over ``warmup``, then falls to a hundredth of its peak: in two steps at
    50 % and 75 % of the training (``"steps"``), or along half a cosine (``"cosine"``).

    Args:
        epochs: Passes over the training batches; may be a fraction.
        lr: Peak learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``.
        weight_decay: On all parameters with two or more axes.
        decay: ``"steps"`` or ``"cosine"``.
        warmup: Share of the training over which the rate rises.
        bfloat16: Run forward and backward under bfloat16 autocast.
        seed: Of first weights (with a function that builds the network), order and augmentation.
        same_order: Every level sees the batches in the order of the dense training (augmented alike,
            too, if it goes back to a whole epoch). By default each level has an order of its own.

    Example:
        >>> how = Training(epochs=4, lr=1.0, warmup=0)
        >>> [round(how.rate_at(step, 100), 3) for step in (0, 49, 50, 75, 99)]
        [1.0, 1.0, 0.1, 0.01, 0.01]
        >>> how = Training(lr=1.0, decay="cosine", warmup=0.1)
        >>> [round(how.rate_at(step, 100), 3) for step in (0, 4, 10, 100)]
        [0.1, 0.5, 1.0, 0.01]
    """

    epochs: float = 10.0
    lr: float = 0.1
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    decay: str = "steps"
    warmup: float = 0.02
    bfloat16: bool = False
    seed: int = 0
    same_order: bool = False

    def __post_init__(self) -> None:
        numbers = ("epochs", "lr", "weight_decay", "warmup")
        wrong = ""
        if odd := odd_number(self, numbers):
            wrong = odd
        elif not (self.epochs > 0 and self.lr > 0):
            wrong = "epochs and lr must be positive numbers"
        elif self.optimizer not in ("sgd", "adamw"):
            wrong = f"optimizer is 'sgd' or 'adamw', not {self.optimizer!r}"
        elif self.decay not in ("steps", "cosine"):
            wrong = f"decay is 'steps' or 'cosine', not {self.decay!r}"
        elif not 0 <= self.warmup < 1:
            wrong = f"warmup is a share from 0 to 1, not {self.warmup:g}"
        elif not self.weight_decay >= 0:
            wrong = f"weight_decay is 0 or more, not {self.weight_decay:g}"
        if wrong:
            raise UsageError(
                "Training(...)", wrong, "no training can be done with it", "correct the value"
            )

    def rate_at(self, step: int, total: int) -> float:
        """Learning rate of a step of a training of ``total`` steps."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.decay == "steps":
            drops = sum(step >= share * total for share in (0.5, 0.75))
            return self.lr * (1.0, 0.1, LAST)[drops]
        done = (step - warm) / max(1, total - warm)
        return self.lr * (LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class TicketPlan:
    """Which levels, and what happens to the survivors at each of them.

    * ``"weights"``: survivors go back to their values at ``rewind_to`` of the dense training, and
      the rest of the training is repeated. At 0 this is the original lottery ticket.
    * ``"rate"``: survivors keep their values; only the learning rate goes back to ``rewind_to``.
    * ``"finetune"``: survivors keep their values and train equally long at the last rate.
    * ``"reinit"``: survivors get new random values and train from the start.

    Args:
        levels: Sparsities, rising. By default each level removes 20 % of what remains, up to the
            recipe's target.
        rewind: One of the four words above.
        rewind_to: Where of the dense training to go back to.
        unit: What ``rewind_to`` counts: ``"epochs"`` or ``"steps"``.
        one_shot: Prune the dense network straight to every level, instead of level after level.
        training: How to train.

    Example:
        >>> TicketPlan(rewind="rate", levels=(0.36, 0.79)).levels
        (0.36, 0.79)
    """

    levels: tuple[float, ...] | None = None
    rewind: str = "weights"
    rewind_to: float = 0.0
    unit: str = "epochs"
    one_shot: bool = False
    training: Training = Training()

    def __post_init__(self) -> None:
        levels: Any = self.levels
        if levels is not None:
            levels = tuple(levels) if isinstance(levels, (tuple, list)) else (levels,)
            object.__setattr__(self, "levels", tuple(float(level) for level in levels))
        wrong = ""
        if self.rewind not in REWINDS:
            wrong = f"rewind is one of {', '.join(REWINDS)}, not {self.rewind!r}"
        elif self.unit not in ("epochs", "steps"):
            wrong = f"unit is 'epochs' or 'steps', not {self.unit!r}"
        elif not 0 <= self.rewind_to < math.inf:
            wrong = f"rewind_to is 0 or more, not {self.rewind_to:g}"
        elif self.rewind == "reinit" and self.rewind_to:
            wrong = "new random weights train from the start, so rewind_to is 0"
        elif self.unit == "steps" and self.rewind_to != int(self.rewind_to):
            wrong = f"steps are whole numbers, not {self.rewind_to:g}"
        if wrong:
            raise UsageError(
                "TicketPlan(...)", wrong, "no ticket can be found with it", "correct the value"
            )
        _require_rising(self.levels)

    def step_of_rewind(self, per_epoch: int, total: int) -> int:
        """The step of the dense training to go back to.

        Raises:
            UsageError: It lies at or behind the end of the training.

        Example:
            >>> TicketPlan(rewind_to=2).step_of_rewind(per_epoch=50, total=500)
            100
        """
        scale = per_epoch if self.unit == "epochs" else 1
        step = round(self.rewind_to * scale)
        if step >= total:
            raise UsageError(
                f"rewind_to={self.rewind_to:g} {self.unit}",
                f"the training has {total} steps, {total / per_epoch:g} epochs",
                "after rewinding there must be something left to train",
                "rewind further, or train longer",
            )
        return step


def levels_of(plan: TicketPlan, recipe: Recipe) -> tuple[float, ...]:
    """The sparsities that will be reached, in order.

    Example:
        >>> from secateur.core.budget import Target
        >>> recipe = Recipe(target=Target("sparsity", 0.6))
        >>> [round(level, 4) for level in levels_of(TicketPlan(), recipe)]
        [0.2, 0.36, 0.488, 0.5904, 0.6]
        >>> levels_of(TicketPlan(one_shot=True), recipe)
        (0.6,)
    """
    target = recipe.target
    assert target is not None
    if target.unit != "sparsity":
        raise BudgetError(
            f"a ticket with a target in {target.unit}",
            f"{target.unit}={target.value:g}",
            "tickets are compared at levels of sparsity",
            "give the target as a sparsity",
        )
    if isinstance(recipe.pattern, NM):
        if plan.levels is not None and plan.levels != (target.value,):
            raise BudgetError(
                f"levels {', '.join(f'{level:g}' for level in plan.levels)}",
                f"the pattern is {recipe.pattern.keep}:{recipe.pattern.of}",
                "an N:M pattern has one sparsity and so one level",
                "leave levels out",
            )
        return (target.value,)
    if plan.levels is not None:
        return plan.levels
    if plan.one_shot:
        return (target.value,)
    levels: list[float] = []
    left = 1.0 - SHARE
    # Within a tenth of a step of the target the level before it would be a training for nothing.
    while 1 - left < target.value - 0.1 * SHARE * (1 - target.value):
        levels.append(round(1 - left, 12))
        left *= 1 - SHARE
    return (*levels, target.value)


def _require_rising(levels: tuple[float, ...] | None) -> None:
    if levels is None:
        return
    rising = all(a < b for a, b in itertools.pairwise(levels))
    if levels and rising and all(0 < level < 1 for level in levels):
        return
    raise BudgetError(
        f"levels {', '.join(f'{level:g}' for level in levels) or '()'}",
        "they are not rising sparsities between 0 and 1",
        "each level prunes what the one before it left",
        "write e.g. 0.36, 0.79, 0.89",
    )
