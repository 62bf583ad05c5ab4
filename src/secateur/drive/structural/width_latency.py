"""What a network's forward pass takes as a function of its widths, from timings of single layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from secateur.allocate.widths import Spend, WidthItem
from secateur.core.batches import Batch
from secateur.core.widths import Width
from secateur.drive.structural.layer_uses import Use, layers_of
from secateur.drive.structural.width_cost import WidthCost, width_cost
from secateur.runtime.layer_times import Layer, LayerTimes, alignment
from secateur.structure import Structure

# Widths at which layers are timed, as shares of their own.
_SHARES = (0.25, 0.5, 0.75)
# The costliest layers say which multiples are fast.
_JUDGES = 3


@dataclass(frozen=True)
class Table:
    """Milliseconds over inputs and outputs, by straight lines in between.

    Example:
        >>> table = Table((2, 4), (10,), ((1.0,), (3.0,)))
        >>> table(3, 10), table(9, 10)
        (2.0, 3.0)
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]

    def __call__(self, inputs: int, outputs: int) -> float:
        """The time at two widths; beyond the table, that at its edge."""
        i, a = _place(self.inputs, inputs)
        j, b = _place(self.outputs, outputs)
        last_i, last_j = min(i + 1, len(self.inputs) - 1), min(j + 1, len(self.outputs) - 1)
        low = (1 - b) * self.times[i][j] + b * self.times[i][last_j]
        high = (1 - b) * self.times[last_i][j] + b * self.times[last_i][last_j]
        return (1 - a) * low + a * high

    def monotone(self) -> Table:
        """No width costs more than a wider one.

        A width that was slower than a wider one costs what the wider one does: whoever wants it is
        better served by that (see :func:`widened`).

        Example:
            >>> Table((1,), (10, 16, 32), ((5.0, 2.0, 4.0),)).monotone().times
            ((2.0, 2.0, 4.0),)
        """
        times = torch.tensor(self.times, dtype=torch.float64)
        for axis in (0, 1):
            times = times.flip(axis).cummin(axis).values.flip(axis)
        return replace(self, times=tuple(map(tuple, times.tolist())))


def _place(points: Sequence[int], at: int) -> tuple[int, float]:
    for i in range(len(points) - 1):
        if at <= points[i + 1]:
            share = (at - points[i]) / (points[i + 1] - points[i])
            return i, max(0.0, share)
    return len(points) - 1, 0.0


@dataclass(frozen=True)
class LatencyCost:
    r"""Predicted milliseconds of a forward pass for any choice of widths.

    **formula** :math:`t(k) = \alpha \sum_l T_l(in_l(k), out_l(k)) + \rho\, r(k)`, *T* the table of a
    layer, :math:`\rho` what the whole network takes beyond its layers, *r* 1 or the share of kept
    activations; where the layers alone took longer than the network, :math:`\alpha < 1` and
    :math:`\rho = 0`
    **Shapes** counts to a number
    **Units** milliseconds
    **Needs** timings of layers, and one of the whole network
    **Source** latency tables: Cai et al., arXiv 1812.00332, HALP, arXiv 2110.10811
    **Differs** tables are over both widths of a layer, and do not decrease with them

    Args:
        sizes: Shapes of all parameters as functions of widths.
        uses: The layers of a pass.
        tables: For each layer.
        dense: Milliseconds of the uncut network.
        follows: Whether the rest shrinks with the activations.
    """

    sizes: WidthCost
    uses: tuple[Use, ...]
    tables: Mapping[Layer, Table]
    dense: float
    follows: bool = True

    def __call__(self, kept: Mapping[str, int]) -> float:
        """Milliseconds when each width keeps so many groups; others stay whole."""
        layers, activations = self._sums(kept)
        whole, all_activations = self._sums({})
        if whole >= self.dense:
            return layers * self.dense / whole
        share = activations / all_activations if self.follows and all_activations else 1.0
        return layers + (self.dense - whole) * share

    def _sums(self, kept: Mapping[str, int]) -> tuple[float, float]:
        time = activations = 0.0
        for use in self.uses:
            inputs, outputs = use.widths(self.sizes.sizes(use.weight, kept))
            time += self.tables[use.layer](inputs, outputs)
            activations += use.layer.positions * outputs
        return time, activations

    def corrected(self, kept: Mapping[str, int], measured: float) -> LatencyCost:
        """With the rest as it predicts better, now that one cut network was measured."""
        both = (self, replace(self, follows=not self.follows))
        return min(both, key=lambda cost: abs(cost(kept) - measured))


def latency_step(uses: Sequence[Use], cost: WidthCost, times: LayerTimes) -> int:
    """The multiple that widths should come in, by the costliest kinds of layers that can be cut."""
    cut = [use.layer for use in uses if any(narrows(use, cost))]
    cut.sort(key=lambda layer: -layer.macs)
    kinds = {(x.size, x.kernel, x.depthwise): x for x in reversed(cut)}
    judges = sorted(kinds.values(), key=lambda layer: -layer.macs)
    return alignment(times, judges[:_JUDGES])


