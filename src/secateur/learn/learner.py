"""What a learned mask is to the loop that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.slots import Slot

#: The loss of the batch of this step, computed anew on the model as it is.
Objective = Callable[[], Tensor]


class Learning(Protocol):
    """A learner at work on one model."""

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of its own parameters, each with its own ``lr``."""

    def penalty(self, step: int) -> Tensor:
        """What to add to the loss of step ``step``, the first of which is 0."""

    def after_step_(
        self, optimizer: torch.optim.Optimizer, step: int, objective: Objective | None
    ) -> None:
        """What happens to the weights themselves after ``optimizer.step()``."""

    def masks(self) -> Masks:
        """The masks of this moment, under the plain parameter names."""

    def harden_(self) -> Masks:
        """Take everything off the model, leave exact zeros, and give the masks."""

    def drop_(self) -> None:
        """Take everything off the model, and leave its weights as they are."""

    def facts(self) -> dict[str, Any]:
        """What the result knows beside its masks, as plain data."""

    def state_dict(self) -> dict[str, Any]:
        """What is not in the model's and the optimizer's own state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class Learner(Protocol):
    """How masks are learned: a plain value."""

    @property
    def penalised(self) -> bool:
        """Whether nothing is pruned unless :meth:`Learning.penalty` joins the loss."""

    @property
    def goal(self) -> float | None:
        """The sparsity of the masks that it aims at, if it aims at one."""

    @property
    def needs_objective(self) -> bool:
        """Whether :meth:`Learning.after_step_` computes the loss of the batch and its gradients anew."""

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        """Put its parameters on ``model``."""


def rate_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> float:
    """The learning rate with which ``optimizer`` trains ``parameter``; 0 if it does not.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> rate_of(torch.optim.SGD(net.parameters(), lr=0.5), net.weight)
        0.5
    """
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group["lr"])
    return 0.0
