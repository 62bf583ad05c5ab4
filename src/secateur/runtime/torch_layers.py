"""PyTorch modules whose sparse layers call our kernels: :func:`accelerate` and :func:`restore`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from secateur.core.arguments import require_network
from secateur.core.errors import UsageError, kind_of
from secateur.core.plain import is_wrapper, numbers_of
from secateur.runtime.library import load
from secateur.runtime.session import is_whole
from secateur.runtime.sparse_layer import INFERENCE, Dense, SparseLayer
from secateur.runtime.stored import DTYPES
from secateur.runtime.torch_packed import forget

__all__ = ["Choose", "Considered", "SparseLayer", "accelerate", "consider", "restore"]

Choose = Literal["measured", "first"]


@dataclass(frozen=True)
class Considered:
    """A Linear or Conv2d layer, and whether :func:`accelerate` swaps it.

    Args:
        name: In the module; empty for the module itself.
        sparsity: Share of zeros in its weight.
        reason: Why it stays dense; empty if it is swapped.
    """

    name: str
    sparsity: float
    reason: str


def accelerate(
    module: nn.Module,
    *,
    threads: int | None = None,
    minimum_sparsity: float = 0.5,
    choose: Choose = "measured",
) -> nn.Module:
    """Swap sparse Linear and Conv2d layers for ones that skip their zeros.

    The module is changed in place, as ``module.to()`` does; the layers in it are new objects.
    Which layers, and why others stay dense: :func:`consider`. Weights in bfloat16 and float16 are
    read as they are, which is what makes single tokens of a language model fast; sums are taken in
    float32.

    Args:
        module: On the CPU, in evaluation mode.
        threads: Of our kernels; None for as many as ``torch.get_num_threads()`` says at a call.
        minimum_sparsity: Layers with a smaller share of zeros stay dense.
        choose: ``"measured"``: at the first input of each size (by powers of two), time the
            kernels and the dense layer, and keep the fastest, for all layers of this shape, type,
            sparsity and pattern; ``"first"``: take the likeliest kernel without timing.

    Returns:
        ``module``, or the new layer if the module is itself such a layer.

    Raises:
        UsageError: The module is in training mode, or an argument is out of range.
        MissingNative: secateur was installed without its native part.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()).eval()
        >>> _ = net[0].weight.data.fill_(0.0).fill_diagonal_(2.0)
        >>> with torch.no_grad():
        ...     accelerate(net)(torch.eye(4)).diagonal()
        tensor([2., 2., 2., 2.])
        >>> type(restore(net)[0]).__name__
        'Linear'
    """
    require_network("accelerate(module)", module)
    load()
    if threads is not None and not (is_whole(threads) and 1 <= threads <= 256):
        raise UsageError(
            f"threads={threads!r}",
            "1 to 256 are possible",
            "it should be a number of threads",
            "leave it out for as many as torch uses",
        )
    if choose not in ("measured", "first"):
        raise UsageError(
            f"choose={choose!r}",
            "'measured' and 'first' are possible",
            "kernels are timed, or the likeliest is taken",
            "leave it out to have them timed",
        )
    if module.training:
        raise UsageError(
            "accelerate(module)",
            "the module is in training mode",
            INFERENCE,
            "call module.eval() first",
        )
    swapped = {c.name for c in consider(module, minimum_sparsity=minimum_sparsity) if not c.reason}
    chosen = {id(layer) for name, layer in _layers(module) if name in swapped}

    def sparse(layer: nn.Module) -> nn.Module | None:
        if id(layer) not in chosen or not isinstance(layer, nn.Linear | nn.Conv2d):
            return None
        return SparseLayer(layer, int(threads or 0), choose == "measured")

    return _swap_(module, sparse)


def restore(module: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`, bit for bit.

    Hooks and ``requires_grad`` that were set in the meantime stay.

    Parameters of the layers that were swapped are new objects with the old contents: an optimizer
    that was made before must be made again.

    Args:
        module: Changed in place. Nothing happens to layers that were not swapped.

    Returns:
        ``module``, or the dense layer if the module is itself a swapped one.
    """
    restored = _swap_(module, _dense)
    forget(choices=True)
    return restored


