"""CIFAR-10, read exactly, and the residual networks for it.

The images and trained networks are not part of the project. They are looked for in the folder
that ``SECATEUR_DATA`` names (default ``../shared/data`` beside the project).
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

SIDE = 32
SHIFT = 4
# The figures that the trained networks were made with (not CIFAR-10's own), of pixel / 255.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN, HELD_OUT = 40_000, 10_000
DEPTHS = (20, 32, 44, 56)


class DataMissing(Exception):
    """The data folder is not there: studies and tests that need it are skipped."""


def data_folder(*parts: str) -> Path:
    """Find a file or folder of the data beside the project.

    Args:
        parts: Path below the data folder.

    Returns:
        The path, which exists.

    Raises:
        DataMissing: It does not exist; the message says where it was looked for.
    """
    root = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = root.joinpath(*parts)
    if not path.exists():
        raise DataMissing(
            f"Reading {'/'.join(parts)}: {root} does not have it. It is not part of the project, "
            "as its licence does not allow that. Set SECATEUR_DATA to the folder that has it."
        )
    return path


@dataclass(frozen=True, slots=True)
class Split:
    """Images and labels.

    Attributes:
        pixels: (N, 32, 32, 3) uint8, red green blue. Channels last, as the convolutions want them.
        labels: (N,) int64, 0..9.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def __getitem__(self, chosen: slice | Tensor) -> Split:
        """Take some of the images."""
        return Split(self.pixels[chosen], self.labels[chosen])


def read() -> tuple[Split, Split]:
    """Read the 50,000 training images and the first 1,000 test images, bit for bit.

    Raises:
        DataMissing: The data folder is not there.
    """
    both = _unpacked(data_folder("cifar10", "cifar10-51k-lossless.npz"))
    return both[:50_000], both[50_000:]


@functools.cache
def _unpacked(path: Path) -> Split:
    """All images, in the canonical order: 51 lossless sheets of 25 x 40 each."""
    with np.load(path) as stored:
        packed, ends = stored["webp"], stored["offsets"]
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    sheets = []
    for start, end in itertools.pairwise(ends):
        sheet = np.asarray(Image.open(io.BytesIO(packed[start:end].tobytes())).convert("RGB"))
        tiles = sheet.reshape(25, SIDE, 40, SIDE, 3).transpose(0, 2, 1, 3, 4)
        sheets.append(tiles.reshape(-1, SIDE, SIDE, 3))
    return Split(torch.from_numpy(np.concatenate(sheets)), labels)


def training_splits() -> tuple[Split, Split]:
    """Give what networks trained here learn from (40,000) and are tested on (11,000).

    The test images are the last 10,000 training images and the 1,000 official test images. The
    standard error of an accuracy on them is 0.27 points at 91 %.
    """
    train, test = read()
    pixels = torch.cat([train.pixels[TRAIN:], test.pixels])
    return train[:TRAIN], Split(pixels, torch.cat([train.labels[TRAIN:], test.labels]))


def normalise(pixels: Tensor) -> Tensor:
    """Turn pixels (N, 32, 32, 3) uint8 into network input (N, 3, 32, 32) float32, channels last."""
    mean, std = torch.tensor(MEAN) * 255, torch.tensor(STD) * 255
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Augmented:
    """Batches in a new order each epoch; each image shifted by up to 4 pixels and mirrored.

    One gather makes a whole batch out of the padded pixels, so no worker process is needed.
    All batches have the same size: a last short one is left out.

    Attributes:
        padded: (N, 40, 40, 3) uint8, black around each image.
        labels: (N,) int64.
        batch: Images in a batch.
        blended: Mix each image with another one of its batch, which counts for at most a half, so that
            an image keeps its label. A network answers blends that it was never trained on less
            surely than images that it knows by heart, and so tells a student more (mixup as in
            Beyer et al., arXiv 2106.05237).
    """

    padded: Tensor
    labels: Tensor
    batch: int
    blended: bool = False

    def __len__(self) -> int:
        """Count the batches in an epoch."""
        return len(self.labels) // self.batch

    def epoch(self, number: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of one epoch.

        Args:
            number: Which epoch. Each has its own order and shifts, whatever was drawn before:
                a run that is taken up again sees what it would have seen.
            seed: Of all epochs.
        """
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        # Of their own, so that order and shifts are those of the images that are not blended.
        shares = torch.Generator().manual_seed(seed * 100_003 + number + 50_000)
        order = torch.randperm(len(self.labels), generator=generator)
        for chosen in order[: len(self) * self.batch].split(self.batch):
            images = normalise(self._cut(chosen, generator))
            if self.blended:
                share = torch.rand(len(images), 1, 1, 1, generator=shares) / 2
                images = torch.lerp(images, images.flip(0), share)
            yield images, self.labels[chosen]

    def _cut(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Cut a 32 x 32 window out of each chosen image, left to right or right to left."""
        count, line = len(chosen), torch.arange(SIDE)
        top, left = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
        mirror = torch.randint(2, (count, 1), generator=generator).bool()
        rows, columns = top + line, left + torch.where(mirror, line.flip(0), line)
        return self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def augmented(split: Split, *, batch: int = 128) -> Augmented:
    """Give the augmented batches of a split."""
    return Augmented(functional.pad(split.pixels, (0, 0, *[SHIFT] * 4)), split.labels, batch)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights (option A of He et al. 2015).

    Where the size changes, the shortcut takes every second pixel and adds channels of zeros,
    half of them before and half behind.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.extra = stride, (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """The residual network for CIFAR-10 of He et al. 2015, section 4.2.

    Args:
        depth: 20, 32, 44 or 56 (6 n + 2).
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Give the ten class scores of images (N, 3, 32, 32)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inside: int, outside: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inside, outside, stride)
    return nn.Sequential(first, *(Block(outside, outside, 1) for _ in range(blocks - 1)))


def trained(depth: int) -> ResNet:
    """Load a trained network, in evaluation mode. It has seen all 50,000 training images.

    Raises:
        DataMissing: The data folder is not there.
    """
    model = ResNet(depth)
    weights = load_file(data_folder("cifar10-resnets", f"resnet{depth}.safetensors"))
    counters = {n: b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **weights})
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def logits(model: nn.Module, split: Split, *, batch: int = 500) -> Tensor:
    """Give the class scores (N, 10) of a split, in float32 and evaluation mode."""
    was = model.training
    model.eval()
    parts = [model(normalise(pixels)) for pixels in split.pixels.split(batch)]
    model.train(was)
    return torch.cat(parts).float()


@dataclass(frozen=True, slots=True)
class Score:
    """How good class scores are.

    Attributes:
        accuracy: Percent.
        loss: Mean cross-entropy.
        images: How many images it was measured on.
    """

    accuracy: float
    loss: float
    images: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy, in points."""
        share = self.accuracy / 100
        return 100 * math.sqrt(share * (1 - share) / self.images)


def score(found: Tensor, labels: Tensor) -> Score:
    """Compare class scores with labels."""
    accuracy = 100 * int((found.argmax(1) == labels).sum()) / len(labels)
    return Score(accuracy, functional.cross_entropy(found, labels).item(), len(labels))
