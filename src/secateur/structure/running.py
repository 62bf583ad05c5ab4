"""How a network is run for a trace: its inputs, and its modules as they run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from secateur.core.arguments import require_dense, require_network
from secateur.core.attention import unfused_attention
from secateur.core.batches import mapped
from secateur.core.errors import UsageError, kind_of


@dataclass(frozen=True)
class Call:
    """One operator as it ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or named argument."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, also those in lists."""
        return tensors_in((self.args, tuple(self.kwargs.values())))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors among the results."""
        return tensors_in(self.out)

    @property
    def name(self) -> str:
        """As PyTorch prints it, e.g. ``aten.add``."""
        return str(self.func.overloadpacket)


def positional(
    example: Any, device: torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments; a model may write into the mappings in it.

    Args:
        example: A tensor, a tuple of positional arguments, or a mapping of named ones.
        device: Where its tensors are moved; by default they stay.

    Example:
        >>> positional(torch.zeros(1))
        ((tensor([0.]),), {})
    """

    def moved(x: Tensor) -> Tensor:
        return x if device is None else x.to(device)

    if isinstance(example, Mapping):
        return (), {key: mapped(value, moved) for key, value in example.items()}
    given = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return mapped(given, moved), {}


def require_python(model: nn.Module) -> None:
    """Refuse a network that hides its modules or its operators.

    Raises:
        UsageError: It is wrapped for several devices, accelerated, or compiled to TorchScript.

    Example:
        >>> require_python(nn.DataParallel(nn.Linear(1, 1)))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: tracing DataParallel: it wraps a Linear for several devices...
    """
    require_network("tracing a network", model)
    require_dense(f"tracing {type(model).__name__}", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(
            f"tracing {type(model).__name__}",
            f"it wraps {kind_of(model.module)} for several devices",
            "the network is cut, not its wrapper",
            "pass its .module, and wrap the result anew",
        )
    scripts = (name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule))
    script = next(scripts, None)
    if script is not None:
        raise UsageError(
            f"tracing {type(model).__name__}",
            f"{repr(script) if script else 'it'} was compiled to TorchScript",
            "compiled code does not show which modules and attributes it uses",
            "pass the network as it was before torch.jit",
        )


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules of a network; the parameters and buffers in them are the same objects.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> shared_copy(layer).weight is layer.weight
        True
    """
    memo: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        # What a forward pass in training left behind is part of a graph, and does not copy itself.
        left = [x for x in tensors_in(vars(module)) if x.grad_fn is not None]
        memo |= {id(x): x.detach().clone() for x in left}
    return copy.deepcopy(model, memo)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as products and a softmax, not as one fused operator."""
    with unfused_attention(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as products and gates, not as one fused operator."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield  # convolutions are much faster with the library that is switched off here
        return
    # The public switch, torch.backends.mkldnn.flags, also sets TF32 and warns on processors without it.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextmanager
def paths(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the paths of the modules that are running on ``stack``."""
    handles = []
    for path, module in model.named_modules():

        def enter(_: nn.Module, __: Any, path: str = path) -> None:
            stack.append(path)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and mappings.

    Example:
        >>> len(tensors_in([torch.zeros(1), {"a": (torch.zeros(2), 3)}]))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in tensors_in(item)]
    return []


def run_plainly(tracer: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator as it is."""
    return func(*args, **kwargs)


# On meta tensors PyTorch runs these in Python, slowly, to find what is known: the shape of the input.
_LIKE_ITS_INPUT = {
    getattr(torch.ops.aten, name).default
    for name in ("relu", "silu", "gelu", "sigmoid", "tanh", "hardtanh", "hardswish")
}


def run_without_values(
    tracer: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Where any argument has no values the result has none, either."""
    tensors = tensors_in((args, tuple(kwargs.values())))
    if func is torch.ops.aten._to_copy.default and not _floats(args[0]) and not args[0].is_meta:
        kwargs = {**kwargs, "device": None}  # indices and lengths keep their values
    elif any(x.is_meta for x in tensors):
        if func in _LIKE_ITS_INPUT:
            return torch.empty_like(args[0], device="meta")
        if func is torch.ops.aten.native_batch_norm.default and not args[5]:
            none = torch.empty(0, device="meta")
            return torch.empty_like(args[0], device="meta"), none, none
        if func is torch.ops.aten._pack_padded_sequence.default:
            return _packed(*args)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    elif not tensors and str(kwargs.get("device")) == "meta" and not _recurrent(tracer):
        kwargs = {**kwargs, "device": "cpu"}  # a constant: its values are known
    return func(*args, **kwargs)


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Their number is known from the lengths, without a value of any step."""
    steps, counts = torch._VF._pack_padded_sequence(torch.empty(x.shape[:2]), lengths, batch_first)
    return x.new_empty((len(steps), *x.shape[2:])), counts


def _floats(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _recurrent(tracer: Any) -> bool:
    """Whether a recurrent layer is running: it compares the device of its first hidden state."""
    inside = tracer.stack and tracer.model.get_submodule(tracer.stack[-1])
    return isinstance(inside, nn.RNNBase)
