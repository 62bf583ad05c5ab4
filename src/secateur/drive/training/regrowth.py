"""What a pruner inside a training loop asks of weights that come back; here, of none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from secateur.core.masks import Masks
from secateur.core.weight import Weight
from secateur.drive.recipe import Recipe


class Regrowth:
    """A training in which no pruned weight comes back; what others do differently, they override.

    Example:
        >>> none = Regrowth()
        >>> none.is_due(100), none.end, none.wide
        (False, 0, None)
    """

    #: Whether the masks are chosen anew whenever it is due, by the recipe's criterion.
    anew = False
    #: The step after which masks stay.
    end = 0
    #: Name of a weight -> the entries that are trained, where these are not those that are kept.
    wide: dict[str, Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Whether weights come back at ``step``."""
        return False

    def dense(self, found: Sequence[Weight]) -> list[Weight]:
        """The weights with all the values that there are."""
        return list(found)

    def widen_(
        self,
        found: Sequence[Weight],
        groups: Mapping[str, Tensor],
        levels: Mapping[str, float],
        recipe: Recipe,
        masks: Masks,
    ) -> None:
        """Take over the masks that were chosen, from such scores at such sparsities."""

    def step(self) -> None:
        """Count a step of the optimizer."""

    def remove(self) -> None:
        """End: take all hooks off the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the masks."""
        return {}

    def require_fit(self, state: Mapping[str, Any]) -> None:
        """Raise if the state is that of a training of another length.

        Raises:
            UsageError: With both lengths.
        """

    def load_state_dict(self, state: Mapping[str, Any], steps: int, masks: Masks) -> None:
        """Go on from a state, after ``steps``, with ``masks`` on the model."""
