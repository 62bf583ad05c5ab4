"""Linear mode connectivity: whether the straight line between two networks stays as good as its ends."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_count, require_network
from secateur.core.batches import as_data
from secateur.core.errors import NeedsData, UsageError
from secateur.drive.pruned import Pruned
from secateur.experiments.reading import read
from secateur.experiments.ticket_facts import TicketFacts
from secateur.formats import Bundle, read_bundle
from secateur.recover import BatchNorm

State = Mapping[str, Tensor]
Ends = State | nn.Module | Pruned | Bundle


@dataclass(frozen=True)
class Connectivity:
    """What was measured along the line from one network to another.

    Args:
        shares: How much of the second network is mixed in, 0 to 1.
        errors: Share of wrong answers at each point (or minus the user's metric).
        losses: Mean loss at each point; ``None`` where there is none.

    Example:
        >>> found = Connectivity((0.0, 0.5, 1.0), (0.1, 0.4, 0.2), (1.0, 3.0, 1.0))
        >>> round(found.barrier, 2), found.loss_barrier, found.connected()
        (0.25, 2.0, False)
    """

    shares: tuple[float, ...]
    errors: tuple[float, ...]
    losses: tuple[float | None, ...]

    @property
    def barrier(self) -> float:
        """How far the worst point lies above the mean of the two ends; at least 0."""
        return max(0.0, max(self.errors) - (self.errors[0] + self.errors[-1]) / 2)

    @property
    def loss_barrier(self) -> float | None:
        """The same for the loss."""
        losses = [loss for loss in self.losses if loss is not None]
        if len(losses) < len(self.losses):
            return None
        return max(0.0, max(losses) - (losses[0] + losses[-1]) / 2)

    def connected(self, most: float = 0.02) -> bool:
        """Whether the barrier stays below ``most``, two points as in the paper."""
        return self.barrier < most


def connectivity(
    model: nn.Module, a: Ends, b: Ends, data: Any, *, points: int = 11, reestimate: bool = False
) -> Connectivity:
    r"""Measure networks along the straight line between two.

    Two trainings that start from one point and see the data in another order end in one linearly
    connected region if that point was late enough: rewinding there keeps lottery tickets winning.

    **formula** :math:`\max_\alpha E(w_\alpha) - \tfrac12 (E(w_0) + E(w_1))`,
    :math:`w_\alpha = (1 - \alpha) w_0 + \alpha w_1`
    **Shapes** a full ``state_dict`` each
    **Units** share of wrong answers
    **Needs** test data; training data to re-estimate BatchNorm
    **Source** Frankle et al., arXiv 1912.05671; re-estimation: Jordan et al., arXiv 2211.08403

    Args:
        model: The architecture; it is not changed.
        a: One end: a ``state_dict()``, a network, a pruned network or a bundle.
        b: The other.
        data: Measured on its test batches.
        points: Equally spaced, both ends included.
        reestimate: Measure BatchNorm statistics anew at every inner point, on ``data.train``: the
            variance of a mixture is too small in between, which looks like a barrier.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> x = torch.randn(16, 2)
        >>> connectivity(net, net, net, [(x, net(x).argmax(1))]).barrier
        0.0
    """
    require_network("connectivity(model, ...)", model)
    require_count("points", points, what="how many networks are measured", write="points=11")
    if points < 2:
        raise UsageError(
            f"points={points}",
            "fewer than two points",
            "a line has two ends",
            "ask for 2 points or more",
        )
    found = as_data(data)
    if found is None:
        raise NeedsData("connectivity", "no data was given", "errors are counted", "pass data=")
    first, second = _state_of(a), _state_of(b)
    spare = copy.deepcopy(model)
    _require_same(spare.state_dict(), first, second)
    shares = tuple(index / (points - 1) for index in range(points))
    errors, losses = [], []
    for share in shares:
        spare.load_state_dict(_between(first, second, share))
        if reestimate and 0 < share < 1:
            BatchNorm().reestimate_(spare, found.sample())
        reading = read(spare, found)
        errors.append(reading.error)
        losses.append(reading.loss)
    return Connectivity(shares, tuple(errors), tuple(losses))


def level_lines(
    model: nn.Module, found: TicketFacts, data: Any, *, points: int = 5
) -> list[Connectivity]:
    r"""Measure the line from each level of a ticket search to the level before it (dense at first).

    Iterative pruning finds tickets that win as long as successive levels lie in one linearly
    connected valley. BatchNorm statistics are measured anew at every inner point.

    **formula** :func:`connectivity` of :math:`w_{i-1}` and :math:`w_i`
    **Shapes** a line a level
    **Units** share of wrong answers
    **Needs** test and training data, and the folder of the search
    **Source** Paul et al., arXiv 2210.03044

    Args:
        model: The architecture; it is not changed.
        found: The search.
        data: That of the search.
        points: Of each line, both ends included.

    Example:
        >>> import tempfile
        >>> from secateur.experiments import TicketPlan, Training, find_ticket
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> batches = [(x, x[:, :2].argmax(1))]
        >>> build = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> how = TicketPlan(levels=(0.36, 0.79), training=Training(epochs=2))
        >>> found = find_ticket(build, data=batches, folder=tempfile.mkdtemp(), plan=how)
        >>> lines = level_lines(build(), found, batches)
        >>> len(lines), len(lines[0].errors), lines[0].barrier >= 0
        (2, 5, True)
    """
    stages = (found.dense, *found.levels)
    ends = [read_bundle(stage.folder) for stage in stages]
    return [
        connectivity(model, a, b, data, points=points, reestimate=True)
        for a, b in itertools.pairwise(ends)
    ]


def _between(a: State, b: State, share: float) -> dict[str, Tensor]:
    mixed = {}
    for name, value in a.items():
        other = b[name].to(value.device)
        # Both ends exactly: 0 * inf and rounding would make them other networks.
        if share == 1:
            mixed[name] = other
        elif share == 0 or not value.dtype.is_floating_point:
            mixed[name] = value
        else:
            mixed[name] = torch.lerp(value, other, share)
    return mixed


def _state_of(end: Ends) -> State:
    if isinstance(end, Pruned):
        return end.model.state_dict()
    if isinstance(end, Bundle):
        return end.tensors
    return end.state_dict() if isinstance(end, nn.Module) else end


def _require_same(own: State, a: State, b: State) -> None:
    for name in {**own, **a, **b}:
        shapes = [tuple(s[name].shape) if name in s else None for s in (own, a, b)]
        if len(set(shapes)) > 1:
            raise UsageError(
                "connectivity of two networks",
                f"{name!r} has the shapes {shapes[1]} and {shapes[2]}, the model's is {shapes[0]}",
                "only networks of one architecture can be mixed",
                "give the ends of one model (detach_ takes masks off)",
            )
