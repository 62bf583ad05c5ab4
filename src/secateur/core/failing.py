"""Where a network fails while it is run for somebody else: the error says that it is the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.core.errors import SecateurError, UsageError, first_line, kind_of


@contextmanager
def looking_inside(model: nn.Module) -> Iterator[None]:
    """Where the inputs of layers are read: says so if the code of the network hides them.

    Raises:
        UsageError: The layers are called inside ``torch.vmap``.
    """
    try:
        yield
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UsageError(
            f"reading the inputs of the layers of {kind_of(model)}",
            "it calls them inside torch.vmap",
            "what is inside stands for many values at once, and cannot be read",
            "write that part for batches, or ask for what reads no inputs: a target in params, "
            "magnitude, recovery=()",
        ) from error


@contextmanager
def on_example(model: nn.Module, why: str) -> Iterator[None]:
    """Where a network is run on an example for the first time: what it does not survive is its own.

    Args:
        model: As the user made it.
        why: What it is run for.

    Raises:
        UsageError: In place of what was raised.

    Example:
        >>> with on_example(nn.Linear(4, 2), "it is run to see what it does"):
        ...     nn.Linear(4, 2)(torch.zeros(8, 3))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: running Linear on the example: its own forward fails
        (RuntimeError: ...
    """
    try:
        yield
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        types = sorted({str(p.dtype) for p in model.parameters()})
        raise UsageError(
            f"running {type(model).__name__} on the example",
            f"its own forward fails ({first_line(error)})",
            why,
            f"pass example inputs on which it runs; its parameters are {', '.join(types)}",
        ) from error
