"""PyTorch modules whose sparse layers call our kernels: :func:`accelerate` and :func:`restore`.

A layer that is swapped gives its dense weight away and keeps the values and a bit mask, which is
smaller from about 5 % of zeros on. Its state dict still has ``weight`` and ``bias``, dense, under
the names and with the bits that they had, and loads the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.masks import pack_bits, unpack_bits
from secateur.formats.layouts import LAYOUTS
from secateur.runtime import torch_operators
from secateur.runtime.library import load
from secateur.runtime.session import is_whole
from secateur.runtime.stored import DTYPES

Choose = Literal["measured", "first"]
Dense = nn.Linear | nn.Conv2d
_BITMASK = LAYOUTS["bitmask"]
_INFERENCE = "the kernels have no backward pass"
# Multiply-adds that PyTorch does in about the ten microseconds that a call of an operator takes.
_LITTLE = 1 << 18


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


@dataclass
class _Known:
    """What a linear layer has learned of its weight.

    Args:
        key: Changes with the weight.
        memory: Of the weight; held, because another weight at its address would have its key.
        dense: By size of the input, whether it is fastest dense.
        weight: The dense weight, once that is needed.
    """

    key: object
    memory: torch.UntypedStorage
    dense: dict[int, bool] = field(default_factory=dict)
    weight: Tensor | None = None


class SparseLayer(nn.Module):
    """What stands where a Linear or Conv2d layer stood.

    Args:
        dense: The layer; it is left as it is.
        threads: 0 for as many as ``torch.get_num_threads()`` says.
        measure: Time the kernels at the first input of each size.
    """

    values: Tensor
    index: Tensor
    negative: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, dense: Dense, threads: int, measure: bool) -> None:
        super().__init__()
        self.train(dense.training)
        self.threads, self.measure = threads, measure
        # The layer without its tensors, in a tuple so that it is no child.
        shell: Dense = copy.copy(dense)
        shell._parameters, shell._buffers, shell._modules = {}, {}, {}
        self._shell: tuple[Dense] = (shell,)
        self._trainable = dense.weight.requires_grad
        self._known: _Known | None = None
        self.shape = tuple(dense.weight.shape)
        # Its order in memory, without the gaps and overlaps that a view may have.
        self._order = torch.empty_like(dense.weight, device="meta").stride()
        for name in ("values", "index", "negative"):
            self.register_buffer(name, None, persistent=False)
        self._store_(dense.weight)
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        self.geometry = _geometry(dense) if isinstance(dense, nn.Conv2d) else None
        for name in dense.__constants__:  # sizes, strides and such, which a parent may read
            setattr(self, name, getattr(dense, name))

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at every use: what is written into it is lost."""
        parts = {"values": self.values, "bitmask": self.index}
        value, _ = _BITMASK.unpack(parts, self.shape, self.values.dtype)
        if self.negative is not None:
            value[unpack_bits(self.negative, self.shape)] = -0.0
        whole = torch.empty_strided(self.shape, self._order, dtype=value.dtype, device=value.device)
        return whole.copy_(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UsageError(
                "assigning the weight of an accelerated layer",
                "it has no dense weight, only the values that are not zero",
                "the kernels run from those",
                "use load_state_dict, or restore() the module first and accelerate() it again",
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer computes, up to rounding."""
        self._require_inference(x)
        if torch.is_autocast_enabled("cpu") and x.dtype in DTYPES:
            # Types as a dense layer has them. The sums are float32, as ever.
            with torch.autocast("cpu", enabled=False):
                y = self._computed(x.to(self.values.dtype))
            return y.to(torch.get_autocast_dtype("cpu"))
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        stored = (self.values, self.index, bias)
        how = (self.threads, self.measure)
        if self.geometry is None:
            plain = self._plain(x, bias)
            if plain is not None:
                return functional.linear(x, plain, bias)
            flat: Tensor = torch.ops.secateur.sparse_linear(x, *stored, *self.shape, *how)
            return flat
        image = x.dim() == 3
        batch = x.unsqueeze(0) if image else x
        y: Tensor = torch.ops.secateur.sparse_conv(batch, *stored, self.shape, *self.geometry, *how)
        return y.squeeze(0) if image else y

    def _plain(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The dense weight, if the layer is fastest dense for so many tokens; else None.

        The operator would come to the same, but calling it takes as long as a small layer.
        """
        outputs, inputs = self.shape
        # One path is to serve all inputs of what is compiled or traced.
        traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not self.measure or torch.compiler.is_compiling() or traced:
            return None
        fits = x.dtype == self.values.dtype and x.dim() > 0 and x.shape[-1] == inputs
        if not fits or not x.numel():
            return None
        key, known = torch_operators.identity(self.values), self._known
        if known is None or known.key != key:
            known = self._known = _Known(key, self.values.untyped_storage())
        tokens = x.numel() // inputs
        size = tokens.bit_length()
        stored = (self.values, self.index, bias)
        if size not in known.dense:
            dense: bool | None = x.numel() * outputs < _LITTLE
            if not dense:
                dense = torch_operators.stays_dense(*stored, self.shape, tokens)
            if dense is None:
                return None
            known.dense[size] = dense
        if not known.dense[size]:
            return None
        if known.weight is None:
            raced = torch_operators.unpacked(*stored, self.shape)
            known.weight = self.weight.contiguous() if raced is None else raced
        return known.weight

    def dense(self) -> Dense:
        """The layer as it was before, with the same bits in its weight."""
        layer = copy.copy(self._shell[0])
        layer._buffers, layer._modules = {}, {}
        weight = nn.Parameter(self.weight, requires_grad=self._trainable)
        layer._parameters = {"weight": weight, "bias": self.bias}
        layer.training = self.training
        return layer

    def extra_repr(self) -> str:
        """Shape, sparsity and the kind of layer."""
        kept = self.values.numel() / max(1, self.index.numel() * 8)
        return f"{type(self._shell[0]).__name__}, weight={self.shape}, sparsity={1 - kept:.3f}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or another process, has weights at other addresses.
        return self.__dict__ | {"_known": None}

    def _store_(self, weight: Tensor) -> None:
        value = weight.detach().contiguous()
        parts = _BITMASK.pack(value, value != 0)
        self.values, self.index = parts["values"], parts["bitmask"]
        # weight * mask leaves -0.0 where the weight was negative; all bits are to come back.
        negative = (value == 0) & value.signbit()
        self.negative = pack_bits(negative.flatten()) if negative.any() else None

    def _require_inference(self, x: Tensor) -> None:
        if self.training:
            raise UsageError(
                "an accelerated layer in training mode", _INFERENCE, do="call .eval(), or restore()"
            )
        # A program is exported with gradients on, and run as its user likes.
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            raise UsageError(
                "an accelerated layer on an input that requires a gradient",
                _INFERENCE,
                do="run the module under torch.inference_mode() or no_grad(), or restore() it",
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(  # noqa: PLR0913, PLR0917 - the signature is torch's
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        given = state_dict.get(name)
        if given is None and strict:
            missing_keys.append(name)
        elif given is not None and tuple(given.shape) != self.shape:
            error_msgs.append(f"size mismatch for {name}: {tuple(given.shape)}, not {self.shape}")
        elif given is not None:
            assigned = local_metadata.get("assign_to_params_buffers", False)
            dtype = given.dtype if assigned else self.values.dtype
            self._store_(given.to(dtype=dtype, device=self.values.device))
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k != name}
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


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
    load()
    if threads is not None and not (is_whole(threads) and 1 <= threads <= 256):
        raise UsageError(
            f"threads={threads!r}",
            "1 to 256 are possible",
            "it is a number of threads",
            "leave it out for as many as torch uses",
        )
    if choose not in ("measured", "first"):
        raise UsageError(f"choose={choose!r}", "it is 'measured' or 'first'")
    if module.training:
        raise UsageError(
            "accelerate(module)",
            "the module is in training mode",
            _INFERENCE,
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

    Parameters of the layers that were swapped are new objects with the old contents: an optimizer
    that was made before must be made again.

    Args:
        module: Changed in place. Nothing happens to layers that were not swapped.

    Returns:
        ``module``, or the dense layer if the module is itself a swapped one.
    """
    restored = _swap_(module, lambda m: m.dense() if isinstance(m, SparseLayer) else None)
    torch_operators.forget(choices=True)
    return restored


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
        raise UsageError(f"minimum_sparsity={minimum_sparsity}", "it is not in [0, 1]")
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
        zeros = 1.0 - int(torch.count_nonzero(weight.detach())) / max(1, weight.numel())
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
    # Subclasses may compute something else, and parametrized layers are subclasses.
    for name, layer in module.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            yield name, layer


def _obstacle(layer: Dense) -> str:
    """Why the kernels cannot do what a layer does; empty if they can."""
    weight = layer.weight
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, and the kernels know float32, bfloat16 and float16"
    if weight.device.type != "cpu" or weight.layout != torch.strided:
        return f"its weight is {weight.layout} on {weight.device}, not dense in main memory"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed at every call; torch.nn.utils.prune.remove ends that"
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


def _geometry(layer: nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, pads (top, left, bottom, right), dilation and groups."""
    # Written for functional.pad: last axis first, before and after.
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return (
        tuple(layer.stride),
        (top, left, bottom, right),
        tuple(layer.dilation),
        layer.groups,
    )


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