def dense_copy(module: nn.Module) -> nn.Module:
    """The module itself; of an accelerated one a restored copy, to count what it has.

    Example:
        >>> net = accelerate(nn.Linear(4, 4).eval(), minimum_sparsity=0)
        >>> type(dense_copy(net)).__name__, type(net).__name__
        ('Linear', 'SparseLayer')
    """
    return _swap_(copy.deepcopy(module), _dense) if is_accelerated(module) else module


def is_accelerated(module: nn.Module) -> bool:
    """Whether some layer of a network is one of :func:`accelerate`.

    Example:
        >>> net = nn.Linear(4, 4).eval()
        >>> is_accelerated(net), is_accelerated(accelerate(net, minimum_sparsity=0))
        (False, True)
    """
    return any(isinstance(layer, SparseLayer) for layer in module.modules())


def consider(module: nn.Module, *, minimum_sparsity: float = 0.5) -> tuple[Considered, ...]:
    """What :func:`accelerate` would do with every Linear and Conv2d layer.

    Args:
        module: Left as it is.
        minimum_sparsity: Layers with a smaller share of zeros stay dense.

    Raises:
        UsageError: ``minimum_sparsity`` is not in [0, 1].

    Example:
        >>> [(c.name, c.reason) for c in consider(nn.Sequential(nn.Linear(2, 2)))]
        [('0', 'its sparsity 0.000 is below 0.5')]
    """
    if not 0 <= minimum_sparsity <= 1:
        raise UsageError(
            f"minimum_sparsity={minimum_sparsity}",
            f"{minimum_sparsity} is not in [0, 1]",
            "it is a share of zeros",
            "write 0.5 for a half",
        )
    uses: dict[int, int] = {}
    for _, owner in module.named_modules():
        for parameter in owner._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    inside = {
        id(child)
        for owner in module.modules()
        if isinstance(owner, nn.TransformerEncoderLayer)
        for child in owner.modules()
    }
    found = []
    for name, layer in _layers(module):
        weight = layer.weight
        zeros = _zeros(weight)
        reason = _obstacle(layer)
        if uses.get(id(weight), 0) > 1:
            reason = "another layer uses the same weight"
        elif id(layer) in inside:
            reason = "nn.TransformerEncoderLayer reads its dense weight itself"
        elif not reason and zeros < minimum_sparsity:
            reason = f"its sparsity {zeros:.3f} is below {minimum_sparsity:g}"
        found.append(Considered(name, zeros, reason))
    return tuple(found)


def _layers(module: nn.Module) -> Iterator[tuple[str, Dense]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


def _zeros(weight: Tensor) -> float:
    """Share of zeros in a weight; none in one that has no numbers yet."""
    if is_lazy(weight) or weight.is_meta or not weight.numel():
        return 0.0
    return 1.0 - int(torch.count_nonzero(numbers_of(weight.detach()))) / weight.numel()


def _obstacle(layer: Dense) -> str:
    """Why the kernels cannot do what a layer does; empty if they can."""
    if is_parametrized(layer, "weight"):
        return (
            "its weight is computed at every call; "
            "torch.nn.utils.parametrize.remove_parametrizations ends that"
        )
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"it is {kind_of(layer)}, and a subclass may compute something else"
    weight = layer.weight
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, and the kernels know float32, bfloat16 and float16"
    if weight.device.type != "cpu" or weight.layout != torch.strided:
        return f"its weight is {weight.layout} on {weight.device}, not dense in main memory"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed at every call; torch.nn.utils.prune.remove ends that"
    if is_wrapper(weight):
        return f"its weight is {kind_of(weight)}, which has kernels of its own"
    if "forward" in vars(layer):
        return "its forward was replaced, which would be lost"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which would be lost"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"its padding mode is {layer.padding_mode!r}, not 'zeros'"
        if weight.shape[1] == 1:
            return "it is depthwise: there is little to skip in it"
    return ""


def _dense(layer: nn.Module) -> nn.Module | None:
    return layer.dense() if isinstance(layer, SparseLayer) else None


def _swap_(module: nn.Module, replacement: Any) -> nn.Module:
    """Replace layers wherever they stand; one that stands in two places stays one."""
    made: dict[int, nn.Module | None] = {}

    def of(layer: nn.Module) -> nn.Module | None:
        if id(layer) not in made:
            made[id(layer)] = replacement(layer)
        return made[id(layer)]

    for owner in list(module.modules()):
        for name, child in owner._modules.items():
            new = None if child is None else of(child)
            if new is not None:
                owner._modules[name] = new
    return of(module) or module
