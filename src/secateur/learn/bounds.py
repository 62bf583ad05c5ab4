"""Bounds of inputs: what perturbed ones are clipped to, and what the given ones must keep to."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.arguments import is_number
from secateur.core.errors import DataError, UsageError

#: A bound of the inputs: one number, or one a channel (axis 1) for normalised images.
Bound = float | tuple[float, ...]

# Bounds of normalised images are often written with two digits: so much of their range is forgiven.
_SLACK = 0.01


def require_bounds(owner: object, low: Bound, high: Bound) -> None:
    """Raise unless each lower bound is below the upper one.

    Example:
        >>> require_bounds(None, 0.0, (1.0, 2.0))
    """
    sides = [tuple(side) if isinstance(side, (tuple, list)) else (side,) for side in (low, high)]
    longest = max(len(side) for side in sides)
    lows, highs = (side * longest if len(side) == 1 else side for side in sides)
    whole = len(lows) == len(highs) > 0 and all(is_number(value) for value in (*lows, *highs))
    if not whole or not all(a < b for a, b in zip(lows, highs, strict=True)):
        raise UsageError(
            f"{type(owner).__name__}(low={low!r}, high={high!r})",
            "low is not below high" if whole else "they are no numbers, or not as many as channels",
            "inputs are clipped to what lies between them",
            "write e.g. low=0.0, high=1.0, or two tuples with a bound for each channel",
        )


def within(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """Inputs, if they keep to their bounds.

    Clipping would move others by far more than an attack does, and the attack would be blamed.

    Raises:
        DataError: They do not.

    Example:
        >>> within(torch.tensor([[0.0, 1.0]]), 0.0, 1.0)
        tensor([[0., 1.]])
    """
    least, most = _bound(low, x), _bound(high, x)
    slack = _SLACK * (most - least)
    if bool(((x < least - slack) | (x > most + slack)).any()):
        raise DataError(
            "an adversarial perturbation",
            f"the inputs reach from {float(x.min()):.4g} to {float(x.max()):.4g}, and their bounds are "
            f"low={low} and high={high}",
            "what is perturbed is clipped to the bounds, which would move these inputs by itself",
            "give the attack the bounds of its inputs: low= and high=, for normalised images a tuple "
            "with one a channel",
        )
    return x


def clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """What lies beyond a bound, brought back to it.

    Example:
        >>> clip(torch.tensor([[-1.0, 3.0]]), 0.0, (1.0, 2.0))
        tensor([[0., 2.]])
    """
    return torch.minimum(torch.maximum(x, _bound(low, x)), _bound(high, x))


def _bound(bound: Bound, x: Tensor) -> Tensor:
    value = torch.tensor(bound, dtype=x.dtype, device=x.device)
    return value.reshape(-1, *[1] * (x.ndim - 2)) if value.ndim else value
