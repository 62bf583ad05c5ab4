"""Structural pruning: score groups, allocate a budget, repair, cut, prove, and train if asked."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.arguments import require_kind
from secateur.core.batches import Data, as_data, lack
from secateur.core.budget import Target
from secateur.core.errors import BudgetError, DataError, NeedsData, SelectorError, UsageError
from secateur.core.facts import Facts, WidthFacts, environment
from secateur.core.masks import Masks
from secateur.core.randomness import own_random
from secateur.core.widths import Width
from secateur.drive.network import copy_of, network_of
from secateur.drive.plan import require_finite
from secateur.drive.pruned import Pruned
from secateur.drive.structural.budget import ShrinkBudget, recount
from secateur.drive.structural.compensate import Told, compensate_
from secateur.drive.structural.cutting import example_of, proved, require_unmasked, widths_in
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.structural.recipe_file import to_plain
from secateur.drive.structural.refit import note_filled, refit_
from secateur.drive.structural.removal import require_slots_alike
from secateur.drive.structural.scores import group_scores
from secateur.drive.structural.trial import require_runs, unproved, unrunnable
from secateur.drive.structural.uniform import held_back, unstated
from secateur.drive.training.finetune import Loop, Progress
from secateur.formats import Surgery
from secateur.frontends.remembered import remember_, surgery_of
from secateur.frontends.surgery import cuts_of, surgery_for
from secateur.recover import BatchNorm, Compensation
from secateur.stats.groups import wants_data
from secateur.structure import Structure, apply_, couple, cuts_for


def shrink(
    model: nn.Module,
    recipe: ShrinkRecipe | None = None,
    example_inputs: Any = None,
    data: Any = None,
    *,
    progress: Progress | None = None,
) -> Pruned:
    """Remove groups from a copy of ``model``: it becomes smaller and faster everywhere.

    Args:
        model: Any torch module, compiled or not. It is not changed.
        recipe: What to do; by default half of the multiply-adds, by squared weights, ranked
            globally.
        example_inputs: A tensor, a tuple of positional arguments or a mapping of named ones, on
            which the network is traced and proved. By default the first batch of ``data``.
        data: Training batches, for criteria that measure, for repair and for fine-tuning.
        progress: Called with a stage, the work done and the whole.

    Returns:
        The cut copy and the facts; ``facts.measures["proof"]`` is the largest relative difference
        to the masked network.

    Raises:
        UsageError: The model does not run on the example, or nothing can be cut.
        BudgetError: The target is below what is pinned; the floor is named.
        DataError: The cut network does not compute what the masked one does, and no width alone is
            at fault. Nothing is returned.

    Example:
        >>> import secateur
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> recipe = secateur.ShrinkRecipe(target=secateur.Target.parse("params=50%"))
        >>> small = secateur.shrink(net, recipe, torch.zeros(1, 16)).model
        >>> small[0], small[2]
        (Linear(in_features=16, out_features=15, bias=True), Linear(in_features=15, out_features=4,
        bias=True))
    """
    return _run(model, recipe, data, progress).run(example_inputs)


def shrink_(
    model: nn.Module,
    recipe: ShrinkRecipe | None = None,
    example_inputs: Any = None,
    data: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Like :func:`shrink`, but cuts ``model`` itself, in the middle of training if need be.

    All of the work is done on a copy. If it fails or is interrupted, model and optimizer are as
    they were.

    Args:
        model: Changed in place. Its parameters stay the same objects.
        recipe: As in :func:`shrink`.
        example_inputs: As in :func:`shrink`.
        data: As in :func:`shrink`.
        optimizer: Its momenta and moments are cut along, so training goes on.
        progress: As in :func:`shrink`.

    Raises:
        UsageError: As in :func:`shrink`; or the state of the optimizer cannot be cut (LBFGS keeps one
            for all parameters).

    Example:
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(2, 16)).sum().backward()
        >>> optimizer.step()
        >>> _ = shrink_(net, None, torch.zeros(1, 16), optimizer=optimizer)
        >>> optimizer.state[net[0].weight]["momentum_buffer"].shape == net[0].weight.shape
        True
    """
    model = network_of(model)
    if optimizer is not None:
        require_slots_alike(model, optimizer)
    run = _run(model, recipe, data, progress)
    pruned = run.run(example_inputs)
    assert run.surgery is not None
    apply_(model, cuts_of(run.surgery), optimizer)
    _take_(model, pruned.model)
    remember_(model, run.surgery)
    return replace(pruned, model=model)


