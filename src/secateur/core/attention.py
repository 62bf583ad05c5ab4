"""Attention as PyTorch has it, and its fused operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Without PyTorch's fused operator for encoder layers, which shows nothing of what is in them.

    It also reads padded inputs as nested tensors, and gives zeros in the place of padding.

    Example:
        >>> with unfused_attention():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
