"""How much a block changes the direction of what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss, evaluating, forward, real_tokens, to_device
from secateur.core.errors import DataError, UsageError
from secateur.core.slots import Slot, device_of


@dataclass(frozen=True)
class BlockCosine:
    r"""Mean cosine between what goes into a block and what comes out ``span`` blocks on.

    Directions are those of the last axis for ``(batch, tokens, features)`` and ``(batch, features)``,
    and of the channels for images ``(batch, channels, height, width)``.

    **formula** :math:`E[\cos(x_{\text{in}}, x_{\text{out}})]` over samples and positions
    **Shapes** a scalar for each path
    **Units** none
    **Needs** a forward pass
    **Source** ShortGPT, arXiv 2403.03853

    Args:
        paths: Blocks in the order in which they run; each returns a tensor of its input's shape
            (or a tuple or output object that begins with one).
        span: Blocks that are taken together; the value at a path is about it and those behind it.
    """

    paths: tuple[str, ...]
    span: int = 1

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        starts = len(self.paths) - self.span + 1
        if self.span < 1 or starts < 1:
            raise UsageError(
                f"the influence of {self.span} blocks at once",
                f"{len(self.paths)} were named",
                "a span lies within the named blocks",
                f"choose span between 1 and {len(self.paths)}",
            )
        sums, counts = [0.0] * starts, [0] * starts
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [_watch(model, path, seen) for path in self.paths]
        try:
            with evaluating(model), torch.no_grad():
                for batch in batches:
                    seen.clear()
                    forward(model, to_device(batch, device_of(model)))
                    for i, path in enumerate(self.paths[:starts]):
                        cosines = self._cosines(seen, path, self.paths[i + self.span - 1])
                        real = real_tokens(model, batch, seen[path][0])
                        if real is not None:
                            cosines = cosines[real]
                        sums[i] += float(cosines.double().sum())
                        counts[i] += cosines.numel()
        finally:
            for handle in handles:
                handle.remove()
        means = [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
        pairs = zip(self.paths[:starts], means, strict=True)
        return {path: torch.tensor(mean, dtype=torch.float64) for path, mean in pairs}

    def _cosines(self, seen: dict[str, tuple[Tensor, Tensor]], first: str, last: str) -> Tensor:
        for path in (first, last):
            if path not in seen:
                raise DataError(
                    f"the influence of block {path!r}",
                    "it did not run on the data",
                    "influence is measured between its input and its output",
                    "check the path, or leave the block out",
                )
        before, after = seen[first][0], seen[last][1]
        if before.shape != after.shape:
            raise UsageError(
                f"the influence of the blocks {first!r} to {last!r}",
                f"in goes {tuple(before.shape)}, out comes {tuple(after.shape)}",
                "only a block that keeps the shape can be left out",
                "name other blocks",
            )
        return nn.functional.cosine_similarity(
            before.double(), after.double(), dim=1 if before.ndim == 4 else -1
        )


def _watch(model: nn.Module, path: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        made = output if isinstance(output, Tensor) else output[0]
        seen[path] = (given.detach(), made.detach())

    return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
