"""Dynamic sparse training: weights are dropped and others grown while a network trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from secateur.core.arguments import odd_number
from secateur.core.errors import UsageError
from secateur.core.select import keep_top


@dataclass(frozen=True)
class Regrow:
    r"""Every ``frequency`` the least useful weights are dropped, and as many others grown (SET, RigL).

    Each weight tensor keeps exactly as many entries as before, each pool of the pattern too: groups
    of the pattern move, N:M stays N:M. What was just dropped may be grown again at once; it then
    keeps its value. New weights start at zero, and so do their momenta and Adam moments.

    With ``grow="gradient"`` the gradient of pruned weights is read on update steps only. It is there
    already, because pruned weights are ordinary parameters that happen to be zero.

    **formula** drop the :math:`\lfloor f_t n \rfloor` kept groups with the lowest score, grow those
    with the largest :math:`|\nabla L|` or random ones, :math:`f_t = \frac f2 (1 + \cos(\pi t/T))`
    **Shapes** that of the weight
    **Units** ``frequency`` in ``unit``; ``end`` as a share of the training
    **Needs** with ``grow="gradient"`` the gradient of the training loop
    **Source** SET (arXiv 1707.04780), RigL (arXiv 1911.11134)
    **Differs** ties go to the lower index (RigL adds noise of 1e-5 to the scores); SET drops by
    magnitude (the paper the smallest positive and the largest negative weights, a share of each) and
    grows weights at zero, both as in RigL's code, and its fraction falls with the cosine too unless
    ``anneal=False``

    Args:
        grow: ``"gradient"`` or ``"random"``.
        fraction: Share of the kept weights that is exchanged, at first.
        frequency: Time between two exchanges.
        end: Share of the training after which masks stay (T above).
        unit: Of the frequency: ``"steps"`` or ``"epochs"``.
        anneal: Let the fraction fall with a cosine to zero at ``end``.
        start: The first mask, if the schedule begins before training: ``"random"``, or
            ``"criterion"`` by the recipe's criterion.
        skip_step: Exchange *instead of* the optimizer's step. ``None`` does as published: RigL skips
            the step (weights, momenta and step counts stay bit for bit), SET does both.

    Example:
        >>> rigl = Regrow()
        >>> rigl.skips, Regrow("random").skips
        (True, False)
        >>> [round(rigl.fraction_at(t, 1000), 3) for t in (0, 375, 750, 751)]
        [0.3, 0.15, 0.0, 0.0]
    """

    grow: str = "gradient"
    fraction: float = 0.3
    frequency: float = 100
    end: float = 0.75
    unit: str = "steps"
    anneal: bool = True
    start: str = "random"
    skip_step: bool | None = None

    def __post_init__(self) -> None:
        wrong = ""
        if odd := odd_number(self, ("fraction", "frequency", "end")):
            wrong = odd
        elif self.grow not in ("gradient", "random"):
            wrong = f"grow is 'gradient' or 'random', not {self.grow!r}"
        elif self.start not in ("random", "criterion"):
            wrong = f"start is 'random' or 'criterion', not {self.start!r}"
        elif not 0 < self.fraction < 1:
            wrong = f"fraction lies between 0 and 1, not at {self.fraction:g}"
        elif not 0 < self.end <= 1:
            wrong = f"end is a share of the training from 0 to 1, not {self.end:g}"
        elif self.unit not in ("steps", "epochs") or self.frequency <= 0:
            wrong = f"frequency is a positive number of steps or epochs, not {self.frequency:g} {self.unit}"
        if wrong:
            raise UsageError(
                "Regrow(...)", wrong, "no exchange could be made with it", "correct the value"
            )

    @property
    def skips(self) -> bool:
        """Whether an exchange takes the place of the optimizer's step."""
        return self.grow == "gradient" if self.skip_step is None else self.skip_step

    def fraction_at(self, step: float, length: float) -> float:
        """Share of the kept weights that is exchanged at ``step`` of a training of ``length``."""
        last = self.end * length
        if step > last:
            return 0.0
        return (
            self.fraction / 2 * (1 + math.cos(math.pi * step / last))
            if self.anneal
            else self.fraction
        )


