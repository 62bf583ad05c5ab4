"""Group learning at work on one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import evaluating
from secateur.core.errors import NeedsData, UsageError
from secateur.core.masks import Masks
from secateur.core.randomness import own_random
from secateur.core.slots import Slot, device_of
from secateur.learn.energy import Branches, energy_prune
from secateur.learn.grouping import (
    GroupLearning,
    group_norms,
    groups_of,
    hard,
    layer_scale,
    logit_gradients,
)
from secateur.learn.learner import Objective, rate_of


class Grouped:
    """The logits of all convolutions, their own Adam, and the virtual step.

    Args:
        how: What to do.
        model: Nothing is put on it.
        slots: Its two-dimensional convolutions without groups take part.

    Example:
        >>> from secateur.core.weight import CONV2D
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3))
        >>> grouped = Grouped(GroupLearning(), net, [Slot("0.weight", "Conv2d", (8, 4, 3, 3), CONV2D)])
        >>> grouped.groups_of_filters()["0.weight"].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0]
    """

    def __init__(self, how: GroupLearning, model: nn.Module, slots: Sequence[Slot]) -> None:
        self._how, self._model = how, model
        self._names = [s.name for s in slots if s.prunable and _plain(model, s, how.count)]
        missing = sorted(set(how.filters) - set(self._names))
        if not self._names or missing:
            raise UsageError(
                "GroupLearning(...)",
                f"{', '.join(missing)} in filters= take no part"
                if missing
                else f"no plain Conv2d with at least {how.count} filters takes part",
                "groups are learned for the filters of convolutions that are not grouped yet",
                "name others" if missing else "widen the scope",
            )
        device = device_of(model)
        self._generator = torch.Generator(device).manual_seed(how.seed)
        self._logits = {
            n: torch.zeros(how.count, len(w), device=device, requires_grad=True)
            for n, w in self._weights().items()
        }
        self._adam = torch.optim.Adam(self._logits.values(), lr=how.lr, eps=1e-12)
        self._pixels: dict[str, tuple[int, int]] = {}
        self._cut: tuple[dict[str, Branches], float] | None = None

    def groups(self) -> list[dict[str, Any]]:
        """None: the logits are trained by an Adam of their own, outside the loss."""
        return []

    def groups_of_filters(self) -> dict[str, Tensor]:
        """The group of each filter, by the name of the weight."""
        return {name: groups_of(a.detach()) for name, a in self._logits.items()}

    def penalty(self, step: int) -> Tensor:
        """0: the penalty acts beside the optimizer."""
        return torch.zeros((), device=device_of(self._model))

    def after_step_(
        self, optimizer: torch.optim.Optimizer, step: int, objective: Objective | None
    ) -> None:
        """One step of the logits, and the hard penalty on the weights."""
        if objective is None:
            raise NeedsData(
                "step() with GroupLearning",
                "no batch was given",
                "the groups are learned at the weights that a virtual step on the batch reaches",
                "call step(batch) with the batch of this step",
            )
        if not self._pixels:
            self._look(objective)
        weights = self._weights()
        rates = {n: rate_of(optimizer, w) for n, w in weights.items()}
        force = {n: rate * self._how.at(step) for n, rate in rates.items()}
        soft = {n: self._how.membership(a, self._generator) for n, a in self._logits.items()}
        fixed = {n: p.detach() for n, p in soft.items()}
        before = {n: w.detach().clone() for n, w in weights.items()}
        with self._restored():
            self._shrink_(weights, fixed, force)
            start = {n: w.detach().clone() for n, w in weights.items()}
            # A convolution may run and have no part in the loss, as auxiliary outputs have it.
            slopes = torch.autograd.grad(
                objective(), list(weights.values()), materialize_grads=True
            )
            with torch.no_grad():
                for (name, weight), slope in zip(weights.items(), slopes, strict=True):
                    weight.sub_(slope, alpha=rates[name])
            after = {n: w.detach().clone() for n, w in weights.items()}
            self._shrink_(weights, fixed, force)
            moved = {n: w.detach() - start[n] for n, w in weights.items()}
        found = logit_gradients(
            soft,
            list(self._logits.values()),
            before=before,
            after=after,
            moved=moved,
            scales=self._scales(),
        )
        for logit, grad in zip(self._logits.values(), found, strict=True):
            logit.grad = grad
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._shrink_(weights, {n: hard(a.detach()) for n, a in self._logits.items()}, force)

    def branches(self) -> dict[str, Branches]:
        """Stage 2: the input channels that each group keeps, at the target cost."""
        return self._prune()[0]

    def masks(self) -> Masks:
        """The kernels that stay, spread over their taps."""
        weights = self._weights()
        return Masks(
            {
                n: b.kernels()[:, :, None, None].expand(weights[n].shape).clone()
                for n, b in self.branches().items()
            }
        )

    def harden_(self) -> Masks:
        """Cut the channels of every group and zero their kernels."""
        self._cut = self._prune()
        masks = self.masks()
        masks.apply_(self._model)
        return masks

    def drop_(self) -> None:
        """Nothing: no parameter was added to the model."""

    def facts(self) -> dict[str, Any]:
        """Groups and kept channels of every convolution, and the β that met the target."""
        branches, beta = self._prune()
        plain = {
            name: {
                "groups": b.groups.tolist(),
                "keep": b.keep.tolist(),
                "filters": b.filters.tolist(),
            }
            for name, b in branches.items()
        }
        return {"groups": plain, "beta": beta}

    def state_dict(self) -> dict[str, Any]:
        """Logits, their Adam, the random state, and the sizes of images: tensors and numbers."""
        return {
            "logits": {n: a.detach().clone() for n, a in self._logits.items()},
            "adam": self._adam.state_dict(),
            "random": self._generator.get_state(),
            "pixels": {n: list(p) for n, p in self._pixels.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly."""
        with torch.no_grad():
            for name, logit in self._logits.items():
                logit.copy_(state["logits"][name])
        self._adam.load_state_dict(state["adam"])
        self._generator.set_state(state["random"].cpu())
        self._pixels = {n: (int(a), int(b)) for n, (a, b) in state["pixels"].items()}

    def _prune(self) -> tuple[dict[str, Branches], float]:
        if self._cut is not None:
            return self._cut
        weights = {n: w.detach() for n, w in self._weights().items()}
        costs = {n: float(w.numel() * self._pixels.get(n, (1, 1))[1]) for n, w in weights.items()}
        return energy_prune(
            weights,
            self.groups_of_filters(),
            costs,
            target=self._how.target,
            count=self._how.count,
            filters=frozenset(self._how.filters),
        )

    def _scales(self) -> dict[str, float]:
        return {
            n: layer_scale(w, self._how.count, self._pixels[n][0])
            for n, w in self._weights().items()
        }

    def _shrink_(
        self,
        weights: Mapping[str, nn.Parameter],
        member: Mapping[str, Tensor],
        force: Mapping[str, float],
    ) -> None:
        scales = self._scales()
        for name, weight in weights.items():
            kind = torch.promote_types(weight.dtype, torch.float32)  # a half sums too coarsely
            free = weight.detach().to(kind).requires_grad_()
            own = group_norms(free, member[name].to(kind), scales[name])
            (slope,) = torch.autograd.grad(own, free)
            with torch.no_grad():
                weight.sub_(slope, alpha=force[name])

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: self._model.get_parameter(name) for name in self._names}

    def _look(self, objective: Objective) -> None:
        """Sizes of the images that each convolution reads and makes, from one pass."""
        handles = []
        for name in self._names:

            def see(
                module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                self._pixels[name] = (_pixels(inputs[0]), _pixels(output))

            owner = self._model.get_submodule(name.rpartition(".")[0])
            handles.append(owner.register_forward_hook(see))
        try:
            with self._restored(), evaluating(self._model), torch.no_grad():
                objective()
        finally:
            for handle in handles:
                handle.remove()
        unseen = [n for n in self._names if n not in self._pixels]
        if unseen:
            self._pixels.clear()
            raise UsageError(
                "GroupLearning(...)",
                f"the batch does not reach {', '.join(unseen)}",
                "the penalty of a convolution depends on the size of its input",
                "leave these weights out with ignore=",
            )

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Weights, buffers and the caller's random state come back as they were."""
        kept = {n: w.detach().clone() for n, w in self._weights().items()}
        buffers = {n: b.detach().clone() for n, b in self._model.named_buffers()}
        try:
            with own_random(self._model), torch.enable_grad():
                yield
        finally:
            with torch.no_grad():
                for name, weight in self._weights().items():
                    weight.copy_(kept[name])
                for name, buffer in self._model.named_buffers():
                    buffer.copy_(buffers[name])


def _pixels(x: Tensor) -> int:
    return int(x.shape[-2] * x.shape[-1])


def _plain(model: nn.Module, slot: Slot, count: int) -> bool:
    owner = model.get_submodule(slot.module)
    return isinstance(owner, nn.Conv2d) and owner.groups == 1 and owner.out_channels >= count
