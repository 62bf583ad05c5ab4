"""When something may happen inside a training loop, and what cannot happen in time."""

from __future__ import annotations

import math

from secateur.core.arguments import require_count
from secateur.core.errors import UsageError
from secateur.drive.recipe import Recipe
from secateur.drive.training.regrow import Regrow
from secateur.schedule import Schedule


def is_due(schedule: Schedule, steps: int, per_epoch: int) -> bool:
    """Whether masks may change after so many steps.

    Example:
        >>> from secateur.schedule import Linear
        >>> epochs = Linear(begin=0, end=2, frequency=0.5, unit="epochs")
        >>> [t for t in range(8) if is_due(epochs, t, per_epoch=3)]
        [0, 2, 3, 5, 6]
    """
    # Begin, end and frequency need not be whole numbers of steps: the first step past them counts.
    scale = per_epoch if schedule.unit == "epochs" else 1
    time, before = steps / scale, (steps - 1) / scale
    if time < schedule.begin or before >= schedule.end:
        return False
    ticked = _ticks(schedule, time) > _ticks(schedule, before)
    return ticked or before < schedule.begin or time >= schedule.end


def _ticks(schedule: Schedule, time: float) -> int:
    return int((time - schedule.begin) / schedule.frequency + 1e-9)


def every(frequency: float, unit: str, per_epoch: int) -> float:
    """A frequency in steps, whole or not."""
    return frequency * per_epoch if unit == "epochs" else frequency


def strikes(step: int, frequency: float) -> bool:
    """Whether a whole number of ``frequency`` is reached with ``step``.

    Example:
        >>> [t for t in range(1, 9) if strikes(t, 2.5)]
        [3, 5, 8]
    """
    return int(step / frequency + 1e-9) > int((step - 1) / frequency + 1e-9)


def training_length(recipe: Recipe, steps_per_epoch: int | None, steps: int | None) -> int | None:
    """Optimizer steps of the training: given, or those of the recipe's fine-tuning step.

    Raises:
        UsageError: What is given is no count.

    Example:
        >>> from secateur.drive.methods import gmp
        >>> training_length(gmp(epochs=2.5), 10, None), training_length(Recipe(), None, None)
        (25, None)
    """
    require_counts("Gradual", steps_per_epoch, steps)
    if steps is not None or recipe.finetune is None or not steps_per_epoch:
        return steps
    return max(1, math.ceil(recipe.finetune.epochs * steps_per_epoch - 1e-9))


def require_counts(kind: str, steps_per_epoch: int | None, steps: int | None) -> None:
    """Refuse steps of an epoch and of a training that are given and no counts.

    Raises:
        UsageError: With what was given.

    Example:
        >>> require_counts("Gradual", 10, None)
    """
    if steps_per_epoch is not None:
        asked, write = f"{kind}(steps_per_epoch=...)", "steps_per_epoch=len(loader)"
        require_count(asked, steps_per_epoch, what="how many steps an epoch has", write=write)
    if steps is not None:
        asked, write = f"{kind}(steps=...)", "e.g. steps=epochs * len(loader)"
        require_count(asked, steps, what="how many steps the whole training has", write=write)


def require_time(recipe: Recipe, steps_per_epoch: int | None, length: int | None) -> None:
    """Refuse units that cannot be counted and what would come after the end of training.

    Raises:
        UsageError: With the times.
    """
    schedule, part = recipe.schedule, recipe.regrow
    if schedule.unit == "rounds":
        raise UsageError(
            f"Gradual(schedule={type(schedule).__name__})",
            "its unit is rounds",
            "inside a training loop time is counted in steps or epochs",
            "write e.g. Polynomial(begin=0, end=1000, frequency=100)",
        )
    if "epochs" in (schedule.unit, getattr(part, "unit", "")) and not steps_per_epoch:
        raise UsageError(
            "Gradual(...) with a schedule or an exchange in epochs",
            "steps_per_epoch is not given",
            "the pruner only sees steps",
            "pass steps_per_epoch=len(loader)",
        )
    per_epoch = steps_per_epoch or 1
    end = every(schedule.end, schedule.unit, per_epoch)
    if length is not None and end > length + 1e-6:
        raise UsageError(
            f"a schedule that ends at {schedule.unit[:-1]} {schedule.end:g}",
            f"training ends after {length} steps, and that is step {end:g}",
            "the target would never be reached",
            "shorten the schedule or train longer",
        )
    if not isinstance(part, Regrow):
        return
    if length is None:
        raise UsageError(
            f"Regrow(end={part.end:g})",
            "the length of the training is not known",
            "the end, and the cosine of the fraction, are shares of it",
            "pass steps=, the number of optimizer steps of the whole training",
        )
    first = every(part.frequency, part.unit, per_epoch)
    if math.ceil(first - 1e-9) > part.end * length:
        raise UsageError(
            f"Regrow(frequency={part.frequency:g}, unit={part.unit!r}, end={part.end:g})",
            f"the first exchange would be at step {first:g}, and the last may be at step "
            f"{part.end * length:g} of {length}",
            "nothing would ever be exchanged",
            "give a smaller frequency, or train longer",
        )


