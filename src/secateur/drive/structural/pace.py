"""When filters are removed inside a training loop, and what cannot be trained that way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from secateur.allocate.widths import GivenWidths
from secateur.core.arguments import require_kind
from secateur.core.batches import Data, lack
from secateur.core.errors import NeedsData, NotYet, UsageError
from secateur.core.slots import bare
from secateur.drive.plan import require_finite
from secateur.drive.recipe import describe
from secateur.drive.structural.cutting import require_unmasked
from secateur.drive.structural.recipe import ShrinkRecipe
from secateur.drive.training import ranks
from secateur.drive.training.timing import every, require_counts
from secateur.schedule import Exponential, Schedule, share_at


@dataclass(frozen=True)
class Pace:
    """When filters go.

    Args:
        schedule: In steps or epochs. Nothing goes before ``begin``; from there on, filters go every
            ``frequency`` until the target is reached at ``end``. ``Exponential`` takes the same
            share of what is left each time.
        steps_per_epoch: Needed for a schedule in epochs, and for the record of each epoch.
        steps: Optimizer steps of the whole training, if known: a schedule that is longer is refused.
        prove_each: Compare every cut network with the masked one, which takes two forward passes; a
            width that is at fault is left alone, with a note.

    Example:
        >>> from secateur.schedule import events
        >>> events(Pace().schedule)
        [1, 2, 3, 4, 5]
    """

    schedule: Schedule = Exponential(1, 5, 1, unit="epochs")  # noqa: RUF009 - a frozen value
    steps_per_epoch: int | None = None
    steps: int | None = None
    prove_each: bool = False

    def __post_init__(self) -> None:
        require_counts("Pace", self.steps_per_epoch, self.steps)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch, 1 if it is not known."""
        return self.steps_per_epoch or 1

    def require_possible(self) -> None:
        """Raise if the schedule cannot be followed by removing filters in a training loop."""
        schedule, end = self.schedule, every(self.schedule.end, self.schedule.unit, self.per_epoch)
        kind = f"Pace({type(schedule).__name__}(...))"
        if schedule.unit == "rounds" or schedule.cyclic:
            found = "it is cyclic" if schedule.cyclic else "its unit is rounds"
            why = "removed filters do not come back, and a training loop counts steps or epochs"
            raise UsageError(kind, found, why, "write e.g. Exponential(1, 5, 1, unit='epochs')")
        if schedule.unit == "epochs" and not self.steps_per_epoch:
            why = "only steps are seen"
            raise UsageError(kind, "steps_per_epoch is not given", why, "pass len(loader)")
        if share_at(schedule, 0, 0.5) > 0:
            found, why = "it removes filters before the first step", "nothing is trained yet"
            raise UsageError(kind, found, why, "call shrink_ first, or begin later")
        if self.steps is not None and end > self.steps + 1e-6:
            found = f"it ends at step {end:g}, and training after {self.steps} steps"
            raise UsageError(kind, found, "the target would never be reached", "shorten it")


def fingerprint_of(recipe: ShrinkRecipe, pace: Pace) -> str:
    """A hash of what decides which filters go when.

    Example:
        >>> fingerprint_of(ShrinkRecipe(), Pace()) == fingerprint_of(ShrinkRecipe(seed=1), Pace())
        False
    """
    parts = [recipe.fingerprint(), describe(pace.schedule), pace.per_epoch]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def require_fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: ShrinkRecipe, data: Data | None
) -> None:
    """Raise if filters of ``model`` cannot be removed while ``optimizer`` trains it.

    Raises:
        UsageError: The model carries masks, the optimizer is that of another model, or the recipe
            has a part that cannot follow a schedule.
        NeedsData: The criterion measures, and there is no data.
        NotYet: Several processes train together.
    """
    write = "e.g. ShrinkRecipe(target=Target('macs', 0.5))"
    require_kind("Shrinking(recipe=...)", recipe, ShrinkRecipe, what="a ShrinkRecipe", write=write)
    kind, write = torch.optim.Optimizer, "torch.optim.SGD(model.parameters(), 0.1)"
    asked = "Shrinking(optimizer=...)"
    require_kind(asked, optimizer, kind, what="the optimizer of the model", write=write)
    if ranks.world() > 1 or isinstance(model, nn.parallel.DistributedDataParallel):
        raise NotYet(
            "removing filters while several processes train",
            f"this is one of {ranks.world()} processes",
            "DistributedDataParallel keeps buffers of the old shapes",
            "train on one process, or prune with masks (Gradual) and shrink afterwards",
        )
    require_finite(bare(model))
    require_unmasked("Shrinking(...)", bare(model))
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        found, why = "its optimizer trains none of its parameters", "their state is cut together"
        raise UsageError("Shrinking(...)", found, why, "pass the optimizer of this model")
    if recipe.target.unit == "latency" or isinstance(recipe.allocation, GivenWidths):
        raise UsageError(
            "Shrinking(...)",
            f"the target is {recipe.target.unit}, the allocation {type(recipe.allocation).__name__}",
            "a share of the way to the target must be a cost that widths decide",
            "use macs, params or bytes, and UniformWidths or RankedWidths",
        )
    if recipe.criterion.needs and (data is None or data.train is None):
        raise NeedsData(
            f"Shrinking with {type(recipe.criterion).__name__}",
            lack(data),
            "it measures the network at every removal",
            "pass data=, the training batches",
        )
