"""Top-KAST inside a training loop: the weights outside the forward pass, and their decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.select import keep_top
from secateur.core.weight import Weight
from secateur.drive.decide import spread
from secateur.drive.recipe import Recipe
from secateur.drive.training.held import Held
from secateur.drive.training.regrow import TopKast
from secateur.drive.training.regrowth import Regrowth
from secateur.drive.training.timing import every, strikes
from secateur.stats.steps import before_update


class Superset(Regrowth):
    """The values and masks beside A that Top-KAST trains with; lives in hooks of the optimizer.

    Between steps the model holds A alone. Just before the update in the optimizer's step the values of
    B come back and gradients outside B are cleared; just after it they are kept here again.

    Args:
        model: Its weights are still dense.
        optimizer: The caller's.
        names: Of the weights that take part.
        part: M and the frequency.
        per_epoch: Steps of an epoch.
        held: The masks on the model: A.
    """

    anew = True
    wide: dict[str, Tensor]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        part: TopKast,
        per_epoch: int,
        held: Held,
    ) -> None:
        self._model, self._part, self._per_epoch = model, part, per_epoch
        self._held = held
        self._values = {n: model.get_parameter(n).detach().clone() for n in names}
        self._narrow = {n: torch.ones_like(v, dtype=torch.bool) for n, v in self._values.items()}
        self.wide = dict(self._narrow)
        self._handles = [
            before_update(optimizer, self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._shows_wide = False

    def is_due(self, step: int) -> bool:
        return step > 0 and strikes(
            step, every(self._part.frequency, self._part.unit, self._per_epoch)
        )

    def dense(self, found: Sequence[Weight]) -> list[Weight]:
        self._take_over()
        return [replace(weight, value=self._values[weight.name]) for weight in found]

    @torch.no_grad()
    def widen_(
        self,
        found: Sequence[Weight],
        groups: Mapping[str, Tensor],
        levels: Mapping[str, float],
        recipe: Recipe,
        masks: Masks,
    ) -> None:
        """Choose B around the new A, and bring the values of A to the model."""
        for weight in found:
            if weight.name not in groups:  # its inputs were not seen: it stays as it is
                self.wide[weight.name] = self._narrow[weight.name] = masks[weight.name]
                continue
            ranks, quota = groups[weight.name], recipe.pattern.quota
            most, level = ranks.shape[1], levels[weight.name]
            least = quota(most, level)
            keep = min(most, max(least + 1, quota(most, max(0.0, level - self._part.extra))))
            self.wide[weight.name] = spread(keep_top(ranks, keep), weight, recipe)
            self._narrow[weight.name] = masks[weight.name]
        self._show()

    def _show(self) -> None:
        for name, values in self._values.items():
            parameter = self._model.get_parameter(name)
            parameter.copy_(values.masked_fill(~self._narrow[name], 0))

    @torch.no_grad()
    def _take_over(self) -> None:
        """What somebody else did to the model since the last step: values clamped, a state loaded."""
        live = self._held.live()
        for name, values in self._values.items():
            narrow = self._narrow[name] = live[name]
            self.wide[name] = self.wide[name] | narrow
            values.copy_(torch.where(narrow, self._model.get_parameter(name), values))

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        self._take_over()
        self._shows_wide = True
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        for name, values in self._values.items():
            parameter, wide = self._model.get_parameter(name), self.wide[name]
            parameter.copy_(values.masked_fill(~wide, 0))
            gradient, group = parameter.grad, groups.get(parameter)
            # What a sparse one changes outside B is not taken over; it knows no weight decay.
            if gradient is None or group is None or gradient.is_sparse:
                continue
            gradient.masked_fill_(~wide, 0)
            narrow = self._narrow[name]
            density = float(narrow.float().mean())
            more = group.get("weight_decay", 0.0) * (1 / density - 1)  # the optimizer adds the rest
            if not more:
                continue
            outside = (wide & ~narrow).to(values.dtype)
            if _decouples(optimizer, group):
                parameter.mul_(1 - group["lr"] * more * outside)
            else:  # a maximizing optimizer turns the sign of the gradient before it adds its own decay
                sign = -1 if group.get("maximize") else 1
                gradient.add_(parameter * outside, alpha=sign * more)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        # A fused optimizer under a gradient scaler may have left this step out.
        if not self._shows_wide:
            return
        self._shows_wide = False
        for name, values in self._values.items():
            parameter, wide = self._model.get_parameter(name), self.wide[name]
            values.copy_(torch.where(wide, parameter, values))
            parameter.masked_fill_(~self._narrow[name], 0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The values outside A, and B."""
        return {"values": dict(self._values), "wide": dict(self.wide)}

    def load_state_dict(self, state: Mapping[str, Any], steps: int, masks: Masks) -> None:
        for name, values in self._values.items():
            values.copy_(state["values"][name])
            self.wide[name] = state["wide"][name].to(values.device)
            self._narrow[name] = masks[name]


def _decouples(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay acts on the values and not through the gradient."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, _DECOUPLED)))


# They have no setting that says so.
_DECOUPLED = (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)
