"""Filters removed while the network trains: ``step()`` after ``optimizer.step()``."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.arguments import require_kind
from secateur.core.batches import Data, as_data
from secateur.core.errors import NeedsData, UsageError
from secateur.core.facts import Facts, environment
from secateur.core.masks import Masks
from secateur.core.randomness import own_random
from secateur.core.slots import bare
from secateur.drive.money import uses
from secateur.drive.network import copy_of
from secateur.drive.pruned import Pruned
from secateur.drive.structural.cutting import as_batch, example_of, require_unmasked, widths_in
from secateur.drive.structural.pace import Pace, fingerprint_of, require_fit
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.recipe_file import to_plain
from secateur.drive.structural.removal import Removal, require_slots_alike, width_facts
from secateur.drive.structural.width_steps import BLOCK, counted
from secateur.drive.training import ranks
from secateur.drive.training.finetune import FineTune, Loop
from secateur.drive.training.recorder import Checkpoints
from secateur.drive.training.timing import is_due, require_open, require_same
from secateur.formats import Surgery
from secateur.formats.surgery_file import parse_surgery, surgery_text
from secateur.frontends import discover
from secateur.frontends.remembered import remember_, surgery_of
from secateur.frontends.surgery import replay_
from secateur.schedule import share_at
from secateur.structure import couple


class Shrinking:
    r"""Removes filters for good while somebody else trains the network.

    At every removal the network is traced, its groups are scored and allocated as in
    :func:`~secateur.shrink`, and parameters, buffers and the optimizer's momenta become smaller in
    place: an epoch gets faster as training goes on. Where widths come in multiples, a removal may take
    one step more than is due, but none goes beyond the target. Parameters and optimizer stay the
    same objects, so learning-rate schedules run on. Nothing is repaired; training does that. Every cut
    is tried on a copy first: widths that break the network stay as they are from then on, with a note.

    ``facts.history`` has one record a removal, ``facts.measures["epochs"]`` one an epoch, and
    ``facts.measures["training_macs"]`` the multiply-adds of the training against dense: those of a
    sample in the forward pass, summed over all steps. (The backward pass takes about twice as many,
    of dense and cut networks alike, so the share is that of the whole training.)

    **formula** at share *s* of the way a cost of :math:`C - s (C - C_{target})` is allocated;
    the training costs :math:`\sum_t M_t / (T M)` of dense, :math:`M_t` the multiply-adds at step *t*
    **Shapes** each cut axis has as many entries as are kept
    **Units** multiply-adds of one sample
    **Needs** what the criterion needs
    **Source** Roy et al., "Pruning Filters while Training", arXiv 2003.02800; IPLT, arXiv 1901.08455
    **Differs** the sources fix the share of filters; here a budget is met, and by default widths
    share it by rank

    Args:
        model: Trained in place by the caller.
        optimizer: The caller's optimizer.
        recipe: Its target is ``macs``, ``params`` or ``bytes``. ``recovery`` is not used.
        pace: When.
        example_inputs: As for :func:`~secateur.shrink`; by default the first batch of ``data``.
        data: For criteria that measure.

    Example:
        >>> from secateur.core.budget import Target
        >>> from secateur.schedule import Linear
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> recipe, pace = ShrinkRecipe(target=Target("macs", 0.5)), Pace(Linear(0, 4, 2))
        >>> shrinking = Shrinking(net, optimizer, recipe, pace=pace, example_inputs=torch.zeros(1, 8))
        >>> for _ in range(8):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     shrinking.step()
        >>> facts = shrinking.finalize().facts
        >>> net[0].out_features, [event["macs"] for event in facts.history]
        (16, [[320.0, 240.0], [240.0, 160.0]])
        >>> facts.measures["training_macs"]["share"]  # (2 * 320 + 2 * 240 + 4 * 160) / (8 * 320)
        0.6875
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: ShrinkRecipe,
        *,
        pace: Pace,
        example_inputs: Any = None,
        data: Data | Any = None,
    ) -> None:
        found = as_data(data)
        require_fit(model, ranks.bare_optimizer(optimizer), recipe, found)
        require_kind("Shrinking(pace=...)", pace, Pace, what="a Pace", write="e.g. pace=Pace()")
        pace.require_possible()
        self.model, self.optimizer = bare(model), ranks.bare_optimizer(optimizer)
        self.recipe, self.pace = recipe, pace
        self.facts = Facts(
            to_plain(recipe), fingerprint_of(recipe, pace), environment=environment()
        )
        for part in recipe.recovery:
            text = "training goes on and repairs what a cut breaks"
            self.facts.note("skipped", type(part).__name__, text)
        with own_random(self.model, recipe.seed):
            example = example_of(example_inputs, found)
            self._structure = couple(self.model, example)
            used = uses(self.model, discover(self.model), as_batch(example))
        for (name, axis), reason in self._structure.pinned.items():
            self.facts.note("pinned", f"{name}[{axis}]", reason)
        widths = widths_in(self._structure, recipe.scope)
        origin = {w.name: w.groups for w in widths}
        self._removal = Removal(recipe, example, used, origin, found, pace.prove_each)
        cost = self._removal.cost(self.model, self._structure)
        self._dense, self._limit = cost.dense, recipe.target.limit(cost.dense)
        flat = {w.name: torch.ones(w.groups) for w in self._removal.taking(self._structure)}
        if not flat:
            found_text = f"none of {len(self._structure.widths)} widths takes part"
            why = "; ".join(list(dict.fromkeys(self._structure.pinned.values()))[:3])
            raise UsageError(
                "Shrinking(...)", found_text, why, "see secateur inspect MODEL --structure"
            )
        self._removal.choose(self._structure, flat, cost, (self._limit,) * 2)  # can it be reached?
        self._dense_macs = self._macs = self._removal.macs(self.model)
        self._parameters = sum(p.numel() for p in self.model.parameters())
        self._surgery: Surgery | None = None  # of this training alone
        self._stuck: dict[str, str] = {}
        self._finalized = False
        self.steps, self._share, self._spent, self._before = 0, 0.0, 0.0, 0.0
        self.facts.measures |= {"epochs": [], "cutting_seconds": 0.0}

    @property
    def time(self) -> float:
        """Time in the schedule's unit."""
        epochs = self.pace.schedule.unit == "epochs"
        return self.steps / self.pace.per_epoch if epochs else float(self.steps)

    @property
    def macs(self) -> float:
        """Multiply-adds of one sample in a forward pass, now."""
        return self._macs

    @property
    def imminent(self) -> bool:
        """Whether filters may go at the next step."""
        return is_due(self.pace.schedule, self.steps + 1, self.pace.per_epoch)

    def step(self) -> None:
        """Count one optimizer step, and remove filters if they are due.

        Raises:
            UsageError: finalize() was called before.
        """
        require_open("step()", finalized=self._finalized, step=self.steps)
        self.steps += 1
        self._spent += self._macs
        if self.steps == 1:
            require_slots_alike(self.model, self.optimizer)
        if self.pace.steps_per_epoch and self.steps % self.pace.steps_per_epoch == 0:
            self._close_epoch()
        schedule, time_ = self.pace.schedule, self.time
        late = time_ >= schedule.end and self._share < 1
        if is_due(schedule, self.steps, self.pace.per_epoch) or late:
            share = share_at(schedule, time_, 1 - self._limit / self._dense)
            if share > self._share:
                self._remove_(share)

    def took(self, seconds: float) -> None:
        """Note the wall time of the epoch that has just ended.

        Raises:
            UsageError: No epoch has ended.
        """
        if not self.facts.measures["epochs"]:
            why = "epochs are counted by steps_per_epoch"
            raise UsageError("took(...)", "no epoch has ended", why, "call it after an epoch")
        self.facts.measures["epochs"][-1]["seconds"] = float(seconds)

    def _close_epoch(self) -> None:
        epochs = self.facts.measures["epochs"]
        steps = self.steps - (epochs[-1]["step"] if epochs else 0)
        mean = (self._spent - self._before) / steps
        epoch = self.steps / self.pace.per_epoch
        record = {"epoch": epoch, "step": self.steps, "macs": mean}
        epochs.append({**record, "share": mean / self._dense_macs if self._dense_macs else 1.0})
        self._before = self._spent

    def _remove_(self, share: float) -> None:
        begun = time.perf_counter()
        require_unmasked(f"removing filters at step {self.steps}", self.model)
        limits = self._dense - share * (self._dense - self._limit), self._limit
        with own_random(self.model, self.recipe.seed):
            done = self._removal.remove_(self.model, self.optimizer, limits, self._stuck)
        if done.surgery is not None:
            before = self._surgery
            self._surgery = done.surgery if before is None else before.then(done.surgery)
            remember_(self.model, done.surgery)
        self._pin(done.stuck)
        self._share, self._macs = share, done.event["macs"][1]
        record = {"step": self.steps, "time": self.time, "share": share}
        self.facts.history.append({**record, **done.event})
        self.facts.measures["cutting_seconds"] += time.perf_counter() - begun

    def _pin(self, stuck: Mapping[str, str]) -> None:
        """Widths that break the network stay as they are from here on."""
        self._stuck |= stuck
        for name, text in stuck.items():
            self.facts.note("pinned", name, text)

    def finalize(self, *, early: bool = False) -> Pruned:
        """End: the network as it is, with everything that was cut and the facts.

        Args:
            early: Accept a schedule that has not reached its end.

        Raises:
            UsageError: The schedule has not reached its end, or finalize() was called before.
        """
        require_open("finalize()", finalized=self._finalized, step=self.steps)
        if self._share < 1 and not early:
            raise UsageError(
                f"finalize() at {self.pace.schedule.unit[:-1]} {self.time:g}",
                f"the schedule ends at {self.pace.schedule.end:g}; {100 * self._share:.0f} % of the "
                "way is gone",
                "training ended before pruning did, or step() was not called",
                "train longer, shorten the schedule, or call finalize(early=True)",
            )
        self._finalized = True
        measures, unit = self.facts.measures, self.recipe.target.unit
        closed = measures["epochs"][-1]["step"] if measures["epochs"] else 0
        if self.pace.steps_per_epoch and closed < self.steps:
            self._close_epoch()
        reached = self.facts.history[-1]["cost"][1] if self.facts.history else self._dense
        align = self._told_align()
        measures["target"] = {"unit": unit, "dense": self._dense, "limit": self._limit,
                              "reached": reached, "align": align}  # fmt: skip
        if abs(reached - self._limit) > 0.02 * self._limit:
            why = "groups are whole filters or channels"
            if self._share < 1:
                why = f"the training ended after {100 * self._share:.0f} % of the way"
            text = f"asked for {self._limit:,.4g} {unit}, reached {reached:,.4g}: {why}"
            self.facts.note("target", "", text)
        count = sum(p.numel() for p in self.model.parameters())
        measures["parameters"] = [self._parameters, count]
        dense = self._dense_macs * self.steps
        share = self._spent / dense if dense else 1.0
        measures["macs"] = [self._dense_macs, self._macs]
        measures["training_macs"] = {"dense": dense, "spent": self._spent, "share": share}
        self.facts.widths = width_facts(self._structure, self._surgery)
        return Pruned(self.model, Masks({}), self.facts, surgery=surgery_of(self.model))

    def _told_align(self) -> int:
        """The finest steps of all removals; a note says why if they are finer than usual."""
        steps = {e["step"]: e["align"] for e in self.facts.history if e["removed"] and "align" in e}
        align = min(steps.values(), default=self.recipe.align or BLOCK)
        if align < BLOCK and not self.recipe.align:
            first = min(step for step, found in steps.items() if found == align)
            text = (
                f"{counted(align)} since step {first}, to meet the target. Runtimes are fastest "
                f"with multiples of {BLOCK}"
            )
            self.facts.note("widths", "", text)
        return align

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors: position, what was cut (as JSON text), and the history."""
        return {
            "steps": self.steps,
            "share": self._share,
            "spent": [self._spent, self._before],
            "fingerprint": self.facts.fingerprint,
            "surgery": surgery_text(self._surgery) if self._surgery is not None else "",
            "stuck": dict(self._stuck),
            "history": copy.deepcopy(self.facts.history),
            "epochs": copy.deepcopy(self.facts.measures["epochs"]),
            "cutting_seconds": self.facts.measures["cutting_seconds"],
        }

    def replay_(self, state: dict[str, Any]) -> None:
        """Cut the uncut model as the run had cut it that saved ``state``. Values are not restored.

        Raises:
            UsageError: The state belongs to another recipe, or the model has been cut otherwise.
        """
        require_same("recipe or pace", self.facts.fingerprint, state["fingerprint"])
        surgery = parse_surgery(state["surgery"].encode()) if state["surgery"] else None
        if surgery == self._surgery:
            return
        if self._surgery is not None or surgery is None:
            raise UsageError(
                "resuming from a saved state",
                f"this model has been cut since, at step {self.steps}",
                "removed filters do not come back",
                "build model, optimizer and Shrinking anew, and load the state then",
            )
        replay_(self.model, surgery)
        self._surgery = surgery

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run. Of the three states this one comes first, then the model's, then the optimizer's.

        It cuts the model to the shapes that the other two have.

        Raises:
            UsageError: As :meth:`replay_`.
        """
        self.replay_(state)
        self.steps, self._share = int(state["steps"]), float(state["share"])
        self._spent, self._before = (float(x) for x in state["spent"])
        self._macs = self._removal.macs(self.model)
        self._pin(state.get("stuck", {}))
        self.facts.history = copy.deepcopy(list(state["history"]))
        self.facts.measures["epochs"] = copy.deepcopy(list(state["epochs"]))
        self.facts.measures["cutting_seconds"] = float(state["cutting_seconds"])


