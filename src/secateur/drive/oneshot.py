"""One-shot pruning: measure, score, allocate, select, repair, then train if the recipe says so."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.batches import Batch, Data, as_data, lack, size_of, to_device
from secateur.core.errors import NeedsData, SecateurError, UsageError
from secateur.core.facts import Facts, LayerFacts, environment
from secateur.core.losses import unusable
from secateur.core.masks import Masks
from secateur.core.slots import Slot, device_of, weights
from secateur.core.weight import Weight
from secateur.drive.decide import allocate, group_scores, items, probe_for, score
from secateur.drive.diagnosis import diagnose
from secateur.drive.gather import gather
from secateur.drive.layerwise import MaskChoice, repair_
from secateur.drive.money import money, uses
from secateur.drive.network import copy_of, network_of
from secateur.drive.plan import Plan, note_left_out, plan, require_finite, require_something
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, require_recipe
from secateur.drive.recipe_file import to_plain
from secateur.drive.training.finetune import Attach, FineTune, Loop, Progress, parameter_groups
from secateur.drive.training.gradual import Gradual, mean_loss
from secateur.drive.training.held import attach_, detach_, masks_of, require_free
from secateur.drive.training.recorder import Checkpoints, as_checkpoints
from secateur.formats.checkpoint import values_hash
from secateur.frontends.remembered import surgery_of
from secateur.recover import BatchNorm
from secateur.schedule import events, share_at
from secateur.stats import Positions, Replay, Sketch, Stats, collect


def prune(
    model: nn.Module,
    recipe: Recipe | None = None,
    data: Any = None,
    *,
    progress: Progress | None = None,
    checkpoint: Checkpoints | str | Path | None = None,
) -> Pruned:
    """Prune a copy of ``model``.

    Args:
        model: Any torch module, compiled or not. It is not changed.
        recipe: What to do; by default magnitude to 50 %, the same in every layer.
        data: :class:`~secateur.core.batches.Data`, or an iterable of training batches, where the
            recipe needs it (statistics, fine-tuning, multiply-adds).
        progress: Called with a stage, the work done and the whole.
        checkpoint: A folder (or :class:`~secateur.drive.training.recorder.Checkpoints`) in which training
            saves itself. The same call, made again after an interruption, ends with the same bits.
            A folder belongs to one network, its weights included, and one recipe; others are refused.
            Other data cannot be recognised with certainty (their order and augmentation are random):
            choose another folder for them.

    Returns:
        The pruned copy, its masks and the facts.

    Raises:
        UsageError: The recipe does not fit the model; nothing was done.
        NeedsData: The recipe needs data that was not given.
        NonFinite: Weights or activations are NaN or infinite.

    Example:
        >>> import secateur
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> pruned = secateur.prune(net, secateur.Recipe(target=secateur.Target.parse("75%")))
        >>> pruned.masks
        Masks(1 weights, 128 of 512 kept)
    """
    return prune_(
        copy_of(model),
        recipe,
        data,
        dense=network_of(model),
        progress=progress,
        checkpoint=checkpoint,
    )


def prune_(
    model: nn.Module,
    recipe: Recipe | None = None,
    data: Any = None,
    *,
    dense: nn.Module | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoints | str | Path | None = None,
) -> Pruned:
    """Like :func:`prune`, but changes ``model`` itself.

    Args:
        model: Changed in place. Of a compiled one, the network inside.
        recipe: As in :func:`prune`.
        data: As in :func:`prune`.
        dense: The untouched network, as the teacher of a distillation.
        progress: As in :func:`prune`.
        checkpoint: As in :func:`prune`.

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> prune_(net).model is net
        True
    """
    saved = as_checkpoints(checkpoint)
    require_recipe(recipe)
    return _Run(network_of(model), recipe or Recipe(), as_data(data), dense, progress, saved).run()


_FEW = 128


class _Run:
    """One pruning run from start to end."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data | None,
        dense: nn.Module | None,
        progress: Progress | None,
        checkpoint: Checkpoints | None = None,
    ) -> None:
        self.model, self.recipe, self.data = model, recipe, data
        self.dense = dense
        self.progress: Progress = progress or _silent
        self.checkpoint, self._stages = checkpoint, 0
        self._start = values_hash(model.state_dict()) if checkpoint is not None else ""
        self.plan = plan(model, recipe)
        self.facts = Facts(recipe=to_plain(recipe), fingerprint=recipe.fingerprint())
        self.facts.environment = environment()
        self._batches: list[Batch] | None = None
        self._few: list[Batch] | None = None
        self._step = (0, 1)

    @property
    def batches(self) -> list[Batch]:
        """The calibration batches, read once."""
        if self._batches is None:
            assert self.data is not None
            self._batches = self.data.sample()
        return self._batches

    @property
    def few(self) -> list[Batch]:
        """At most ``_FEW`` samples, enough to say where the damage is."""
        if self._few is None:
            self._few = Data(train=self.batches, calibration=_FEW).sample()
        return self._few

    def run(self) -> Pruned:
        """Check everything first, then prune, then train."""
        start = time.perf_counter()
        self._check()
        note_left_out(self.facts, self.plan)
        if self.recipe.finetune is not None and self.recipe.distills and self.dense is None:
            self.dense = copy.deepcopy(self.model)
        before = masks_of(self.model)
        on = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(sorted(on, key=str)):  # the caller's random state stays
            torch.manual_seed(self.recipe.seed)
            trains = self.recipe.schedule.unit != "rounds"
            try:
                masks = self._after(self._gradual() if trains else self._rounds())
            except BaseException:  # weights may have changed, but the model has its form again
                detach_(self.model, set(masks_of(self.model)) - set(before))
                self._require_usable()
                raise
        self.facts.measures["seconds"] = time.perf_counter() - start
        self._count(before, masks)
        diagnose(self.facts)
        return Pruned(self.model, masks, self.facts, surgery_of(self.model))

    def _require_usable(self) -> None:
        """After an error: raise another one if the network by itself fails on the data."""
        error = sys.exception()
        if isinstance(error, SecateurError) or not isinstance(error, Exception):
            return
        model = self.dense or self.model
        if self.data is None or self.data.train is None:
            return
        batch = next((batch for batch in self.data.train if size_of(batch)), None)
        if batch is not None:
            batch = to_device(batch, device_of(model))
            reason = unusable(model, batch, self.data.loss)
            if reason is not None:
                raise reason from error

    def _check(self) -> None:
        recipe = self.recipe
        require_something(self.plan, recipe)
        require_finite(self.model)
        if recipe.finetune is not None or len(events(recipe.schedule)) > 1:
            require_free(self.model, [slot.name for slot in self.plan.chosen])
        assert recipe.target is not None
        wants = {
            f"criterion {type(recipe.criterion).__name__}": bool(recipe.criterion.needs),
            f"allocation {type(recipe.allocation).__name__}": recipe.allocation.needs_probe,
            "a target in multiply-adds": recipe.target.unit == "macs",
        }
        for step in recipe.recovery:
            wants[f"recovery {type(step).__name__}"] = bool(getattr(step, "needs", True))
        if self.data is None or self.data.train is None:
            for what, needed in wants.items():
                if needed:
                    raise NeedsData(
                        what,
                        lack(self.data),
                        "it works on training batches",
                        "pass data= with train in Python, or --data file.py:function on the command line",
                    )
        if recipe.finetune is not None:
            parameter_groups(self.model, 0.0)  # raises now what would end the run much later
        if recipe.schedule.unit != "rounds":
            if recipe.finetune is None:
                raise UsageError(
                    f"a schedule in {recipe.schedule.unit}",
                    "the recipe has no fine-tuning step",
                    f"{recipe.schedule.unit} are counted while the network trains",
                    "add FineTune(...) to recovery, use a schedule in rounds, or Gradual in your own loop",
                )
            if recipe.schedule.unit == "epochs" and recipe.schedule.end > recipe.finetune.epochs:
                raise UsageError(
                    f"a schedule that ends at epoch {recipe.schedule.end:g}",
                    f"fine-tuning ends at epoch {recipe.finetune.epochs:g}",
                    "the target would never be reached",
                    "shorten the schedule or train longer",
                )

    # -- pruning without training ---------------------------------------------------------------

    def _rounds(self) -> Masks:
        recipe = self.recipe
        # Whether a round does anything does not depend on the target; at share 0 nothing does.
        times = [t for t in events(recipe.schedule) if share_at(recipe.schedule, t, 0.5) > 0]
        before = masks = masks_of(self.model)
        memory = Stats(recipe.seed)
        for index, moment in enumerate(times):
            self.progress("pruning", index, len(times))
            self._step = (index, len(times))
            masks = self._round(moment, masks, memory, last=index == len(times) - 1)
        self.progress("pruning", len(times), len(times))
        detach_(self.model)
        return before & masks  # what was pruned earlier and takes no part now stays pruned

    def _round(self, moment: float, prior: Masks, memory: Stats, *, last: bool) -> Masks:
        recipe = self.recipe
        whole = not recipe.sequential or recipe.allocation.needs_scores
        needs = set(recipe.criterion.needs) if whole else set()
        repair_needs = self._repair_needs(last)
        stats = self._collect(
            self.plan.chosen, needs | (set() if recipe.sequential else repair_needs)
        )
        stats.memory, stats.seed = memory.memory, memory.seed
        slots = self._reached(self.plan.chosen, stats)
        found = weights(self.model, slots)
        groups = {w.name: self._ranks(w, stats, prior) for w in found} if whole else {}
        levels = self._levels(slots, groups, moment, last)
        layers: dict[str, LayerFacts] = {}
        masks: dict[str, torch.Tensor] = {}
        replay = self._replay(slots) if recipe.sequential else None
        for slot in self._order(slots) if recipe.sequential else slots:
            self.progress("pruning", self._step[0] + len(masks) / len(slots), self._step[1])
            weight, local = slot.weight(self.model), stats
            if replay is not None:
                needs = repair_needs | set(recipe.criterion.needs)
                local = replay.trying(partial(self._collect, [slot], needs, replay))
                local.memory, local.seed = memory.memory, memory.seed
                groups[slot.name] = self._ranks(weight, local, prior)
            picked = MaskChoice(
                weight, recipe, groups.pop(slot.name), levels[slot.name], prior.get(slot.name)
            )
            masks[slot.name], layers[slot.name] = repair_(
                self.model, slot, picked, recipe=recipe, stats=local, facts=self.facts
            )
            local.drop(slot.name)
            if replay is not None:
                replay.finish(slot)
        self.facts.layers = [layers[slot.name] for slot in slots]
        done = Masks({slot.name: masks[slot.name] for slot in slots})
        if not last:
            attach_(self.model, done)
        return done

    def _ranks(self, weight: Weight, stats: Stats, prior: Masks) -> torch.Tensor:
        scores = score(weight, self.recipe, stats)
        return group_scores(scores, weight, self.recipe, prior.get(weight.name))

    def _levels(
        self, slots: list[Slot], groups: Mapping[str, torch.Tensor], moment: float, last: bool
    ) -> dict[str, float]:
        """The sparsity of every weight at this moment of the schedule."""
        recipe, found = self.recipe, weights(self.model, slots)
        assert recipe.target is not None
        used = {}
        if recipe.target.unit == "macs":
            used = uses(self.model, self.plan.slots, self.batches[0])
        purse = money(self.model, found, recipe, used)
        probe = None
        if recipe.allocation.needs_probe:
            assert self.data is not None
            measure = mean_loss(self.model, self.data, self.batches)
            probe = probe_for(self.model, found, recipe, groups, measure)
        budget = purse.at(share_at(recipe.schedule, moment, purse.sparsity), probe)
        choice = items(found, slots, recipe, groups, purse.costs)
        levels = allocate(choice, recipe, budget)
        spent = budget.spent(choice, levels)
        if last and spent > 1.02 * budget.limit:
            self.facts.note(
                "target",
                "",
                f"asked for {purse.told(recipe.target, budget.limit)}, reached "
                f"{purse.told(recipe.target, spent)}: levels were given, or at least one group stays "
                "in every pool of the pattern",
            )
        return levels

    def _reached(self, slots: list[Slot], stats: Stats) -> list[Slot]:
        """Leave out weights whose inputs the recipe needs and no data reached; never silently."""
        needed = {*self.recipe.criterion.needs, *self._repair_needs(last=False)}
        if not any(getattr(need, "source", "") == "inputs" for need in needed):
            return slots
        seen = set(stats.names())
        if self.recipe.sequential:
            seen = set(collect(self.model, slots, [Positions()], self.batches[:1]).names())
        for slot in slots:
            if slot.name not in seen:
                self.facts.note("left-out", slot.name, "its inputs could not be seen on the data")
        reached = [slot for slot in slots if slot.name in seen]
        if not reached:
            require_something(Plan(()), self.recipe)
        return reached

    def _repair_needs(self, last: bool) -> set[Any]:
        if self.data is None or self.data.train is None:
            return set()
        needs: set[Any] = set().union(*(step.needs for step in self.recipe.repairs))
        return needs | ({Sketch()} if last else set())

    def _replay(self, slots: Sequence[Slot]) -> Replay:
        """What a sequential run need not compute twice; without data it runs nothing at all."""
        if self.data is None or self.data.train is None:
            return Replay(self.model, slots, ())
        return Replay(self.model, slots, (*self.few, *self.batches))

    def _collect(
        self, slots: Sequence[Slot], needs: set[Any], replay: Replay | None = None
    ) -> Stats:
        """Gather statistics; what only serves the diagnosis is read from a few samples."""
        loss = self.data.loss if self.data is not None else None
        diagnosis = needs & {Sketch()}
        if diagnosis and all(a is b for a, b in zip_longest(self.few, self.batches)):
            diagnosis = set()  # the few are all: one pass
        stats = Stats()
        if needs - diagnosis:
            wanted = needs - diagnosis
            stats = gather(self.model, slots, wanted, self.batches, loss=loss, replay=replay)
        if diagnosis:
            few = collect(self.model, slots, diagnosis, self.few, replay=replay)
            stats = few.merge(stats).keep_values(stats)
        return stats

    def _order(self, slots: Sequence[Slot]) -> list[Slot]:
        """Slots in the order in which data reaches them; those it never reaches come last."""
        if self.data is None or self.data.train is None:
            return list(slots)
        seen = collect(self.model, slots, [Positions()], self.batches[:1]).names()
        rank = {name: index for index, name in enumerate(seen)}
        return sorted(slots, key=lambda slot: rank.get(slot.name, len(rank)))

    # -- pruning while training -----------------------------------------------------------------

    def _gradual(self) -> Masks:
        how = self.recipe.finetune
        assert how is not None
        assert self.data is not None
        pruner: list[Gradual] = []

        def attach(optimizer: torch.optim.Optimizer, per_epoch: int) -> Gradual:
            pruner.append(
                Gradual(
                    self.model, optimizer, self.recipe, data=self.data, steps_per_epoch=per_epoch
                )
            )
            return pruner[0]

        history = self._train(how, attach)
        pruned = pruner[0].finalize()
        self.facts.layers = pruned.facts.layers
        self.facts.history = [*pruned.facts.history, *history]
        self.facts.notes += [n for n in pruned.facts.notes if n not in self.facts.notes]
        end = self.recipe.schedule.end
        whole = how.epochs if self.recipe.schedule.unit == "epochs" else pruner[0].steps
        self.facts.measures["finetune_share"] = max(0.0, 1 - end / whole)
        return pruned.masks

    def _train(self, how: FineTune, attach: Attach | None) -> list[dict[str, Any]]:
        assert self.data is not None
        folder, self._stages = self.checkpoint, self._stages + 1
        folder = folder.stage(self._stages - 1) if folder is not None else None
        loop = Loop(
            self.model, self.data, how, self.dense, attach, self.progress, folder, self._start
        )
        history = loop.run()
        for text in history[-1].get("rollbacks", ()):
            self.facts.note("rolled-back", "", text)
        return history

    def _after(self, masks: Masks) -> Masks:
        """What follows pruning; the masks with which it ended."""
        steps = [type(step) for step in self.recipe.recovery]
        has_data = self.data is not None and self.data.train is not None
        if has_data and BatchNorm not in steps and FineTune not in steps:
            try:
                drifts = BatchNorm().drift(self.model, self.few)
            except ValueError as error:  # a layer that is given a single row, perhaps
                self.facts.note("batchnorm-drift", "", f"it could not be measured: {error}")
            else:
                self._note_drifts(drifts, advice="; add the recovery 'batchnorm'")
        trained = self.recipe.schedule.unit != "rounds"
        for step in self.recipe.recovery:
            if isinstance(step, BatchNorm):
                self._note_drifts(BatchNorm().reestimate_(self.model, self.batches))
            elif isinstance(step, FineTune) and not trained:
                attach_(self.model, masks)
                self.facts.history += self._train(step, None)
                masks = self._trained(masks, detach_(self.model))
        return masks

    def _count(self, before: Masks, masks: Masks) -> None:
        """Count what is kept in the end: choices were made as if nothing had been pruned before."""
        names = [layer.name for layer in self.facts.layers]
        self.facts.layers = [
            replace(layer, kept=int(masks[layer.name].sum())) for layer in self.facts.layers
        ]
        old = Masks({name: before[name] for name in names if name in before})
        if old and old == Masks({name: masks[name] for name in names}):
            text = (
                f"nothing was added: {100 * old.sparsity:.4g} % were pruned before, more than asked"
            )
            self.facts.note("target", "", text)

    def _trained(self, chosen: Masks, masks: Masks) -> Masks:
        """The masks of the trained weights, which come from a checkpoint if the run went on from one."""
        if masks != chosen:
            text = (
                "this run chose other masks than the checkpoint that it went on from, which count: "
            )
            self.facts.note("checkpoint", "", text + "the data or the machine are others")
            self.facts.layers = [
                replace(layer, kept=int(masks[layer.name].sum()), output_error=None, knee=None)
                for layer in self.facts.layers
            ]
        return masks

    def _note_drifts(self, drifts: Mapping[str, float], advice: str = "") -> None:
        """Note the BatchNorms whose inputs moved most."""
        for name in sorted(drifts, key=lambda n: -drifts[n])[:3]:
            if drifts[name] > 1:
                moved = f"an input mean moved by {drifts[name]:.1f} standard deviations"
                self.facts.note("batchnorm-drift", name, moved + advice)


def _silent(stage: str, done: float, total: float) -> None:
    pass