@dataclass(frozen=True)
class TopKast:
    r"""Run the network with the best weights A, and train a superset B of them.

    Both are chosen anew every ``frequency``, A by the recipe's target, B with ``extra`` more. What is
    in B but not in A takes no part in the forward pass, yet its values learn; it is pulled to zero
    harder than A, by the optimizer's weight decay over the density, so that A settles. What is in
    neither keeps its value and is left alone.

    **formula** :math:`A = \mathrm{top}_D |w|`, :math:`B = \mathrm{top}_{D+M} |w|`; decay
    :math:`\lambda` on A, :math:`\lambda / D` on :math:`B \setminus A`, 0 elsewhere
    **Shapes** that of the weight
    **Units** ``frequency`` in ``unit``; ``extra`` a share of the weight
    **Needs** an optimizer; its ``weight_decay`` is :math:`\lambda`
    **Source** Jayakumar et al., arXiv 2106.03517
    **Differs** all values stay on the device of the weight, not in the host's memory; momenta and
    Adam moments outside B are zeroed at every step

    Args:
        extra: M. With groups, at least one more group in every pool.
        frequency: Time between two choices.
        unit: Of the frequency: ``"steps"`` or ``"epochs"``.

    Example:
        >>> TopKast(extra=0.1).frequency
        100
    """

    extra: float = 0.1
    frequency: float = 100
    unit: str = "steps"

    def __post_init__(self) -> None:
        wrong = ""
        if odd := odd_number(self, ("extra", "frequency")):
            wrong = odd
        elif not 0 < self.extra < 1:
            wrong = f"extra is a share between 0 and 1, not {self.extra:g}"
        elif self.unit not in ("steps", "epochs") or self.frequency <= 0:
            wrong = f"frequency is a positive number of steps or epochs, not {self.frequency:g} {self.unit}"
        if wrong:
            raise UsageError(
                "TopKast(...)", wrong, "no superset could be made with it", "correct the value"
            )


@dataclass(frozen=True)
class Exchange:
    """What one exchange does to the groups of one weight.

    Args:
        kept: Flags after it, ``(pools, groups)``.
        moved: How many groups were dropped; as many were grown.
        again: How many of them came back at once.
    """

    kept: Tensor
    moved: int
    again: int


def exchange(kept: Tensor, scores: Tensor, promise: Tensor, fraction: float) -> Exchange:
    """Drop the lowest scores among the kept groups, and grow the most promising others.

    What is dropped is chosen over the whole weight; each pool grows as many as it lost. A full pool
    has nothing to grow, so it drops nothing.

    Args:
        kept: Which groups are kept, ``(pools, groups)``.
        scores: Larger is better, of kept groups.
        promise: Larger is better, of all others.
        fraction: Share of the kept groups, outside full pools, that is exchanged.

    Example:
        >>> import torch
        >>> kept = torch.tensor([[True, True, True, False, False]])
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.0]])
        >>> promise = torch.tensor([[9.0, 0.0, 9.0, 1.0, 2.0]])
        >>> exchange(kept, scores, promise, 0.4).kept.int().tolist()
        [[1, 0, 1, 0, 1]]
    """
    full = kept.all(1, keepdim=True)
    movable = kept & ~full
    count = int(fraction * int(movable.sum()) + 1e-9)
    if not count:
        return Exchange(kept, 0, 0)
    rank = scores.masked_fill(~kept, -math.inf).masked_fill(full, math.inf)
    stay = keep_top(rank.reshape(1, -1), int(kept.sum()) - count).reshape_as(kept)
    hope = promise.masked_fill(stay, -math.inf)
    lost = kept.sum(1) - stay.sum(1)
    born = keep_top(hope, count if len(kept) == 1 else lost)
    return Exchange(stay | born, count, int((born & kept).sum()))


#: Ways for pruned weights to come back during training, by the names of recipe files.
REGROWTHS: dict[str, type[Regrow | TopKast]] = {"exchange": Regrow, "topkast": TopKast}
