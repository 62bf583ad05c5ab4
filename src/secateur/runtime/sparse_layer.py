"""The module that stands where a sparse Linear or Conv2d layer stood.

It gives the dense weight away and keeps the values and a bit mask, which is smaller from about 5 % of
zeros on. Its state dict still has ``weight`` and ``bias``, dense, under the names and with the bits that
they had, and loads the same.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from secateur.core.errors import UsageError
from secateur.core.masks import pack_bits
from secateur.formats.layouts import LAYOUTS
from secateur.runtime import torch_operators, torch_packed
from secateur.runtime.stored import DTYPES
from secateur.runtime.torch_weight import UnreadWeight, assigned

Dense = nn.Linear | nn.Conv2d
INFERENCE = "the kernels compute outputs, and no derivatives"
_BITMASK = LAYOUTS["bitmask"]
# Multiply-adds that PyTorch does in about the ten microseconds that a call of an operator takes.
_LITTLE = 1 << 18
# Shapes of inputs that a layer remembers.
_SHAPES = 1000


@dataclass
class _Known:
    """What a layer has learned of its weight.

    Args:
        key: Changes with the weight.
        memory: Of the weight; held, because another weight at its address would have its key.
        dense: By shape of the input, whether it is fastest dense.
        weight: The dense weight, once that is needed.
    """

    key: object
    memory: torch.UntypedStorage
    dense: dict[torch.Size, bool] = field(default_factory=dict)
    weight: Tensor | None = None


class SparseLayer(nn.Module):
    """What stands where a Linear or Conv2d layer stood.

    Args:
        dense: The layer; it is left as it is.
        threads: 0 for as many as ``torch.get_num_threads()`` says.
        measure: Time the kernels at the first input of each size.
    """

    is_packed = True  # secateur.core.arguments.require_dense knows it by this

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
        self._known: _Known | None = None
        self.shape = tuple(dense.weight.shape)
        # Its order in memory, without the gaps and overlaps that a view may have.
        self._order = torch.empty_like(dense.weight, device="meta").stride()
        for name in ("values", "index", "negative"):
            self.register_buffer(name, None, persistent=False)
        self._store_(dense.weight)
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        # An empty stand-in for the weight among the parameters, so that requires_grad_() of this
        # module, or of one around it, is not lost.
        self.trainable = nn.Parameter(self.values.new_empty(0), dense.weight.requires_grad)
        self.geometry = _geometry(dense) if isinstance(dense, nn.Conv2d) else None
        # As the operators take them.
        self._dimensions: tuple[Any, ...] = self.shape
        if self.geometry is not None:
            self._dimensions = (self.shape, *self.geometry)
        for name in dense.__constants__:  # sizes, strides and such, which a parent may read
            setattr(self, name, getattr(dense, name))
        self._release_at_the_end()

    @property
    def weight(self) -> Tensor:
        """The dense weight; what is written into it is lost.

        It is unpacked when its numbers are first used, anew for every read. Its type, shape and
        device are known without.
        """
        parts = (self.values, self.index, self.negative, self.shape, self._order)
        if _is_followed():  # Compilers leave out a call whose result is not used.
            whole: Tensor = torch.ops.secateur.dense_weight(*parts)
            return whole
        # Without the layer, which may get other values in the meantime.
        unpack = functools.partial(torch_operators.dense_weight, *parts)
        return UnreadWeight(self.shape, self._order, self.values, unpack)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise assigned()
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer computes, up to rounding."""
        self._require_inference(x)
        _require_plain(x)
        if torch.is_autocast_enabled("cpu") and x.dtype in DTYPES:
            # Types as a dense layer has them. The sums are float32, as ever.
            with torch.autocast("cpu", enabled=False):
                y = self._computed(x.to(self.values.dtype))
            return y.to(torch.get_autocast_dtype("cpu"))
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        # Reading a tensor as an attribute of a module takes longer than all else that is done here.
        plain = self._plain(x)
        if plain is not None:
            bias: Tensor | None = self._parameters["bias"]
            if bias is not None and torch.is_grad_enabled():
                bias = bias.detach()
            shell = self._shell[0]
            if isinstance(shell, nn.Conv2d):
                y: Tensor = shell._conv_forward(x, plain, bias)
                return y
            return functional.linear(x, plain, bias)
        stored = (*self._stored(), *self._dimensions, self.threads, self.measure)
        if self.geometry is None:
            flat: Tensor = torch.ops.secateur.sparse_linear(x, *stored)
            return flat
        image = x.dim() == 3
        batch: Tensor = torch.ops.secateur.sparse_conv(x.unsqueeze(0) if image else x, *stored)
        return batch.squeeze(0) if image else batch

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        bias = self._parameters["bias"]
        values, index = self._buffers["values"], self._buffers["index"]
        assert values is not None
        assert index is not None
        return values, index, None if bias is None else bias.detach()

    def _plain(self, x: Tensor) -> Tensor | None:
        """The dense weight, if the layer is fastest dense for such an input; else None.

        The operator would come to the same, but calling it takes as long as a small layer.
        """
        # One path is to serve all inputs of what is compiled or traced.
        if not self.measure or _is_followed() or x.is_meta:
            return None
        values = self._buffers["values"]
        assert values is not None
        if x.dtype != values.dtype:
            return None
        key, known = torch_packed.identity(values), self._known
        if known is None or known.key != key:
            known = self._known = _Known(key, values.untyped_storage())
        dense = known.dense.get(x.shape)
        if dense is None:
            dense = self._learn(x, known)
        return known.weight if dense else None

    def _learn(self, x: Tensor, known: _Known) -> bool:
        """Whether the layer is fastest dense for such an input, as far as that is known."""
        stored = self._stored()
        if self.geometry is None:
            asked = torch_operators.ask_linear(x, *stored, *self._dimensions)
        else:
            batch = x.unsqueeze(0) if x.dim() == 3 else x
            asked = torch_operators.ask_conv(batch, *stored, *self._dimensions)
        if not asked.work:
            return False
        dense: bool | None = asked.work < _LITTLE
        if not dense:
            dense = torch_packed.stays_dense(asked.stored, asked.positions)
        if dense is None:
            return False
        if dense and known.weight is None:
            raced = torch_packed.unpacked(asked.stored)
            whole = self._unpacked().contiguous() if raced is None else raced
            known.weight = whole.view(self.shape)
        if len(known.dense) == _SHAPES:
            known.dense.clear()
        known.dense[x.shape] = dense
        return dense

    def dense(self) -> Dense:
        """The layer as it was before, with the same bits in its weight; hooks are taken along."""
        layer = copy.copy(self._shell[0])
        layer._buffers, layer._modules = {}, {}
        weight = nn.Parameter(self._unpacked(), requires_grad=self.trainable.requires_grad)
        layer._parameters = {"weight": weight, "bias": self.bias}
        layer.training = self.training
        for name, hooks in vars(self).items():
            if "_hooks" in name:
                # The dictionaries themselves: handles remove hooks from these.
                hooks.update(vars(layer)[name])
            if "_hook" in name:  # and what kind they are
                setattr(layer, name, hooks)
        return layer

    def extra_repr(self) -> str:
        """Shape, sparsity and the kind of layer."""
        kept = self.values.numel() / max(1, self.index.numel() * 8)
        return f"{type(self._shell[0]).__name__}, weight={self.shape}, sparsity={1 - kept:.3f}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or another process, has weights at other addresses.
        return self.__dict__ | {"_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._release_at_the_end()

    def _release_at_the_end(self) -> None:
        # The dictionary does not know the layer, so it does not keep it, and has its latest tensors.
        end = weakref.finalize(self, torch_packed.release, self._buffers)
        end.atexit = False

    def _store_(self, weight: Tensor) -> None:
        torch_packed.release(self._buffers)
        value = weight.detach().contiguous()
        parts = _BITMASK.pack(value, value != 0)
        self.values, self.index = parts["values"], parts["bitmask"]
        # weight * mask leaves -0.0 where the weight was negative; all bits are to come back.
        negative = (value == 0) & value.signbit()
        self.negative = pack_bits(negative.flatten()) if negative.any() else None

    def _unpacked(self) -> Tensor:
        parts = (self.values, self.index, self.negative)
        return torch_operators.dense_weight(*parts, self.shape, self._order)

    def _require_inference(self, x: Tensor) -> None:
        if self.training:
            raise UsageError(
                "a run of an accelerated layer",
                "it is in training mode",
                INFERENCE,
                "call .eval(), or restore()",
            )
        # A program is exported with gradients on, and run as its user likes.
        wanted = x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        dual = not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None
        if wanted or dual:
            raise UsageError(
                "a run of an accelerated layer",
                f"its input {'has a tangent' if dual else 'requires a gradient'}",
                INFERENCE,
                "run the module under torch.inference_mode() or no_grad(), or restore() it",
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self._unpacked()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "trainable"]

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
            like = given if assigned else self.values
            if not like.is_meta:  # torch, too, copies nothing into a tensor without memory
                self._store_(given.to(dtype=like.dtype, device=like.device))
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k != name}
        own[prefix + "trainable"] = self.values.new_empty(0)
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _require_plain(x: Tensor) -> None:
    """Refuse what the dispatcher of PyTorch would not hand to an operator of ours."""
    if x.layout != torch.strided or x.is_nested:
        raise UsageError(
            "a run of an accelerated layer",
            f"its input is {'nested' if x.is_nested else x.layout}",
            "the kernels read dense arrays",
            "convert it, e.g. with .to_dense() or torch.nested.to_padded_tensor, or restore() the layer",
        )


def _is_followed() -> bool:
    """Whether a call is compiled, exported or traced, and not just run."""
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.compiler.is_compiling() or traced


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