def narrows(use: Use, cost: WidthCost) -> tuple[bool, bool]:
    """Whether the inputs and the outputs of a layer can be cut."""
    cut = {axis for axis, _, _ in cost.losses.get(use.weight, ())}
    return use.axes[1] in cut and not use.layer.depthwise, use.axes[0] in cut


def _per(layer: Layer) -> int:
    return layer.outputs // layer.groups if layer.depthwise else layer.groups


def _points(size: int, step: int) -> tuple[int, ...]:
    """A few widths from the least to the whole."""
    aligned = {max(step, round(share * size / step) * step) for share in _SHARES}
    return tuple(sorted({n for n in (step, *aligned) if n < size} | {size}))


@dataclass(frozen=True)
class LayerTiming:
    """How layers are timed.

    Args:
        times: Measures layers.
        step: Widths come in multiples of it; 0 finds it by measuring.
        progress: Called with layers done, and all.
    """

    times: LayerTimes
    step: int = 0
    progress: Callable[[float, float], None] = lambda done, total: None


def latency_tables(
    uses: Sequence[Use], cost: WidthCost, how: LayerTiming, step: int
) -> dict[Layer, Table]:
    """A table for every distinct layer, at widths in multiples of ``step``."""
    sides: dict[Layer, tuple[bool, bool]] = {}
    for use in uses:
        one, two = narrows(use, cost), sides.get(use.layer, (False, False))
        sides[use.layer] = (one[0] or two[0], one[1] or two[1])
    tables = {}
    for number, (layer, (narrow_in, narrow_out)) in enumerate(sides.items()):
        how.progress(number, len(sides))
        ins = _points(layer.inputs, step * _per(layer)) if narrow_in else (layer.inputs,)
        outs = _points(layer.outputs, step * _per(layer)) if narrow_out else (layer.outputs,)
        taken = iter(how.times([(layer.at(i, o),) for i in ins for o in outs]))
        grid = tuple(tuple(next(taken) for _ in outs) for _ in ins)
        tables[layer] = Table(ins, outs, grid).monotone()
    return tables


def latency_cost(
    model: nn.Module, structure: Structure, example: Batch, *, dense: float, how: LayerTiming
) -> tuple[LatencyCost, int]:
    """Time the layers of a network, and predict it.

    Args:
        model: The uncut network.
        structure: Its structure.
        example: One batch, of the size that counts.
        dense: Milliseconds of the uncut network.
        how: How layers are timed.

    Returns:
        The prediction, and the step.

    Example:
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> x = torch.zeros(1, 64)
        >>> how = LayerTiming(LayerTimes(lambda chains: [chain[0].macs for chain in chains]))
        >>> cost, step = latency_cost(net, couple(net, x), x, dense=8192.0, how=how)
        >>> cost({}), cost({"0": 32}), step
        (8192.0, 4096.0, 1)
    """
    uses = layers_of(model, example)
    sizes = width_cost(model, structure, "params")
    step = how.step or latency_step(uses, sizes, how.times)
    tables = latency_tables(uses, sizes, how, step)
    return LatencyCost(sizes, uses, tables, dense), step


def steps(widths: Sequence[Width], uses: Sequence[Use], step: int) -> dict[str, int]:
    """Groups by which each width should change, so that its layers change by multiples of ``step``.

    A width of less than two steps comes in halves of it, or finer.

    Example:
        >>> from secateur.core.widths import Slices
        >>> slices = (Slices("a.weight", 0, torch.arange(64).view(16, 4)),)
        >>> width = Width("a", slices, torch.arange(16))
        >>> steps([width], [Use("a.weight", Layer(8, 64, 1))], 16)
        {'a': 4}
    """
    timed = {use.weight for use in uses}
    found = {}
    for width in widths:
        members = [s.index.shape[1] for s in width.slices if s.parameter in timed]
        own = max((step // math.gcd(step, m) for m in members), default=1)
        while own > max(1, width.groups // 2):
            own = -(-own // 2)
        found[width.name] = own
    return found


def widened(items: Sequence[WidthItem], kept: Mapping[str, int], spend: Spend) -> dict[str, int]:
    """Wider wherever it costs nothing: a narrower network that is not faster has no use.

    Example:
        >>> items = [WidthItem("a", torch.zeros(40), step=8)]
        >>> widened(items, {"a": 9}, lambda kept: -(-kept["a"] // 16) * 16.0)
        {'a': 16}
    """
    found = dict(kept)
    for item in items:
        best = spend(found)
        while found[item.name] < item.groups:
            wider = (found[item.name] // item.step + 1) * item.step
            tried = {**found, item.name: min(item.groups, wider)}
            if spend(tried) > best * (1 + 1e-9):
                break
            found = tried
    return found