def _run(
    model: nn.Module, recipe: ShrinkRecipe | None, data: Any, progress: Progress | None
) -> _Run:
    write = "e.g. ShrinkRecipe(target=Target('macs', 0.5))"
    kinds = (ShrinkRecipe, type(None))
    require_kind("the recipe", recipe, kinds, what="a ShrinkRecipe", write=write)
    with torch.inference_mode(mode=False):  # what is made here can be trained
        return _Run(copy_of(model), recipe or ShrinkRecipe(), as_data(data), progress or _silent)


def _take_(model: nn.Module, other: nn.Module) -> None:
    """Give the parameters and buffers of ``model`` the memory of those of its twin."""
    for own, new in (
        *zip(model.parameters(), other.parameters(), strict=True),
        *zip(model.buffers(), other.buffers(), strict=True),
    ):
        own.data = new.data


@dataclass
class _Run:
    """One run from start to end, on a model of its own."""

    model: nn.Module
    recipe: ShrinkRecipe
    data: Data | None
    progress: Progress

    def run(self, example: Any) -> Pruned:
        begun = time.perf_counter()
        facts = self.facts = Facts(to_plain(self.recipe), self.recipe.fingerprint())
        facts.environment = environment()
        self._check()
        example = example_of(example, self.data)
        require_runs(self.model, example)
        dense = copy.deepcopy(self.model)
        self.surgery: Surgery | None = None  # of this run alone
        self.settled: frozenset[str] = frozenset()
        self.stuck: set[str] = set()
        with torch.inference_mode(mode=False), own_random(self.model, self.recipe.seed):
            self.structure = self._traced(example)
            self._note_structure()
            self._chosen()  # a scope that fits nothing is told before anything is measured
            targets = self._budget(self.recipe).targets(example)
            for number, target in enumerate(targets):
                if number:
                    self.structure = self._traced(example)
                last = targets[-1] if len(targets) > 1 else None
                recipe = replace(self.recipe, target=target, rounds=1)
                self._round_(recipe, example, last=last)
            self._refit_(dense)
            self._train_(dense)
            note_filled(self.model, dense, self.surgery, self.facts)
        facts.measures["seconds"] = time.perf_counter() - begun
        return Pruned(self.model, Masks({}), facts, surgery=surgery_of(self.model))

    def _traced(self, example: Any) -> Structure:
        self.progress("tracing", 0, 1)
        return couple(self.model, example)

    def _budget(self, recipe: ShrinkRecipe, last: Target | None = None) -> ShrinkBudget:
        return ShrinkBudget(self.model, self.structure, recipe, self.facts, self.progress, last)

    def _round_(self, recipe: ShrinkRecipe, example: Any, *, last: Target | None) -> None:
        """Score, choose, repair, cut and prove once."""
        keep = self._workable(recipe, example, last)
        surgery = surgery_for(self.model, cuts_for(self.model, self.structure, keep))
        self._cut_(keep, example)
        remember_(self.model, surgery)
        self.surgery = self.surgery.then(surgery) if self.surgery else surgery
        self._reestimate_()

    def _workable(
        self, recipe: ShrinkRecipe, example: Any, last: Target | None
    ) -> dict[str, Tensor]:
        """A choice that runs and is proved: the widths that break the network are pinned."""
        while True:
            notes, measures = len(self.facts.notes), dict(self.facts.measures)
            keep = self._choice(recipe, example, last)
            found = unrunnable(self.model, self.structure, keep, example)
            stuck = {name: f"raises {why}" for name, why in found.items()}
            topic = "pinned"
            if not stuck and recipe.uniform:
                stuck = unstated(self.model, self.structure, keep, example)
                topic = "widths"
            if not stuck:
                try:
                    self._prove(keep, example)
                except DataError:
                    stuck = unproved(self.model, self.structure, keep, example)
                else:
                    return keep
            # What was told of this choice, such as the cost that it reached, is not so any more.
            del self.facts.notes[notes:]
            self.facts.measures = measures
            for name, why in stuck.items():
                text = f"cut to {int(keep[name].sum())} of {len(keep[name])} the network {why}"
                self.facts.note(topic, name, text)
            self.stuck |= set(stuck)

    def _prove(self, keep: dict[str, Tensor], example: Any) -> None:
        begun = time.perf_counter()
        self.progress("proving", 0, 1)
        cuts = cuts_for(self.model, self.structure, keep)
        proof = proved(self.model, cuts, self.structure, keep, example)
        told = self.facts.measures
        told["proof"] = max(proof.error, told.get("proof", 0.0))
        told["proof_seconds"] = time.perf_counter() - begun + told.get("proof_seconds", 0.0)
        if not proof.scale:
            text = "all outputs are 0 on the example, so the proof says nothing about this cut"
            self.facts.note("vacuous", "", text)

    def _choice(self, recipe: ShrinkRecipe, example: Any, last: Target | None) -> dict[str, Tensor]:
        widths, around, told = self._chosen(), self.structure.widths, self.facts
        scores = group_scores(self.model, widths, recipe, self.data, around=around, facts=told)
        try:
            return self._budget(recipe, last).keep(widths, scores, example)
        except (BudgetError, SelectorError) as error:
            # An allocation may name a width that turned out to be stuck, or need it for the target.
            notes = [f"{n.where}: {n.text}" for n in told.notes if n.where in self.stuck]
            if not notes:
                raise
            found = error.found if isinstance(error, BudgetError) else ""
            found = "; ".join(filter(None, [found, *notes[:3]]))
            why = "a width that cannot be cut as chosen is pinned, and takes no part any more"
            do = "ask for more than that" if isinstance(error, BudgetError) else "leave it out"
            do += ", or leave uniform out" if self.recipe.uniform else ""
            raise type(error)(error.asked, found, why, do) from error

    def _check(self) -> None:
        require_finite(self.model)
        require_unmasked("shrinking the network", self.model)
        needs = [f"criterion {type(self.recipe.criterion).__name__}"] * bool(
            wants_data(self.recipe.criterion.needs)
        )
        needs += ["FineTune"] * (self.recipe.finetune is not None)
        if needs and not self._has_data:
            raise NeedsData(
                needs[0],
                lack(self.data),
                "it works on training batches",
                "pass data= with train in Python, or --data file.py:function on the command line",
            )

    def _note_structure(self) -> None:
        trace = self.structure.trace
        if not trace.meta:
            text = (
                "the network looks at its activations: only the path of this example was followed"
            )
            self.facts.note("traced-path", "", text)
        for name in self.structure.unreached:
            self.facts.note("pinned", name, "the example inputs do not reach it")
        for (name, axis), reason in self.structure.pinned.items():
            self.facts.note("pinned", f"{name}[{axis}]", reason)

    def _chosen(self) -> list[Width]:
        widths = widths_in(self.structure, self.recipe.scope)
        chosen = [w for w in widths if w.groups > 1 and w.name not in self.stuck]
        held = held_back(self.structure, [w.name for w in chosen]) if self.recipe.uniform else {}
        for name, why in held.items():
            self.facts.note("pinned", name, why)
        chosen = [w for w in chosen if w.name not in held]
        if not chosen:
            notes = [note.text for note in self.facts.notes if note.where in self.stuck]
            reasons = dict.fromkeys([*notes, *held.values(), *self.structure.pinned.values()])
            raise UsageError(
                "structural pruning",
                f"none of {len(self.structure.widths)} widths takes part",
                "; ".join(list(reasons)[:3]) or "nothing is wider than one",
                "widen the scope, or see secateur inspect MODEL --structure",
            )
        return chosen

    def _cut_(self, keep: dict[str, Tensor], example: Any) -> None:
        if self.recipe.compensation is not None:
            self._repair_(self.recipe.compensation, keep)
            self._prove(keep, example)
        told, parameters = self.facts.measures, list(self.model.parameters())
        first = told.get("parameters", [sum(p.numel() for p in parameters)])[0]
        apply_(self.model, cuts_for(self.model, self.structure, keep))
        told["parameters"] = [first, sum(p.numel() for p in parameters)]
        recount(self.model, example, self.facts)
        self._note_widths(keep)
        self._note_reductions(keep)

    def _note_reductions(self, keep: Mapping[str, Tensor]) -> None:
        """One note for each module that reduces over an axis which lost units."""
        alive = self.structure.alive(keep)
        noted = {note.where for note in self.facts.notes if note.topic == "reduces"}
        for where, text, units in self.structure.trace.reductions:
            if where not in noted and not bool(alive[units].all()):
                self.facts.note("reduces", where, text)
                noted.add(where)

    def _note_widths(self, keep: Mapping[str, Tensor]) -> None:
        """One entry a width, over all rounds."""
        known = {width.name: width for width in self.facts.widths}
        for name, flags in keep.items():
            width, kept = self.structure.by_name[name], int(flags.sum())
            fresh = WidthFacts(name, width.groups, kept, tuple(width.parameters()), width.why)
            known[name] = replace(known.get(name, fresh), kept=kept)
        self.facts.widths = list(known.values())

    def _repair_(self, how: Compensation, keep: dict[str, Tensor]) -> None:
        if not self._has_data:
            self.facts.note("skipped", "Compensation", f"{lack(self.data)} to fit on")
            return
        norms = compensate_(
            self.model,
            self.structure,
            keep,
            self._sample(),
            how=how,
            told=self._told("compensating"),
        )
        self.settled |= norms

    def _reestimate_(self) -> None:
        step = next((s for s in self.recipe.recovery if isinstance(s, BatchNorm)), None)
        if step is None or not any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            return
        if self._has_data:
            step.reestimate_(self.model, self._sample(), skip=self.settled)
        else:
            self.facts.note("skipped", "BatchNorm", f"{lack(self.data)} to measure on")

    def _refit_(self, dense: nn.Module) -> None:
        how = self.recipe.compensation
        if how is None or not how.refit or not self._has_data:
            return
        told = self._told("refitting")
        refit_(self.model, dense, self.surgery, self._sample(), how=how, told=told)
        measured = any(isinstance(s, BatchNorm) for s in self.recipe.recovery)
        if measured and any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            text = (
                "layers were fitted to those of the uncut network with its statistics: measuring "
                "them anew would undo a part of that"
            )
            self.facts.note("skipped", "BatchNorm", text)

    @property
    def _has_data(self) -> bool:
        return self.data is not None and self.data.train is not None

    def _sample(self) -> list[Any]:
        assert self.data is not None
        return self.data.sample()

    def _told(self, stage: str) -> Told:
        return Told(self.facts, lambda done, total: self.progress(stage, done, total))

    def _train_(self, dense: nn.Module) -> None:
        if (how := self.recipe.finetune) is not None:
            assert self.data is not None
            loop = Loop(self.model, self.data, how, teacher=dense, progress=self.progress)
            self.facts.history += loop.run()


def _silent(stage: str, done: float, total: float) -> None:
    pass
