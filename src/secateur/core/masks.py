"""Masks: the result of pruning, immutable, True = kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError


class Masks(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to a boolean tensor, True = kept.

    Example:
        >>> a = Masks({"w": torch.tensor([True, True, False])})
        >>> b = Masks({"w": torch.tensor([True, False, True])})
        >>> (a & b)["w"].tolist(), a.kept, a.total
        ([True, False, False], 2, 3)
        >>> dropped, grown = a.diff(b)
        >>> dropped["w"].tolist(), grown["w"].tolist()
        ([False, True, False], [False, False, True])
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise UsageError(
                    f"Masks({{{name!r}: ...}})",
                    f"its type is {mask.dtype}",
                    "a mask is boolean, True = kept",
                    "compare explicitly, e.g. tensor != 0",
                )
        self._masks = {name: mask.detach() for name, mask in masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, {self.kept:,} of {self.total:,} kept)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks) or set(self) != set(other):
            return False
        return all(torch.equal(self[n].cpu(), other[n].cpu()) for n in self)

    __hash__ = None  # type: ignore[assignment]  # tensors do not hash; use fingerprint()

    @property
    def kept(self) -> int:
        """Number of kept weights."""
        return sum(int(m.sum()) for m in self.values())

    @property
    def total(self) -> int:
        """Number of weights that are masked at all."""
        return sum(m.numel() for m in self.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def __and__(self, other: Masks) -> Masks:
        """Kept in both; a weight that only one side masks keeps that mask."""
        both = {**other, **self}
        return Masks({n: self[n] & other[n] if n in self and n in other else both[n] for n in both})

    def diff(self, new: Masks) -> tuple[Masks, Masks]:
        """``(dropped, grown)``: True where a weight left, and where it came back."""
        dropped = {n: self[n] & ~new[n] for n in self}
        return Masks(dropped), Masks({n: ~self[n] & new[n] for n in self})

    def fingerprint(self) -> str:
        """A hash of names, shapes and bits that is stable across processes and devices."""
        digest = hashlib.sha256()
        for name in sorted(self):
            mask = self[name].cpu()
            digest.update(f"{name}{tuple(mask.shape)}".encode())
            digest.update(pack_bits(mask).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every pruned weight of ``model`` (also an EMA copy) to zero, in place.

        Raises:
            UsageError: The model has no such parameter, or one of another shape; nothing was changed.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            shape = tuple(named[name].shape) if name in named else None
            if shape != tuple(mask.shape):
                found = (
                    f"its shape there is {shape}"
                    if shape is not None
                    else "the model has no such parameter"
                )
                raise UsageError(
                    f"applying a mask of shape {tuple(mask.shape)} to {name!r}",
                    found,
                    "masks belong to the network that they were made for",
                    "apply them to that network, or to a copy of it",
                )
        for name, mask in self.items():
            named[name].masked_fill_(~mask.to(named[name].device), 0)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight flags a byte, least significant bit first; the last byte is padded with zeros.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).reshape(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded * powers).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_bits`.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,)).tolist()
        [True, False, True]
    """
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    flags = (packed[:, None] & powers) != 0
    count = 1
    for size in shape:
        count *= size
    return flags.flatten()[:count].reshape(shape)
