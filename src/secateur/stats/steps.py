"""The moment inside an optimizer's step when gradients are there and no weight has changed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.core.slots import Slot
from secateur.stats.engine import Stats
from secateur.stats.stat import Stat

Act = Callable[[torch.optim.Optimizer], object]


def before_update(optimizer: torch.optim.Optimizer, act: Act) -> RemovableHandle:
    """Call ``act`` in every step of an optimizer, between the gradients and the update.

    ``optimizer.step(closure)`` computes the gradients itself: there ``act`` follows the closure (its
    first call, for optimizers that call it several times). Fused optimizers are given gradients that
    a gradient scaler has scaled: they are unscaled here. A step that such an optimizer leaves out,
    because the gradients overflowed, is left out here, too.

    Args:
        optimizer: Any of torch's, or one that inherits from theirs.
        act: Called without gradients being recorded.

    Returns:
        A handle whose ``remove()`` ends it.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> handle = before_update(optimizer, lambda _: print(net.weight.grad))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = net(torch.ones(1, 2)).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        tensor([[1., 1.]])
    """

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        waiting = True

        @torch.no_grad()
        def now() -> None:
            nonlocal waiting
            if waiting and not _overflowed(optimizer):
                _unscale_(optimizer)
                act(optimizer)
            waiting = False

        def after(closure: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                loss = closure()
                now()
                return loss

            return run

        given = [*args, *kwargs.values()]
        if not any(callable(a) for a in given):
            now()
            return None
        named = {k: after(a) if callable(a) else a for k, a in kwargs.items()}
        return tuple(after(a) if callable(a) else a for a in args), named

    return optimizer.register_step_pre_hook(before)


def stream_gradients(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    slots: Sequence[Slot],
    needs: Sequence[Stat],
    stats: Stats,
) -> RemovableHandle:
    """Feed ``stats`` from a training loop: the gradients just before every update of the weights.

    Returns:
        A handle whose ``remove()`` ends it.
    """

    def before(_: torch.optim.Optimizer) -> None:
        if all(slot.tensor(model).grad is None for slot in slots):
            return  # no backward pass came before this step
        for slot in slots:
            parameter = slot.tensor(model)
            # The loss does not depend on a weight that it left without a gradient.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for need in needs:
                stats.update(need, slot.weight(model), gradient, 1)

    return before_update(optimizer, before)


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scaler has told a fused optimizer that it must not use these gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _unscale_(optimizer: torch.optim.Optimizer) -> None:
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # the optimizer's own reading of it
