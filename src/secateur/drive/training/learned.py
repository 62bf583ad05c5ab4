"""Learned masks inside a training loop: ``penalty()`` in the loss, ``step()`` after the optimizer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_kind, require_part
from secateur.core.batches import Batch, Data, as_data, to_device
from secateur.core.errors import NotYet, UsageError
from secateur.core.facts import Facts, LayerFacts, environment
from secateur.core.losses import default_loss
from secateur.core.masks import Masks
from secateur.core.selectors import matches
from secateur.core.slots import Slot, device_of
from secateur.drive.network import network_of
from secateur.drive.plan import note_left_out, plan, require_finite
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe, Scope, describe
from secateur.drive.training import ranks
from secateur.drive.training.held import masks_of, require_trains
from secateur.drive.training.timing import require_same
from secateur.frontends.remembered import surgery_of
from secateur.learn import Learner, Learning
from secateur.learn.masked import obstacle, require_unlearned
from secateur.learn.slimming import Slimming, is_scale

# A target is reached if the masks come this close to it.
CLOSE = 0.01
# A weight with more zeros than that is as good as gone.
EMPTY = 0.99


class Learned:
    """Learns masks on a model while somebody else trains it.

    What it learns is an optimizer group of its own, with its own learning rate. Scores and
    thresholds live on the model (``<module>.parametrizations.weight.0.*``, the weight itself is
    ``<module>.parametrizations.weight.original`` meanwhile), so the model's and the optimizer's
    ``state_dict()`` hold them; :meth:`harden` gives the plain names back.

    Args:
        model: Trained in place by the caller.
        optimizer: The caller's optimizer; it gets more groups. Make schedules of learning rates
            afterwards, so that they know these too. The groups are empty after :meth:`harden`.
        how: A learner, e.g. :class:`~secateur.learn.Leap`.
        scope: Which weights take part.
        data: Only its loss is used, by learners that compute the loss of a batch once more.

    Raises:
        UsageError: Model, optimizer and learner do not fit, e.g. the optimizer is that of a copy;
            neither was changed.

    Example:
        >>> import torch
        >>> from secateur.learn import Leap
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        >>> learned = Learned(net, optimizer, Leap.short(0.75))
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     loss = net(torch.randn(4, 8)).square().mean() + learned.penalty()
        ...     loss.backward()
        ...     optimizer.step()
        ...     learned.step()
        >>> pruned = learned.harden()
        >>> abs(pruned.facts.sparsity - 0.75) < 0.02, "0.weight" in net.state_dict()
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        how: Learner,
        *,
        scope: Scope | None = None,
        data: Data | Any = None,
    ) -> None:
        _require_parts(how, optimizer)
        model = _plain(model, how)
        self.model, self.optimizer, self.how = model, optimizer, how
        self._data = as_data(data)
        require_finite(model)
        found = plan(model, Recipe(scope=scope or Scope()))
        slots = [_possible(model, slot, how) for slot in found.slots]
        self.facts = Facts(recipe={"learn": describe(how)}, fingerprint=self._fingerprint(slots))
        self.facts.environment = environment()
        note_left_out(self.facts, replace(found, slots=tuple(slots)))
        names = [name for name, _ in model.named_parameters()]
        require_trains(model, ranks.bare_optimizer(optimizer), names)
        taking = [s for s in slots if s.prunable or _wanted(s, scope or Scope())]
        if isinstance(how, Slimming):
            taking = self._scales(taking)
        _require_bare(model, [slot.name for slot in taking])
        self._learning: Learning = _begin(how, model, taking, slots)
        self._own = self._join_optimizer_()
        self.steps = 0
        self._asked = False
        self._hardened = False

    def _scales(self, slots: list[Slot]) -> list[Slot]:
        """What Slimming moves; whoever masks the weights beside them is not in its way."""
        scales = [slot for slot in slots if is_scale(self.model, slot)]
        frozen = [slot for slot in scales if not slot.tensor(self.model).requires_grad]
        for slot in frozen:
            self.facts.note("left-out", slot.name, "it is frozen, and Slimming moves it")
        return [slot for slot in scales if slot not in frozen]

    def _join_optimizer_(self) -> list[dict[str, Any]]:
        """Give the optimizer groups of what is learned; if it cannot take them, nothing has changed."""
        groups, before = self._learning.groups(), len(self.optimizer.param_groups)
        if groups and any("initial_lr" in group for group in self.optimizer.param_groups):
            self._learning.drop_()
            raise UsageError(
                "learning masks with an optimizer whose learning rates follow a schedule",
                f"the schedule was made for its {before} groups; {len(groups)} for the masks would join",
                "most schedules have one entry a group, and fail at a group that they do not know",
                "make Learned first and the schedule afterwards; after a schedule that has ended, take "
                "'initial_lr' out of optimizer.param_groups",
            )
        try:
            for group in groups:
                _require_takes(self.optimizer)
                self.optimizer.add_param_group(self._as_asked(group))
        except Exception as error:
            del self.optimizer.param_groups[before:]
            self._learning.drop_()
            raise UsageError(
                f"learning masks with the optimizer {type(self.optimizer).__name__}",
                f"it refuses the parameters of the masks ({str(error)[:200]})",
                "they are trained by the same optimizer, in groups of their own",
                "use AdamW or another optimizer that takes parameters of any shape",
            ) from error
        return groups

    def _as_asked(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with names, if the optimizer was made with ``named_parameters()``."""
        if not any("param_names" in known for known in self.optimizer.param_groups):
            return group
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {**group, "params": [(names[id(p)], p) for p in group["params"]]}

    def _fingerprint(self, slots: list[Slot]) -> str:
        names = [s.name for s in slots if s.prunable]
        text = json.dumps([describe(self.how), names], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def masks(self) -> Masks:
        """The masks of this moment, under the plain names of the weights."""
        return self._learning.masks()

    @property
    def sparsity(self) -> float:
        """Share of zeros in :attr:`masks`."""
        return self.masks.sparsity

    def penalty(self) -> Tensor:
        """What to add to the loss of this step; 0 for learners without a penalty."""
        self._require_open("penalty()")
        self._asked = True
        return self._learning.penalty(self.steps)

    def step(self, batch: Batch = None) -> None:
        """Count one optimizer step.

        Args:
            batch: The batch of this step, for learners that look at it again.
        """
        self._require_open("step()")
        objective = None if batch is None else self._objective(batch)
        self._learning.after_step_(self.optimizer, self.steps, objective)
        self.steps += 1

    def _objective(self, batch: Batch) -> Callable[[], Tensor]:
        loss = (self._data.loss if self._data is not None else None) or default_loss
        return lambda: loss(self.model, to_device(batch, device_of(self.model)))

    def harden(self, *, early: bool = False) -> Pruned:
        """End: write the masked weights into the plain parameters and remove all else.

        The hardened model computes what the last forward pass would have computed.

        Args:
            early: Accept masks that have not been trained.

        Raises:
            UsageError: No step was counted, or the penalty never joined the loss.
        """
        self._require_open("harden()")
        if not early and (not self.steps or (self.how.penalised and not self._asked)):
            raise UsageError(
                f"harden() after {self.steps} steps",
                "no step was counted" if not self.steps else "penalty() was never asked for",
                "the masks are as they were at the beginning, and prune next to nothing",
                "add penalty() to the loss and call step() after optimizer.step(), "
                "or call harden(early=True)",
            )
        masks = self._learning.harden_()
        self._hardened = True
        self._leave_optimizer_()
        self.facts.layers = [LayerFacts.of(name, mask) for name, mask in masks.items()]
        self.facts.measures |= {"steps": self.steps, **self._learning.facts()}
        self._note_result(masks)
        return Pruned(self.model, masks, self.facts, surgery_of(self.model))

    def _note_result(self, masks: Masks) -> None:
        goal, found = self.how.goal, masks.sparsity
        if goal is not None and abs(found - goal) > CLOSE:
            why = "what goes are whole groups, and one of each weight stays"
            if self.how.penalised and found < goal:
                why = "train longer, or raise the learning rate or the penalty of the masks"
            elif self.how.penalised:
                why = (
                    "the thresholds went past the target, and no penalty brings them back. Train with "
                    "AdamW, longer, or with a lower learning rate of the thresholds"
                )
            self.facts.note("target", "", f"asked for {goal:.1%}, reached {found:.1%}: {why}")
        if not found:
            self.facts.note("target", "", "nothing was pruned: no mask has a zero")
        for layer in self.facts.layers:
            if layer.sparsity > EMPTY:
                text = f"only {layer.kept} of {layer.total} are left; lower the sparsity, the penalty or "
                text += "the weight decay of the masks, or leave it out with ignore="
                self.facts.note("nearly-empty", layer.name, text)

    def _leave_optimizer_(self) -> None:
        """Training may go on with the same optimizer: it forgets what is no longer there.

        The groups stay, empty: schedules of learning rates have an entry for each.
        """
        gone = {id(p) for group in self._own for p in group["params"]}
        for group in self.optimizer.param_groups:
            stays = [id(p) not in gone for p in group["params"]]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = list(itertools.compress(group[key], stays))
        for parameter in [p for p in self.optimizer.state if id(p) in gone]:
            del self.optimizer.state[parameter]

    def _require_open(self, asked: str) -> None:
        if self._hardened:
            raise UsageError(
                asked, "harden() was called before", "the masks are off the model", "start anew"
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps, and what is neither in the model's nor in the optimizer's state. No pickle needed."""
        return {
            "steps": self.steps,
            "asked": self._asked,
            "fingerprint": self.facts.fingerprint,
            "learning": self._learning.state_dict(),
        }

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Raise if a state belongs to another learner, scope or model.

        Raises:
            UsageError: With both fingerprints.
        """
        what = "learner, scope or model"
        require_same(what, self.facts.fingerprint, state["fingerprint"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run: load the model's and the optimizer's state as well.

        Raises:
            UsageError: As :meth:`require_fit`.
        """
        self.require_fit(state)
        self.steps, self._asked = int(state["steps"]), bool(state["asked"])
        self._learning.load_state_dict(state["learning"])


def _require_takes(optimizer: torch.optim.Optimizer) -> None:
    # Both take the group, and fail at their first step.
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("it has one group")
    if isinstance(optimizer, torch.optim.Muon):
        raise ValueError("it trains matrices only")


def _require_bare(model: nn.Module, names: list[str]) -> None:
    """Raise if one of the weights has a mask already."""
    require_unlearned(model, names)
    masked = list(masks_of(model, names))
    if masked:
        raise UsageError(
            f"learning a mask for {masked[0]!r}",
            "the weight carries a mask",
            "two masks of one weight would not know each other",
            "finalize the other pruner or call detach_ first, or leave the weight out with ignore=",
        )


def _begin(how: Learner, model: nn.Module, slots: list[Slot], every: list[Slot]) -> Learning:
    learning = how.begin_(model, slots)
    if not learning.masks():
        left = [slot for slot in every if slot.axes is not None]
        told = [f"{slot.name} ({slot.reason})" for slot in left if slot.reason]
        do = "widen the scope (include=, sensitive=True)"
        if any(slot.reason and slot.reason == obstacle(model, slot) for slot in left):
            do += ", or prune with Gradual or prune, which take weights like these, too"
        raise UsageError(
            f"learning masks with {type(how).__name__}",
            f"no weight takes part ({len(left)} were looked at)",
            f"left out are {'; '.join(told[:3])}" if told else "there is nothing to prune",
            do,
        )
    return learning


def _require_parts(how: object, optimizer: object) -> None:
    asked, has = "learning masks: how=...", ("begin_", "goal", "penalised")
    require_part(asked, how, has, what="a learner", write="e.g. Leap.short(0.9)")
    kind, write = torch.optim.Optimizer, "torch.optim.AdamW(model.parameters())"
    asked, given = "learning masks: optimizer=...", ranks.bare_optimizer(optimizer)
    require_kind(asked, given, kind, what="the optimizer of the model", write=write)


def _plain(model: nn.Module, how: Learner) -> nn.Module:
    """The network without wrappers, if its masks can be learned by all processes together."""
    asked = f"learning masks with {type(how).__name__}"
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            asked,
            "the model is wrapped in DistributedDataParallel already",
            "only parameters that are there when a model is wrapped are averaged over the processes, "
            "and each would learn masks of its own",
            "make Learned with the plain model, and wrap the model afterwards",
        )
    if how.needs_objective and ranks.world() > 1:
        raise NotYet(
            f"{asked} while several processes train",
            f"this is one of {ranks.world()} processes",
            "it learns beside the optimizer, from the batches of its own process alone",
            "train on one process, or take another learner",
        )
    return network_of(model)


def _possible(model: nn.Module, slot: Slot, how: Learner) -> Slot:
    reason = obstacle(model, slot) if slot.prunable else ""
    if slot.prunable and how.needs_objective and not slot.tensor(model).requires_grad:
        reason = f"it is frozen, and {type(how).__name__} reads its gradient"
    return replace(slot, reason=reason) if reason else slot


def _wanted(slot: Slot, scope: Scope) -> bool:
    """Whether a parameter that is no weight (a scale) is in scope."""
    if slot.axes is not None:
        return False
    names = (slot.name, *slot.aliases)
    hit = [any(matches(s, n, slot.kind) for n in names) for s in scope.include]
    missed = any(matches(s, n, slot.kind) for s in scope.ignore for n in names)
    return (not scope.include or any(hit)) and not missed
