"""Network slimming: the scales of batch normalisations are made sparse, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_amounts, require_numbers
from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.core.select import keep_top
from secateur.core.slots import Slot, device_of
from secateur.learn.learner import Learning, Objective, rate_of


@dataclass(frozen=True)
class Slimming:
    r"""L1 on the scales of batch normalisations; a global threshold says which channels go.

    The L1 step is taken beside the optimizer, so that momentum and Adam's scaling do not touch it.
    At the end the channels with the smallest scales over the whole network go: their scale and
    shift are set to zero, so each puts out zeros. Removing them from the network is structural
    pruning; scores and channels to keep are in ``facts.measures["channels"]``.

    **formula** :math:`γ \leftarrow sign(γ) \, relu(|γ| - η λ)` after each optimizer step; channel i
    stays if :math:`|γ_i|` is among the largest ``1 - sparsity`` of all channels
    **Shapes** a score a channel
    **Units** those of γ
    **Needs** gradients of a training loop
    **Source** Liu et al., arXiv 1708.06519
    **Differs** the source adds :math:`λ \, sign(γ)` to the gradient, where momentum multiplies it and
    γ steps across zero; here it stops at zero. At least one channel a layer stays

    Args:
        sparsity: Share of the channels that shall go.
        strength: λ; the source has 1e-4 (VGG) and 1e-5 (ResNet).

    Example:
        >>> Slimming(sparsity=0.7).strength
        0.0001
    """

    sparsity: float = 0.5
    strength: float = 1e-4

    def __post_init__(self) -> None:
        require_numbers(self, ("sparsity", "strength"))
        require_amounts(self, ("strength",))
        if not 0 < self.sparsity < 1:
            raise UsageError(
                f"Slimming(sparsity={self.sparsity:g})",
                "it is not between 0 and 1",
                "sparsity is the share of channels that go",
                "write e.g. 0.5",
            )

    @property
    def penalised(self) -> bool:
        return False

    @property
    def goal(self) -> float | None:
        return self.sparsity

    @property
    def needs_objective(self) -> bool:
        return False

    def begin_(self, model: nn.Module, slots: Sequence[Slot]) -> Learning:
        return Slimmed(self, model, slots)


class Slimmed:
    """Slimming at work on one model. Nothing is put on it.

    Args:
        how: Strength and sparsity.
        model: Its batch normalisations with a scale take part.
        slots: Only those named here.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        >>> _ = net[1].weight.data.copy_(torch.tensor([0.1, 0.9]))
        >>> Slimmed(Slimming(), net, [Slot("1.weight", "BatchNorm2d", (2,))]).harden_()["1.weight"]
        tensor([False,  True])
    """

    def __init__(self, how: Slimming, model: nn.Module, slots: Sequence[Slot]) -> None:
        self._how, self._model = how, model
        self._names = [s.module for s in slots if is_scale(model, s)]
        if not self._names:
            raise UsageError(
                "Slimming(...)",
                "no batch normalisation with a scale that is trained takes part",
                "its scales say which channels matter",
                "use another learner, or widen the scope",
            )

    def groups(self) -> list[dict[str, Any]]:
        """None: the scales are the model's own."""
        return []

    def penalty(self, step: int) -> Tensor:
        """0: the step is taken beside the optimizer."""
        return torch.zeros((), device=device_of(self._model))

    @torch.no_grad()
    def after_step_(
        self, optimizer: torch.optim.Optimizer, step: int, objective: Objective | None
    ) -> None:
        """Move every scale towards zero by learning rate times λ, not across it."""
        for gamma in self._gammas().values():
            less = (gamma.abs() - rate_of(optimizer, gamma) * self._how.strength).clamp(min=0)
            gamma.copy_(gamma.sign() * less)

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        """Which channels stay, by the name of their batch normalisation."""
        sizes = {name: gamma.abs().float() for name, gamma in self._gammas().items()}
        for size in sizes.values():  # one channel a layer comes before all others
            size[int(size.argmax())] = torch.inf
        every = torch.cat(list(sizes.values()))
        keep = len(every) - round(len(every) * self._how.sparsity)
        top = keep_top(every[None], max(len(sizes), keep))[0]
        parts = top.split([len(size) for size in sizes.values()])
        return dict(zip(sizes, parts, strict=True))

    def masks(self) -> Masks:
        """The channels to keep, for scales and shifts alike."""
        found = {}
        for name, keep in self.kept().items():
            norm: Any = self._model.get_submodule(name)
            for kind in ("weight", "bias"):
                if getattr(norm, kind) is not None:
                    found[f"{name}.{kind}"] = keep.clone()
        return Masks(found)

    def harden_(self) -> Masks:
        """Zero scale and shift of the channels that go."""
        self._found = self._scores()
        masks = self.masks()
        masks.apply_(self._model)
        return masks

    def drop_(self) -> None:
        """Nothing: no parameter was added to the model."""

    def facts(self) -> dict[str, Any]:
        """Scores ``|γ|`` and keep flags of all channels (before they were zeroed)."""
        scores = getattr(self, "_found", None) or self._scores()
        return {"channels": scores}

    def _scores(self) -> dict[str, Any]:
        kept = self.kept()
        return {
            name: {"score": gamma.detach().abs().tolist(), "keep": kept[name].tolist()}
            for name, gamma in self._gammas().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the scales are in the model's ``state_dict()``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""

    def _gammas(self) -> dict[str, nn.Parameter]:
        return {name: self._model.get_parameter(f"{name}.weight") for name in self._names}


def is_scale(model: nn.Module, slot: Slot) -> bool:
    """Whether a parameter is the scale of a batch normalisation.

    Example:
        >>> is_scale(nn.BatchNorm2d(2), Slot("weight", "BatchNorm2d", (2,)))
        True
    """
    owner = model.get_submodule(slot.module)
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return slot.parameter == "weight" and isinstance(owner, known)
