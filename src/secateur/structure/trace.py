"""Run a network once and follow the units of its parameters through every operator.

Parameters lie on the ``meta`` device where that is possible: no arithmetic and no memory, so a
network of billions of parameters is traced in seconds. What does not depend on parameters (indices,
positions, masks) keeps its values, because code likes to look at them. Where the code looks at
activations, the network runs with its real values.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.attention import free_heads_
from secateur.core.batches import evaluating
from secateur.core.failing import on_example
from secateur.core.slots import device_of
from secateur.structure.counted import Counted, counting
from secateur.structure.named import Named, naming
from secateur.structure.outputs import require_predictions
from secateur.structure.running import (
    paths,
    plain_attention,
    plain_recurrence,
    positional,
    require_python,
    run_plainly,
    run_without_values,
    shared_copy,
)
from secateur.structure.seen import Trace
from secateur.structure.tracer import Tracer

__all__ = ["Trace", "run_traced", "trace"]


def trace(model: nn.Module, example: Any) -> Trace:
    """Run ``model`` on one batch and follow its units.

    Args:
        model: Left as it is. It may live on the meta device.
        example: Inputs: a tensor, a tuple of positional arguments, or a mapping of named ones.

    Raises:
        UsageError: The model fails on this example, is wrapped for several devices, or compiled.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> found = trace(net, torch.zeros(1, 4))
        >>> found.meta, found.ledger.settle()[found.axes["2.weight", 1]].tolist()
        (True, [0, 1, 2])
    """
    require_python(model)
    with suppress(Exception):  # whatever the model does that needs values: they are computed then
        return _trace_on(model, example, "meta")
    if any(x.is_meta for x in model.parameters()):
        return _failing(model, example, "meta")
    return _failing(model, example, "")


def _failing(model: nn.Module, example: Any, device: str) -> Trace:
    with on_example(model, "its operators are recorded while it runs"):
        return _trace_on(model, example, device)


def _trace_on(model: nn.Module, example: Any, device: str) -> Trace:
    model = shared_copy(model)  # a forward pass may store what it computes in the modules
    free_heads_(model)  # PyTorch's own code ties the heads to the width
    tracer = Tracer(model, run_without_values if device == "meta" else run_plainly)
    output = run_traced(model, example, tracer, device)
    for x in require_predictions(output, model):
        tracer.pay(x)
        for label in tracer.labels(x):
            tracer.ledger.pin(label, "it reaches the output of the model")
    seen = tracer.seen
    return Trace(
        tracer.ledger,
        tracer.axes,
        seen.sizes,
        frozenset(seen.reached),
        seen.reductions,
        seen.ratios,
        seen.names,
        seen.valued,
        seen.doubts,
        device == "meta",
        seen.operators,
    )


# In inference mode operators are not taken apart into those that have rules.
@torch.inference_mode(mode=False)
def run_traced(model: nn.Module, example: Any, tracer: Tracer, device: str = "") -> Any:
    """Run ``model`` under ``tracer``, with its parameters on ``device`` (``""``: where they are)."""
    twins: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, x in tensors:
        twin = twins.get(id(x))
        if twin is None:
            # A new object even without a move: labels belong to objects, and this one is ours.
            twin = x.detach().to(device) if device else x.detach()
            if not device and not isinstance(x, nn.Parameter):
                twin = twin.clone()  # a forward pass may write into a buffer
            twins[id(x)] = twin
            if name not in state and _has_units(x):
                tracer.own(name, twin)
        state[name] = twin
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(plain_attention())
        stack.enter_context(plain_recurrence(model))
        stack.enter_context(paths(model, tracer.stack))
        # A run without values takes inputs from anywhere; one with values, where the model is.
        args, kwargs = positional(example, None if device else device_of(model))
        stack.enter_context(naming(model))
        kinds = (Counted, Named)
        stack.enter_context(counting(tracer.counted, tracer.state, used=tracer.used, kinds=kinds))
        stack.enter_context(tracer)
        return torch.func.functional_call(model, state, args, kwargs, tie_weights=False)


def _has_units(x: Tensor) -> bool:
    """Parameters of a network have, and buffers that are more than a number."""
    if isinstance(x, nn.Parameter):
        return x.dtype.is_floating_point
    return x.numel() > 1 and not x.dtype.is_complex
