"""How stable pruning is: accuracy before and after each event, and which groups an event hits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_network
from secateur.core.batches import as_data
from secateur.core.errors import NeedsData, UsageError
from secateur.core.masks import Masks
from secateur.core.weight import Weight
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.regrow import Regrow
from secateur.experiments.reading import Reading, read
from secateur.score import Criterion, Magnitude, Random
from secateur.score.criterion import Needs
from secateur.stats import Stats

TARGETS = ("smallest", "random", "largest")


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
        require_network("EventLog(model, ...)", model)
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

    Its state is that of the pruner and the events so far, so a resumed loop logs them all.

    Measuring before an event needs the weights of before: they are copied at every step (not the
    whole network: only what is pruned), and put back for the measurement. An exchange that takes the
    place of the optimizer's step (RigL) is measured against the end of the step before.

    Args:
        pruner: Of the training loop.
        log: About the same network.

    Example:
        >>> from secateur import Recipe, Target
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
        >>> watched.finalize().masks
        Masks(1 weights, 16 of 32 kept)
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
        regrow = pruner.recipe.regrow
        self._exchanges = isinstance(regrow, Regrow) and regrow.skips
        self._last: tuple[Masks, dict[str, Tensor]] = Masks({}), {}
        self._remember()

    def _remember(self) -> None:
        if self._exchanges:
            self._last = self._copy()

    def _copy(self) -> tuple[Masks, dict[str, Tensor]]:
        masks = self.pruner.masks
        return masks, {n: self.pruner.model.get_parameter(n).detach().clone() for n in masks}

    @torch.no_grad()
    def step(self) -> None:
        """Count one step of the optimizer; measure if the masks changed."""
        old_masks, old = self._copy()
        if self._exchanges and old_masks != self._last[0]:  # in place of the optimizer's step
            old_masks, old = self._last
        self.pruner.step()
        if self.pruner.masks != old_masks:
            self._measure(old_masks, old)
        self._remember()

    def _measure(self, old_masks: Masks, old: Mapping[str, Tensor]) -> None:
        _, new = self._copy()
        for name, value in old.items():
            parameter = self.pruner.model.get_parameter(name)
            parameter.copy_(value.masked_fill(~old_masks[name], 0))  # as the step held them
        before = self.log.reading()
        for name, value in new.items():
            self.pruner.model.get_parameter(name).copy_(value)
        self.log.events.append(Event(f"step {self.pruner.steps}", before, self.log.reading()))

    # What loops and checkpoints ask of a pruner.

    @property
    def model(self) -> nn.Module:
        """The network that is pruned."""
        return self.pruner.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The pruner's."""
        return self.pruner.optimizer

    @property
    def recipe(self) -> Recipe:
        """The pruner's."""
        return self.pruner.recipe

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.pruner.steps

    @property
    def masks(self) -> Masks:
        """The masks of this moment."""
        return self.pruner.masks

    @property
    def imminent(self) -> bool:
        """Whether masks may change at the next step."""
        return self.pruner.imminent

    def finalize(self, *, early: bool = False) -> Pruned:
        """As :meth:`secateur.Gradual.finalize`."""
        return self.pruner.finalize(early=early)

    def state_dict(self) -> dict[str, Any]:
        """The state of the pruner, and the events as plain values."""
        return {"pruner": self.pruner.state_dict(), "events": [asdict(e) for e in self.log.events]}

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """As :meth:`secateur.Gradual.require_fit`."""
        self.pruner.require_fit(state["pruner"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.pruner.load_state_dict(state["pruner"])
        self._remember()
        self.log.events[:] = [
            Event(e["label"], Reading(**e["before"]), Reading(**e["after"]))
            for e in state["events"]
        ]


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
        raise UsageError(
            f"target {target!r}", found, "no others are defined", "write one of the three"
        )
    size = criterion or Magnitude()
    return {"smallest": size, "random": Random(seed), "largest": Opposite(size)}[target]
