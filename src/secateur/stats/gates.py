"""The gradient of the loss with respect to a gate on each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss
from secateur.core.errors import UsageError
from secateur.core.groups import Groups, Part
from secateur.stats.groups import gradients_of

Gate = Literal["auto", "in", "out", "norm", "group"]
GATES = ("auto", "in", "out", "norm", "group")


@dataclass(frozen=True)
class GateGradient:
    r"""Mean and mean square over batches of the loss's derivative by a gate on each group.

    A gate ``z`` multiplies slices of the group, so its derivative at 1 is the sum of weight times
    gradient over them. Where the gate sits is ``gate``: at the columns of the ``"in"`` side it
    multiplies the unit's activation, which is exact whatever function comes before; at the ``"out"``
    side (with biases) it multiplies what the producers compute; at the BatchNorm (``"norm"``) its
    scale and shift; ``"group"`` takes every slice, so a path through n layers counts n times.
    ``"auto"`` is ``"in"``, or ``"group"`` for a width without known consumers.

    **formula** :math:`a_{bg} = \sum_{i\in g} w_i\, \partial L_b/\partial w_i`; values
    :math:`\bar a_g` (batches weighted by their samples) and :math:`\frac1m\sum_b a_{bg}^2`
    **Shapes** ``(2, groups)``
    **Units** loss, and loss squared
    **Needs** a backward pass per batch, or per ``samples`` samples
    **Source** Molchanov et al. 2019, arXiv 1906.10771

    Example:
        >>> from secateur.stats.groups import collect_groups
        >>> from secateur.testing import sample_groups
        >>> sample = sample_groups("plain")
        >>> stats = collect_groups(sample.model, sample.groups, [GateGradient()], sample.batches)
        >>> stats.at(GateGradient(), sample.groups[0].name).shape
        torch.Size([2, 6])
    """

    gate: Gate = "auto"
    samples: int | None = None

    def measure_groups(
        self, model: nn.Module, groups: Sequence[Groups], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        gated = {g.name: self.parts(g) for g in groups}
        means = {g.name: torch.zeros(g.count, dtype=torch.float64) for g in groups}
        squares = {name: zero.clone() for name, zero in means.items()}
        seen = steps = 0
        every = [part for parts in gated.values() for part in parts]
        for found, size in gradients_of(model, every, batches, loss, self.samples):
            seen, steps = seen + size, steps + 1
            # A parameter cut along two axes lies in two widths: its product is made once, and not in
            # float16, in which the product of a small weight and a small gradient is zero.
            wide = {
                p.parameter: p.value if p.value.itemsize > 2 else p.value.float() for p in every
            }
            flows = {name: value * found[name] for name, value in wide.items()}
            for name, parts in gated.items():
                by_part = [part.sum(flows[part.parameter]).sum(1) for part in parts]
                gradient = torch.stack(by_part).sum(0)
                means[name] = means[name].to(gradient.device) + gradient * size
                squares[name] = squares[name].to(gradient.device) + gradient.square()
        return {
            name: torch.stack([means[name] / max(1, seen), squares[name] / max(1, steps)])
            for name in means
        }

    def parts(self, groups: Groups) -> tuple[Part, ...]:
        """The slices that the gate multiplies.

        Raises:
            UsageError: The width has none; it is named.
        """
        chosen = {
            "in": groups.having("in"),
            "out": tuple(p for p in groups.having("out", "vector") if not _normalises(p)),
            "norm": tuple(p for p in groups.having("vector") if p.batch_norm),
            "group": groups.trained,
        }
        chosen["auto"] = chosen["in"] or chosen["group"]
        parts = chosen[self.gate]
        if not parts:
            have = ", ".join(f"{p.parameter} ({p.role})" for p in groups.parts[:6])
            raise UsageError(
                f"a gate at {self.gate!r} of the width {groups.name!r}",
                f"it has no such slices: {have}",
                "a gate multiplies slices of the group",
                "use gate='auto', or leave the width out with ignore=",
            )
        return parts


def _normalises(part: Part) -> bool:
    return part.role == "vector" and (part.batch_norm or "Norm" in part.kind)
