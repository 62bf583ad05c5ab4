"""Gradual pruning inside a training loop: ``step()`` after ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.core.batches import Data, as_data
from secateur.core.facts import Facts, LayerFacts, environment
from secateur.core.masks import Masks
from secateur.core.slots import Slot, weights
from secateur.core.weight import Weight
from secateur.drive.network import network_of
from secateur.drive.plan import (
    note_left_out,
    plan,
    require_finite,
    require_something,
    without_frozen,
)
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, require_recipe
from secateur.drive.recipe_file import to_plain
from secateur.drive.training import ranks, told
from secateur.drive.training.deciding import Deciding, require_no_repairs
from secateur.drive.training.held import (
    Held,
    attach_,
    detach_,
    masks_of,
    require_all,
    require_free,
    require_trains,
    reset_momentum_,
    unheld,
    untrained,
)
from secateur.drive.training.regrow import Regrow, TopKast
from secateur.drive.training.regrowing import Regrowing, gradient_promise, turn
from secateur.drive.training.regrowth import Regrowth
from secateur.drive.training.timing import (
    every,
    is_due,
    require_ended,
    require_last,
    require_open,
    require_same,
    require_same_epochs,
    require_settled,
    require_stepped,
    require_time,
    training_length,
)
from secateur.drive.training.topkast import Superset
from secateur.frontends.remembered import surgery_of
from secateur.schedule import share_at
from secateur.stats import stream_gradients
from secateur.stats.steps import before_update


class Gradual:
    """Prunes a model while somebody else trains it.

    Masks are buffers on the model; pruned weights, their momenta and Adam moments are set to zero
    after every step, so weight decay and momentum cannot wake them. Masks only change when the
    schedule says so; a pruned weight comes back only if the schedule is cyclic, or if the recipe has
    ``regrow``: dynamic sparse training (SET, RigL, Top-KAST).

    Several pruners may work on one model, each on weights of its own (see the recipe's scope).

    Gradients that a criterion needs are read just before each optimizer step: means over the steps
    since the last mask update, and sums (movement) over all steps. Statistics of inputs or of single
    samples are measured on ``data`` at each mask update.

    Args:
        model: Trained in place by the caller.
        optimizer: The caller's optimizer.
        recipe: Its schedule counts steps or epochs.
        data: For criteria that need data at mask updates.
        steps_per_epoch: Needed when the schedule or the exchange counts epochs.
        steps: Optimizer steps of the whole training, which :class:`Regrow` must know; by default the
            epochs of the recipe's fine-tuning step, if it has one.

    Raises:
        UsageError: Recipe, model and optimizer do not fit; neither was changed.
        BudgetError: What is not pruned costs more than the target.

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
        steps: int | None = None,
    ) -> None:
        model, optimizer = network_of(model), ranks.bare_optimizer(optimizer)
        require_recipe(recipe, default=False)
        self._length = training_length(recipe, steps_per_epoch, steps)
        require_time(recipe, steps_per_epoch, self._length)
        require_no_repairs(recipe)
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self._per_epoch = steps_per_epoch or 1
        found = without_frozen(plan(model, recipe), model, recipe)
        require_something(found, recipe)
        require_finite(model)
        self._slots: list[Slot] = found.chosen
        self.steps = 0
        self._share, self._missed = 0.0, ""
        self._finalized = False
        self.facts = Facts(recipe=to_plain(recipe), fingerprint=recipe.fingerprint())
        self.facts.environment = environment()
        note_left_out(self.facts, found)
        self._deciding = Deciding(model, found, recipe, as_data(data))
        own = [slot.name for slot in self._slots]
        require_free(model, own)
        require_trains(model, optimizer, own, whole=recipe.regrow is not None)
        for name in untrained(model, optimizer, own):
            text = "this optimizer does not train it; momenta in another one are not held at zero"
            self.facts.note("optimizer", name, text)
        already = self._before = masks_of(model, own)
        fresh = {n: m for n, m in _ones(model, self._slots).items() if n not in already}
        self._brought = tuple(fresh)
        # What was pruned earlier and takes no part now stays pruned; other pruners keep their own.
        self._names = frozenset([*own, *unheld(model)])
        self._last_update = 0  # the step at which the optimizer took its last one
        self._stream: RemovableHandle | None = None
        self._watch: RemovableHandle | None = None
        self._regrowth = Regrowth()
        self._deciding.require_reachable()
        attach_(model, Masks(fresh))
        try:
            self._begin_()
        except BaseException:  # the caller may correct something and try again
            self._take_hooks_off()
            detach_(model, fresh)
            raise

    def _begin_(self) -> None:
        self._held = Held(self.model, self.optimizer, self._names)
        self._regrowth = self._begun_regrowth()
        streamed, stats = self._deciding.streamed, self._deciding.stats
        seen = self._slots if streamed else []
        self._stream = stream_gradients(self.optimizer, self.model, seen, streamed, stats)
        self._watch = before_update(self.optimizer, self._note_update)
        # A schedule may start before the first step.
        if not streamed or self._starts_at_random:
            self._maybe_update()

    def _take_hooks_off(self) -> None:
        for part in (self._stream, self._watch, self._regrowth):
            if part is not None:
                part.remove()

    def _begun_regrowth(self) -> Regrowth:
        part, optimizer, per_epoch = self.recipe.regrow, self.optimizer, self._per_epoch
        if isinstance(part, Regrow):
            assert self._length is not None
            if part.skips and every(part.frequency, part.unit, per_epoch) < 2:
                said = "an exchange replaces at most every second step of the optimizer"
                self.facts.note("regrow", "", f"frequency {part.frequency:g} {part.unit}: {said}")
            return Regrowing(
                part,
                optimizer,
                length=self._length,
                per_epoch=per_epoch,
                perform=self._exchange,
                check=lambda step: gradient_promise(self.model, self._found(), step),
            )
        if isinstance(part, TopKast):
            names = [slot.name for slot in self._slots]
            return Superset(self.model, optimizer, names, part, per_epoch, self._held)
        return Regrowth()

    @property
    def _starts_at_random(self) -> bool:
        part = self.recipe.regrow
        return self.steps == 0 and isinstance(part, Regrow) and part.start == "random"

    def _found(self) -> list[Weight]:
        return self._regrowth.dense(weights(self.model, self._slots))

    @property
    def time(self) -> float:
        """Time in the schedule's unit."""
        epochs = self.recipe.schedule.unit == "epochs"
        return self.steps / self._per_epoch if epochs else float(self.steps)

    @property
    def imminent(self) -> bool:
        """Whether masks may change at the next step: the moment to keep a copy of everything."""
        following = self.steps + 1
        ticks = is_due(self.recipe.schedule, following, self._per_epoch)
        return ticks or self._regrowth.is_due(following)

    @property
    def masks(self) -> Masks:
        """The masks of this moment."""
        return masks_of(self.model, self._names)

    def _own(self) -> Masks:
        """The masks of the weights that are pruned now, which must still be weights of the model."""
        names = {weight.name for weight in weights(self.model, self._slots)}
        masks = masks_of(self.model, names)
        require_all(masks, names, f"pruning at step {self.steps}")
        return masks

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step, update the masks if they are due, and hold them.

        Raises:
            UsageError: finalize() was called before.
        """
        self._require_open("step()")
        self.steps += 1
        self._held.hold_()
        self._maybe_update()
        self._regrowth.step()

    def _maybe_update(self) -> None:
        schedule, time = self.recipe.schedule, self.time
        now = is_due(schedule, self.steps, self._per_epoch)
        late = time >= schedule.end and self._share < 1
        anew = self._regrowth.anew and self._regrowth.is_due(self.steps)
        if not (now or late or anew):
            return
        # A gradient scaler leaves out its first steps, and then no gradient was seen yet.
        seen = self._last_update or self._starts_at_random or self._deciding.stats.names()
        if self._deciding.streamed and not seen and time < schedule.end:
            return
        # Whether anything is due does not depend on the target; at share 0 nothing is, unless a
        # cyclic schedule has come down to it.
        if share_at(schedule, time, 0.5) > 0:
            self._update(time)
        elif self._share > 0:
            self._decompress()

    def _note_update(self, _: torch.optim.Optimizer) -> None:
        self._last_update = self.steps + 1

    def _decompress(self) -> None:
        self._adopt(Masks(_ones(self.model, self._slots)), self.steps)
        self._share = 0.0
        if getattr(self.recipe.schedule, "reset_momentum", False):
            reset_momentum_(self.optimizer)

    @torch.no_grad()
    def _exchange(self, step: int, fraction: float) -> int:
        done = turn(self._deciding, self._found(), self._own(), step, fraction)
        told.tell_unseen(self.facts, done.unseen)
        if done.moved:
            counts = {"dropped": done.moved, "grown": done.moved, "again": done.again}
            self._adopt(done.masks, step, **counts, fraction=fraction)
        return done.moved

    def _adopt(self, masks: Masks, step: int, **counted: float) -> None:
        before = self._own()
        masks = ranks.settled(masks, before, f"{self.recipe.fingerprint()} {self.steps}")
        attach_(self.model, masks)
        self._held.refresh(self._regrowth.wide)
        self._held.hold_()
        told.tell_change(self.facts, step, before, masks, **counted)

    @torch.no_grad()
    def _update(self, time: float) -> None:
        found, own = self._found(), self._own()
        free = self.recipe.schedule.cyclic or self._regrowth.anew
        prior = None if free else own
        decided = self._deciding.masks(
            found, time, prior, steps=self.steps, at_random=self._starts_at_random
        )
        masks = Masks({**own, **decided.masks})
        told.tell_unseen(self.facts, (name for name in own if name not in decided.masks))
        for note in decided.notes:
            self.facts.note(note.topic, note.where, note.text)
        if self._deciding.streamed and not self._starts_at_random:
            told.tell_stale(self.facts, self._last_update)
        if not free:  # a low target, or the first steps to a high one, would revive some
            now = {name: own[name] for name in self._before}  # exchanges have brought some back
            masks &= self._before if self.recipe.regrow is None else Masks(now)
        self._regrowth.widen_(found, decided.groups, decided.levels, self.recipe, masks)
        self._adopt(masks, self.steps)
        self._share = decided.share
        self._missed = decided.missed if decided.share >= 1 else ""

    def finalize(self, *, early: bool = False) -> Pruned:
        """End: remove the mask buffers, keep the zeros, and return the result with its facts.

        Args:
            early: Accept a schedule or an exchange that has not reached its end.

        Raises:
            UsageError: The schedule or the exchange has not reached its end, or finalize() was called
                before.
        """
        self._require_open("finalize()")
        if not early:
            self._require_complete()
        self._held.hold_()
        self._take_hooks_off()
        found, target = self._own().sparsity, self.recipe.target
        assert target is not None
        told.tell_target(self.facts, target, self._share, found, self._missed)
        masks = detach_(self.model, self._names)
        self._finalized = True
        self.facts.layers = [LayerFacts.of(name, mask) for name, mask in masks.items()]
        return Pruned(self.model, masks, self.facts, surgery_of(self.model))

    def _require_complete(self) -> None:
        part, step = self.recipe.regrow, self.steps
        require_ended(self.recipe.schedule, self.time, self._share)
        require_settled(step, self._regrowth.end, self._length)
        if part is not None:
            require_stepped(
                step, self._last_update, every(part.frequency, part.unit, self._per_epoch)
            )
        found = self._own().sparsity
        require_last(step, found, told.last_sparsity(self.facts, found))

    def abandon_(self) -> None:
        """End without a result: the masks that it brought, and its hooks on the optimizer, go off.

        Weights stay as they are.
        """
        if not self._finalized:
            self._take_hooks_off()
            detach_(self.model, self._brought)
            self._finalized = True

    def _require_open(self, asked: str) -> None:
        on = "use attach_(model, pruned.masks) and finetune(...), which hold the zeros"
        require_open(asked, finalized=self._finalized, step=self.steps, to_train_on=on)

    def state_dict(self) -> dict[str, Any]:
        """Position in the schedule and streamed sums; the masks are in the model's ``state_dict()``."""
        return {
            "steps": self.steps,
            "share": self._share,
            "missed": self._missed,
            "fingerprint": self.recipe.fingerprint(),
            "per_epoch": self._per_epoch,
            "last_update": self._last_update,
            "stats": self._deciding.state_dict(),
            **told.so_far(self.facts),
            "regrow": self._regrowth.state_dict(),
        }

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Refuse a state of another recipe, or of a training of another length where it matters.

        Raises:
            UsageError: With both.
        """
        require_same("recipe", self.recipe.fingerprint(), state["fingerprint"])
        if "epochs" in {self.recipe.schedule.unit, getattr(self.recipe.regrow, "unit", "steps")}:
            require_same_epochs(self._per_epoch, state.get("per_epoch", self._per_epoch))
        self._regrowth.require_fit(state.get("regrow", {}))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run: load the model's (masks and all) and optimizer's state first.

        Raises:
            UsageError: As :meth:`require_fit`; nothing was changed.
        """
        self.require_fit(state)
        self.steps, self._share = int(state["steps"]), float(state["share"])
        self._missed = str(state.get("missed", ""))
        self._last_update = int(state.get("last_update", self.steps))
        told.tell_again(self.facts, state)
        self._deciding.load_state_dict(state["stats"])
        self._regrowth.load_state_dict(state.get("regrow", {}), self.steps, self.masks)
        self._held.refresh(self._regrowth.wide)


def _ones(model: nn.Module, slots: list[Slot]) -> dict[str, torch.Tensor]:
    return {s.name: torch.ones_like(s.tensor(model), dtype=torch.bool) for s in slots}
