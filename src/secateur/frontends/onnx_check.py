"""A call of a network, and whether a file of ONNX computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.core.batches import Batch, mapped, real_tokens, size_of
from secateur.core.difference import largest_error
from secateur.core.errors import DataError


@dataclass(frozen=True)
class Call:
    """What is exported: a model, and a call of it; whether tokens may be of any length."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lengths: bool = False

    @property
    def leaves(self) -> list[Any]:
        return tree_leaves((self.args, self.kwargs))

    @property
    def size(self) -> int:
        return size_of((*self.args, *self.kwargs.values()))

    def has_rows(self, x: Any) -> bool:
        """Whether it has one row for each sample, as the edges of a graph have not."""
        return isinstance(x, Tensor) and x.ndim > 0 and len(x) == self.size

    def is_tokens(self, x: Any) -> bool:
        return self.has_rows(x) and x.ndim == 2 and not x.is_floating_point() and x.shape[1] > 1


@torch.no_grad()
def difference(session: Any, call: Call, asked: str) -> float:
    """Largest relative difference over the example, and a batch of another size and length.

    Tokens that are padding count for nothing: what reads no token at all is undefined.
    """
    names = [i.name for i in session.get_inputs()]
    worst = 0.0
    for repeat, shorter in ((1, False), (3, False), *([(1, True)] if call.lengths else [])):

        def repeated(x: Tensor, times: int = repeat, shorter: bool = shorter) -> Tensor:
            kept = x[:, :-1] if shorter and call.is_tokens(x) else x
            return torch.cat([kept] * times) if call.has_rows(x) else x

        many, named = mapped((call.args, call.kwargs), repeated)
        try:
            expected = _tensors(call.model(*mapped(many), **mapped(named)))
        except Exception:
            if not shorter:
                raise
            return float("inf")  # a network for one length
        tensors = [x for x in tree_leaves((many, named)) if isinstance(x, Tensor)]
        feed = {n: x.cpu().numpy() for n, x in zip(names, tensors, strict=True)}
        try:
            got = [torch.from_numpy(y) for y in session.run(None, feed)]
        except Exception as error:  # its classes have no common one of their own
            raise DataError(
                asked,
                f"ONNX Runtime fails on the file ({str(error).splitlines()[0][:300]})",
                "the exporter took something that follows from the input for a constant",
                "report the model to PyTorch; the file was not kept",
            ) from error
        worst = max(worst, largest_error(*(_read(call, named, y) for y in (expected, got))))
    return worst


@torch.no_grad()
def require_repeatable(call: Call, asked: str, tolerance: float) -> None:
    """Refuse a network that differs from itself: no file can compute the same."""
    first, second = (
        _tensors(call.model(*mapped(call.args), **mapped(call.kwargs))) for _ in range(2)
    )
    error = largest_error(first, second)
    if error > tolerance:
        raise DataError(
            asked,
            f"in PyTorch, two runs on the same input differ by {error:.2g} of the largest output",
            "the network draws random numbers, even in evaluation mode, so no file can be checked",
            "export the part that draws none, or draw in training alone; the file was not kept",
        )


def _read(call: Call, batch: Batch, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs without those of padding."""
    masks = [real_tokens(call.model, batch, x) for x in outputs]
    return [x if m is None else x[m] for x, m in zip(outputs, masks, strict=True)]


def _tensors(output: Any) -> list[Tensor]:
    """In the order in which the exporter writes them."""
    return [leaf.cpu() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
