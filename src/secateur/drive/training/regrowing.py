"""How weights are exchanged inside a training loop: the moment, the masks, the skipped step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import NeedsData, NonFinite, UsageError
from secateur.core.masks import Masks
from secateur.core.weight import Weight
from secateur.drive.decide import group_scores, score, spread
from secateur.drive.recipe import Recipe
from secateur.drive.training.deciding import Deciding
from secateur.drive.training.regrow import Regrow, exchange
from secateur.drive.training.regrowth import Regrowth
from secateur.drive.training.timing import every, strikes
from secateur.stats.steps import before_update, gradient_of, park_, unpark_


@dataclass(frozen=True)
class Turn:
    """The masks after an exchange in all weights, how many entries moved, and where none could."""

    masks: Masks
    moved: int
    again: int
    unseen: tuple[str, ...]


def turn(
    deciding: Deciding, found: Sequence[Weight], before: Masks, step: int, fraction: float
) -> Turn:
    """Exchange groups in every weight that can be scored and has a promise; others keep their masks.

    Everything is decided before anything is changed: an error leaves all masks as they were.
    """
    recipe = deciding.recipe
    assert isinstance(recipe.regrow, Regrow)
    if recipe.regrow.grow == "gradient":
        promise = gradient_promise(deciding.model, found, step)
    else:
        promise = random_promise(found, recipe, step)
    stats = deciding.measure(step)
    known = {weight.name for weight in deciding.scorable(found, stats)}
    masks: dict[str, Tensor] = {}
    moved = again = 0
    for weight in found:
        mask = before[weight.name]
        masks[weight.name] = mask
        if weight.name not in promise or weight.name not in known:
            continue
        folded = recipe.pattern.fold(mask, weight.axes)
        scores = group_scores(score(weight, recipe, stats), weight, recipe, None)
        hope = group_scores(promise[weight.name], weight, recipe, None)
        found_here = exchange(folded[..., 0], scores, hope, fraction)
        if found_here.moved:
            masks[weight.name] = spread(found_here.kept, weight, recipe)
            moved += found_here.moved * folded.shape[2]
            again += found_here.again * folded.shape[2]
    unseen = tuple(weight.name for weight in found if weight.name not in known)
    return Turn(Masks(masks), moved, again, unseen)


def random_promise(found: Sequence[Weight], recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Random scores of groups, decided by seed, step and name alone: a resumed run draws the same."""
    promise = {}
    for weight in found:
        empty = torch.empty(weight.value.shape, device="meta")
        shape = recipe.pattern.fold(empty, weight.axes).shape
        seed = zlib.crc32(f"{recipe.seed}/{step}/{weight.name}".encode())
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(shape[:2], generator=generator, dtype=torch.float32)
        spaced = drawn[..., None].expand(shape).to(weight.value.device)
        promise[weight.name] = recipe.pattern.unfold(spaced, tuple(weight.value.shape), weight.axes)
    return promise


def gradient_promise(model: nn.Module, found: Sequence[Weight], step: int) -> dict[str, Tensor]:
    """The size of every dense gradient.

    Raises:
        NonFinite: A gradient is NaN or infinite.
        NeedsData: No weight has a gradient.
    """
    promise = {}
    for weight in found:
        gradient = gradient_of(model.get_parameter(weight.name))
        if gradient is None:
            continue  # e.g. an expert that no token reached: it keeps its mask
        if gradient.is_sparse:  # an embedding's, of the rows that were looked up
            gradient = gradient.to_dense()
        bad = int((~torch.isfinite(gradient)).sum())
        if bad:
            raise NonFinite(
                f"growing weights by gradient at step {step}",
                f"{bad} of {gradient.numel()} entries of the gradient of {weight.name!r} are NaN "
                "or infinite",
                "they cannot be ranked; weights and masks are still those of the step before",
                "go back to the last checkpoint, and lower the learning rate or check the data",
            )
        promise[weight.name] = gradient.detach().abs()
    if not promise:
        raise NeedsData(
            f"growing weights by gradient at step {step}",
            "no pruned weight has a gradient",
            "parameter.grad is read just before the optimizer's step",
            "call loss.backward() before optimizer.step(), and zero_grad() after step()",
        )
    return promise


class Regrowing(Regrowth):
    """When weights are exchanged, and how the optimizer's step is skipped for it.

    Hooks of the optimizer, and no copy of anything: before a step that is to be skipped all
    gradients are taken away, which makes every torch optimizer pass over its parameters (no decay,
    no momentum, no step count), and after it they are put back.

    Args:
        part: What is exchanged, and when.
        optimizer: The caller's.
        length: Steps of the whole training.
        per_epoch: Steps of an epoch.
        perform: Called with the step and the fraction; exchanges, and returns how many moved.
        check: Called with the step before it, to refuse gradients that cannot be ranked.
    """

    def __init__(
        self,
        part: Regrow,
        optimizer: torch.optim.Optimizer,
        *,
        length: int,
        per_epoch: int,
        perform: Callable[[int, float], int],
        check: Callable[[int], object],
    ) -> None:
        self._part, self._length, self._per_epoch = part, length, per_epoch
        self._optimizer, self._perform, self._check = optimizer, perform, check
        self.end = int(part.end * length)
        self.steps = 0
        self._last = 0
        self._seen = self._owed = False
        self._handles = [
            before_update(optimizer, self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def is_due(self, step: int) -> bool:
        if step > self.end:
            return False
        # At least one ordinary step lies between two exchanges that replace one.
        if self._part.skips and self._last and step - self._last < 2:
            return False
        frequency = every(self._part.frequency, self._part.unit, self._per_epoch)
        # An exchange that could not be done (a scaler left the optimizer's step out) is made up for.
        return self._owed or strikes(step, frequency)

    def step(self) -> None:
        """Count a step; exchange now what was not exchanged in place of the optimizer's step."""
        self.steps += 1
        due, seen, self._seen = self.is_due(self.steps), self._seen, False
        if self._last == self.steps or not due:
            return
        needs = self._part.skips or self._part.grow == "gradient"
        if needs and not seen:
            self._owed = True
        elif not self._part.skips:
            self._run(self.steps)

    def _run(self, step: int) -> bool:
        moved = self._perform(step, self._part.fraction_at(step, self._length))
        self._last, self._owed = step, False
        return moved > 0

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.steps + 1
        self._seen = True
        if not self.is_due(step):
            return
        if self._part.grow == "gradient" and not self._part.skips:
            self._check(step)  # before the optimizer carries a NaN into the weights
        if self._part.skips and self._run(step):
            park_(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        unpark_(optimizer)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "owed": self._owed, "length": self._length}

    def require_fit(self, state: Mapping[str, Any]) -> None:
        if state["length"] != self._length:
            raise UsageError(
                f"resuming a training of {self._length} steps",
                f"the state was saved by one of {state['length']} steps",
                "how much is exchanged, and until when, depends on the length",
                "resume with the epochs, steps= and steps_per_epoch= of the run",
            )

    def load_state_dict(self, state: Mapping[str, Any], steps: int, masks: Masks) -> None:
        self.steps, self._last, self._owed = steps, int(state["last"]), bool(state["owed"])
