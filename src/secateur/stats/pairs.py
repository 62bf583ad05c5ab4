"""The dense network beside the one that is pruned: what it gives out beyond that, layer by layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.core.attention import open_attention
from secateur.core.batches import Batch, evaluating
from secateur.core.errors import NonFinite
from secateur.core.slots import Slot
from secateur.core.weight import Weight
from secateur.stats.activations import no_rows, per_row
from secateur.stats.passes import Passes
from secateur.stats.replay import Replay
from secateur.stats.stat import State

if TYPE_CHECKING:
    from secateur.stats.engine import Stats


@dataclass(frozen=True)
class OutputGap:
    r"""How the outputs of the dense network's layer go with what the layer's inputs are now.

    The inputs :math:`x` have changed with the layers before; the dense network had :math:`\hat x`.

    **formula** with the gap :math:`d = \hat W \hat x - W x`: means of :math:`d x^\top`, of :math:`d_i`,
    of :math:`d_i^2` and of :math:`(\hat W \hat x)_i^2`
    **Shapes** ``(out, fan_in + 3)``, the last three in a column each; empty if the rows of both networks
    are not the same ones (experts)
    **Units** outputs times inputs; outputs; outputs squared
    **Needs** a forward pass of both networks
    **Source** He et al., arXiv 1707.06168; GPTAQ, arXiv 2504.02692, which has :math:`\hat x - x`

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0]]), LINEAR)
        >>> now, before = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0], [3.0]]])
        >>> seen = torch.cat([now, 2 * before - 2 * now, 2 * before], 2)
        >>> stat = OutputGap()
        >>> stat.value(stat.update(stat.init(w), w, seen, 2), w)
        tensor([[ 1.,  1.,  2., 26.]], dtype=torch.float64)
    """

    source: ClassVar[Literal["pairs"]] = "pairs"
    samples: ClassVar[None] = None

    def init(self, weight: Weight) -> State:
        shape, device = (weight.out, weight.fan_in + 3), weight.value.device
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        return {"sums": sums, "rows": no_rows(weight)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        outputs = weight.out // weight.axes.groups
        x, gap, dense = seen.split([weight.fan_in, outputs, outputs], 2)
        products = (gap.transpose(1, 2) @ x).double().flatten(0, 1)
        single = [y.double().sum(1).flatten() for y in (gap, gap.square(), dense.square())]
        sums = state["sums"] + torch.cat([products, torch.stack(single, 1)], 1)
        return {"sums": sums, "rows": state["rows"] + seen.shape[1]}

    def value(self, state: State, weight: Weight) -> Tensor:
        return per_row(state["sums"], state["rows"])


def gap_of(weight: Weight, stats: Stats) -> Tensor | None:
    """The :class:`OutputGap` of a weight, if it was collected and both networks have the same rows."""
    if (OutputGap(), weight.name) not in stats:
        return None
    gap = stats(OutputGap(), weight)
    return gap if gap.numel() else None


class Beside(Replay):
    """A replay that has the dense network beside it, which is run on each batch first.

    Args:
        model: The network that is pruned.
        slots: The weights that will be finished, all before what reads them is.
        batches: What both will be run on, these very objects.
        dense: The dense network, of the same form; never changed.

    Example:
        >>> from secateur.frontends import discover
        >>> net, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), torch.ones(5, 3)
        >>> slots = [slot for slot in discover(net) if slot.rows]
        >>> beside = Beside(net, slots, [x], dense=net)
        >>> beside.see(["1"], x)
        >>> torch.equal(beside.rows(slots[1], beside.call("1"), slice(None))[0], net[0](x))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        batches: Sequence[Batch],
        *,
        dense: nn.Module,
    ) -> None:
        super().__init__(model, slots, batches)
        self.dense = dense
        self._settled = Replay(dense, slots, batches)
        self._seen: dict[str, deque[tuple[Any, ...]]] = {}

    def finish(self, slot: Slot) -> None:
        super().finish(slot)
        self._settled.finish(slot)

    def see(self, paths: Collection[str], batch: Batch) -> None:
        """Run a batch through the dense network, and keep what these modules are called with.

        Raises:
            NonFinite: That is NaN or infinite.
        """

        def run() -> None:
            self._seen = {path: deque() for path in paths}
            with evaluating(self.dense), open_attention(self.dense):
                _Calls(self.dense, self._seen).run([batch], self._settled)

        self._settled.trying(run)

    def call(self, path: str) -> tuple[Any, ...] | None:
        """The next call of a module, in order; None if there was none."""
        calls = self._seen[path]
        return calls.popleft() if calls else None

    @staticmethod
    def rows(slot: Slot, call: tuple[Any, ...] | None, piece: slice) -> Tensor | None:
        """The input rows of a weight in a call, or in a part of its samples; None if not to be had."""
        if call is None or slot.rows is None:
            return None
        module, (x, *rest), output = call
        return slot.rows(module, (x if piece == slice(None) else x[piece], *rest), output)


class _Calls(Passes):
    """Keeps what modules are called with."""

    def __init__(self, model: nn.Module, calls: dict[str, deque[tuple[Any, ...]]]) -> None:
        super().__init__(model, calls)
        self._calls = calls

    def called(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and not bool(torch.isfinite(x).all()):
            raise NonFinite(
                f"the dense network's inputs of {path!r}",
                "some are NaN or infinite",
                "nothing can be fitted to what it makes of them",
                "check the data and the layers before this one",
            )
        # Copies, for what follows may change them in place.
        self._calls[path].append((module, *tree_map_only(Tensor, torch.clone, (inputs, output))))
