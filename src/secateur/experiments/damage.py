"""Temporary damage to filters, and their exact restoration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import (
    odd_number,
    require_count,
    require_kind,
    require_network,
    require_part,
)
from secateur.core.batches import as_data
from secateur.core.errors import NeedsData, UsageError
from secateur.core.masks import Masks
from secateur.core.slots import Slot, weights
from secateur.core.weight import Weight
from secateur.drive.decide import group_scores, score, select
from secateur.drive.plan import plan, require_something
from secateur.drive.recipe import Recipe
from secateur.experiments.stability import targeting
from secateur.pattern import Pattern, Rows
from secateur.score import Criterion, Magnitude
from secateur.stats import Stats, collect

NOISES = ("zero", "gaussian")


@dataclass(frozen=True)
class Damage:
    """What is damaged, how, and for how long.

    Args:
        share: Of the groups of every weight, 0 to 1.
        target: Which: ``"smallest"``, ``"random"`` or ``"largest"``.
        noise: ``"zero"``, or ``"gaussian"`` with the standard deviation of the damaged row.
        restore_after: Steps after which the old values come back; ``None`` for never.
        pattern: What a group is; by default a filter.
        criterion: What size means.

    Example:
        >>> Damage(share=0.1, target="largest", restore_after=50).noise
        'zero'
    """

    share: float = 0.1
    target: str = "smallest"
    noise: str = "zero"
    restore_after: int | None = None
    pattern: Pattern = field(default_factory=Rows)
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        wrong = ""
        if odd := odd_number(self, ("share",)):
            wrong = odd
        elif not 0 < self.share < 1:
            wrong = f"share lies between 0 and 1, not {self.share:g}"
        elif self.noise not in NOISES:
            wrong = f"noise is one of {', '.join(NOISES)}, not {self.noise!r}"
        if wrong:
            raise UsageError(
                "Damage(...)", wrong, "nothing can be measured with it", "correct the value"
            )
        if self.restore_after is not None:
            what, write = "steps until it is restored", "restore_after=50"
            require_count("Damage(restore_after=...)", self.restore_after, what=what, write=write)
        what, write = "a pattern", "e.g. Rows()"
        require_part("Damage(pattern=...)", self.pattern, ("fold",), what=what, write=write)
        what, write = "a criterion", "e.g. Magnitude()"
        require_part("Damage(criterion=...)", self.criterion, ("needs",), what=what, write=write)
        targeting(self.target)


class Disturbance:
    """Strikes groups of weights in a training loop, and restores them exactly after some steps.

    While they are out, the struck entries hold zeros (or new noise at every step) and their
    optimizer state is zero, as if they were pruned. What comes back is what they were, to the bit.

    Args:
        model: Trained by the caller.
        optimizer: The caller's.
        damage: What to do.
        data: For criteria that are measured on data.
        seed: Of random targets and noise; each strike has its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> old = net[0].weight.detach().clone()
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> disturbance = Disturbance(net, sgd, Damage(share=0.25, restore_after=2))
        >>> struck = disturbance.strike_()
        >>> int((net[0].weight == 0).all(1).sum())
        2
        >>> disturbance.step(); disturbance.step()
        >>> torch.equal(net[0].weight, old)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        damage: Damage,
        *,
        data: Any = None,
        seed: int = 0,
    ) -> None:
        require_network("Disturbance(model, ...)", model)
        require_kind("damage", damage, Damage, what="a Damage", write="Damage(share=0.25)")
        self.model, self.optimizer, self.damage, self.seed = model, optimizer, damage, seed
        self._recipe = Recipe(pattern=damage.pattern)
        found = plan(model, self._recipe)
        require_something(found, self._recipe)
        self._slots: list[Slot] = found.chosen
        self._data = as_data(data)
        self._out: Masks | None = None
        self._old: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        self._steps = self.strikes = 0

    @property
    def struck(self) -> Masks | None:
        """What is damaged now, as masks that are False there; ``None`` if nothing is."""
        return self._out

    @torch.no_grad()
    def strike_(self) -> Masks:
        """Choose groups and damage them, in place.

        Returns:
            Masks that are False where it struck.

        Raises:
            UsageError: The last strike was not restored yet.
        """
        if self._out is not None and self.damage.restore_after is not None:
            raise UsageError(
                "strike_()",
                f"the last strike is {self._steps} of {self.damage.restore_after} steps old",
                "two overlapping strikes could not both be restored",
                "strike again after it was restored, or call restore_()",
            )
        self.strikes, self._steps = self.strikes + 1, 0
        criterion = targeting(
            self.damage.target, self.damage.criterion, seed=self.seed + self.strikes
        )
        found = weights(self.model, self._slots)
        ranking = Recipe(criterion, self.damage.pattern, seed=self.seed)
        stats, kept = self._stats(criterion), {}
        for weight in found:
            groups = group_scores(score(weight, ranking, stats), weight, ranking, None)
            kept[weight.name] = select(weight, ranking, groups, self.damage.share)
        self._out = Masks(kept)
        self._old = {w.name: w.value.clone() for w in found}
        self._spread = {w.name: w.like(_spread(w)) for w in found}
        self._damage_()
        return self._out

    @torch.no_grad()
    def step(self) -> None:
        """After each step of the optimizer: hold the damage, or take it back if it is time."""
        if self._out is None:
            return
        self._steps += 1
        if self.damage.restore_after is not None and self._steps >= self.damage.restore_after:
            self.restore_()
        else:
            self._damage_()

    @torch.no_grad()
    def restore_(self) -> None:
        """Take the damage back now: struck entries get their old values, all others stay."""
        if self._out is None:
            return
        for name, mask in self._out.items():
            parameter = self.model.get_parameter(name)
            parameter.copy_(torch.where(mask, parameter, self._old[name]))
            self._clear_state_(parameter, mask)
        self._out, self._old, self._spread = None, {}, {}

    def _damage_(self) -> None:
        assert self._out is not None
        for index, (name, mask) in enumerate(self._out.items()):
            parameter = self.model.get_parameter(name)
            if self.damage.noise == "zero":
                parameter.masked_fill_(~mask, 0)
            else:
                seed = 1_000_003 * (self.seed + self.strikes) + 1_009 * self._steps + index
                generator = torch.Generator().manual_seed(seed)  # on the CPU: equal everywhere
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(torch.where(mask, parameter, noise * self._spread[name]))
            self._clear_state_(parameter, mask)

    def _clear_state_(self, parameter: nn.Parameter, mask: Tensor) -> None:
        state: Mapping[str, Any] = {}
        if self.optimizer is not None:
            state = self.optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(~mask, 0)

    def _stats(self, criterion: Criterion) -> Stats:
        if not criterion.needs:
            return Stats(self.seed)
        if self._data is None:
            raise NeedsData(
                f"Disturbance with {type(criterion).__name__}",
                "no data was given",
                "the criterion is measured on training batches",
                "pass data=",
            )
        with torch.enable_grad():
            return collect(
                self.model, self._slots, criterion.needs, self._data.sample(), loss=self._data.loss
            )


def _spread(weight: Weight) -> Tensor:
    """Standard deviation of each row, spread over the row."""
    rows = weight.matrix()
    return rows.std(1, keepdim=True, correction=0).expand_as(rows)
