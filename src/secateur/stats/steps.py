"""The moment inside an optimizer's step when gradients are there and no weight has changed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.core.slots import Slot
from secateur.stats.engine import Stats
from secateur.stats.stat import Stat

Act = Callable[[torch.optim.Optimizer], object]

#: Gradients that were taken away from an optimizer for one step, by their parameters. Others who look
#: at gradients before the same step find them here.
_PARKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
        found = [gradient_of(slot.tensor(model)) for slot in slots]
        if all(gradient is None for gradient in found):
            return  # no backward pass came before this step
        for slot, seen in zip(slots, found, strict=True):
            # The loss does not depend on a weight that it left without a gradient.
            gradient = torch.zeros_like(slot.tensor(model)) if seen is None else seen
            for need in needs:
                stats.update(need, slot.weight(model), gradient, 1)

    return before_update(optimizer, before)


def park_(optimizer: torch.optim.Optimizer) -> None:
    """Take all gradients away, so that the step that follows passes over every parameter.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> park_(optimizer)
        >>> net.weight.grad, gradient_of(net.weight)
        (None, tensor([[1., 1.]]))
        >>> unpark_(optimizer)
        >>> net.weight.grad
        tensor([[1., 1.]])
    """
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:
            _PARKED[parameter] = parameter.grad
            parameter.grad = None


def unpark_(optimizer: torch.optim.Optimizer) -> None:
    """Put back what :func:`park_` has taken."""
    for parameter in _parameters(optimizer):
        parked = _PARKED.pop(parameter, None)
        if parameter.grad is None:
            parameter.grad = parked


def gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of this step, also while it is taken away from the optimizer."""
    parked: Tensor | None = _PARKED.get(parameter)
    return parked if parameter.grad is None else parameter.grad


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scaler has told a fused optimizer that it must not use these gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _unscale_(optimizer: torch.optim.Optimizer) -> None:
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for parameter in _parameters(optimizer):
        if parameter.grad is not None:
            parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # the optimizer's own reading of it
