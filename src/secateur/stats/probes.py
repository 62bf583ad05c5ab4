"""Measurements that need the whole network at once: pruning at initialisation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from secateur.core.batches import Batch, Loss, forward, mapped, narrow, size_of
from secateur.core.errors import UsageError
from secateur.core.losses import differentiable, logits_of, own_loss, read_tensors
from secateur.core.slots import Slot
from secateur.stats.engine import requiring_grad


@dataclass(frozen=True)
class GradientFlow:
    r"""Hessian times gradient: how the squared gradient norm changes with each weight.

    The logits are divided by ``temperature``, which flattens the softmax as in the paper. A model
    that computes its own loss (Transformers with labels) is used as it is. Batches count by their
    samples. Half precision is measured on a copy in float32, where small squares do not vanish.

    **formula** :math:`H g,\quad g = \nabla L(w),\ H = \nabla^2 L(w)`, for all parameters of two and
    more axes, also those that are not pruned
    **Shapes** that of the weight
    **Units** loss² per weight³
    **Needs** two passes with a double backward
    **Source** GraSP, arXiv 2002.07376
    """

    temperature: float = 200.0

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            model = copy.deepcopy(model).float()
            batches = [_in_float32(batch) for batch in batches]
        # The gradient whose norm is looked at is that of all weights, as in the source.
        whole = [p for p in model.parameters() if p.ndim > 1]
        index = {id(p): i for i, p in enumerate(whole)}
        sizes = [size_of(batch) for batch in batches]
        shares = [size / sum(sizes) for size in sizes]
        # Fused attention has no second derivative; its plain form does.
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.enable_grad(), plain, requiring_grad(whole), _cooled(model, self.temperature):
            mean = [torch.zeros_like(p) for p in whole]
            for batch, share in zip(batches, shares, strict=True):
                value = differentiable(loss(model, batch))
                found = torch.autograd.grad(value, whole, allow_unused=True)
                mean = [m if g is None else m + share * g for m, g in zip(mean, found, strict=True)]
            product = [torch.zeros_like(p) for p in whole]
            for batch, share in zip(batches, shares, strict=True):
                found = torch.autograd.grad(
                    loss(model, batch), whole, create_graph=True, allow_unused=True
                )
                pairs = [(g, m) for g, m in zip(found, mean, strict=True) if g is not None]
                flow = sum((g * m.detach()).sum() for g, m in pairs)
                assert isinstance(flow, Tensor)
                second = torch.autograd.grad(flow, whole, allow_unused=True)
                product = [
                    p if h is None else p + share * h for p, h in zip(product, second, strict=True)
                ]
        return {slot.name: product[index[id(slot.tensor(model))]].detach() for slot in slots}


def _in_float32(batch: Batch) -> Batch:
    def wide(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    return cast(Batch, tree_map_only(Tensor, wide, batch))


@contextmanager
def _cooled(model: nn.Module, temperature: float) -> Iterator[None]:
    """The logits of ``model`` divided by a temperature, in whatever they come, unless it has its own loss.

    A hook and no wrapper: a loss of the user's own finds everything else of the model.
    """

    def cool(_: nn.Module, __: object, output: Any) -> Any:
        if own_loss(output) is not None:
            return output
        logits = logits_of(output)
        cold = mapped(output, lambda x: x / temperature if x is logits else x)
        # What an object of another kind holds cannot be replaced.
        return logits / temperature if logits_of(cold) is logits else cold

    handle = model.register_forward_hook(cool)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class SynapticFlow:
    r"""Gradient of the summed output of the linearised network of absolute weights.

    Every parameter is replaced by its absolute value, every bias by zero and every input of floats by
    ones, in float64 and evaluation mode, on a copy of the model. BatchNorm uses its stored statistics
    with zero mean; normalisations that have none (LayerNorm, RMSNorm, GroupNorm, InstanceNorm) only
    scale, as they would otherwise undo what the layers before them do. Activations pass on what they
    get, as ReLU does with what is positive: one that saturates would let the flow through layers
    before it die. So the network is linear in each layer's weights, but for softmax, gates and the
    inside of recurrent layers.

    **formula** :math:`\partial R/\partial |w|,\quad R = \mathbf 1^\top f_{|w|}(\mathbf 1)`
    **Shapes** that of the weight
    **Units** none that matter; sums of ``|w| * value`` over a layer are equal for all layers of a
    chain (synaptic conservation)
    **Needs** one batch, only for its shape
    **Source** SynFlow, arXiv 2006.05467
    """

    def measure(
        self, model: nn.Module, slots: Sequence[Slot], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        kinds = [x.dtype for x in read_tensors(batches[0]) if x.ndim]
        if not kinds or not kinds[0].is_floating_point:
            raise UsageError(
                "SynFlow",
                f"the input is of type {kinds[0]}" if kinds else "the batch holds no input",
                "its input is a tensor of ones, which has no meaning for token ids",
                "use another criterion, e.g. magnitude or snip",
            )
        linear = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for name, parameter in linear.named_parameters():
                added = "bias" in name.rpartition(".")[2]
                (parameter.zero_() if added else parameter.abs_()).requires_grad_(True)
            for module in linear.modules():
                stored = getattr(module, "running_mean", None)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and stored is not None:
                    stored.zero_()
        parameters = [slot.tensor(linear) for slot in slots]
        with torch.enable_grad(), _Linear():
            total = logits_of(forward(linear, _ones(batches[0]))).sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {
            slot.name: (torch.zeros_like(p) if g is None else g).detach()
            for slot, p, g in zip(slots, parameters, found, strict=True)
        }


def _ones(batch: Batch) -> Batch:
    """One sample with ones in place of all numbers; what is no number stays."""

    def one(x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x

    return cast(Batch, tree_map_only(Tensor, one, narrow(batch, 1)))


class _Linear(TorchFunctionMode):
    """Activations do nothing; normalisations by statistics of the input multiply by their weight."""

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        if func in _NORMS:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            x, weight, at = given["input"], given.get("weight"), _NORMS[func]
            stored = given.get("running_mean") is not None and not given.get(
                "training", given.get("use_input_stats", True)
            )
            if not stored:
                if weight is None:
                    return x
                return x * (weight if at == -1 else weight.reshape(-1, *[1] * (x.ndim - 2)))
        return func(*args, **kwargs)


_ACTIVATIONS = {
    *(getattr(torch, name) for name in ("tanh", "tanh_", "sigmoid", "sigmoid_")),
    *(getattr(Tensor, name) for name in ("tanh", "tanh_", "sigmoid", "sigmoid_")),
    *(F.tanh, F.sigmoid, F.hardtanh, F.relu6, F.hardswish, F.hardsigmoid, F.logsigmoid),
    *(F.gelu, F.silu, F.mish, F.elu, F.selu, F.celu, F.softplus, F.softsign),
    *(F.softshrink, F.hardshrink, F.tanhshrink, F.threshold),
}
# Normalisations, and the axis that their weight lies along: the channels or the last axes.
_NORMS: dict[Any, int] = {
    F.layer_norm: -1,
    F.rms_norm: -1,
    F.group_norm: 1,
    F.instance_norm: 1,
    F.batch_norm: 1,
}
