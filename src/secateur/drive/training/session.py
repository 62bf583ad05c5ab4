"""One pruner inside a training loop that somebody else drives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Data, as_data
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.slots import bare, device_of
from secateur.drive.pruned import Pruned
from secateur.drive.recipe import Recipe
from secateur.drive.training import ranks
from secateur.drive.training.gradual import Gradual
from secateur.drive.training.held import SUFFIX, attach_, masks_of
from secateur.drive.training.resume import Training, on_device, stamp_of
from secateur.formats.checkpoint import Stamp, read_checkpoint, require_stamp, write_checkpoint

#: Builds a pruner (``step``, ``finalize``, ``state_dict``, ``load_state_dict``) from a model, its
#: optimizer and the steps of an epoch.
Make = Callable[[nn.Module, torch.optim.Optimizer, int | None], Any]


class Session:
    """One pruner in a training loop that somebody else drives.

    Args:
        what: A recipe for :class:`~secateur.Gradual`, or a function that builds a pruner.
        data: For criteria that need data at mask updates.
        permanent: At the end, remove the masks from the model (the zeros stay).

    Example:
        >>> from secateur import Target
        >>> from secateur.schedule import Polynomial
        >>> net = nn.Linear(8, 4)
        >>> sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> recipe = Recipe(target=Target("sparsity", 0.5), schedule=Polynomial(0, 2, 1))
        >>> session = Session(recipe)
        >>> session.begin(net, sgd, steps=2, per_epoch=None)
        >>> session.step(); session.step(); session.end()
        >>> session.pruned.masks
        Masks(1 weights, 16 of 32 kept)
    """

    def __init__(self, what: Recipe | Make, data: Any = None, *, permanent: bool = True) -> None:
        if not isinstance(what, Recipe) and not callable(what):
            raise UsageError(
                "pruning in the training loop of a host",
                f"a {type(what).__name__} was given: {what!r}"[:200],
                "the callback wants a Recipe, or a function (model, optimizer, steps_per_epoch) that "
                "builds a pruner",
                "pass e.g. secateur.recipes.gmp(0.9), or a function that returns a Gradual or Shrinking",
            )
        self.what = what
        self.key = _key(what)
        self._data: Data | None = as_data(data)
        self._permanent = permanent
        self.pruner: Any = None
        self._pruned: Pruned | None = None
        self._waiting: tuple[Mapping[str, Any], str | Path] | None = None
        self._trial = False

    def forget(self) -> None:
        """Begin anew: what an earlier training with this session left is no part of the next one."""
        if self._pruned is None and hasattr(self.pruner, "abandon_"):  # it was interrupted
            self.pruner.abandon_()
        self.pruner = self._pruned = self._waiting = None

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None,
        per_epoch: int | None,
        trial: bool = False,
    ) -> None:
        """Attach masks; continue from a state that was restored or read before.

        Args:
            model: Trained by the host.
            optimizer: Its optimizer.
            steps: Length of the training, from where the pruner begins.
            per_epoch: Steps of an epoch.
            trial: A few steps that only try the code: the schedule need not come to its end.

        Raises:
            UsageError: The schedule is longer than the training.
        """
        self._trial = trial
        if trial and isinstance(self.what, Recipe):
            steps = _long_enough(self.what, steps, per_epoch)
        elif isinstance(self.what, Recipe):
            _require_length(self.what, steps, per_epoch)
        waiting, self._waiting = self._waiting, None
        # A host that continues has loaded weights and moments already. The first mask of a pruner
        # that is built now is not theirs.
        kept = _kept(model, optimizer, waiting[0].get("masks", ())) if waiting else []
        self.pruner = self._made(model, optimizer, steps, per_epoch)
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        # Files of weights that the host writes stay those of a dense model.
        hide_(self.pruner.model)
        if waiting is not None:
            self._continue(*waiting)

    def _made(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int | None,
        per_epoch: int | None,
    ) -> Any:
        if not isinstance(self.what, Recipe):
            return self.what(model, optimizer, per_epoch)
        return Gradual(
            model, optimizer, self.what, data=self._data, steps_per_epoch=per_epoch, steps=steps
        )

    def step(self) -> None:
        """Count a step of the optimizer."""
        self.pruner.step()

    def state(self) -> dict[str, Any]:
        """The pruner's own masks and its state, with what they belong to."""
        if self.pruner is None:
            return dict(self._waiting[0]) if self._waiting is not None else {}
        stamp = self._stamp()
        masks = dict(masks_of(self.pruner.model, getattr(self.pruner, "masks", None)))
        if self._pruned is not None:  # they were taken off, and a later training goes on with them
            masks |= self._pruned.masks
        return {
            "model": stamp.model,
            "recipe": stamp.recipe,
            "world": stamp.world,
            "masks": masks,
            "pruner": self.pruner.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; before :meth:`begin` it waits until then."""
        self._take(state, "of the host")

    def _take(self, state: Mapping[str, Any], place: str | Path) -> None:
        if self.pruner is None:
            self._waiting = state, place
        else:
            self._continue(state, place)

    def _continue(self, state: Mapping[str, Any], place: str | Path) -> None:
        if not state:  # the host saved before training began
            return
        model = self.pruner.model
        found = Stamp(state["model"], state["recipe"], 0, world=state["world"])
        require_stamp(place, found, self._stamp())
        attach_(model, Masks(state["masks"]))
        self.pruner.load_state_dict(on_device(state["pruner"], device_of(model)))

    def write(self, file: Path) -> None:
        """Save the state into a file, beside those of the host."""
        write_checkpoint(file, self.state(), self._stamp())

    def read(self, file: Path) -> None:
        """Continue from a file; before :meth:`begin` it waits until then."""
        state, _ = read_checkpoint(file)
        self._take(state, file)

    def end(self) -> None:
        """Hold the masks a last time and remove them.

        Raises:
            UsageError: The target was not reached.
        """
        masks = masks_of(self.pruner.model)
        if self._trial:
            self._pruned = self.pruner.finalize(early=True)
            self._pruned.facts.note("trial", "", "the host only tried the code, for a few steps")
        else:
            self._pruned = self._finalized()
        if not self._permanent:
            attach_(self.pruner.model, masks)

    def _finalized(self) -> Pruned:
        try:
            return self.pruner.finalize()  # type: ignore[no-any-return]
        except UsageError as error:
            raise UsageError(
                error.asked,
                error.found,
                error.why,
                "train longer or shorten the schedule; what there is so far can be had with "
                "callback.session.pruner.finalize(early=True)",
            ) from None

    @torch.no_grad()
    def hold(self) -> None:
        """Put pruned weights back to zero, where the host wrote something else after :meth:`end`."""
        if self._pruned is None or not self._awake():
            return
        self._pruned.masks.apply_(self._pruned.model)
        text = "the host wrote other weights at the end (an average?); the final masks were applied to them"
        self._pruned.facts.note("masks", "", text)

    def _awake(self) -> list[str]:
        """Names of weights that are not zero where the result says so."""
        assert self._pruned is not None
        known = dict(self._pruned.model.named_parameters())
        masks = {n: m for n, m in self._pruned.masks.items() if n in known}
        return [
            n for n, m in masks.items() if bool(known[n].detach()[~m.to(known[n].device)].any())
        ]

    @property
    def pruned(self) -> Pruned:
        """The result.

        Raises:
            UsageError: Training did not reach its end, the callback was never called, or the model
                has other weights since.
        """
        if self._pruned is None:
            found = "training did not reach its end"
            if self.pruner is None:
                found = "the callback was never called"
            raise UsageError(
                "the result of a pruning callback",
                found,
                "masks are finished when training ends",
                "pass the callback to the trainer (callbacks=[...]) and let it train to the end",
            )
        awake = self._awake()
        if awake:
            raise UsageError(
                "the result of a pruning callback",
                f"{awake[0]!r} is not zero where it was pruned ({len(awake)} such weights)",
                "the model was changed after training; trainer.test(ckpt_path='best'), for one, loads "
                "weights that may be from before the last mask update",
                "keep the result (callback.pruned.save) before other weights are loaded",
            )
        return self._pruned

    def _stamp(self) -> Stamp:
        training = Training(self.pruner.model, self.pruner.optimizer, self.pruner)
        stamp = stamp_of(training, int(getattr(self.pruner, "steps", 0)))
        return Stamp(
            stamp.model,
            stamp.recipe,
            stamp.step,
            rank=0,
            world=ranks.world(),
            library=stamp.library,
        )

    def __str__(self) -> str:
        if self.pruner is None:
            return "pruning has not begun"
        return f"{masks_of(self.pruner.model)} at step {getattr(self.pruner, 'steps', 0)}"


def _key(what: Recipe | Make) -> str:
    """The fingerprint of a recipe, or the name of a function."""
    if isinstance(what, Recipe):
        return what.fingerprint()
    name = getattr(what, "__qualname__", type(what).__qualname__)
    return f"{getattr(what, '__module__', '')}.{name}"


def _kept(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> list[tuple[Tensor, Tensor]]:
    """Masked weights and their optimizer state, each with a copy in main memory."""
    state, known = ranks.bare_optimizer(optimizer).state, dict(bare(model).named_parameters())
    parameters = [known[name] for name in names if name in known]
    slots = [v for p in parameters for v in state.get(p, {}).values() if isinstance(v, Tensor)]
    tensors: list[Tensor] = [*parameters, *slots]
    return [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]


def _require_length(recipe: Recipe, steps: int | None, per_epoch: int | None) -> None:
    if "epochs" in (recipe.schedule.unit, getattr(recipe.regrow, "unit", "")) and not per_epoch:
        raise UsageError(
            "a schedule or an exchange in epochs",
            "the training loader has no length",
            "how many steps an epoch has is not known before its end",
            "give both in steps",
        )
    if steps is None or steps <= 0 or recipe.schedule.unit == "rounds":
        return
    whole = steps / (per_epoch or 1) if recipe.schedule.unit == "epochs" else float(steps)
    if recipe.schedule.end > whole + 1e-9:
        unit = recipe.schedule.unit
        raise UsageError(
            f"a schedule that ends at {unit[:-1]} {recipe.schedule.end:g}",
            f"training ends at {unit[:-1]} {whole:g}",
            "the target would never be reached",
            "shorten the schedule or train longer",
        )


def _long_enough(recipe: Recipe, steps: int | None, per_epoch: int | None) -> int:
    """Steps of a training in which the schedule would come to its end."""
    each = per_epoch or 1 if recipe.schedule.unit == "epochs" else 1
    end = 0 if recipe.schedule.unit == "rounds" else math.ceil(recipe.schedule.end * each)
    return max(steps or 1, end)


def hide_(model: nn.Module) -> None:
    """Leave the masks of a model out of its ``state_dict``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> attach_(net, Masks({"weight": torch.tensor([[True, False]])}))
        >>> hide_(net)
        >>> sorted(net.state_dict()), masks_of(net)
        (['bias', 'weight'], Masks(1 weights, 1 of 2 kept))
    """
    for name in masks_of(model):
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.add(attribute + SUFFIX)
