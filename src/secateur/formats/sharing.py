"""Tensors that share memory: which of them are one tensor, and which only overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.formats.layouts import same_bits
from secateur.formats.table import Alias


@dataclass(frozen=True)
class View:
    """Where a tensor lies: equal views are one tensor under several names."""

    storage: int
    start: int
    end: int
    kind: str

    def overlaps(self, other: View) -> bool:
        """Whether the byte ranges meet (views that interleave count as meeting)."""
        return self.storage == other.storage and self.start < other.end and other.start < self.end


def view_of(tensor: Tensor) -> View | None:
    """The place of a tensor in memory; ``None`` when it has no bytes.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> view_of(x) == view_of(x.detach()), view_of(x) == view_of(x[:2])
        (True, False)
        >>> view_of(x).overlaps(view_of(x[2:]))
        True
    """
    if tensor.numel() == 0:
        return None
    span = 1 + sum((n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    # A conjugate or negative view has the memory of its tensor and other values.
    bits = f"{tensor.is_conj()} {tensor.is_neg()}"
    kind = f"{tensor.device} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {bits}"
    storage = tensor.untyped_storage().data_ptr()
    return View(storage, start, start + span * tensor.itemsize, kind)


def find_aliases(tensors: Mapping[str, Tensor], masks: Masks) -> dict[str, Alias]:
    """Names that are another name of an earlier tensor, or of the one that has a mask.

    Args:
        tensors: All tensors of a model.
        masks: Their masks; two names of one tensor may not have different masks.

    Example:
        >>> import torch
        >>> x = torch.zeros(2)
        >>> find_aliases({"a": x, "b": x}, Masks({"b": torch.ones(2, dtype=torch.bool)}))
        {'a': Alias(of='b', masked=False)}
    """
    groups: dict[View, list[str]] = {}
    for name, tensor in tensors.items():
        view = view_of(tensor)
        if view is not None:
            groups.setdefault(view, []).append(name)
    aliases = {}
    for names in groups.values():
        owner = next((name for name in names if name in masks), names[0])
        for name in names:
            if name == owner:
                continue
            if name in masks and not same_bits(masks[name], masks[owner]):
                raise UsageError(
                    f"writing the tied weights {owner!r} and {name!r}",
                    "they are one tensor with two different masks",
                    "a tensor is stored once, with one mask",
                    "give one mask, or combine them with &",
                )
            aliases[name] = Alias(owner, name in masks)
    refuse_half_masked(tensors, masks, groups)
    return aliases


def refuse_half_masked(
    tensors: Mapping[str, Tensor], masks: Masks, groups: Mapping[View, list[str]]
) -> None:
    """Overlapping views are stored one by one; that is wrong if a mask would change only one."""
    for view, names in groups.items():
        masked = next((name for name in names if name in masks), None)
        if masked is None:
            continue
        other = next((place for place in groups if place != view and view.overlaps(place)), None)
        if other is None:
            continue
        value = tensors[masked].detach()
        changed = int((value[~masks[masked].to(value.device)] != 0).sum())
        if changed:
            raise UsageError(
                f"writing {masked!r} with its mask",
                f"it shares memory with a part of {groups[other][0]!r}, and {changed} of its "
                "pruned entries are not zero yet",
                "the two would differ after reading",
                "set the pruned entries to zero first, e.g. with masks.apply_(model)",
            )
