"""Make `data/` from the full data set: all test images, and a balanced part of the others.

    python pack.py ../../../shared/data/fashion-mnist/fashion-mnist.npz

The packing is the standard library's LZMA over raw pixels, in the order that suits it.
Bytes an image, measured on 2,000 to 10,000 of these images (the raw size is 784):

    PNG sheet, optimised                401
    LZMA of median-predicted residuals  399
    LZMA, images mixed                  391
    WebP lossless sheets, mixed         384
    LZMA, class by class, lc=4          374
    WebP lossless, 200 of one class     363   (and minutes to write)
    LZMA, class by class, transposed    357   <- garments run up and down: so do the matches
"""

import argparse
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from data import FOLDER, read
from numpy.typing import NDArray

SOURCE = Path("../shared/data/fashion-mnist/fashion-mnist.npz")
LIMIT = 18_000_000  # bytes for this whole folder, weights included
# lc=4: the last pixel's upper four bits choose the statistics for the next. No alignment bits.
PRESET = 9 | lzma.PRESET_EXTREME
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": PRESET, "lc": 4, "lp": 0, "pb": 0}]

Pixels = NDArray[np.uint8]


def by_class(images: Pixels, labels: Pixels, each: int, seed: int) -> Pixels:
    """Choose `each` images of every class at random, kept in their original order.

    Args:
        images: (N, 28, 28).
        labels: (N,), 0 to 9.
        each: How many of a class. All there are gives all, whatever the seed.
        seed: Of the choice.

    Returns:
        (10, each, 28, 28).
    """
    random = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in range(10)]
    chosen = [np.sort(random.choice(rows, each, replace=False)) for rows in members]
    balanced: Pixels = images[np.stack(chosen)]
    return balanced


def write_(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def pack_(name: str, chosen: Pixels, folder: Path) -> dict[str, Any]:
    """Write one split.

    Args:
        name: Of the split.
        chosen: (classes, each, rows, columns).
        folder: Where to write `<name>.xz`.

    Returns:
        The split's entry for `index.json`.
    """
    raw = np.ascontiguousarray(chosen.swapaxes(2, 3)).tobytes()
    packed = lzma.compress(raw, format=lzma.FORMAT_XZ, filters=FILTERS)
    write_(folder / f"{name}.xz", packed)
    count = chosen.shape[0] * chosen.shape[1]
    print(f"{name}: {count} images, {len(packed)} bytes, {len(packed) / count:.1f} an image")
    return {
        "file": f"{name}.xz",
        "classes": chosen.shape[0],
        "images_per_class": chosen.shape[1],
        "sha256_unpacked": hashlib.sha256(raw).hexdigest(),
    }


def verify(name: str, chosen: Pixels, folder: Path) -> None:
    """Check that reading gives back every byte, and every label.

    Args:
        name: Of the split.
        chosen: (classes, each, rows, columns), what was packed.
        folder: Where it was packed.

    Raises:
        ValueError: A pixel or a label differs.
    """
    images, labels = read(name, folder)
    for label, expected in enumerate(chosen):
        if not np.array_equal(images[labels == label].numpy(), expected):
            raise ValueError(f"Packing split {name!r}: class {label} reads back differently.")
    print(f"{name}: read back, byte for byte the same")


def main() -> None:
    """Pack, read back, and weigh the folder."""
    parser = argparse.ArgumentParser(description="Pack Fashion-MNIST for this example.")
    parser.add_argument("source", nargs="?", type=Path, default=SOURCE, help="fashion-mnist.npz")
    parser.add_argument("--per-class", type=int, default=3500, help="training images of a class")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of training images")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    arguments = parser.parse_args()

    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, Pixels] = {}
    with np.load(arguments.source, allow_pickle=False) as full:
        for name, each in (("train", arguments.per_class), ("test", 1000)):
            images, labels = full[f"{name}_images"], full[f"{name}_labels"]
            splits[name] = by_class(images, labels, each, arguments.seed)
        classes = [str(name) for name in full["classes"]]
    entries = {name: pack_(name, chosen, folder) for name, chosen in splits.items()}
    index = {
        "origin": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "licence": "MIT, Copyright (c) 2017 Zalando SE",
        "layout": "xz of uint8 (class, image, column, row); the class is the label",
        "classes": classes,
        "seed": arguments.seed,
        "splits": entries,
    }
    write_(folder / "index.json", (json.dumps(index, indent=2) + "\n").encode())
    for name, chosen in splits.items():
        verify(name, chosen, folder)

    here = Path(__file__).parent
    files = [path for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    total = sum(path.stat().st_size for path in files)
    print(f"this folder: {total} bytes of at most {LIMIT}")
    if total > LIMIT:
        raise SystemExit(f"{total - LIMIT} bytes too many: lower --per-class.")


if __name__ == "__main__":
    main()
