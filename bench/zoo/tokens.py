"""Hand-written networks on tokens and vectors: recurrence, tied weights, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Recurrent(nn.Module):
    """Tokens, a recurrent network, and a classifier on its last state."""

    def __init__(self, kind: type[nn.RNNBase], *, both_ways: bool, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = kind(8, 10, layers, batch_first=True, bidirectional=both_ways)
        self.fc = nn.Linear(20 if both_ways else 10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(tokens))
        out: Tensor = self.fc(y[:, -1])
        return out


class Tied(nn.Module):
    """One matrix embeds the tokens and predicts them; one block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.block = nn.Sequential(
            nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)
        )
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = x + self.block(x)
        out: Tensor = self.out(x)
        return out


class WeightNorm(nn.Module):
    """Weights that are computed from others whenever they are read."""

    def __init__(self) -> None:
        super().__init__()
        normed = parametrizations.weight_norm
        self.one = normed(nn.Linear(6, 16))
        self.two = normed(nn.Linear(16, 12))
        self.three = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.three(F.relu(self.two(torch.tanh(self.one(x)))))
        return out


class Deciding(nn.Module):
    """How often a block runs depends on the values of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.block = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        times = 1 + int(x.abs().mean().item() > 0.5)
        y = torch.tanh(self.inside(x))
        for _ in range(times):
            y = y + self.block(y)
        out: Tensor = self.out(y)
        return out


class Attention(nn.Module):
    """Attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        return out


class CrossAttention(nn.Module):
    """The first token asks all others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.wq, self.wk, self.wv = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h = self.num_heads
        q = self.wq(x[:, 0:1]).reshape(b, 1, h, c // h).permute(0, 2, 1, 3)
        k = self.wk(x).reshape(b, n, h, c // h).permute(0, 2, 1, 3)
        v = self.wv(x).reshape(b, n, h, c // h).permute(0, 2, 1, 3)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, 1, c))
        return out


class CrossVit(nn.Module):
    """Two token streams of different width; the class token of one asks the other's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 12, 4, 4)
        self.large = nn.Conv2d(3, 16, 8, 8)
        self.tokens = nn.ParameterList([torch.randn(1, 1, 12), torch.randn(1, 1, 16)])
        self.blocks = nn.ModuleList([Attention(12, 3), Attention(16, 4)])
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(16)])
        self.over = nn.Linear(12, 16)
        self.cross = CrossAttention(16, 4)
        self.back = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        streams = []
        for patch, token, block, norm in zip(
            (self.small, self.large), self.tokens, self.blocks, self.norms, strict=True
        ):
            y = patch(x).flatten(2).transpose(1, 2)
            y = torch.cat([token.expand(len(x), -1, -1), y], 1)
            streams.append(y + block(norm(y)))
        small, large = streams
        asked = torch.cat([self.over(small[:, :1]), large[:, 1:]], 1)
        token = asked[:, :1] + self.cross(asked)
        out: Tensor = self.head((small[:, :1] + self.back(token))[:, 0])
        return out


class CrossCovariance(nn.Module):
    """EdgeNeXt's attention between channels (XCA), on pixels as tokens."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.gamma = nn.Parameter(torch.rand(width))
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        out: Tensor = self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, c))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        y = x.reshape(b, c, h * w).permute(0, 2, 1)
        y = y + self.gamma * self.attend(self.norm(y))
        out: Tensor = self.head((x + y.permute(0, 2, 1).reshape(b, c, h, w)).mean((-2, -1)))
        return out
