"""PyTorch's attention with all its options, and networks that use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.structure import couple

TOLERANCE = {"rtol": 0, "atol": 1e-10}
N, L, S, E, H = 2, 5, 7, 16, 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def stock(**options: Any) -> nn.MultiheadAttention:
    """One with biases that are not zero."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
PADDING = torch.arange(S) >= torch.tensor([S, 4])[:, None]
EACH = numbers(N * H, L, S, seed=3)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": EACH[0] > 1},
    "float": {"attn_mask": EACH[0]},
    "heads": {"attn_mask": EACH},
    "heads_bool": {"attn_mask": EACH > 1},
    "padding": {"key_padding_mask": PADDING},
    "padding_float": {"key_padding_mask": numbers(N, S)},
    "both": {"attn_mask": EACH[0] > 1, "key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal_padding": {
        "attn_mask": -torch.inf == CAUSAL, "is_causal": True, "key_padding_mask": PADDING[:, :L],
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "more_tokens": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 6, "vdim": 10},
    "one_width": {"kdim": 6, "batch_first": True, "add_bias_kv": True},
}


def inputs(module: nn.MultiheadAttention, mask: str) -> tuple[Tensor, Tensor, Tensor]:
    keys = L if "causal" in mask else S
    shapes = [(L, E), (keys, module.kdim), (keys, module.vdim)]
    q, k, v = (numbers(N, *shape, seed=i) for i, shape in enumerate(shapes))
    if not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return q, k, v


class One(nn.Module):
    """Attention between linear layers, with options and a call of its own."""

    def __init__(self, named: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, E), nn.Linear(E, 3)
        self.attn = nn.MultiheadAttention(E, H, **options)
        self.named = dict(named)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        out, weights = self.attn(x, x, x, **self.named)
        return self.head(x + out), weights


class Block(nn.Module):
    """As torchvision writes the blocks of its vision transformers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, given: Tensor) -> Tensor:
        x = self.ln_1(given)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + given
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, E, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, E))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, E))
        self.layers = nn.Sequential(Block(E, H), Block(E, H))
        self.ln, self.head = nn.LayerNorm(E), nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        out: Tensor = self.head(self.ln(self.layers(x))[:, 0])
        return out


class Encoder(nn.Module):
    """A stack of PyTorch's encoder layers, with an embedding, and padding if it is given."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            E, H, 24, batch_first=batch_first, norm_first=norm_first, dropout=0.1
        )
        nested = batch_first and not norm_first
        self.embed, self.head = nn.Linear(6, E), nn.Linear(E, 3)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.stack(self.embed(x), src_key_padding_mask=padding))
        return out


def transformer() -> nn.Module:
    return nn.Transformer(E, H, 1, 2, 24, batch_first=True)


NETWORKS: dict[str, tuple[Any, Any]] = {
    "one": (lambda: One({"need_weights": False}, {}), numbers(L, N, 6)),
    "weights": (lambda: One({}, {"batch_first": True}), numbers(N, L, 6)),
    "more": (lambda: One({}, {"add_bias_kv": True, "add_zero_attn": True}), numbers(L, N, 6)),
    "causal": (
        lambda: One({"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, {}),
        numbers(L, N, 6),
    ),
    "single": (lambda: One({"need_weights": False}, {"bias": False}), numbers(L, 6)),
    "encoder": (Encoder, numbers(N, L, 6)),
    "encoder_first": (lambda: Encoder(norm_first=True), numbers(N, L, 6)),
    "encoder_sequence": (lambda: Encoder(batch_first=False), numbers(L, N, 6)),
    "padded": (Encoder, (numbers(N, L, 6), PADDING[:, :L])),
    "transformer": (transformer, (numbers(N, S, E), numbers(N, L, E))),
    "vision": (VisionTransformer, numbers(N, 3, 8, 8)),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = NETWORKS[name][0]().double().eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def heads_of(net: nn.Module, example: Any) -> dict[str, Tensor]:
    """Another choice of heads for each attention."""
    structure = couple(net, example)
    found = {}
    for width in structure.widths:
        if isinstance(net.get_submodule(width.name), nn.MultiheadAttention):
            flags = torch.ones(H, dtype=torch.bool)
            flags[[len(found) % H, 3]] = False
            found[width.name] = flags
    return found


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def recipe(net: nn.Module, target: str = "params=85%", **settings: Any) -> secateur.ShrinkRecipe:
    """One that cuts heads, and nothing else."""
    heads = (n for n, m in net.named_modules() if isinstance(m, nn.MultiheadAttention))
    width = "embed" if hasattr(net, "embed") else "conv_proj"  # the queries read it
    scope = secateur.Scope(include=tuple(heads), ignore=(width,))
    settings = {"recovery": (), "scope": scope, **settings}
    return secateur.ShrinkRecipe(target=secateur.Target.parse(target), **settings)
