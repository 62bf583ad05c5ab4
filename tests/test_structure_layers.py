"""Structural pruning of the standard layers: what can be cut is exact, what cannot says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structure_layers import IMAGE, TOKENS, between, convolved, fresh, require_exact
from torch import Tensor, nn

import secateur
from secateur.core.errors import UsageError
from secateur.structure import couple
from secateur.structure.kept_units import run_on_kept
from secateur.structure.labels import along
from secateur.structure.tracer import Call, Tracer

WORDS = torch.tensor([[3, 0, 5, 5], [1, 2, 0, 0], [4, 4, 1, 2]])


class Two(nn.Module):
    """Two layers of their own widths, joined by a module that reads both."""

    def __init__(self, join: nn.Module, widths: tuple[int, int], after: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, widths[0]), nn.Linear(6, widths[1])
        self.join, self.out = join, nn.Linear(after, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.join(self.a(x), self.b(x)))


class Distance(nn.Module):
    """All rows of one tensor against all of another."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a, b)


class Words(nn.Module):
    """Bags of words into a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(7, 9, **options), nn.Linear(9, 4)

    def forward(self, words: Tensor, *more: Tensor) -> Any:
        return self.out(self.bag(words, *more))


class Weighted(Words):
    """Each word with a weight of its own, which a layer computes."""

    def __init__(self) -> None:
        super().__init__(mode="sum")
        self.weigh = nn.Linear(6, 4)

    def forward(self, words: Tensor, *more: Tensor) -> Any:
        return self.out(self.bag(words, per_sample_weights=self.weigh(more[0][:, 0])))


class Unpooled(nn.Module):
    """An encoder that keeps where its maxima were, and a decoder that puts them back."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        pool: Any = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
        unpool: Any = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)[dims - 1]
        self.first, self.middle = conv(3, 12, 3, padding=1), conv(12, 12, 1)
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)
        self.last = conv(12, 4, 1)

    def forward(self, x: Tensor) -> Any:
        small, places = self.pool(self.first(x))
        return self.last(self.unpool(self.middle(small), places))


class Patches(nn.Module):
    """Unfolded patches into a linear layer, and back into an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Conv2d(3, 6, 1), nn.Linear(6 * 4, 5 * 4)
        self.take, self.put = nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)
        self.last = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Any:
        patches = self.take(self.first(x)).transpose(1, 2)
        return self.last(self.put(self.mix(patches).transpose(1, 2)))


#: What lies between two layers, an example, and what of it can be cut.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "RMSNorm": (lambda: between(nn.RMSNorm(12)), TOKENS, {"0": 12}),
    "RMSNorm over two axes": (lambda: between(nn.RMSNorm((5, 12))), TOKENS, {"0": 12}),
    "RMSNorm without weight": (
        lambda: between(nn.RMSNorm(12, elementwise_affine=False)),
        TOKENS,
        {"0": 12},
    ),
    "rms_norm of its input's shape": (
        lambda: between(lambda x: F.rms_norm(x, x.shape[-1:])),
        TOKENS,
        {"0": 12},
    ),
    "CircularPad1d": (lambda: convolved(nn.CircularPad1d(1), 1), IMAGE[:, :, 0], {"0": 12}),
    "CircularPad2d": (lambda: convolved(nn.CircularPad2d(1)), IMAGE, {"0": 12}),
    "CircularPad3d": (
        lambda: convolved(nn.CircularPad3d(1), 3),
        IMAGE[:, :, None].expand(2, 3, 8, 8, 8),
        {"0": 12},
    ),
    "transposed convolution of each channel to two": (
        lambda: convolved(nn.ConvTranspose2d(12, 24, 2, stride=2, groups=12), after=24),
        IMAGE,
        {"0": 12},
    ),
    "circular convolution": (
        lambda: convolved(nn.Conv2d(12, 12, 3, padding=1, padding_mode="circular")),
        IMAGE,
        {"0": 12, "1": 12},
    ),
    "Bilinear": (
        lambda: Two(nn.Bilinear(8, 7, 6), (8, 7), 6),
        TOKENS,
        {"a": 8, "b": 7, "join": 6},
    ),
    "cdist": (lambda: Two(Distance(), (8, 8), 5), TOKENS, {"a": 8}),
    **{
        f"EmbeddingBag {mode}": (
            lambda mode=mode: Words(mode=mode, padding_idx=0),  # type: ignore[misc]
            (WORDS,),
            {"bag": 9},
        )
        for mode in ("sum", "mean", "max")
    },
    "EmbeddingBag with offsets": (
        lambda: Words(max_norm=0.5),
        (WORDS.flatten(), torch.tensor([0, 3, 8])),
        {"bag": 9},
    ),
    "EmbeddingBag with weights": (Weighted, (WORDS, TOKENS), {"bag": 9}),
    "Embedding of limited length": (
        lambda: nn.Sequential(nn.Embedding(7, 9, max_norm=0.5), nn.Linear(9, 4)),
        (WORDS,),
        {"0": 9},
    ),
    "MaxUnpool1d": (lambda: Unpooled(1), IMAGE[:, :, 0], {"first": 12}),
    "MaxUnpool2d": (lambda: Unpooled(2), IMAGE, {"first": 12}),
    "MaxUnpool3d": (
        lambda: Unpooled(3),
        IMAGE[:, :, None].expand(2, 3, 8, 8, 8),
        {"first": 12},
    ),
    "Unfold and Fold": (Patches, IMAGE, {"first": 6, "mix": 5}),
    "Fourier transform over tokens": (
        lambda: between(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1)),
        TOKENS,
        {"0": 12},
    ),
    "complex numbers": (
        lambda: between(lambda x: (torch.complex(x, 2 * x) * torch.polar(x, x)).abs()),
        TOKENS,
        {"0": 12},
    ),
    "second smallest token": (
        lambda: between(lambda x: x.kthvalue(2, 1).values),
        TOKENS,
        {"0": 12},
    ),
    "a triangle for each feature": (lambda: between(by_delta), TOKENS, {"0": 12}),
    "a triangle for all features": (lambda: between(by_columns), TOKENS, {"0": 12}),
    "groups as a number": (
        lambda: convolved(lambda x: F.group_norm(x, 3)),
        IMAGE,
        {"0": 4},
    ),
}


def by_delta(x: Tensor) -> Tensor:
    """A triangle of products of tokens for each feature, as in linear attention by the delta rule."""
    k = x.transpose(1, 2)[..., None]
    triangle = torch.eye(x.shape[1], dtype=x.dtype) + (k @ k.mT).tril(-1)
    return torch.linalg.solve_triangular(triangle, k, upper=False)[..., 0].transpose(1, 2)


def by_columns(x: Tensor) -> Tensor:
    """One triangle for all features."""
    triangle = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
    return torch.linalg.solve_triangular(triangle, x, upper=False)


#: What cannot be cut, and the reason.
PINNED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "LocalResponseNorm": (
        lambda: convolved(nn.LocalResponseNorm(5)),
        IMAGE,
        "a window slides over them, as in a LocalResponseNorm",
    ),
    "pooling over features": (
        lambda: between(lambda x: F.avg_pool1d(x, 2), after=6),
        TOKENS,
        "a window slides over them",
    ),
    "smoothing over features": (
        lambda: between(lambda x: F.avg_pool1d(x, 3, 1, 1)),
        TOKENS,
        "a window slides over them",
    ),
    "resizing over features": (
        lambda: between(lambda x: F.interpolate(x, scale_factor=2), after=24),
        TOKENS,
        "they are pixels that are resized",
    ),
    "Fourier transform over features": (
        lambda: between(lambda x: torch.fft.fft(x).real),
        TOKENS,
        "a Fourier transform runs over them",
    ),
    "an equation for the features": (
        lambda: between(lambda x: by_columns(x.mT).mT),
        TOKENS,
        "an equation is solved for all of them together",
    ),
    "orthogonal weight": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 4)
        ),
        TOKENS,
        "a function of a whole matrix mixes them, as in an orthogonal weight",
    ),
    "FractionalMaxPool2d": (
        lambda: convolved(nn.FractionalMaxPool2d(2, output_ratio=0.5)),
        IMAGE,
        "drawn at random",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cuts_around_a_layer_are_exact(name: str) -> None:
    build, example, widths = CASES[name]
    structure = require_exact(build, example)
    assert {width.name: width.groups for width in structure.widths} == widths
    assert not [text for text in structure.pinned.values() if "no rule" in text]


@pytest.mark.parametrize("name", PINNED)
def test_what_cannot_be_cut_says_why(name: str) -> None:
    build, example, reason = PINNED[name]
    structure = couple(fresh(build), example)
    assert not structure.widths
    first = next(name for name, axis in structure.pinned if axis == 0 and "weight" in name)
    assert reason in structure.pinned[first, 0]


def test_attention_that_scales_by_the_width_says_so() -> None:
    """Without heads the width is the size of the head, by whose root the scores are divided."""
    net = between(lambda x: F.scaled_dot_product_attention(x, x, x)).eval()
    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.6), recovery=())
    with pytest.raises(UsageError, match="its code computes with their number, 12"):
        secateur.shrink(net, recipe, TOKENS.float())
    scaled = lambda: between(lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3))  # noqa: E731
    assert [width.groups for width in require_exact(scaled, TOKENS).widths] == [12]


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.Bilinear, nn.PReLU])
def test_sizes_that_layers_state_follow(cell: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            self.layer = {nn.Bilinear: lambda: cell(8, 8, 8), nn.PReLU: lambda: cell(8)}.get(
                cell, lambda: cell(8, 8)
            )()
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            both = (self.a(x), self.b(x))
            y = self.layer(*both[: 1 + (cell is nn.Bilinear)])
            return self.out(y[0] if cell is nn.LSTMCell else y)

    recipe = secateur.ShrinkRecipe(target=secateur.Target("params", 0.5), recovery=())
    layer = secateur.shrink(Net(), recipe, torch.randn(3, 6)).model.layer
    if cell is nn.PReLU:
        assert (layer.num_parameters,) == layer.weight.shape < (8,)
    elif cell is nn.Bilinear:
        assert (layer.out_features, layer.in1_features, layer.in2_features) == layer.weight.shape
        assert layer.weight.numel() < 8**3
    else:
        assert (layer.input_size, layer.hidden_size) == (
            layer.weight_ih.shape[1],
            layer.weight_hh.shape[1],
        )
        assert layer.input_size * layer.hidden_size < 64


def test_the_fused_rms_norm_of_accelerators_sees_kept_units_only() -> None:
    """On processors PyTorch takes it apart, so the operator is called by its name here."""
    x, weight = torch.randn(3, 12), torch.randn(12)
    tracer = Tracer(nn.Linear(1, 1))
    ids = tracer.ledger.new(12)
    tracer.put(x, [along(ids, 1, (3, 12))])
    alive = torch.arange(12) % 3 != 1
    x[:, ~alive] = 0
    call = Call(torch.ops.aten._fused_rms_norm.default, (x, [12], weight, None), {}, None)
    found, _ = run_on_kept(tracer, call, alive)
    wanted = F.rms_norm(x[:, alive], (8,), weight[alive])
    torch.testing.assert_close(found[:, alive], wanted)
    assert not bool(found[:, ~alive].any())


class Mixed(nn.Module):
    """Tokens are the channels of convolutions, so features lie along their pixels."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(6, 12), nn.Sequential(first, nn.GELU(), last)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        return self.out(x + self.mix(x))


