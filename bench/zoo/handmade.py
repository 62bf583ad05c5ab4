"""Hand-written networks, each with one thing that makes structural pruning hard."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.tokens import (
    CrossCovariance,
    CrossVit,
    Deciding,
    Recurrent,
    Tied,
    WeightNorm,
)

Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def conv(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Head(nn.Module):
    """Mean over pixels and a linear layer."""

    def __init__(self, inputs: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Vgg(nn.Module):
    """Channels times pixels, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 12), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


class DenseNet(nn.Module):
    """Every layer reads all before it (concatenation), norm before the convolution."""

    def __init__(self, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = [8 + growth * i for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1))
            for w in widths
        )
        width = widths[-1] + growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 10, 1), nn.AvgPool2d(2)
        )
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        out: Tensor = self.head(self.transition(torch.cat(found, 1)))
        return out


class Inception(nn.Module):
    """Four branches of different depth side by side, in a batch of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.one = conv(8, 6, 1)
        self.three = nn.Sequential(conv(8, 4, 1), conv(4, 6))
        self.five = nn.Sequential(conv(8, 4, 1), conv(4, 5, 5))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(8, 3, 1))
        self.after = conv(20, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)
        out: Tensor = self.head(self.after(x))
        return out


def shuffled(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle by view, transpose, view."""
    b, c, h, w = x.size()
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleV1(nn.Module):
    """Grouped 1x1 convolutions with a channel shuffle, residual and concatenated shortcut."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.stem = conv(3, 12)
        self.reduce = conv(12, 6, 1, groups=groups)
        self.spatial = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        )
        self.expand = nn.Sequential(nn.Conv2d(6, 12, 1, groups=groups), nn.BatchNorm2d(12))
        self.down = conv(12, 12, stride=2, groups=groups)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = shuffled(self.reduce(x), self.groups)
        x = F.relu(x + self.expand(self.spatial(y)))
        y = torch.cat([F.avg_pool2d(x, 3, 2, 1), self.down(x)], 1)
        out: Tensor = self.head(y)
        return out


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half the channels pass, the other half is convolved, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half), conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffled(torch.cat((left, self.branch(right)), dim=1), 2)


class ShuffleV2(nn.Module):
    """Two shuffle units after a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(conv(3, 12), ShuffleUnit(12), ShuffleUnit(12), conv(12, 10, 1))
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x))
        return out


class UNet(nn.Module):
    """Down, up by a transposed convolution, and skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.bottom = conv(3, 6), conv(6, 10), conv(10, 12)
        self.up2 = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.two_up = conv(20, 8)
        self.up1 = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2)
        self.one_up = conv(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        up = self.up2(self.bottom(F.max_pool2d(two, 2)))
        up = self.up1(self.two_up(torch.cat([two, up], 1)))
        out: Tensor = self.out(self.one_up(torch.cat([one, up], 1)))
        return out


class GoogLeNet(nn.Module):
    """Several outputs; one comes from the middle of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.top = conv(3, 8), conv(8, 12), conv(12, 10)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(2), conv(12, 6, 1), nn.Flatten())
        self.aux_fc = nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5))
        self.head = Head(10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.middle(self.stem(x))
        return {"logits": self.head(self.top(x)), "aux": self.aux_fc(self.aux(x))}


class Volume(nn.Module):
    """Three-dimensional convolutions with instance norm, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1),
            nn.InstanceNorm3d(8, affine=True),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.ConvTranspose3d(8, 6, 2, stride=2),
            nn.BatchNorm3d(6),
            nn.Conv3d(6, 6, 3, padding=1, groups=6),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Squeeze(nn.Module):
    """A gate for each channel, computed from the mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.gate = nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 12), nn.Sigmoid())
        self.top = conv(12, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = self.gate(F.adaptive_avg_pool2d(x, 1).flatten(1)).view(x.shape[0], x.shape[1], 1, 1)
        out: Tensor = self.head(self.top(x * scale))
        return out


class Inverted(nn.Module):
    """A block of MobileNet v3: wide inside, depthwise, gated by hard sigmoids."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(width, inside, 1, bias=False),
            nn.BatchNorm2d(inside),
            nn.Hardswish(inplace=True),
            nn.Conv2d(inside, inside, 5, padding=2, groups=inside, bias=False),
            nn.BatchNorm2d(inside),
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inside, 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, inside, 1),
            nn.Hardsigmoid(),
        )
        self.narrow = nn.Sequential(
            nn.Hardswish(), nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        out: Tensor = x + self.narrow(y * self.gate(y))
        return out


class PixelShuffle(nn.Module):
    """Channels become pixels and pixels channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.PixelUnshuffle(2))
        self.middle = nn.Sequential(nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.up = nn.Sequential(nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.middle(self.down(x)))
        return out


class Gates(nn.Module):
    """PReLU with a slope for each channel, and a GLU over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1),
            nn.PReLU(10),
            nn.Conv2d(10, 16, 3, padding=1),
            nn.GLU(dim=1),
            nn.Conv2d(8, 6, 1),
            nn.PReLU(),
        )
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x))
        return out


class Csp(nn.Module):
    """Cross-stage partial: the channels are chunked, one half is processed, both are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.after = conv(3, 16), conv(8, 8), conv(16, 12, 1)
        self.inner = nn.Sequential(conv(8, 6, 1), conv(6, 8))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, 1)
        two = self.part(two)
        two = two + self.inner(two)
        out: Tensor = self.head(self.after(torch.cat((two, one), 1)))
        return out


