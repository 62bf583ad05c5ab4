"""The search for lottery tickets: stage after stage, each kept and never computed twice."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Data, aside
from secateur.core.budget import Target
from secateur.core.errors import UsageError
from secateur.core.facts import Facts, Note, environment
from secateur.core.masks import Masks
from secateur.drive.network import network_of
from secateur.drive.oneshot import prune_
from secateur.drive.plan import plan as plan_of
from secateur.drive.plan import require_finite, require_something
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, describe
from secateur.drive.recipe_file import to_plain
from secateur.drive.training.finetune import Progress
from secateur.drive.training.held import attach_, detach_, masks_of
from secateur.experiments.reading import read
from secateur.experiments.similarity import mask_churn
from secateur.experiments.stages import Run, Stage, name_of, open_run
from secateur.experiments.terms import TicketPlan, levels_of
from secateur.experiments.ticket_facts import TicketFacts, facts_of
from secateur.experiments.training import Stretch, seed_of, seeded, steps_of, train_
from secateur.formats import Bundle, load_into_
from secateur.formats.checkpoint import values_hash
from secateur.frontends.remembered import source_of, surgery_of

_IDLE = ("hint", "batchnorm-drift")
Network = nn.Module | Callable[[], nn.Module]


def restart_(model: nn.Module, masks: Masks, values: Mapping[str, Tensor] | None) -> None:
    """Put ``values`` (all weights and BatchNorm statistics) into ``model`` and attach ``masks``.

    Survivors get their values exactly; pruned entries are exactly zero. With ``None`` the survivors
    keep what they have.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> masks = Masks({"weight": torch.tensor([[True, False]])})
        >>> restart_(net, masks, {"weight": torch.tensor([[0.5, 0.7]])})
        >>> net.weight.tolist()
        [[0.5, 0.0]]
    """
    detach_(model)
    if values is not None:
        load_into_(model, Bundle(values, Masks({}), {}, Facts()))
    attach_(model, masks)


class Search:
    """One search from start to end."""

    def __init__(
        self,
        model: Network,
        recipe: Recipe,
        data: Data | None,
        folder: Path,
        plan: TicketPlan,
        progress: Progress | None,
    ) -> None:
        self.given, self.recipe, self.plan, self.folder = model, recipe, plan, folder
        self.data = _repeatable(data or Data())
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.levels = levels_of(plan, recipe)
        self._require_rewindable()
        self.per_epoch, self.total = steps_of(self.data, plan.training)
        self.step = plan.step_of_rewind(self.per_epoch, self.total)
        self.start = self._first_weights(0)
        self.values: Mapping[str, Tensor] = _state_of(self.start)  # what weights go back to
        if plan.rewind == "reinit":
            self._require_new_weights()
        self.notes: list[Note] = []

    def run(self) -> TicketFacts:
        """Check everything first, then go through the stages."""
        fitting = dataclasses.replace(self.recipe, target=self._target(self.levels[-1]))
        require_something(plan_of(self.start, fitting), self.recipe)
        require_finite(self.start)
        if masks_of(self.start):
            raise UsageError(
                "finding tickets",
                "the network carries masks",
                "the dense training would hold them",
                "start from a dense network (detach_ takes masks off)",
            )
        training, network = describe(self.plan.training)["Training"], self._network()
        identity = {"dense": training}
        where = self.folder / f"dense-{_words(training)}{name_of(identity)}"
        with open_run(where, identity, network) as run:  # others may train from it afterwards
            dense, done = self._dense(run)
            if self.plan.rewind == "weights" and self.step:
                self.values = self._snapshot(run)
        found = [facts_of(dense, done)]
        identity = {"recipe": self._recipe_words(), "plan": self._plan_words()}
        where = self.folder / f"{self._words()}{name_of(identity)}"
        with open_run(where, identity, network) as run:
            before = dense
            for index, level in enumerate(self.levels, start=1):
                before = dense if self.plan.one_shot else before
                chain = (level,) if self.plan.one_shot else self.levels[:index]
                before, done = self._level(run, chain, before)
                found.append(facts_of(before, done))
        for note in before.facts.notes:
            if note not in self.notes:
                self.notes.append(note)
        return TicketFacts(
            folder=str(run.folder),
            rewind=self.plan.rewind,
            recipe=to_plain(fitting),
            plan=_plain(self.plan),
            metric=str(dense.facts.measures["metric"]),
            dense=found[0],
            levels=tuple(found[1:]),
            notes=self.notes,
            split=str(dense.facts.measures["split"]),
        )

    # -- stages ---------------------------------------------------------------------------------

    def _dense(self, run: Run) -> tuple[Stage, bool]:
        stage = run.read("dense")
        if stage is not None:
            return stage, True
        began, model = time.perf_counter(), copy.deepcopy(self.start)
        how, report = self.plan.training, self._reporter("dense training")
        with self._seeded("dense"):
            at_start = self._measured(model)
            history = train_(model, self.data, how, Stretch(0), progress=report)
            measures = {"asked": 0.0, "churn": 0.0, **self._measured(model, at_start)}
        facts = Facts(measures=measures, history=history, environment=environment())
        measures["seconds"] = time.perf_counter() - began
        return run.write("dense", self._stage(run, model, Masks({}), facts)), False

    def _snapshot(self, run: Run) -> Mapping[str, Tensor]:
        """The network at the rewinding point: the beginning of the dense training once more.

        It is short, and repeats to the bit; so one dense training serves every rewinding point.
        """
        name = f"step-{self.step}"
        stage = run.read(name)
        if stage is None:
            model, report = copy.deepcopy(self.start), self._reporter("to the rewinding point")
            with self._seeded("dense"):
                self._measured(model)  # as the dense training does, whatever it draws
                first = Stretch(0, end=self.step)
                history = train_(model, self.data, self.plan.training, first, progress=report)
            facts = Facts(history=history, environment=environment())
            stage = run.write(name, self._stage(run, model, Masks({}), facts))
        return stage.tensors

    def _level(self, run: Run, chain: tuple[float, ...], before: Stage) -> tuple[Stage, bool]:
        name = _stage_name(chain, named=self.plan.levels is not None)
        stage = run.read(name, before.digest)
        if stage is not None:
            return stage, True
        began, index = time.perf_counter(), len(chain)
        with self._seeded(name):
            model = copy.deepcopy(self.start)
            restart_(model, before.masks, before.tensors)
            pruned = self._pruned(model, chain[-1])
            restart_(model, pruned.masks, self._values(name))
            at_start = self._measured(model)
            first = Stretch(index, self.step, last_rate=self.plan.rewind == "finetune")
            how, report = self.plan.training, self._reporter(name)
            history = train_(model, self.data, how, first, progress=report)
            masks = masks_of(model)
            detach_(model)
            measures = self._measured(model, at_start)
        facts = pruned.facts
        measures |= {"asked": chain[-1], "churn": _churn(before.masks, masks)}
        facts.measures |= {**measures, "seconds": time.perf_counter() - began}
        facts.history = [*facts.history, *history]
        return run.write(name, self._stage(run, model, masks, facts), before.digest), False

    def _stage(self, run: Run, model: nn.Module, masks: Masks, facts: Facts) -> Stage:
        cut, source = surgery_of(self.start), source_of(self.start)
        if source:
            facts.environment["source"] = source
        return Stage(run.folder, _state_of(model), masks, facts, "", cut)

    def _pruned(self, model: nn.Module, level: float) -> Pruned:
        recipe = dataclasses.replace(self.recipe, target=self._target(level))
        pruned = prune_(model, recipe, self.data, progress=self.progress)
        # Training follows, so advice about its absence would mislead.
        pruned.facts.notes[:] = [n for n in pruned.facts.notes if n.topic not in _IDLE]
        return pruned

    def _values(self, name: str) -> Mapping[str, Tensor] | None:
        """What the survivors go back to; ``None`` to keep what they have."""
        if self.plan.rewind == "weights":
            return self.values
        return _state_of(self._first_weights(name)) if self.plan.rewind == "reinit" else None

    # -- parts ----------------------------------------------------------------------------------

    def _first_weights(self, which: int | str) -> nn.Module:
        """The network before any training: number 0, or new random values for a level."""
        seed = seed_of(self.plan.training.seed, "weights", which)
        with seeded(seed):
            if not isinstance(self.given, nn.Module):
                return network_of(self.given() if callable(self.given) else self.given).train()
            model = copy.deepcopy(self.given)
            if which != 0:
                reset_(model)
            return model

    def _seeded(self, name: str) -> Any:
        seed = seed_of(self.plan.training.seed, name)
        return seeded(seed, self.start, self.data.train)

    def _measured(
        self, model: nn.Module, at_start: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        measures = dataclasses.asdict(read(model, self.data))
        measures["sparsity"] = masks_of(model).sparsity
        if at_start is not None:
            measures["sparsity"] = at_start["sparsity"]
            measures["accuracy_at_start"] = at_start["accuracy"]
            measures["loss_at_start"] = at_start["loss"]
        return measures

    def _reporter(self, stage: str) -> Progress:
        return lambda _, done, total: self.progress(stage, done, total)

    def _target(self, level: float) -> Target:
        return Target("sparsity", level)

    def _require_rewindable(self) -> None:
        recipe, wrong = self.recipe, ""
        if recipe.recovery or recipe.rounding is not None:
            wrong = "the recipe repairs, rounds or trains the survivors"
        elif recipe.schedule.unit != "rounds":
            wrong = f"the recipe's schedule counts {recipe.schedule.unit}"
        if wrong:
            raise UsageError(
                "finding tickets",
                wrong,
                "the plan says what happens to the survivors, and rewinding would undo the rest",
                "leave recovery, rounding and schedule out of the recipe",
            )

    def _require_new_weights(self) -> None:
        first, other = self.start.state_dict(), self._first_weights("other").state_dict()
        if all(torch.equal(first[name], other[name]) for name in first):
            raise UsageError(
                "rewind='reinit'",
                "the function that builds the network gives the same weights again",
                "it sets a seed of its own, or loads weights",
                "take that out, or pass the network instead of the function",
            )

    # -- names ----------------------------------------------------------------------------------

    def _network(self) -> dict[str, str]:
        """What must not change while a run goes on: the network and its first weights."""
        shapes, state = hashlib.sha256(), self.start.state_dict()
        for name, tensor in state.items():
            shapes.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        kind = type(self.start).__name__
        return {
            "class": kind,
            "shapes": shapes.hexdigest()[:12],
            "weights": values_hash(state)[:12],
        }

    def _recipe_words(self) -> dict[str, Any]:
        words = describe(self.recipe)
        words.pop("target", None)  # a run can be taken further
        return dict(words)

    def _plan_words(self) -> dict[str, Any]:
        words = dict(describe(self.plan)["TicketPlan"])
        for key in ("levels", "one_shot", "rewind_to", "unit"):
            words.pop(key, None)
        return {**words, "rewind": self.plan.rewind, "step": self.step}

    def _words(self) -> str:
        recipe, training = self.recipe, describe(self.plan.training)["Training"]
        back = f"{self.step}" if self.step else ""
        parts = [type(p).__name__ for p in (recipe.criterion, recipe.pattern, recipe.allocation)]
        return f"{self.plan.rewind}{back}-{'-'.join(parts).lower()}-{_words(training)}"


def _repeatable(data: Data) -> Data:
    """Data of which each epoch can be drawn again by itself."""
    return data if data.train is None else dataclasses.replace(data, train=aside(data.train))


def reset_(model: nn.Module) -> None:
    """Give every module new random weights, by its own ``reset_parameters()``.

    Raises:
        UsageError: A module has parameters and no such method.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> before = net[0].weight.clone()
        >>> reset_(net)
        >>> bool((net[0].weight != before).all())
        True
    """
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise UsageError(
                "rewind='reinit'",
                f"{name or 'the network'!r} ({type(module).__name__}) has no reset_parameters()",
                "its first weights cannot be drawn again",
                "pass the function that builds the network instead of the network",
            )


def _stage_name(chain: tuple[float, ...], *, named: bool) -> str:
    """Number and sparsity of a level, and a mark of the named levels that it was reached by."""
    way = f"-after-{name_of({'levels': chain[:-1]})[:6]}" if named and len(chain) > 1 else ""
    return f"level-{len(chain):02d}-{chain[-1]:.6g}{way}"


def _churn(before: Masks, after: Masks) -> float:
    return mask_churn(before, after) if before else after.sparsity  # dense keeps everything


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _plain(plan: TicketPlan) -> dict[str, Any]:
    words = describe(plan)["TicketPlan"]
    training = words.pop("training", {"Training": {}})["Training"]
    return {**words, "training": training}


def _words(training: Mapping[str, Any]) -> str:
    """Hyper-parameters that differ from their defaults, for people."""
    short = {"epochs": "e", "weight_decay": "wd"}
    values = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in training.items()}
    return "".join(f"{short.get(key, key)}{value}-" for key, value in values.items())
