"""How a law fails: one sentence with the law, the thing that broke it, and the numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def require(holds: bool, law: str, subject: object, found: str) -> None:
    """Raise if a law does not hold.

    Raises:
        AssertionError: With the law, what broke it, and what was found.

    Example:
        >>> require(False, "shares lie in [0, 1]", 3, "1.5 at step 3")
        Traceback (most recent call last):
            ...
        AssertionError: law 'shares lie in [0, 1]' is broken by 3: 1.5 at step 3
    """
    if not holds:
        raise AssertionError(f"law {law!r} is broken by {subject!r}: {found}")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits.

    Example:
        >>> same(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )
