"""Stage 2 of dynamic structure pruning: which input channels each group of filters still reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, UsageError
from secateur.core.facts import Facts


@dataclass(frozen=True)
class Branches:
    """One convolution as groups of filters, each with the input channels that it reads.

    Args:
        groups: ``(filters,)`` the group of each filter.
        keep: ``(groups, channels)``, True where the group reads the channel.
        filters: ``(filters,)``, False for filters that go altogether.

    Example:
        >>> branches = Branches(torch.tensor([0, 1]), torch.tensor([[True, False], [True, True]]),
        ...                     torch.tensor([True, True]))
        >>> branches.kernels().tolist()
        [[True, False], [True, True]]
    """

    groups: Tensor
    keep: Tensor
    filters: Tensor

    def kernels(self) -> Tensor:
        """``(filters, channels)``, True where a kernel stays."""
        return self.keep[self.groups] & self.filters[:, None]


def learned_branches(facts: Facts) -> dict[str, Branches]:
    """What group learning has cut, by the names of the weights, as the facts of its result hold it.

    Args:
        facts: Of the network that :meth:`~secateur.Learned.harden` or ``learn_masks`` gave, or that
            was loaded from its bundle.

    Raises:
        UsageError: They are those of something else.

    Example:
        >>> plain = {"groups": [0, 1], "keep": [[True, False], [True, True]], "filters": [True, True]}
        >>> found = learned_branches(Facts(measures={"groups": {"0.weight": plain}}))
        >>> found["0.weight"].kernels().tolist()
        [[True, False], [True, True]]
    """
    groups = facts.measures.get("groups")
    if not isinstance(groups, Mapping):
        raise UsageError(
            "the branches of a pruned network",
            f"its facts know of {', '.join(facts.measures) or 'nothing'}, and of no groups",
            "groups of filters are learned by GroupLearning",
            "give the facts of a network that was pruned with it",
        )
    kinds = {"groups": torch.long, "keep": torch.bool, "filters": torch.bool}
    return {
        name: Branches(*(torch.tensor(plain[key], dtype=kind) for key, kind in kinds.items()))
        for name, plain in groups.items()
    }


def branches_at(weight: Tensor, groups: Tensor, *, count: int, beta: float) -> Branches:
    r"""The channels that hold all but ``beta`` of each group's energy.

    **formula** :math:`e_{gc} = \sum_{f \in g} W_{fc}^2 / \sum_c (\cdot)`; the channels of smallest
    energy whose sum is below β go
    **Shapes** weight ``(filters, channels, ...)``, result ``(groups, channels)``
    **Units** share of the energy
    **Needs** nothing
    **Source** Park et al., arXiv 2303.09736
    **Differs** ties go to the lower channel, one channel of each group stays, and β = 0 cuts
    nothing; the source cuts whole groups then

    Args:
        weight: Of a convolution, torch order.
        groups: The group of each filter.
        count: How many groups there may be; one without filters reads nothing.
        beta: Share of the energy that may go.

    Example:
        >>> w = torch.tensor([[1.0, 3.0], [2.0, 2.0]])[..., None, None]
        >>> branches_at(w, torch.tensor([0, 1]), count=2, beta=0.2).keep.tolist()
        [[False, True], [True, True]]
    """
    energy = weight.detach().double().flatten(2).square().sum(2)  # (filters, channels)
    member = torch.nn.functional.one_hot(groups, count).to(energy)
    per_group = member.T @ energy
    keep = _all_but(per_group, beta) & (member.sum(0)[:, None] > 0)
    return Branches(groups, keep, torch.ones(len(groups), dtype=torch.bool, device=groups.device))


def without_filters(branches: Branches, weight: Tensor, beta: float) -> Branches:
    """Also cut the filters of smallest energy, by the same rule over the whole convolution.

    Example:
        >>> w = torch.tensor([[0.1], [1.0]])[..., None, None]
        >>> both = Branches(torch.tensor([0, 0]), torch.ones(1, 1, dtype=torch.bool),
        ...                 torch.ones(2, dtype=torch.bool))
        >>> without_filters(both, w, 0.1).filters.tolist()
        [False, True]
    """
    energy = weight.detach().double().flatten(1).square().sum(1)
    return Branches(branches.groups, branches.keep, _all_but(energy[None], beta)[0])


def _all_but(energy: Tensor, beta: float) -> Tensor:
    """Per row, True for what stays when the smallest entries of sum below ``beta`` go."""
    order = energy.sort(dim=1, descending=True, stable=True)
    share = order.values / order.values.sum(1, keepdim=True).clamp(min=1e-300)
    # Sum of the entry itself and all smaller ones.
    below = share.flip(1).cumsum(1).flip(1) < beta
    below[:, 0] = False
    keep = torch.ones_like(below)
    return keep.scatter(1, order.indices, ~below)


def energy_prune(
    weights: Mapping[str, Tensor],
    groups: Mapping[str, Tensor],
    costs: Mapping[str, float],
    *,
    target: float,
    count: int,
    filters: frozenset[str] = frozenset(),
) -> tuple[dict[str, Branches], float]:
    """Find the one β, by bisection, at which ``target`` of the cost of all convolutions is gone.

    Args:
        weights: Convolutions by name.
        groups: The group of each of their filters.
        costs: Cost of each whole convolution, e.g. its multiply-adds.
        target: Share of the cost to remove.
        count: Groups a convolution.
        filters: Convolutions of which whole filters may go as well.

    Returns:
        The branches by name, and β.

    Raises:
        BudgetError: Not even one channel a group is that cheap.

    Example:
        >>> w = {"c": torch.rand(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))}
        >>> ids = {"c": torch.arange(8) % 2}
        >>> found, beta = energy_prune(w, ids, {"c": 1.0}, target=0.5, count=2)
        >>> float(found["c"].kernels().float().mean())
        0.5
    """

    def cut(beta: float) -> tuple[dict[str, Branches], float]:
        found = {}
        for name, weight in weights.items():
            found[name] = branches_at(weight, groups[name], count=count, beta=beta)
            if name in filters:
                found[name] = without_filters(found[name], weight, beta)
        left = sum(costs[n] * float(b.kernels().double().mean()) for n, b in found.items())
        return found, 1 - left / sum(costs.values())

    most = cut(1.0)[1]
    if most < target:
        raise BudgetError(
            f"removing {target:.0%} of the multiply-adds",
            f"with one channel left a group, {most:.1%} are gone",
            "every group of filters reads at least one channel",
            "lower the target, or let whole filters go (filters=)",
        )
    low, high = 0.0, 1.0
    for _ in range(40):  # far below the energy of one channel
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle)[1] >= target else (middle, high)
    return cut(high)[0], high
