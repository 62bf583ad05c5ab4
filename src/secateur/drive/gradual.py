"""Gradual pruning inside a training loop: ``step()`` after ``optimizer.step()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.core.batches import Batch, Data, as_data, default_loss, evaluating, take, to_device
from secateur.core.errors import NeedsData, UsageError
from secateur.core.facts import Facts, LayerFacts, environment
from secateur.core.masks import Masks
from secateur.core.slots import Slot, device_of, weights
from secateur.drive.decide import (
    allocate,
    group_scores,
    items,
    probe_for,
    score,
    select,
    smoothed_parts,
)
from secateur.drive.held import Held, attach_, detach_, masks_of
from secateur.drive.money import money, uses
from secateur.drive.plan import note_left_out, plan, require_finite, require_something
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe
from secateur.drive.recipe_file import to_plain
from secateur.schedule import Schedule, due, share_at
from secateur.stats import Stat, Stats, collect, stream_gradients


class Gradual:
    """Prunes a model while somebody else trains it.

    Masks are buffers on the model; pruned weights, their momenta and Adam moments are set to zero
    after every step, so weight decay and momentum cannot wake them. Masks only change when the
    schedule says so; a pruned weight comes back only if the schedule is cyclic.

    Gradients that a criterion needs are read just before each optimizer step. Statistics of inputs
    or of single samples are measured on ``data`` at each mask update.

    Args:
        model: Trained in place by the caller.
        optimizer: The caller's optimizer.
        recipe: Its schedule counts steps or epochs.
        data: For criteria that need data at mask updates.
        steps_per_epoch: Needed when the schedule counts epochs.

    Example:
        >>> from secateur.core.budget import Target
        >>> from secateur.schedule import Polynomial
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> recipe = Recipe(target=Target("sparsity", 0.75), schedule=Polynomial(0, 8, 2))
        >>> pruner = Gradual(net, optimizer, recipe)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruned = pruner.finalize()
        >>> round(pruned.facts.sparsity, 2), "0.weight_mask" in net.state_dict()
        (0.75, False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        *,
        data: Data | Any = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        if recipe.schedule.unit == "rounds":
            raise UsageError(
                f"Gradual(schedule={type(recipe.schedule).__name__})",
                "its unit is rounds",
                "inside a training loop time is counted in steps or epochs",
                "write e.g. Polynomial(begin=0, end=1000, frequency=100)",
            )
        if recipe.schedule.unit == "epochs" and not steps_per_epoch:
            raise UsageError(
                "Gradual(...) with a schedule in epochs",
                "steps_per_epoch is not given",
                "the pruner only sees steps",
                "pass steps_per_epoch=len(loader)",
            )
        if recipe.repairs or recipe.rounding is not None:
            raise UsageError(
                "Gradual(...) with weight-wise repairs or a rounding",
                ", ".join(
                    type(part).__name__ for part in (*recipe.repairs, recipe.rounding) if part
                ),
                "training itself repairs the weights, and would undo a rounding at the next step",
                "leave them out, or use prune() with a schedule in rounds",
            )
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self._data = as_data(data)
        self._per_epoch = steps_per_epoch or 1
        self._plan = plan(model, recipe)
        require_something(self._plan, recipe)
        require_finite(model)
        self._slots: list[Slot] = self._plan.chosen
        self._stats = Stats(recipe.seed)
        self.steps = 0
        self._share = 0.0
        self.facts = Facts(recipe=to_plain(recipe), fingerprint=recipe.fingerprint())
        self.facts.environment = environment()
        note_left_out(self.facts, self._plan)
        self._streamed, self._measured = self._split_needs()
        already = masks_of(model)
        fresh = {n: m for n, m in _ones(model, self._slots).items() if n not in already}
        attach_(model, Masks(fresh))
        self._held = Held(model, optimizer)
        self._stream = stream_gradients(optimizer, model, self._slots, self._streamed, self._stats)
        self._uses = self._count_uses()
        if not self._streamed:  # a schedule may start before the first step
            self._maybe_update()

    def _split_needs(self) -> tuple[list[Stat], list[Any]]:
        needs: list[Any] = list(self.recipe.criterion.needs)
        streamed = [
            n for n in needs if getattr(n, "source", "") == "gradients" and n.samples is None
        ]
        measured = [n for n in needs if n not in streamed]
        assert self.recipe.target is not None
        probing = self.recipe.allocation.needs_probe or self.recipe.target.unit == "macs"
        if (measured or probing) and (self._data is None or self._data.train is None):
            raise NeedsData(
                f"Gradual with {type(self.recipe.criterion).__name__} and "
                f"{type(self.recipe.allocation).__name__}",
                "no data was given",
                "they measure the network at every mask update",
                "pass data=, the training batches",
            )
        return streamed, measured

    def _count_uses(self) -> dict[str, float]:
        assert self.recipe.target is not None
        if self.recipe.target.unit != "macs" or self._data is None:
            return {}
        return uses(self.model, self._plan.slots, self._data.sample()[0])

    @property
    def time(self) -> float:
        """Time in the schedule's unit."""
        epochs = self.recipe.schedule.unit == "epochs"
        return self.steps / self._per_epoch if epochs else float(self.steps)

    @property
    def masks(self) -> Masks:
        """The masks of this moment."""
        return masks_of(self.model)

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step, update the masks if they are due, and hold them."""
        self.steps += 1
        self._held.hold_()
        self._maybe_update()

    def _maybe_update(self) -> None:
        schedule, time = self.recipe.schedule, self.time
        if schedule.unit == "epochs":
            # A frequency in epochs need not be a whole number of steps: the first step past it counts.
            before = (self.steps - 1) / self._per_epoch
            inside = schedule.begin <= time and before < schedule.end
            ticked = _ticks(schedule, time) > _ticks(schedule, before)
            now = inside and (ticked or before < schedule.begin)
        else:
            now = due(schedule, time)
        late = time >= schedule.end and self._share < 1
        # Whether anything is due does not depend on the target; at share 0 nothing is.
        if (now or late) and share_at(schedule, time, 0.5) > 0:
            self._update(time)

    @torch.no_grad()
    def _update(self, time: float) -> None:
        recipe, slots = self.recipe, self._slots
        found = weights(self.model, slots)
        stats = self._measure()
        before = masks_of(self.model)
        prior = None if recipe.schedule.cyclic else before
        groups = {}
        for weight in found:
            old = prior[weight.name] if prior is not None else None
            groups[weight.name] = group_scores(score(weight, recipe, stats), weight, recipe, old)
        purse = money(self.model, found, recipe, self._uses)
        share = share_at(recipe.schedule, time, purse.sparsity)
        probe = None
        if recipe.allocation.needs_probe:
            assert self._data is not None
            probe = probe_for(self.model, found, recipe, groups, mean_loss(self.model, self._data))
        choice = items(found, slots, recipe, groups, purse.costs)
        levels = allocate(choice, recipe, purse.at(share, probe))
        masks = Masks({w.name: select(w, recipe, groups[w.name], levels[w.name]) for w in found})
        attach_(self.model, masks)
        self._held.refresh()
        self._held.hold_()
        self._share = share
        dropped, grown = before.diff(masks)
        self.facts.history.append(
            {
                "step": self.steps,
                "sparsity": masks.sparsity,
                "dropped": dropped.kept,
                "grown": grown.kept,
            }
        )

    def _measure(self) -> Stats:
        if self._streamed and not self._stats.names():
            raise NeedsData(
                f"Gradual with {type(self.recipe.criterion).__name__}",
                f"no gradient was seen in {self.steps} steps",
                "the criterion reads parameter.grad just before every optimizer step",
                "call loss.backward() before optimizer.step(), and train the pruned weights",
            )
        if not self._measured:
            return self._stats
        assert self._data is not None
        fresh = collect(
            self.model, self._slots, self._measured, self._data.sample(), loss=self._data.loss
        )
        merged = fresh.merge(self._stats)
        merged.memory, merged.seed = self._stats.memory, self._stats.seed
        merged.keep_values(fresh)
        return merged

    def finalize(self, *, early: bool = False) -> Pruned:
        """End: remove the mask buffers, keep the zeros, and return the result with its facts.

        Args:
            early: Accept a schedule that has not reached its end.

        Raises:
            UsageError: The schedule has not reached its end, so the target is missed.
        """
        if self._share < 1 and not early:
            raise UsageError(
                f"finalize() at {self.recipe.schedule.unit[:-1]} {self.time:g}",
                f"the schedule ends at {self.recipe.schedule.end:g}; {100 * self._share:.0f} % of the "
                "target is reached",
                "training ended before pruning did, or step() was not called",
                "train longer, shorten the schedule, or call finalize(early=True)",
            )
        self._held.hold_()
        self._stream.remove()
        masks = detach_(self.model)
        self.facts.layers = [
            LayerFacts(name, tuple(mask.shape), mask.numel(), int(mask.sum()))
            for name, mask in masks.items()
        ]
        return Pruned(self.model, masks, self.facts)

    def state_dict(self) -> dict[str, Any]:
        """Position in the schedule and streamed sums; the masks are in the model's ``state_dict()``."""
        return {
            "steps": self.steps,
            "share": self._share,
            "fingerprint": self.recipe.fingerprint(),
            "stats": self._stats.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run: load the model's (masks and all) and optimizer's state first.

        Raises:
            UsageError: The state belongs to another recipe.
        """
        if state["fingerprint"] != self.recipe.fingerprint():
            raise UsageError(
                f"resuming recipe {self.recipe.fingerprint()}",
                f"the state was saved by recipe {state['fingerprint']}",
                "another recipe would prune differently from here on",
                "resume with the recipe of the run",
            )
        self.steps, self._share = int(state["steps"]), float(state["share"])
        parts = [*self._streamed, *smoothed_parts(self.recipe.criterion)]
        keys = [(part, slot.name) for part in parts for slot in self._slots]
        self._stats.load_state_dict(state["stats"], keys)
        self._held.refresh()


def _ticks(schedule: Schedule, time: float) -> int:
    return int((time - schedule.begin) / schedule.frequency + 1e-9)


def _ones(model: nn.Module, slots: list[Slot]) -> dict[str, torch.Tensor]:
    return {s.name: torch.ones_like(s.tensor(model), dtype=torch.bool) for s in slots}


def mean_loss(model: nn.Module, data: Data, batches: list[Batch] | None = None) -> Any:
    """A function that measures the mean calibration loss of ``model`` as it is."""
    sample = batches if batches is not None else take(data.sample(), 64)
    moved = [to_device(b, device_of(model)) for b in sample]
    loss = data.loss or default_loss

    def measure() -> float:
        with evaluating(model), torch.no_grad():
            return sum(float(loss(model, b)) for b in moved) / len(moved)

    return measure