class DualPath(nn.Module):
    """DPN: some channels are added to a residual path, the rest joins a dense path."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.stem = conv(3, 12)
        self.one = nn.Sequential(conv(12, 10, 1), nn.Conv2d(10, 12, 3, padding=1, groups=2))
        self.two = nn.Sequential(conv(16, 10, 1), nn.Conv2d(10, 12, 3, padding=1, groups=2))
        self.head = Head(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (self.one, self.two):
            y = block(x)
            added = x[:, : self.width] + y[:, : self.width]
            x = torch.cat([added, x[:, self.width :], y[:, self.width :]], 1)
        out: Tensor = self.head(x)
        return out


def _images(model: Callable[[], nn.Module], *, size: int = 16) -> Build:
    return lambda: (model(), (torch.randn(2, 3, size, size),))


def _tokens(model: Callable[[], nn.Module]) -> Build:
    return lambda: (model(), (torch.randint(0, 20, (3, 7)),))


NETWORKS: dict[str, Build] = {
    "VGG": _images(Vgg),
    "DenseNet": _images(DenseNet),
    "Inception": _images(Inception),
    "ShuffleNet v1": _images(ShuffleV1),
    "ShuffleNet v2": _images(ShuffleV2),
    "U-Net": _images(UNet),
    "GoogLeNet": _images(GoogLeNet),
    "3-D": lambda: (Volume(), (torch.randn(2, 1, 4, 6, 6),)),
    "LSTM": _tokens(lambda: Recurrent(nn.LSTM, both_ways=False)),
    "LSTM both ways": _tokens(lambda: Recurrent(nn.LSTM, both_ways=True)),
    "GRU": _tokens(lambda: Recurrent(nn.GRU, both_ways=False)),
    "GRU both ways": _tokens(lambda: Recurrent(nn.GRU, both_ways=True)),
    "squeeze and excitation": _images(Squeeze),
    "MobileNet v3": _images(
        lambda: nn.Sequential(conv(3, 8), Inverted(8, 20), Inverted(8, 12), nn.Hardswish(), Head(8))
    ),
    "pixel shuffle": _images(PixelShuffle),
    "weight tying": _tokens(Tied),
    "weight norm": lambda: (WeightNorm(), (torch.randn(3, 6),)),
    "PReLU and GLU": _images(Gates),
    "control flow": lambda: (Deciding(), (torch.randn(3, 6),)),
    "CSP": _images(Csp),
    "DPN": _images(DualPath),
    "CrossViT": _images(CrossVit),
    "XCA": _images(CrossCovariance),
}
