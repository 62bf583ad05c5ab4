"""Pruning inside the training loops of others: Transformers' ``Trainer`` and Lightning."""

from __future__ import annotations

from typing import Any

from secateur.allocate import Ranked
from secateur.core.budget import Target
from secateur.core.errors import UsageError
from secateur.drive.recipe import Recipe
from secateur.drive.training.session import Make, Session
from secateur.frontends.hosts import lightning_callback, transformers_callback
from secateur.schedule import Polynomial


def TransformersCallback(what: Recipe | Make, *, data: Any = None) -> Any:  # noqa: N802
    """A callback for Transformers' ``Trainer``; named like a class, as callbacks are there.

    Masks change as the schedule says; the state lies in ``secateur.safetensors`` in each
    checkpoint folder (that of a second callback in ``secateur-2.safetensors``, in the order of the
    trainer's list), so ``resume_from_checkpoint`` continues exactly. After training,
    ``callback.pruned`` is the result.

    Args:
        what: A recipe with a schedule in steps or epochs, or a function ``(model, optimizer,
            steps_per_epoch) -> pruner``.
        data: For criteria that need data at mask updates.

    Raises:
        MissingExtra: Transformers is not installed.

    Example:
        >>> recipe = Recipe(schedule=Polynomial(0, 2, 0.1, unit="epochs"))
        >>> callback = TransformersCallback(recipe)
        >>> callback.pruned
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: the result of a pruning callback: the callback was never \
called. ...
    """
    return transformers_callback(Session(what, data))


def LightningCallback(  # noqa: N802
    what: Recipe | Make | None = None,
    *,
    amount: float = 0.5,
    data: Any = None,
    make_pruning_permanent: bool = True,
    prune_on_train_epoch_end: bool = True,
    verbose: int = 0,
) -> Any:
    """A callback for Lightning's ``Trainer``, with the argument names of its ``ModelPruning``.

    Differs from ``ModelPruning``: ``amount`` is what is pruned at the end, not again in each epoch,
    and masks are held after every optimizer step, so momentum and weight decay wake nothing.

    Several callbacks, each with weights of its own, may prune in one training. In checkpoints they are
    told apart by their recipes, and functions by their names.

    Args:
        what: A recipe with a schedule in steps or epochs, or a function ``(model, optimizer,
            steps_per_epoch) -> pruner``. By default: magnitude over all layers, gradually over the
            first half of the training.
        amount: Share of zeros at the end, without ``what``.
        data: For criteria that need data at mask updates.
        make_pruning_permanent: Remove the masks at the end; the zeros stay.
        prune_on_train_epoch_end: Without ``what``: masks change at the end of epochs only, where there
            are any: not in a stream, and not in a training of less than an epoch.
        verbose: 1 prints the masks of every step.

    Raises:
        UsageError: Lightning is not installed.

    Example:
        >>> import importlib.util
        >>> if importlib.util.find_spec("lightning") is None:
        ...     print("pip install lightning")
        ... else:
        ...     _ = LightningCallback(amount=0.9)  # trainer = Trainer(callbacks=[...])
        ...     print("pip install lightning")
        pip install lightning
    """
    default = what is None
    session = Session(
        _default(amount, 2.0, 1.0) if what is None else what, data, permanent=make_pruning_permanent
    )

    def begin(steps: int | None, per_epoch: int | None) -> None:
        if default:
            session.what = _first_half(amount, steps, per_epoch, whole=prune_on_train_epoch_end)

    return lightning_callback(session, begin, verbose=verbose)


def _first_half(amount: float, steps: int | None, per_epoch: int | None, *, whole: bool) -> Recipe:
    """Magnitude, during the first half of a training; ``whole``: at the end of epochs, if it has any."""
    if per_epoch and (steps is None or steps >= per_epoch):
        epochs = 1.0 if steps is None else steps / per_epoch
        end = max(1.0, epochs // 2) if whole else epochs / 2
        return _default(amount, end, 1.0 if whole else end / 50)
    if steps is None:
        raise UsageError(
            "LightningCallback(...) without a recipe",
            "neither the training nor its epochs have a known length",
            "it prunes during the first half of the training",
            "give the trainer max_steps=, or pass a recipe whose schedule counts steps",
        )
    end = max(1, steps // 2)
    return _default(amount, end, max(1, end // 50), "steps")


def _default(amount: float, end: float, frequency: float, unit: str = "epochs") -> Recipe:
    schedule = Polynomial(begin=0, end=end, frequency=frequency, unit=unit)
    return Recipe(target=Target("sparsity", amount), allocation=Ranked(), schedule=schedule)
