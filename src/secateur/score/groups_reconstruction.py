"""Which groups the others can stand in for: compensation-aware ranking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.groups import Groups, Part
from secateur.score.groups import GroupNeeds, measured, no_part
from secateur.stats import Gram, Moments, Stats


@dataclass(frozen=True)
class Reconstruction:
    r"""What the consumers' outputs lose when a group goes and the others are refitted to stand in.

    Groups are removed backwards, the cheapest first; after every step the inverse and the weights
    are those of the refitted consumers, so two groups that could stand in for one another are not
    both cheap. The score of a group is what its own removal cost, never less than that of a group
    that went before it.

    **formula** :math:`I_g = \sum_k \operatorname{tr}(W_{kg} [H_k^{-1}]_{gg}^{-1} W_{kg}^\top) /
    \operatorname{tr}(W_k H_k W_k^\top)` over consumers *k*, with
    :math:`W \leftarrow W - W_g [H^{-1}]_{gg}^{-1} H^{-1}_{g:}` after each removal
    **Shapes** ``(groups,)``
    **Units** share of the consumers' output energy
    **Needs** Gram matrices and means of the consumers' inputs
    **Source** structured OBS: ZipLM, arXiv 2302.04089; the dual of the forward selection in Pruning
    with Compensation, arXiv 2108.13728
    **Differs** removes several groups at once where there are more than ``steps``

    Args:
        damping: Relative to the mean of the diagonal of the covariance.
        steps: In at most about so many steps.

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> criterion = Reconstruction()
        >>> stats = collect_groups(sample.model, sample.groups, criterion.needs, sample.batches)
        >>> bool((criterion(sample.groups[0], stats) >= 0).all())
        True
    """

    damping: float = 1e-2
    steps: int = 64

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.steps < 1:
            raise UsageError(
                f"Reconstruction(damping={self.damping:g}, steps={self.steps})",
                "damping is not positive, or there are no steps",
                "a covariance of few samples is singular, and groups go step by step",
                "give e.g. damping=0.01, steps=64",
            )

    @property
    def needs(self) -> GroupNeeds:
        return frozenset({Gram(), Moments()})

    def __call__(self, groups: Groups, stats: Stats) -> Tensor:
        parts = [p for p in groups.having("in") if p.seen]
        if not parts:
            raise no_part("Reconstruction", groups, "can refit (a consumer whose inputs are seen)")
        parts = measured(parts, self.needs, stats)
        consumers = [c for part in parts for c in _consumers(part, stats, self.damping)]
        left = torch.arange(groups.count)
        scores = torch.zeros(groups.count, dtype=torch.float64)
        at_once = max(1, -(-groups.count // self.steps))
        while len(left):
            costs = sum((c.costs(left) for c in consumers), torch.zeros(len(left)).double())
            order = costs.argsort(stable=True)[:at_once]
            going = left[order]
            scores[going] = torch.maximum(costs[order], scores.max())
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[order] = False
            left = left[stays]
            if len(left):
                for consumer in consumers:
                    consumer.remove_(going)
        return scores.float()


class _Consumer:
    """One consumer (or one convolution group of it) while its inputs are taken away."""

    def __init__(self, weight: Tensor, covariance: Tensor, columns: Tensor) -> None:
        self._weight, self._columns = weight.clone(), columns  # (out, D), (groups, members)
        self._inverse = torch.linalg.inv(covariance)
        self._energy = float(torch.einsum("od,de,oe->", weight, covariance, weight))

    def costs(self, left: Tensor) -> Tensor:
        """What removing each group that is left would cost, relative to the output energy."""
        if self._energy <= 0:
            return torch.zeros(len(left), dtype=torch.float64)
        columns = self._columns[left]
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        w = self._weight[:, columns].movedim(1, 0)  # (groups, out, members)
        solved = torch.linalg.solve(blocks, w.mT)
        cost: Tensor = (w.mT * solved).sum((1, 2)).clamp(min=0).cpu() / self._energy
        return cost

    def remove_(self, groups: Tensor) -> None:
        """Take groups away and refit the rest."""
        gone = self._columns[groups].flatten()
        block = self._inverse[gone[:, None], gone]
        rows = torch.linalg.solve(block, self._inverse[gone])
        self._weight -= self._weight[:, gone] @ rows
        self._inverse -= self._inverse[:, gone] @ rows
        # Exactly, so that later steps do not see what rounding leaves.
        self._weight[:, gone] = 0


def _consumers(part: Part, stats: Stats, damping: float) -> Iterator[_Consumer]:
    weight = part.weight
    gram, mean = stats(Gram(), weight).double(), stats(Moments(), weight)[0].double()
    covariances = gram - mean[:, :, None] * mean[:, None, :]
    scale = covariances.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    eye = torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device)
    matrix = weight.matrix().double().reshape(len(gram), -1, gram.shape[1])
    columns = _columns(part).to(gram.device)
    for w, covariance, size in zip(matrix, covariances, scale, strict=True):
        yield _Consumer(w, covariance + damping * size * eye, columns)


def _columns(part: Part) -> Tensor:
    """``(groups, members * taps)``: the columns of each group in the weight as a matrix."""
    weight = part.weight
    shape = weight.value.shape
    view = [1] * len(shape)
    view[part.axis] = shape[part.axis]
    place = torch.arange(shape[part.axis]).reshape(view).expand(shape)
    positions = weight.axes.cube(place)[0].flatten()  # column -> position along the axis
    order = torch.argsort(positions, stable=True)
    taps = len(positions) // shape[part.axis]
    return order.reshape(-1, taps)[part.index.cpu()].flatten(1)
