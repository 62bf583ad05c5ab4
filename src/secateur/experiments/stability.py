"""How stable pruning is: accuracy before and after each event, and damage that is taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import as_data
from secateur.core.errors import NeedsData, UsageError
from secateur.core.masks import Masks
from secateur.core.slots import Slot, weights
from secateur.core.weight import Weight
from secateur.drive.decide import group_scores, score, select
from secateur.drive.gradual import Gradual
from secateur.drive.plan import plan, require_something
from secateur.drive.recipe import Recipe
from secateur.experiments.reading import Reading, read
from secateur.pattern import Pattern, Rows
from secateur.score import Criterion, Magnitude, Random
from secateur.score.criterion import Needs
from secateur.stats import Stats, collect

TARGETS = ("smallest", "random", "largest")
NOISES = ("zero", "gaussian")


@dataclass(frozen=True)
class Event:
    """One pruning event.

    Args:
        label: What or when it was, e.g. ``"step 400"``.
        before: Right before the masks changed.
        after: Right after.

    Example:
        >>> Event("step 3", Reading(0.5), Reading(0.25)).instability
        0.5
    """

    label: str
    before: Reading
    after: Reading

    @property
    def instability(self) -> float:
        """``(before - after) / before`` of the accuracy; negative if pruning helped."""
        before, after = self.before.accuracy, self.after.accuracy
        assert before is not None
        assert after is not None
        if before == 0:
            return 0.0 if after == 0 else -math.inf
        return (before - after) / abs(before)


class EventLog:
    r"""Measures a network before and after each pruning event.

    **formula** :math:`(t_{pre} - t_{post}) / t_{pre}`, and its mean over the events
    **Shapes** one number an event
    **Units** none
    **Needs** test batches
    **Source** Bartoldson et al., arXiv 1906.03728

    Args:
        model: The network that is pruned.
        data: Measured on its test batches.
        read: Measures in another way: ``(model) -> Reading``.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> log = EventLog(net, [(torch.eye(2), torch.tensor([0, 1]))])
        >>> with log.event("one weight"):
        ...     _ = net.weight.data[1].zero_()
        >>> log.events[0].before.accuracy, log.events[0].after.accuracy, log.instability
        (1.0, 0.5, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        read: Callable[[nn.Module], Reading] | None = None,
    ) -> None:
        if data is None and read is None:
            raise NeedsData(
                "EventLog(...)", "neither data nor read", "accuracy is measured", "pass data="
            )
        self.model = model
        self._data, self._read = as_data(data), read
        self.events: list[Event] = []

    @contextmanager
    def event(self, label: str) -> Iterator[None]:
        """Measure around the block, in which masks change."""
        before = self.reading()
        yield
        self.events.append(Event(label, before, self.reading()))

    def reading(self) -> Reading:
        """Measure the network as it is now."""
        if self._read is not None:
            return self._read(self.model)
        found = read(self.model, self._data)
        _ = found.error  # refuses batches without targets now, not when the ratio is taken
        return found

    @property
    def instability(self) -> float:
        """Mean over the events; 0 without any."""
        found = [event.instability for event in self.events]
        return sum(found) / len(found) if found else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """Plain rows, for tables and CSV."""
        return [
            {
                "event": event.label,
                "accuracy_before": event.before.accuracy,
                "accuracy_after": event.after.accuracy,
                "loss_before": event.before.loss,
                "loss_after": event.after.loss,
                "instability": event.instability,
            }
            for event in self.events
        ]


class Watched:
    """A gradual pruner whose events are logged. Use it in the loop instead of the pruner.

    Measuring before an event needs the weights of before: they are copied at every step (not the
    whole network: only what is pruned), and put back for the measurement.

    Args:
        pruner: Of the training loop.
        log: About the same network.

    Example:
        >>> from secateur.core.budget import Target
        >>> from secateur.schedule import OneShot
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> recipe = Recipe(target=Target("sparsity", 0.5), schedule=OneShot(2, unit="steps"))
        >>> x = torch.randn(16, 4)
        >>> log = EventLog(net, [(x, x[:, :2].argmax(1))])
        >>> watched = Watched(Gradual(net, sgd, recipe), log)
        >>> for _ in range(3):
        ...     watched.step()
        >>> [event.label for event in log.events]
        ['step 2']
    """

    def __init__(self, pruner: Gradual, log: EventLog) -> None:
        if pruner.model is not log.model:
            raise UsageError(
                "Watched(pruner, log)",
                "they are about two networks",
                "the log measures the network that is pruned",
                "make EventLog with the pruner's model",
            )
        self.pruner, self.log = pruner, log

    @torch.no_grad()
    def step(self) -> None:
        """Count one step of the optimizer; measure if the masks changed."""
        names = list(self.pruner.masks)
        parameters = {name: self.pruner.model.get_parameter(name) for name in names}
        old_masks = self.pruner.masks
        old = {name: p.detach().clone() for name, p in parameters.items()}
        self.pruner.step()
        if self.pruner.masks == old_masks:
            return
        new = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(old[name].masked_fill(~old_masks[name], 0))  # as the step held them
        before = self.log.reading()
        for name, p in parameters.items():
            p.copy_(new[name])
        self.log.events.append(Event(f"step {self.pruner.steps}", before, self.log.reading()))


# -- which groups an event hits -------------------------------------------------------------------


@dataclass(frozen=True)
class Opposite:
    r"""The reverse of a criterion: what it would keep longest goes first.

    **formula** :math:`-s`
    **Shapes** that of the weight
    **Units** those of the inner criterion
    **Needs** what the inner criterion needs
    **Source** the target "largest" of arXiv 1906.03728

    Example:
        >>> from secateur.core.weight import LINEAR
        >>> Opposite(Magnitude())(Weight("w", torch.tensor([[-2.0, 1.0]]), LINEAR), Stats())
        tensor([[-2., -1.]])
    """

    inner: Criterion

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def __call__(self, weight: Weight, stats: Stats) -> Tensor:
        return -self.inner(weight, stats)


def targeting(target: str, criterion: Criterion | None = None, *, seed: int = 0) -> Criterion:
    """A criterion whose lowest groups are the smallest, random, or the largest ones.

    Args:
        target: ``"smallest"``, ``"random"`` or ``"largest"``.
        criterion: Of size; by default magnitude.
        seed: Of the random scores.

    Example:
        >>> targeting("largest")
        Opposite(inner=Magnitude(p=1))
    """
    if target not in TARGETS:
        found = f"it is one of {', '.join(TARGETS)}"
        raise UsageError(f"target {target!r}", found, "", "write one of the three")
    size = criterion or Magnitude()
    return {"smallest": size, "random": Random(seed), "largest": Opposite(size)}[target]


# -- damage that is taken back ----------------------------------------------------------------------


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
        if not 0 < self.share < 1:
            wrong = f"share lies between 0 and 1, not {self.share:g}"
        elif self.noise not in NOISES:
            wrong = f"noise is one of {', '.join(NOISES)}, not {self.noise!r}"
        elif self.restore_after is not None and self.restore_after < 1:
            wrong = f"restore_after is 1 step or more, not {self.restore_after}"
        if wrong:
            raise UsageError("Damage(...)", wrong, "", "correct the value")
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
