"""Statistics of the gradient of the loss with respect to a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from secateur.core.arguments import require_count
from secateur.core.weight import Weight
from secateur.stats.stat import State


@dataclass(frozen=True)
class Gradient:
    r"""Mean gradient.

    **formula** :math:`\bar g = \frac1m \sum_b \nabla L_b(w)`
    **Shapes** that of the weight
    **Units** loss per weight
    **Needs** a backward pass per batch, batches weighted by their samples
    **Source** definition
    """

    samples: int | None = None
    source: ClassVar[Literal["gradients"]] = "gradients"

    def init(self, weight: Weight) -> State:
        return _sums(weight)

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        return {"sum": state["sum"] + seen.float() * samples, "count": state["count"] + samples}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["sum"] / state["count"].clamp(min=1)


@dataclass(frozen=True)
class SquaredGradient:
    r"""Mean of squared gradients; with ``samples=1`` the diagonal of the empirical Fisher matrix.

    **formula** :math:`\frac1m \sum_b (\nabla L_b(w))^2`
    **Shapes** that of the weight
    **Units** (loss per weight) squared
    **Needs** a backward pass per ``samples`` samples
    **Source** empirical Fisher, e.g. WoodFisher, arXiv 2004.14340
    """

    samples: int | None = 1
    source: ClassVar[Literal["gradients"]] = "gradients"

    def init(self, weight: Weight) -> State:
        return _sums(weight)

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        return {"sum": state["sum"] + seen.float().square(), "count": state["count"] + 1}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["sum"] / state["count"].clamp(min=1)


@dataclass(frozen=True)
class WeightGradient:
    r"""Sum over steps of weight times gradient, taken with the weights of each step.

    **formula** :math:`\sum_t w_t\, \nabla L_t(w_t)`
    **Shapes** that of the weight
    **Units** loss
    **Needs** a backward pass per batch; inside a training loop the loop's own
    **Source** movement pruning, arXiv 2005.07683
    """

    samples: int | None = None
    source: ClassVar[Literal["gradients"]] = "gradients"
    #: In a training, of all its steps and not of those since the last pruning.
    whole: ClassVar[bool] = True

    def init(self, weight: Weight) -> State:
        return {"sum": torch.zeros_like(weight.value, dtype=torch.float32)}

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        return {"sum": state["sum"] + weight.value.float() * seen.float()}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["sum"]


@dataclass(frozen=True)
class BlockFisher:
    r"""Empirical Fisher matrix in diagonal blocks of ``block`` consecutive weights.

    Consecutive in the matrix ``(out, fan_in)``, whatever the order of the axes in memory, so most of a
    block multiply for one output. The last block is padded with zeros. Sums of outer products are kept
    (not the running inverse of the papers), so that parts of the data can be merged; one Cholesky
    factorization per block gives the same inverse.

    **formula** :math:`F_B = \frac1m \sum_b g_B g_B^\top`
    **Shapes** ``(blocks, block, block)``
    **Units** (loss per weight) squared
    **Needs** a backward pass per ``samples`` samples; ``block`` times the weights in memory
    **Source** WoodFisher (arXiv 2004.14340), oBERT (arXiv 2203.07259)
    """

    block: int = 50
    samples: int | None = 1
    source: ClassVar[Literal["gradients"]] = "gradients"

    def init(self, weight: Weight) -> State:
        blocks = -(-weight.value.numel() // self.block)
        shape = (blocks, self.block, self.block)
        return {
            "sum": torch.zeros(shape, dtype=torch.float32, device=weight.value.device),
            "count": torch.zeros((), dtype=torch.float64, device=weight.value.device),
        }

    def update(self, state: State, weight: Weight, seen: Tensor, samples: int) -> State:
        g = self.blocks(weight, seen.float())
        state["sum"].baddbmm_(g[:, :, None], g[:, None, :])  # too big to copy for every sample
        return {"sum": state["sum"], "count": state["count"] + 1}

    def value(self, state: State, weight: Weight) -> Tensor:
        return state["sum"] / state["count"].clamp(min=1)

    def blocks(self, weight: Weight, x: Tensor) -> Tensor:
        """A tensor of the weight's shape as ``(blocks, block)``, padded with zeros."""
        flat = weight.axes.cube(x).flatten()
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).reshape(-1, self.block)

    def whole(self, weight: Weight, blocks: Tensor) -> Tensor:
        """Numbers in blocks as a tensor of the weight's shape: the inverse of :meth:`blocks`."""
        return weight.like(blocks.flatten()[: weight.value.numel()])

    def damped(self, fisher: Tensor, damp: float) -> Tensor:
        """Blocks in float64 with ``damp`` added to their diagonals.

        Less than 1e-6 of the mean diagonal is never added: float32 sums are not exact to more.

        Args:
            fisher: The value of this statistic, or some of its blocks.
            damp: In the units of the Fisher matrix.

        Example:
            >>> BlockFisher(2).damped(torch.zeros(1, 2, 2), 0.5)[0].tolist()
            [[0.5, 0.0], [0.0, 0.5]]
        """
        scale = float(fisher.diagonal(dim1=1, dim2=2).mean()) if len(fisher) else 0.0
        eye = torch.eye(self.block, dtype=torch.float64, device=fisher.device)
        return fisher.double() + max(damp, 1e-6 * scale, 1e-30) * eye


def require_samples(asked: str, samples: int | None) -> None:
    """Raise unless it is a number of samples per gradient, or ``None`` for whole batches."""
    if samples is not None:
        require_count(asked, samples, what="how many samples a gradient is of", write="samples=1")


def require_block(asked: str, block: int) -> None:
    """Raise unless it is a number of weights per block of a Fisher matrix."""
    require_count(asked, block, what="how many weights share a block", write="e.g. block=50")


def _sums(weight: Weight) -> State:
    return {
        "sum": torch.zeros_like(weight.value, dtype=torch.float32),
        "count": torch.zeros((), dtype=torch.float64, device=weight.value.device),
    }
