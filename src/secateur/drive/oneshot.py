"""One-shot pruning: measure, score, allocate, select, repair, then train if the recipe says so."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.batches import Data, as_data, lack, size_of, to_device
from secateur.core.errors import NeedsData, SecateurError, UsageError
from secateur.core.facts import Facts, environment
from secateur.core.losses import unusable
from secateur.core.masks import Masks
from secateur.core.randomness import own_random
from secateur.core.slots import device_of
from secateur.drive.calibration import Calibration
from secateur.drive.diagnosis import diagnose
from secateur.drive.network import copy_of, network_of
from secateur.drive.plan import note_left_out, plan, require_finite, require_something
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, require_recipe
from secateur.drive.recipe_file import to_plain
from secateur.drive.rounds import Rounds
from secateur.drive.training import ranks
from secateur.drive.training.finetune import Attach, FineTune, Loop, Progress, parameter_groups
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.held import attach_, detach_, masks_of, require_free
from secateur.drive.training.recorder import Checkpoints, as_checkpoints
from secateur.formats.checkpoint import values_hash
from secateur.frontends.remembered import surgery_of
from secateur.recover import BatchNorm
from secateur.schedule import events


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
        if dense is None and (recipe.distills or recipe.asymmetric):
            dense = copy.deepcopy(model)
        self.dense = dense
        self.progress: Progress = progress or _silent
        self.checkpoint, self._stages = checkpoint, 0
        self._start = values_hash(model.state_dict()) if checkpoint is not None else ""
        self.plan = plan(model, recipe)
        self.facts = Facts(recipe=to_plain(recipe), fingerprint=recipe.fingerprint())
        self.facts.environment = environment()
        self.sample = Calibration(data, dense)

    def run(self) -> Pruned:
        """Check everything first, then prune, then train."""
        start = time.perf_counter()
        self._check()
        note_left_out(self.facts, self.plan)
        before = masks_of(self.model)
        with own_random(self.model, self.recipe.seed):
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
        if self.checkpoint is not None:
            self.checkpoint.require_writable()
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
        if not self.sample.given:
            for what, needed in wants.items():
                if needed:
                    raise NeedsData(
                        what,
                        lack(self.data),
                        "it works on training batches",
                        "pass data= with train in Python, or --data file.py:function on the command line",
                    )
        if recipe.finetune is not None:  # raises now what would end the run much later
            parameter_groups(self.model, 0.0)
            ranks.require_averaged(self.model)
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

    def _rounds(self) -> Masks:
        return Rounds(
            self.model, self.recipe, self.plan, self.sample, self.facts, self.progress
        ).run()

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
        if self.sample.given and BatchNorm not in steps and FineTune not in steps:
            try:
                drifts = BatchNorm().drift(self.model, self.sample.few)
            except ValueError as error:  # a layer that is given a single row, perhaps
                self.facts.note("batchnorm-drift", "", f"it could not be measured: {error}")
            else:
                self._note_drifts(drifts, advice="; add the recovery 'batchnorm'")
        trained = self.recipe.schedule.unit != "rounds"
        for step in self.recipe.recovery:
            if isinstance(step, BatchNorm):
                drifts = BatchNorm().reestimate_(self.model, self.sample.batches)
                self._note_drifts(drifts)
                if not drifts:
                    text = "nothing was measured: no BatchNorm got several values a channel at once"
                    self.facts.note("batchnorm", "", text)
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
            text = f"nothing was added: {100 * old.sparsity:.4g} % were pruned before"
            target = self.recipe.target
            if target is not None and target.unit == "sparsity" and old.sparsity > target.value:
                text += ", more than asked"
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
