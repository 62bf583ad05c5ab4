"""Repairing weights one at a time: how a recovery asks for its mask, and what is recorded."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.core.facts import Facts, LayerFacts
from secateur.core.select import keep_top
from secateur.core.slots import Slot
from secateur.core.weight import Axes, Weight
from secateur.drive.contract import require_repaired
from secateur.drive.decide import select
from secateur.drive.recipe import Recipe
from secateur.pattern import NM
from secateur.recover import NoRecovery, Repaired
from secateur.stats import Gram, Sketch, Stats, gap_of

_CUBE = Axes(("out", "in", "tap"))
_LARGE = 1 << 20
_LEVELS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class MaskChoice:
    """Answers a recovery's questions about the mask of one weight.

    With a criterion that can rescore (optimal-brain saliency) and a pattern whose groups lie within
    neighbouring inputs, the mask of a column block is decided when the sweep reaches it. Otherwise
    it is decided once, from the scores of the dense weight.
    """

    def __init__(
        self,
        weight: Weight,
        recipe: Recipe,
        groups: Tensor,
        sparsity: float,
        prior: Tensor | None = None,
    ) -> None:
        self._weight, self._recipe = weight, recipe
        self._groups, self._sparsity = groups, sparsity
        self._prior = None if prior is None else _matrix(weight, prior)
        self._mask: Tensor | None = None
        self.values = (
            weight.matrix() if self._prior is None else weight.matrix().masked_fill(~self._prior, 0)
        )
        self._taps = weight.cube().shape[2]

    @property
    def unit(self) -> int:
        return self._recipe.pattern.span(self._taps) or self._weight.fan_in

    @property
    def alone(self) -> bool:
        return isinstance(self._recipe.pattern, NM) and self.live

    @property
    def live(self) -> bool:
        """Whether column blocks are decided during a sweep."""
        rescores = hasattr(self._recipe.criterion, "rescore")
        return self._mask is None and rescores and self._recipe.pattern.span(self._taps) > 0

    def fix(self, mask: Tensor) -> None:
        """From here on the mask is this matrix."""
        self._mask = mask

    def __call__(
        self,
        columns: slice | None = None,
        current: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> Tensor:
        if columns is None or current is None or pivots is None or not self.live:
            fixed = self._fixed()
            return fixed if columns is None else fixed[:, columns]
        scores = cast(Any, self._recipe.criterion).rescore(current, pivots)
        return self._choose(scores, columns)

    def ranked(self, scores: Tensor) -> Tensor:
        """The mask by these scores, if the criterion is the optimal-brain one; else the fixed one."""
        return self._choose(scores, slice(0, scores.shape[1])) if self.live else self._fixed()

    def knee(self, stats: Stats) -> float | None:
        """Where plain masking begins to hurt: the point of the error curve farthest below its chord.

        Not looked for in weights of over a million elements, where it would cost more than pruning,
        nor with N:M, which has one level and no curve.
        """
        size, runs = self._weight.value.numel(), isinstance(self._recipe.pattern, NM)
        if runs or (Sketch(), self._weight.name) not in stats or size > _LARGE:
            return None
        curve = [(0.0, 0.0)]
        for level in _LEVELS:
            mask = _matrix(self._weight, select(self._weight, self._recipe, self._groups, level))
            values = self._weight.matrix().masked_fill(~mask, 0)
            curve.append((level, masking_error(self._weight, values, stats)))
        top = max(error for _, error in curve)
        return max(curve, key=lambda p: p[0] / _LEVELS[-1] - (p[1] / top if top else 1))[0]

    def _fixed(self) -> Tensor:
        if self._mask is None:
            chosen = select(self._weight, self._recipe, self._groups, self._sparsity)
            mask = _matrix(self._weight, chosen)
            # Fewer groups may be alive than stay, and a living one may have gaps.
            self._mask = mask if self._prior is None else mask & self._prior
        return self._mask

    def _choose(self, scores: Tensor, columns: slice) -> Tensor:
        pattern = self._recipe.pattern
        alive = torch.ones_like(scores, dtype=torch.bool)
        if self._prior is not None:
            alive = self._prior[:, columns]
            scores = scores.masked_fill(~alive, 0)
        shape = (scores.shape[0], scores.shape[1] // self._taps, self._taps)
        living = pattern.fold(alive.reshape(shape), _CUBE).any(2)
        groups = pattern.fold(scores.reshape(shape), _CUBE).mean(2).masked_fill(~living, -torch.inf)
        keep = pattern.quota(self._groups.shape[1], self._sparsity)
        here = groups.shape[1] == self._groups.shape[1]
        kept = keep_top(groups, keep if here else self._share(keep, columns))
        members = scores.numel() // kept.numel()
        spread = kept[..., None].expand(*kept.shape, members)
        return pattern.unfold(spread, shape, _CUBE).reshape(scores.shape) & alive

    def _share(self, keep: int, columns: slice) -> int | Tensor:
        """How much of the quota of a pool falls to these columns, rounded so that the shares add up.

        As many as there are columns; after an earlier pruning as many as it left, a count for each pool.
        """
        ends = (columns.start, columns.stop, self._weight.fan_in)
        before, after, whole = map(self._left, ends)
        whole = whole + (whole == 0)  # of a pool with nothing left the share is 0
        return _rounded(keep * after, whole) - _rounded(keep * before, whole)

    def _left(self, columns: int) -> int | Tensor:
        """What there is to keep in the first columns: groups of each pool, or just the columns."""
        if self._prior is None:
            return columns
        shape = (len(self._prior), columns // self._taps, self._taps)
        alive = self._recipe.pattern.fold(self._prior[:, :columns].reshape(shape), _CUBE)
        return alive.any(2).sum(1)


def _rounded(numerator: int | Tensor, denominator: int | Tensor) -> int | Tensor:
    return (2 * numerator + denominator) // (2 * denominator)


def _matrix(weight: Weight, x: Tensor) -> Tensor:
    return weight.axes.cube(x).flatten(1)


@torch.no_grad()
def repair_(
    model: nn.Module, slot: Slot, choice: MaskChoice, *, recipe: Recipe, stats: Stats, facts: Facts
) -> tuple[Tensor, LayerFacts]:
    """Run the recipe's repairs on one weight of ``model``, in place.

    Returns:
        The mask in the weight's shape, and what is to be recorded.
    """
    start = time.perf_counter()
    # The statistics describe the dense weight's inputs; the dense values are copied because the
    # parameter they share memory with is written at the end.
    live = slot.weight(model)
    dense = Weight(live.name, live.value.clone(), live.axes)
    done = Repaired(choice.values, torch.ones_like(choice.values, dtype=torch.bool))
    shift: Tensor | None = None
    for step in recipe.repairs or (NoRecovery(),):
        given = step(dense, stats, choice, recipe.rounding)
        done = require_repaired(step, slot.name, choice.values, given)
        choice.fix(done.mask)
        choice.values = done.values
        for note in done.notes:
            facts.note("repair", slot.name, note)
        if shift is not None and done.shift is None:
            # It made good the change of the values before this step, which are gone.
            facts.note("bias", slot.name, f"its correction was dropped by {type(step).__name__}")
        shift = done.shift
    live.value.copy_(dense.like(done.values))
    if shift is not None:
        _shift_bias_(model, slot, shift, facts)
    mask = dense.like(done.mask)
    kept = int(mask.sum())
    record = LayerFacts(
        slot.name, slot.shape, mask.numel(), kept, output_error(dense, done.values, stats)
    )
    record = replace(record, knee=choice.knee(stats), seconds=time.perf_counter() - start)
    return mask, record


def output_error(dense: Weight, values: Tensor, stats: Stats) -> float | None:
    """Relative squared error of the output with new values.

    Against the output with the dense ones, estimated from the input sketch; beside the dense network,
    against what that makes of its own inputs.
    """
    gap = gap_of(dense, stats)
    if gap is None:
        return masking_error(dense, values, stats) if (Sketch(), dense.name) in stats else None
    # The square of the gap plus the change's output; the Gram matrix has the change's own.
    products, (_, square, whole) = gap[:, : dense.fan_in], gap[:, dense.fan_in :].sum(0)
    change = dense.matrix().double() - values.double()
    gram = stats(Gram(), dense).double()
    own = (change.reshape(len(gram), -1, dense.fan_in) @ gram).reshape(change.shape) * change
    error = float(square + 2 * (change * products).sum() + own.sum())
    return max(0.0, error) / float(whole) if whole > 0 else 0.0


def masking_error(dense: Weight, values: Tensor, stats: Stats) -> float:
    """Relative squared output error of new values on the same inputs, from the input sketch."""
    sketch = stats(Sketch(), dense)
    groups = len(sketch)
    before = dense.matrix().float().reshape(groups, -1, dense.fan_in)
    change = before - values.float().reshape(before.shape)
    # Squares in double precision: those of large activations are infinite in single.
    whole = float((before @ sketch).double().square().sum())
    return float((change @ sketch).double().square().sum()) / whole if whole > 0 else 0.0


def _shift_bias_(model: nn.Module, slot: Slot, shift: Tensor, facts: Facts) -> None:
    # The "bias" of a recurrent layer is a flag.
    biases = [getattr(owner, slot.bias_name, None) for owner in slot.owners(model).values()]
    bias = biases[0]
    if not isinstance(bias, Tensor):
        facts.note("bias", slot.name, "has no bias, so its means could not be corrected")
        return
    if any(other is not bias for other in biases):
        text = "tied layers have a bias each, so their means were not corrected"
        facts.note("bias", slot.name, text)
        return
    bias.add_(shift.reshape(bias.shape).to(bias.dtype))