ALONE: Any = {
    "kernel of one": lambda: Mixed(nn.Conv1d(5, 9, 1), nn.Conv1d(9, 5, 1)),
    "in groups": lambda: Mixed(nn.Conv1d(5, 10, 1, groups=5), nn.Conv1d(10, 5, 1, bias=False)),
    "transposed": lambda: Mixed(nn.Conv1d(5, 9, 1), nn.ConvTranspose1d(9, 5, 1)),
    "one axis": lambda: nn.Sequential(
        nn.Linear(8, 12), nn.Conv2d(3, 9, (3, 1), stride=(2, 1)), nn.Linear(12, 4)
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_pixels_that_a_kernel_sees_alone_can_go(name: str) -> None:
    net, example = ALONE[name], IMAGE if name == "one axis" else TOKENS
    structure = require_exact(net, example)
    assert any(width.groups == 12 for width in structure.widths), structure.pinned


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}]
)
def test_pixels_that_a_kernel_mixes_or_skips_stay(options: Any) -> None:
    after = 12 // options.get("stride", 1)
    net = nn.Sequential(nn.Linear(6, 12), nn.Conv1d(5, 5, **options), nn.Linear(after, 4)).double()
    assert couple(net, TOKENS).pinned["0.weight", 0] == "a convolution mixes their pixels"
