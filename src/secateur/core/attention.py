"""Attention as PyTorch has it, with fewer heads than its width has room for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.errors import UsageError


class PrunedAttention(nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` of which heads, or a part of the width, were cut.

    A cut turns a module into this class: its parameters stay the same objects under the same names.
    It computes what ``nn.MultiheadAttention`` computes with the other heads set to zero, but for the
    weights that it returns, which are averaged over the heads that are left. PyTorch's fused
    operator for whole encoder layers reads the width as heads times their size, so it is not used.

    **formula** :math:`\sum_h \operatorname{softmax}(q_h k_h^\top / \sqrt d + m)\, v_h W_h^O + b`
    **Shapes** ``in_proj_weight`` ``(3 num_heads head_dim, embed_dim)``, ``out_proj.weight``
    ``(width, num_heads head_dim)``; inputs and outputs as of ``nn.MultiheadAttention``
    **Units** those of the values
    **Needs** nothing
    **Source** torch.nn.functional.multi_head_attention_forward of PyTorch 2.13

    Example:
        >>> from secateur.structure import apply_, couple, cuts_for
        >>> layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> keep = {"self_attn": torch.tensor([True, False, True, False])}
        >>> apply_(layer, cuts_for(layer, couple(layer, x), keep))
        >>> layer.self_attn.num_heads, tuple(layer.self_attn.out_proj.weight.shape)
        (2, (8, 4))
        >>> type(layer.self_attn).__name__
        'PrunedAttention'
    """

    def extra_repr(self) -> str:
        """What its parameters do not show."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(  # noqa: PLR0913, PLR0917 - the interface of nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of ``nn.MultiheadAttention``.

        Raises:
            UsageError: ``is_causal`` without a mask; a mask for each head is one for more heads; or
                nested tensors come with anything else.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            others = query is not key or key is not value or need_weights
            if others or attn_mask is not None or key_padding_mask is not None:
                raise UsageError(
                    "attention of nested tensors",
                    "keys or values of their own, a mask, or need_weights were given",
                    "nested tensors are read as nn.TransformerEncoder passes them",
                    "pass padded tensors and key_padding_mask",
                )
            return self._of_lists(query), None
        if is_causal and attn_mask is None:
            raise UsageError(
                "attention with is_causal=True",
                "attn_mask is None",
                "is_causal says what attn_mask is, as in nn.MultiheadAttention",
                "pass nn.Transformer.generate_square_subsequent_mask(length), too",
            )
        q, k, v = (self._by_head(x) for x in self._projected(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            is_causal = False
            mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        single = query.dim() == 2
        if not need_weights:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            return self._joined(out, single), None
        scores = q * math.sqrt(1.0 / self.head_dim) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = self._joined(weights @ v, single)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights.squeeze(0) if single else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, ``(..., num_heads * head_dim)``."""
        whole, bias = self.in_proj_weight, self.in_proj_bias
        if whole is not None and query is key and key is value:
            return F.linear(query, whole, bias).chunk(3, -1)
        three: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if whole is not None:
            three = whole.chunk(3)
        biases: Any = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), three, biases))

    def _by_head(self, x: Tensor) -> Tensor:
        """As ``(batch, heads, tokens, head_dim)``."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def _joined(self, x: Tensor, single: bool) -> Tensor:
        """The inverse, and the output projection."""
        if single:
            x = x.squeeze(0).transpose(0, 1)
        else:
            x = x.permute(0, 2, 1, 3) if self.batch_first else x.permute(2, 0, 1, 3)
        out: Tensor = self.out_proj(x.flatten(-2))
        return out

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with one more token that is learned, and one of zeros."""
        if bias is not None:
            token = bias.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            x = torch.cat([x, token.expand(x.shape[0], -1, -1, -1)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, each: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores ``(batch, heads, queries, keys)``."""
        parts = []
        if each is not None:
            each = _added(each, q)
            if each.dim() == 3:
                if each.shape[0] != q.shape[0] * self.num_heads:
                    raise UsageError(
                        "attention with a mask for each head",
                        f"it is {tuple(each.shape)}, for {q.shape[0]} samples and "
                        f"{self.num_heads} heads",
                        "heads were cut, or the mask is one for another batch",
                        f"pass {q.shape[0] * self.num_heads} masks, or a single one of 2 axes",
                    )
                each = each.unflatten(0, (q.shape[0], self.num_heads))
            parts.append(each)
        if padding is not None:
            padding = _added(padding, q)
            parts.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        parts = [F.pad(mask, (0, more)) for mask in parts] if more else parts
        return sum(parts[1:], parts[0]) if parts else None

    def _of_lists(self, x: Tensor) -> Tensor:
        """Of a nested tensor, which ``nn.TransformerEncoder`` makes of padded inputs."""
        lengths = [len(row) for row in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        places = torch.arange(padded.shape[1], device=x.device)
        gone = places >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self(padded, padded, padded, key_padding_mask=gone, need_weights=False)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is True for what is not looked at, as numbers to add."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def is_plain(module: nn.Module) -> bool:
    """Whether it is PyTorch's attention with PyTorch's code, so that :class:`PrunedAttention` fits.

    Example:
        >>> is_plain(nn.MultiheadAttention(4, 2)), is_plain(nn.Linear(4, 2))
        (True, False)
    """
    return type(module) is nn.MultiheadAttention and "forward" not in vars(module)


def free_heads_(model: nn.Module) -> list[nn.Module]:
    """Turn PyTorch's attention into :class:`PrunedAttention`, of all its heads yet; which were turned.

    Example:
        >>> layer = nn.MultiheadAttention(4, 2)
        >>> len(free_heads_(layer)), layer
        (1, PrunedAttention(
          4, num_heads=2, head_dim=2
          (out_proj): NonDynamicallyQuantizableLinear(in_features=4, out_features=4, bias=True)
        ))
    """
    found: list[Any] = [module for module in model.modules() if is_plain(module)]
    for module in found:
        module.__class__ = PrunedAttention
        module._qkv_same_embed_dim = False  # what PyTorch's fused operators ask for
    return found


def settle_heads_(model: nn.Module, changed: Collection[str] = ()) -> None:
    """After a cut: :class:`PrunedAttention` where PyTorch's own does not fit any more.

    PyTorch's own cannot read padded inputs as ``nn.TransformerEncoder`` passes them if its heads are
    odd in number. An encoder that is built so knows, and one that was cut to it does not.

    Args:
        model: Changed in place.
        changed: Paths of modules of which sizes were cut.

    Example:
        >>> layer = nn.MultiheadAttention(4, 2)
        >>> layer.num_heads = 1
        >>> settle_heads_(layer)
        >>> is_plain(layer)
        False
    """
    turned = {id(module) for module in free_heads_(model)}
    for path, module in model.named_modules():
        if isinstance(module, PrunedAttention) and _fills(module):
            as_built = id(module) in turned and path not in changed
            if as_built or module.num_heads % 2 == 0:
                _turn_back_(module)


def _fills(module: nn.MultiheadAttention) -> bool:
    width = module.embed_dim
    square = tuple(module.out_proj.weight.shape) == (width, width)
    return square and module.num_heads * module.head_dim == width


def _turn_back_(module: Any) -> None:
    module.__class__ = nn.MultiheadAttention
    module._qkv_same_embed_dim = module.in_proj_weight is not None


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Without PyTorch's fused operator for encoder layers, which shows nothing of what is in them.

    It also reads padded inputs as nested tensors, and gives zeros in the place of padding.

    Example:
        >>> with unfused_attention():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def open_attention(model: nn.Module) -> Iterator[None]:
    """Let hooks see the output projections of PyTorch's attention, which it does not call.

    Example:
        >>> layer, seen = nn.MultiheadAttention(4, 2).eval(), []
        >>> _ = layer.out_proj.register_forward_hook(lambda *_: seen.append(1))
        >>> x = torch.zeros(1, 3, 4)
        >>> with open_attention(layer):
        ...     _ = layer(x, x, x)
        >>> len(seen), is_plain(layer)
        (1, True)
    """
    turned = free_heads_(model)
    try:
        with unfused_attention():
            yield
    finally:
        for module in turned:
            _turn_back_(module)