def train_and_shrink(
    model: nn.Module,
    data: Data | Any,
    recipe: ShrinkRecipe | None = None,
    *,
    how: FineTune | None = None,
    pace: Pace | None = None,
    checkpoint: Checkpoints | str | Path | None = None,
) -> Pruned:
    """Train a copy of ``model`` and remove filters on the way.

    Args:
        model: Trained already or not. It is not changed; with ``how.distill`` it is the teacher.
        data: Training batches; the first one is the example on which the network is traced.
        recipe: What goes; by default half of the multiply-adds.
        how: Epochs, learning rate and so on.
        pace: When; its numbers of steps are filled in.
        checkpoint: As in :func:`~secateur.drive.training.finetune.finetune`: a run that was killed and is
            called again ends with the same bits.

    Returns:
        The small network. ``facts.measures["epochs"]`` also has loss, learning rate and wall time.

    Example:
        >>> from secateur.schedule import Linear
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 2))
        >>> batches = [(x := torch.randn(16, 8), (x[:, 0] > 0).long()) for _ in range(5)]
        >>> pace = Pace(Linear(begin=0, end=3, frequency=1, unit="epochs"))
        >>> pruned = train_and_shrink(net, batches, how=FineTune(5, lr=0.1), pace=pace)
        >>> pruned.model[0].out_features, pruned.facts.measures["training_macs"]["share"]
        (12, 0.7)
    """
    found, how, pace = as_data(data), how or FineTune(), pace or Pace()
    if found is None or found.train is None:
        why = "weights learn from batches"
        raise NeedsData("train_and_shrink(...)", "no training data", why, "pass batches")
    if how.on_nan == "rollback":
        raise UsageError(
            "train_and_shrink(...) with on_nan='rollback'",
            "filters that were removed do not come back",
            "a network cannot return to before a cut",
            "use on_nan='raise' and a checkpoint",
        )
    small, live, clock = copy_of(model), list[Shrinking](), list[float]()

    def attach(optimizer: torch.optim.Optimizer, per_epoch: int) -> Shrinking:
        total = max(1, math.ceil(how.epochs * per_epoch - 1e-9))
        own = replace(pace, steps_per_epoch=per_epoch, steps=total)
        shrinking = Shrinking(small, optimizer, recipe or ShrinkRecipe(), pace=own, data=found)
        live.append(shrinking)
        return shrinking

    def tell(stage: str, done: float, total: float) -> None:
        if done % live[0].pace.per_epoch == 0:
            now = time.perf_counter()
            if clock:  # not the first epoch since the call: it may have begun before
                live[0].took(now - clock[-1])
            clock[:] = [now]

    history = Loop(
        small, found, how, model if how.distill else None, attach, tell, checkpoint
    ).run()
    pruned = live[0].finalize()
    for epoch, record in zip(pruned.facts.measures["epochs"], history, strict=False):
        epoch |= {name: record[name] for name in ("loss", "lr")}
    return pruned
