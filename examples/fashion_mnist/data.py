"""Fashion-MNIST batches from the packed files in `data/`, without a data-loading process.

Standard library, numpy and torch are enough to read them. `loaders()` is the entry point:

    train, test = loaders().values()
    for images, labels in train: ...
"""

import hashlib
import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data"
SIDE = 28
SHIFT = 2
# Of the full training set of 60,000, in units of pixel / 255: the figures everyone uses.
MEAN, STD = 0.2860, 0.3530


def read(split: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Read one split, exactly as it is in the original data set.

    The files hold the pixels class by class and transposed, because that packs best (see
    `pack.py`). Here the classes are dealt out in turn, so that image `k` is of class `k % 10`
    and any leading part of a split is balanced.

    Args:
        split: `"train"` or `"test"`.
        folder: Where the packed files are.

    Returns:
        Pixels (N, 28, 28) uint8, and labels (N,) int64.

    Raises:
        ValueError: The pixels are not those that `index.json` describes.
    """
    entry = json.loads((folder / "index.json").read_text(encoding="utf-8"))["splits"][split]
    path = folder / entry["file"]
    raw = lzma.decompress(path.read_bytes())
    found = hashlib.sha256(raw).hexdigest()
    if found != entry["sha256_unpacked"]:
        raise ValueError(
            f"Reading split {split!r}: the pixels in {path} have sha256 {found}, and index.json "
            f"says {entry['sha256_unpacked']}. The file is damaged or from another packing: "
            "fetch the folder again, or run pack.py."
        )
    classes, each = entry["classes"], entry["images_per_class"]
    stored = np.frombuffer(raw, np.uint8).reshape(classes, each, SIDE, SIDE)
    pixels = np.ascontiguousarray(stored.transpose(1, 0, 3, 2)).reshape(-1, SIDE, SIDE)
    return torch.from_numpy(pixels), torch.arange(classes * each) % classes


def normalise(pixels: Tensor) -> Tensor:
    """Turn pixels (N, 28, 28) uint8 into network input (N, 1, 28, 28) float32."""
    return pixels.unsqueeze(1).float().sub_(255 * MEAN).div_(255 * STD)


@dataclass(frozen=True, slots=True)
class InOrder:
    """Batches in a fixed order, without augmentation: for measuring.

    Attributes:
        pixels: (N, 28, 28) uint8.
        labels: (N,) int64.
        batch: Images in a batch; the last one may be smaller.
    """

    pixels: Tensor
    labels: Tensor
    batch: int

    def __len__(self) -> int:
        """Count the batches."""
        return math.ceil(len(self.labels) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) from the first to the last."""
        parts = zip(
            torch.split(self.pixels, self.batch), torch.split(self.labels, self.batch), strict=True
        )
        for pixels, labels in parts:
            yield normalise(pixels), labels


@dataclass(frozen=True, slots=True)
class Shuffled:
    """Batches in a new order each epoch, each image shifted and mirrored at random.

    Augmentation is one gather for the whole batch, straight out of the padded pixels: about a
    hundredth of the time of a training step, so no worker processes are needed.

    Attributes:
        padded: (N, 28 + 2 * SHIFT, 28 + 2 * SHIFT) uint8, black around each image.
        labels: (N,) int64.
        batch: Images in a batch; the last one may be smaller.
        generator: All randomness comes from it; each epoch moves it on.
    """

    padded: Tensor
    labels: Tensor
    batch: int
    generator: torch.Generator

    def __len__(self) -> int:
        """Count the batches in an epoch."""
        return math.ceil(len(self.labels) / self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of one epoch."""
        order = torch.randperm(len(self.labels), generator=self.generator)
        for chosen in torch.split(order, self.batch):
            yield normalise(self._augment(chosen)), self.labels[chosen]

    def _augment(self, chosen: Tensor) -> Tensor:
        """Cut a 28 x 28 window out of each chosen image, left to right or right to left."""
        count = len(chosen)
        top, left = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=self.generator)
        mirror = torch.randint(2, (count, 1), generator=self.generator).bool()
        line = torch.arange(SIDE)
        columns = left + torch.where(mirror, line.flip(0), line)
        rows = top + line
        return self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def loaders(*, batch: int = 128, seed: int = 0) -> dict[str, Shuffled | InOrder]:
    """Give the batches to train on and those to measure with.

    Args:
        batch: Images in a training batch (test batches have 500).
        seed: Of the order and the augmentation. Two calls with one seed give the same epochs.

    Returns:
        `{"train": ..., "test": ...}`. Each can be iterated again and again over
        (images (B, 1, 28, 28) float32, labels (B,) int64), and has a `len`, in batches.
    """
    pixels, labels = read("train")
    padded = torch.nn.functional.pad(pixels, (SHIFT,) * 4)
    generator = torch.Generator().manual_seed(seed)
    return {
        "train": Shuffled(padded, labels, batch, generator),
        "test": InOrder(*read("test"), batch=500),
    }
