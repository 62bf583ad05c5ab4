"""The laws of masks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from secateur.core.masks import Masks, pack_bits, unpack_bits
from secateur.formats import read_tensors, write_tensors
from secateur.testing.law import require


def check_masks(a: Masks, b: Masks) -> None:
    """Check the laws of masks on two of them.

    ``&`` is commutative, idempotent and keeps no more than either side; ``diff`` says exactly what
    left and what came; the fingerprint follows the bits alone; a file gives the same masks back.

    Raises:
        AssertionError: Naming the law.

    Example:
        >>> check_masks(Masks({"w": torch.tensor([True])}), Masks({"w": torch.tensor([False])}))
    """
    require((a & b) == (b & a), "& is commutative", a, "a & b is not b & a")
    require((a & a) == a, "& is idempotent", a, "a & a is not a")
    require((a & b).fingerprint() == (b & a).fingerprint(), "& is commutative", a, "fingerprints")
    for name in set(a) & set(b):
        grown = bool(((a & b)[name] & ~a[name]).any())
        require(not grown, "& keeps no more than either side", a, name)
    if set(a) == set(b) and all(a[n].shape == b[n].shape for n in a):
        dropped, grown_masks = a.diff(b)
        for name in a:
            back = (a[name] & ~dropped[name]) | grown_masks[name]
            law = "diff says what left and what came"
            require(torch.equal(back, b[name]), law, a, name)
    copied = Masks(
        {n: unpack_bits(pack_bits(a[n]), tuple(a[n].shape)) for n in sorted(a, reverse=True)}
    )
    law = "the fingerprint follows names, shapes and bits alone"
    require(copied.fingerprint() == a.fingerprint(), law, a, "a copy has another one")
    require((a == b) == (a.fingerprint() == b.fingerprint()), law, a, "unequal masks share one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_tensors(path, {n: torch.ones(a[n].shape) * a[n] for n in a}, a)
        require(read_tensors(path)[1] == a, "a file gives the same masks back", a, "it does not")
