"""Lottery tickets: train, prune, rewind, train again; every stage is kept and never computed twice."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Data, as_data
from secateur.core.budget import Target
from secateur.core.errors import UsageError
from secateur.core.facts import Facts, Note, environment
from secateur.core.masks import Masks
from secateur.drive.finetune import Progress
from secateur.drive.held import attach_, detach_, masks_of
from secateur.drive.oneshot import prune_
from secateur.drive.plan import plan as plan_of
from secateur.drive.plan import require_finite, require_something
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, describe
from secateur.drive.recipe_file import to_plain
from secateur.experiments.reading import read
from secateur.experiments.similarity import mask_churn
from secateur.experiments.stages import Run, Stage, name_of, open_run
from secateur.experiments.terms import TicketPlan, levels_of
from secateur.experiments.training import Stretch, seed_of, seeded, steps_of, train_
from secateur.formats import Bundle, load_into_, read_bundle

_IDLE = ("hint", "batchnorm-drift")
Network = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class StageFacts:
    """One finished stage.

    Args:
        name: ``"dense"`` or the name of the level.
        folder: A bundle, like those of ``prune``.
        asked: The sparsity asked for; 0 for the dense training.
        sparsity: Share of zeros among the weights that take part.
        accuracy: After training, on the test data (or the training data if there is none).
        loss: The same.
        accuracy_at_start: Right after pruning and rewinding, before training.
        churn: Jaccard distance between this level's mask and the one before it.
        mask: Fingerprint of the masks.
        seconds: That the stage took when it was computed.
        done: Whether it was found finished.
    """

    name: str
    folder: str
    asked: float
    sparsity: float
    accuracy: float | None
    loss: float | None
    accuracy_at_start: float | None
    churn: float
    mask: str
    seconds: float
    done: bool


@dataclass(frozen=True)
class TicketFacts:
    """What a search for tickets found.

    Args:
        folder: Of the run: one folder a level, each of them a bundle.
        rewind: What happened to the survivors.
        recipe: As plain values.
        plan: What differs from the default plan.
        metric: What the accuracies are.
        dense: The dense training.
        levels: From dense to sparse.
        notes: What a user should know.

    Example:
        >>> import tempfile
        >>> from secateur.experiments import Training
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> batches = [(x[:32], x[:32, :2].argmax(1)), (x[32:], x[32:, :2].argmax(1))]
        >>> build = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> how = TicketPlan(levels=(0.36, 0.79), training=Training(epochs=2))
        >>> found = find_ticket(build, data=batches, folder=tempfile.mkdtemp(), plan=how)
        >>> [(level.name[:13], round(level.sparsity, 2)) for level in found.levels]
        [('level-01-0.36', 0.36), ('level-02-0.79', 0.79)]
        >>> dense, sparse = found.masks()
        >>> bool((sparse["0.weight"] & ~dense["0.weight"]).any())  # nested
        False
    """

    folder: str
    rewind: str
    recipe: Mapping[str, Any]
    plan: Mapping[str, Any]
    metric: str
    dense: StageFacts
    levels: tuple[StageFacts, ...]
    notes: list[Note] = field(default_factory=list)

    def masks(self) -> list[Masks]:
        """The masks of all levels, read from their folders."""
        return [read_bundle(level.folder).masks for level in self.levels]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


def find_ticket(
    model: Network,
    recipe: Recipe | None = None,
    data: Any = None,
    *,
    folder: str | Path,
    plan: TicketPlan | None = None,
    progress: Progress | None = None,
) -> TicketFacts:
    r"""Train, prune, rewind and train again, level after level.

    Every stage (the dense training, each level) is written below ``folder`` and returns at once if
    it is there. A run that was killed goes on with the stage that it was in; what it ends with is
    bit for bit what the uninterrupted run ends with, on the CPU, because each epoch of each stage
    has a seed of its own. Data that draws its order or augmentation from elsewhere than PyTorch,
    Python, NumPy or the loader's own generator cannot be repeated.

    The dense training has a folder of its own, shared by all runs that train alike.

    **formula** :math:`w \leftarrow m_l \odot w_k` (weights), :math:`m_l \odot w_T` (rate, fine-tune)
    or :math:`m_l \odot w'_0` (reinit), then steps :math:`k..T` of the schedule; :math:`m_l \le m_{l-1}`
    **Shapes** those of the weights
    **Units** none
    **Needs** training batches, and what the criterion needs
    **Source** Frankle and Carbin, arXiv 1803.03635; rewinding to k: arXiv 1903.01611; learning-rate
    rewinding: Renda et al., arXiv 2003.02389; masks: Paganini and Forde, arXiv 2001.05050
    **Differs** final classifier and first convolution stay dense unless the recipe's scope says
    otherwise (the first paper prunes the classifier half as fast)

    Args:
        model: A network, or a function that builds one. The network itself is not changed.
        recipe: Criterion, pattern, allocation and scope; its target is the last level unless the
            plan names the levels.
        data: Training batches, and test batches to measure on.
        folder: The runs' folder.
        plan: Levels, rewinding and training.
        progress: Called with a stage, the work done and the whole.

    Raises:
        UsageError: The recipe, plan or network do not fit; nothing was written.
        FormatError: A finished stage was altered.
        DataError: The loss became NaN; finished stages are kept.

    Example:
        >>> import tempfile
        >>> from secateur.experiments import Training
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> batch = (x, (x.sum(1) > 0).long())
        >>> def net():
        ...     wide = nn.Linear(16, 16)
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), wide, nn.ReLU(), nn.Linear(16, 2))
        >>> plan = TicketPlan(levels=(0.5, 0.75), training=Training(epochs=2))
        >>> found = find_ticket(net, None, {"train": [batch], "test": [batch]},
        ...                     folder=tempfile.mkdtemp(), plan=plan)
        >>> [round(stage.sparsity, 2) for stage in found.levels]
        [0.5, 0.75]

    Example: see :class:`TicketFacts`.
    """
    plan = plan or TicketPlan()
    return _Search(model, recipe or Recipe(), as_data(data), Path(folder), plan, progress).run()


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


class _Search:
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
        self.data = data or Data()
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
        found = [_facts_of(dense, done)]
        identity = {"recipe": self._recipe_words(), "plan": self._plan_words()}
        where = self.folder / f"{self._words()}{name_of(identity)}"
        with open_run(where, identity, network) as run:
            before = dense
            for index, level in enumerate(self.levels, start=1):
                before = dense if self.plan.one_shot else before
                chain = (level,) if self.plan.one_shot else self.levels[:index]
                before, done = self._level(run, chain, before)
                found.append(_facts_of(before, done))
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
        return run.write("dense", Stage(run.folder, _state_of(model), Masks({}), facts, "")), False

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
            found = Stage(run.folder, _state_of(model), Masks({}), facts, "")
            stage = run.write(name, found)
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
        return run.write(
            name, Stage(run.folder, _state_of(model), masks, facts, ""), before.digest
        ), False

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
                built = self.given()
                return built.train()
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
        shapes, values = hashlib.sha256(), hashlib.sha256()
        for name, tensor in self.start.state_dict().items():
            shapes.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            values.update(flat.numpy().tobytes())
        kind = type(self.start).__name__
        return {
            "class": kind,
            "shapes": shapes.hexdigest()[:12],
            "weights": values.hexdigest()[:12],
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


def load_ticket(model: nn.Module, level: str | Path) -> Pruned:
    """Restore one level of a run into ``model``, in place: its weights, masks and facts.

    The same as :func:`secateur.load`; here for those who look for it here.

    Example:
        >>> load_ticket(nn.Linear(2, 2), "no-such-folder")
        Traceback (most recent call last):
            ...
        secateur.core.errors.FormatError: reading the bundle ...
    """
    bundle = read_bundle(level)
    load_into_(model, bundle)
    return Pruned(model, bundle.masks, bundle.facts)


def _facts_of(stage: Stage, done: bool) -> StageFacts:
    measures = stage.facts.measures
    return StageFacts(
        name=stage.folder.name,
        folder=str(stage.folder),
        asked=measures["asked"],
        sparsity=stage.masks.sparsity,
        accuracy=measures["accuracy"],
        loss=measures["loss"],
        accuracy_at_start=measures["accuracy_at_start"],
        churn=measures["churn"],
        mask=stage.masks.fingerprint() if stage.masks else "",
        seconds=measures["seconds"],
        done=done,
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
