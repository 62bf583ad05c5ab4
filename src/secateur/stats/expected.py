"""What a channel gives behind its BatchNorm and ReLU, without any data but a path through the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss
from secateur.core.errors import UsageError
from secateur.core.slots import Slot
from secateur.stats.order import following_norms


@dataclass(frozen=True)
class ExpectedOutput:
    r"""The expected output of each filter behind the BatchNorm that follows it and a ReLU.

    Which BatchNorm follows is seen by running one batch: it reads the very tensor that the filter's
    layer gave. A normalised channel is taken as Gaussian.

    **formula** :math:`E[\max(0, \gamma z + \beta)] = \beta\,\Phi(\beta/|\gamma|)
    + |\gamma|\,\varphi(\beta/|\gamma|)`
    **Shapes** that of the weight, equal within a filter
    **Units** activations
    **Needs** one batch
    **Source** Bartoldson et al., arXiv 1906.03728
    """

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        norms = following_norms(model, batches[0], has="weight")
        found = {}
        for slot in slots:
            if slot.module not in norms:
                raise UsageError(
                    f"the expected BatchNorm output of {slot.name!r}",
                    "no BatchNorm reads the output of its layer",
                    "the score is made of a BatchNorm's scale and shift",
                    "leave this weight out with ignore=, or use another criterion",
                )
            norm: Any = model.get_submodule(norms[slot.module])
            weight = slot.weight(model)
            each = expected_relu(norm.weight, norm.bias).to(weight.value.device)
            rows = each[:, None].expand(weight.out, weight.fan_in)
            found[slot.name] = weight.like(rows).clone()
        return found


def expected_relu(scale: Tensor, shift: Tensor) -> Tensor:
    """The mean of ``max(0, scale * z + shift)`` over a standard normal ``z``, in double precision.

    Example:
        >>> found = expected_relu(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, -2.0]))
        >>> [round(x, 4) for x in found.tolist()]
        [0.3989, 2.0, 0.0]
    """
    size, shift = scale.detach().double().abs(), shift.detach().double()
    # Without a scale the channel is constant; the quotient's limit is plus or minus infinity.
    ratio = torch.where(size > 0, shift / size.clamp(min=torch.finfo(torch.float64).tiny), shift)
    below = 0.5 * torch.erfc(-ratio / math.sqrt(2))
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(size > 0, shift * below + size * density, shift.clamp(min=0)).clamp(min=0)
