"""What a statistic is: a streaming sum over data, independent of any criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from secateur.core.batches import Batch, Loss
from secateur.core.slots import Slot
from secateur.core.weight import Weight

#: Named sums. Two states of the same statistic merge by adding their entries, which is what
#: makes every statistic right under data parallelism and safe to save.
State = dict[str, Tensor]


class Stat(Protocol):
    """A statistic of one weight. Implementations are frozen dataclasses (hashable values).

    Law: ``update`` over any split of the data, followed by :func:`merge`, equals one pass.
    """

    @property
    def source(self) -> Literal["inputs", "gradients", "pairs"]:
        """What it is made from: rows of inputs; gradients of the loss; or rows and what comes of them.

        The last are ``(groups, rows, fan_in + 2 out / groups)``: the rows, how far the outputs of the
        dense network lie beyond those of now, and the outputs of the dense network.
        """
        ...

    @property
    def samples(self) -> int | None:
        """Samples per gradient (``None``: whole batches). Ignored for ``source == "inputs"``."""
        ...

    def init(self, weight: Weight) -> State:
        """Zeros."""
        ...

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        """Add what was seen: input rows ``(groups, rows, fan_in)`` or a gradient like the weight."""
        ...

    def value(self, state: State, weight: Weight) -> Tensor:
        """The statistic itself."""
        ...


class Probe(Protocol):
    """A measurement that needs the whole network at once, e.g. a Hessian-vector product.

    It leaves the model exactly as it found it.
    """

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        """Name of each slot -> a tensor of the shape of its weight."""
        ...


def merge(a: State, b: State) -> State:
    """Join the states of two disjoint parts of the data."""
    return {key: a[key] + b[key] for key in a}
