"""What each expert of a mixture contributes to its layer's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss, evaluating, forward, real_tokens, to_device
from secateur.core.errors import UsageError
from secateur.core.groups import Groups, Part
from secateur.core.slots import device_of


@dataclass(frozen=True)
class RoutedOutput:
    r"""Mean over the tokens routed to an expert of its gate times the norm of its output.

    **formula** :math:`S_j = \frac{1}{|X_j|} \sum_{x\in X_j} g_j(x)\, \lVert f_j(x) \rVert_2`
    **Shapes** ``(groups,)``, an expert each; 0 for an expert that no token reached. Tokens that the
    batch's ``attention_mask`` calls padding reach none
    **Units** those of the layer's output
    **Needs** a forward pass; for a list of modules also a backward pass through its block
    **Source** REAP, arXiv 2510.13999
    """

    def measure_groups(
        self, model: nn.Module, groups: Sequence[Groups], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        found = {}
        for width in groups:
            path, index = _experts(model, width)
            found[width.name] = expert_outputs(model, path, batches)[index.reshape(-1)]
        return found


def _experts(model: nn.Module, width: Groups) -> tuple[str, Tensor]:
    """Path of the experts whose number a width is, and the expert of each group."""
    for part in width.having("other"):
        if part.value.ndim >= 3 and part.axis == 0 and part.index.shape[1] == 1:
            return part.module, part.index
    for part in width.having("out", "other"):
        path = _list_beside(model, part)
        if path is not None and part.index.shape[1] == 1:
            return path, part.index
    have = ", ".join(f"{p.parameter} ({p.role}, axis {p.axis})" for p in width.parts[:6])
    raise UsageError(
        f"expert saliency of the width {width.name!r}",
        f"its groups are no experts: {have}",
        "it scores the first axis of stacked experts, or a router's rows beside a ModuleList",
        "use it with include= on the experts' widths",
    )


def _list_beside(model: nn.Module, part: Part) -> str | None:
    """The ModuleList with as many modules as the router has rows, in the router's block."""
    block = part.module.rpartition(".")[0]
    for name, child in model.get_submodule(block).named_children():
        if isinstance(child, nn.ModuleList) and len(child) == part.value.shape[part.axis]:
            return f"{block}.{name}" if block else name
    return None


def expert_outputs(model: nn.Module, path: str, batches: Sequence[Batch]) -> Tensor:
    """Mean routed output norms of the experts at ``path``: ``(experts,)``.

    Args:
        model: Run in evaluation mode.
        path: A module of stacked experts called as ``(states, index, gates)``, as in Transformers
            5; or a ``ModuleList`` of experts, whose parent mixes their outputs linearly. The gates
            of a list are then the derivatives of the mixture by the outputs, whatever the routing.
        batches: Inputs.

    Raises:
        UsageError: The experts are called in another way.
    """
    experts = model.get_submodule(path)
    watch = _listed if isinstance(experts, nn.ModuleList) else _stacked
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def add(expert: int, gates: Tensor, outputs: Tensor) -> None:
        norms = outputs.double().norm(dim=-1)
        sums[expert] = sums.get(expert, norms.new_zeros(())) + (gates.double() * norms).sum()
        counts[expert] = counts.get(expert, 0) + len(gates)

    given: list[Batch] = []

    def real(x: Tensor) -> Tensor | slice:
        tokens = real_tokens(model, given[-1], x)
        return slice(None) if tokens is None else tokens

    with evaluating(model), _without_gradients(model), watch(model, path, add, real) as count:
        for batch in batches:
            given.append(batch)
            forward(model, to_device(batch, device_of(model)))
    scores = torch.zeros(count(), dtype=torch.float64, device=device_of(model))
    for expert, total in sums.items():
        scores[expert] = total / max(1, counts[expert])
    return scores


@contextmanager
def _stacked(model: nn.Module, path: str, add: Any, real: Any) -> Iterator[Any]:
    experts = model.get_submodule(path)
    total = len(next(p for p in experts.parameters(recurse=False) if p.ndim >= 3))
    busy = False

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal busy
        if busy:
            return
        routing = _routing(path, (*args, *kwargs.values()))
        states, index, gates = (x[real(routing[0])] for x in routing)
        busy = True
        try:
            # The same module, asked for one expert alone with gate 1, gives its bare output.
            for expert in index.unique().tolist():
                if not 0 <= expert < total:
                    continue  # a number beyond the last marks tokens that stay away
                hit = index == expert
                tokens = hit.any(1)
                alone = index.new_full((int(tokens.sum()), 1), expert)
                outputs = module(states[tokens], alone, gates.new_ones(alone.shape))
                add(expert, (gates * hit).sum(1)[tokens], outputs)
        finally:
            busy = False

    handle = experts.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            yield lambda: total
    finally:
        handle.remove()


def _routing(path: str, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [x for x in given if isinstance(x, Tensor)]
    if len(tensors) == 3 and tensors[1].shape == tensors[2].shape:
        states, index, gates = tensors
        if not index.dtype.is_floating_point:
            chosen = index.shape[-1]
            flat = states.reshape(-1, states.shape[-1])
            return flat, index.reshape(-1, chosen), gates.reshape(-1, chosen)
    raise UsageError(
        f"expert saliency of {path!r}",
        f"it is called with tensors of shapes {[tuple(x.shape) for x in tensors]}",
        "stacked experts are called with states, chosen experts and their gates",
        "use another criterion for this width",
    )


@contextmanager
def _listed(model: nn.Module, path: str, add: Any, real: Any) -> Iterator[Any]:
    experts = model.get_submodule(path)
    assert isinstance(experts, nn.ModuleList)
    block = model.get_submodule(path.rpartition(".")[0])
    made: list[tuple[int, Tensor]] = []

    def after_expert(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_(True)
            made.append((number, leaf))
            return leaf

        return hook

    def after_block(module: nn.Module, args: Any, output: Any) -> Any:
        mixed = output if isinstance(output, Tensor) else output[0]
        leaves = [leaf for _, leaf in made]
        found = (
            torch.autograd.grad(mixed[real(mixed)].sum(), leaves, allow_unused=True)
            if leaves
            else ()
        )
        for (expert, leaf), gradient in zip(made, found, strict=True):
            if gradient is not None:
                _add_listed(path, expert, leaf.detach(), gradient, add)
        made.clear()
        # Cut the graph here: the layers behind need no gradients.
        return mixed.detach() if isinstance(output, Tensor) else (mixed.detach(), *output[1:])

    handles = [m.register_forward_hook(after_expert(i)) for i, m in enumerate(experts)]
    handles.append(block.register_forward_hook(after_block))
    try:
        with torch.enable_grad():
            yield lambda: len(experts)
    finally:
        for handle in handles:
            handle.remove()


def _add_listed(path: str, expert: int, outputs: Tensor, gradient: Tensor, add: Any) -> None:
    gates = gradient.flatten(0, -2)
    spread = float((gates - gates[:, :1]).abs().max()) if len(gates) else 0.0
    if spread > 1e-4 * max(1e-30, float(gates.abs().max()) if len(gates) else 0.0):
        raise UsageError(
            f"expert saliency of {path!r}",
            "its block is not linear in the experts' outputs",
            "the gate of an expert is read from that linear mixture",
            "measure inside the block: put mixture and experts into a module of their own",
        )
    routed = gates[:, 0] != 0
    add(expert, gates[routed, 0], outputs.flatten(0, -2)[routed])


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients, so graphs begin at the experts' outputs."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