def require_ended(schedule: Schedule, time: float, share: float) -> None:
    """Raise if a schedule has not come to its end.

    Args:
        schedule: A cyclic one is at the target between times, too.
        time: Of the training, in the schedule's unit.
        share: Of the target that is reached.

    Raises:
        UsageError: With both times.
    """
    if share < 1 or (schedule.cyclic and time < schedule.end):
        raise UsageError(
            f"finalize() at {schedule.unit[:-1]} {time:g}",
            f"the schedule ends at {schedule.end:g}; {100 * share:.0f} % of the target is reached",
            "training ended before pruning did, or step() was not called",
            "train longer, shorten the schedule, or call finalize(early=True)",
        )


def require_open(
    asked: str, *, finalized: bool, step: int, to_train_on: str = "leave step() out"
) -> None:
    """Raise if a pruner has given its result.

    Args:
        asked: The method that was called.
        finalized: Whether it has.
        step: Of the training.
        to_train_on: What to do for that.

    Raises:
        UsageError: It has.

    Example:
        >>> require_open("step()", finalized=False, step=3)
    """
    if finalized:
        raise UsageError(
            asked,
            f"finalize() was called before, at step {step}",
            "the result is complete, and its facts are those of that moment",
            f"call finalize() once, after the last step; to train on, {to_train_on}",
        )


def require_settled(step: int, end: int, length: int | None) -> None:
    """Raise if weights would still be exchanged after a step.

    Raises:
        UsageError: With both steps.
    """
    if step < end:
        raise UsageError(
            f"finalize() at step {step}",
            f"weights are exchanged up to step {end} of {length}",
            "training ended before the masks settled, or step() was not called",
            "train longer, correct steps=, or call finalize(early=True)",
        )


def require_stepped(step: int, last: int, period: float) -> None:
    """Raise if the optimizer that weights are exchanged with has not stepped for a whole period.

    Raises:
        UsageError: With both steps.

    Example:
        >>> require_stepped(100, 99, 10)
        >>> require_stepped(100, 40, 10)
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: finalize() at step 100: the optimizer that the pruner was \
given stepped last at step 40. ...
    """
    if step - last >= max(period, 1):
        raise UsageError(
            f"finalize() at step {step}",
            "the optimizer that the pruner was given "
            + (f"stepped last at step {last}" if last else "never stepped"),
            "weights are exchanged around its step(), so masks stayed as they were; another optimizer "
            "may have taken its place, or a wrapper does not call it",
            "make the pruner with the optimizer that trains, or call finalize(early=True)",
        )


def require_last(step: int, found: float, last: float) -> None:
    """Raise if the masks on the model are not those of the last update.

    Args:
        step: Of the training.
        found: The sparsity of the masks.
        last: That after the last update.

    Raises:
        UsageError: With both.
    """
    if found != last:
        raise UsageError(
            f"finalize() at step {step}",
            f"the masks on the model have {100 * found:.4g} % zeros, and after the last update they "
            f"had {100 * last:.4g} %",
            "a state of the model from another moment was loaded since then",
            "load one from after the last update, or call finalize(early=True) to keep these masks",
        )


def require_same(what: str, now: str, saved: str) -> None:
    """Raise if a run would go on from the state of one with other settings.

    Args:
        what: The fingerprint is of.
        now: That of the run.
        saved: That in the state.

    Raises:
        UsageError: With both.

    Example:
        >>> require_same("recipe", "ab12", "cd34")
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: resuming the run 'ab12': the state was saved by the run \
'cd34'. Another recipe would go on differently from here. Resume with the recipe of the run.
    """
    if saved != now:
        raise UsageError(
            f"resuming the run {now!r}",
            f"the state was saved by the run {saved!r}",
            f"another {what} would go on differently from here",
            f"resume with the {what} of the run",
        )


def require_same_epochs(now: int, saved: int) -> None:
    """Raise if a schedule in epochs would go on with epochs of another length.

    Raises:
        UsageError: With both.
    """
    if now != saved:
        raise UsageError(
            f"resuming with steps_per_epoch={now}",
            f"the state was saved with steps_per_epoch={saved}",
            "the recipe counts epochs, so masks would change at other steps from here on",
            "resume with the batches of the run",
        )
