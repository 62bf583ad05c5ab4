"""Criteria made for pruning at initialisation: GraSP and SynFlow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.weight import Weight
from secateur.score.criterion import Needs
from secateur.stats import GradientFlow, Stats, SynapticFlow


@dataclass(frozen=True)
class Grasp:
    r"""Keep the weights whose removal would reduce the gradient flow.

    The paper removes the largest :math:`-w \cdot (Hg)`; larger = keep turns the sign.

    **formula** :math:`s = w\,(H g)`
    **Shapes** that of the weight
    **Units** loss² per weight²
    **Needs** Hessian times gradient of all weights, logits cooled by ``temperature``
    **Source** GraSP, arXiv 2002.07376
    **Differs** not divided by the global sum (no ranking changes); in evaluation mode, where a
    BatchNorm normalises by what it stored, and in a network that has seen no data not at all: the
    paper's code normalises by the batch, which chooses other weights

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.put(GradientFlow(), "w", torch.tensor([[1.0, -1.0]]))
        >>> Grasp()(w, stats)
        tensor([[ 2., -1.]])
    """

    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(
                f"Grasp(temperature={self.temperature:g})",
                "it is not positive",
                "logits are divided by it",
                "write e.g. temperature=200",
            )

    @property
    def needs(self) -> Needs:
        return frozenset({GradientFlow(self.temperature)})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return weight.value.float() * stats(GradientFlow(self.temperature), weight)


@dataclass(frozen=True)
class SynFlow:
    r"""Synaptic flow: the product of absolute weights along all paths through a weight.

    Meant to be iterated: ``schedule=Exponential(end=100)`` prunes a little a hundred times, which is
    what avoids emptying a layer. The alias ``synflow`` does so.

    **formula** :math:`s = |w|\ \partial R/\partial |w|`
    **Shapes** that of the weight
    **Units** none that matter
    **Needs** synaptic flow (only the shape of an input)
    **Source** SynFlow, arXiv 2006.05467
    **Differs** biases and stored normalisation means count as zero, normalisations without stored
    statistics only scale, and activations pass on what they get, so that flow is conserved exactly;
    the original only takes absolute values

    Example:
        >>> import torch
        >>> from secateur.core.weight import LINEAR
        >>> w = Weight("w", torch.tensor([[-2.0, 1.0]]), LINEAR)
        >>> stats = Stats()
        >>> stats.put(SynapticFlow(), "w", torch.tensor([[1.0, 3.0]]))
        >>> SynFlow()(w, stats)
        tensor([[2., 3.]], dtype=torch.float64)
    """

    @property
    def needs(self) -> Needs:
        return frozenset({SynapticFlow()})

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return weight.value.double().abs() * stats(SynapticFlow(), weight)
