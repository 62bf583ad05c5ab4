"""Units and what ties them: joins, pins, and the choices that are settled after a trace.

A *unit* is one index of one axis of one parameter, numbered through the whole network. Units that
must be cut together are *joined*; the connected components are the groups. ``NONE`` marks places
that belong to no unit, such as zero padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.structure.labels import NONE, compact, first_along, varying


def components(count: int, a: Tensor, b: Tensor) -> Tensor:
    """The smallest member of each unit's connected component, for edges ``a[i] - b[i]``.

    Labels spread along the edges and jump to the label of their label, so long chains take
    logarithmically many rounds; everything is vectorised.

    Example:
        >>> components(5, torch.tensor([0, 3]), torch.tensor([1, 4])).tolist()
        [0, 0, 2, 3, 3]
    """
    root = torch.arange(count)
    while True:
        ra, rb = root[a], root[b]
        low = torch.minimum(ra, rb)
        new = root.scatter_reduce(0, ra, low, "amin").scatter_reduce(0, rb, low, "amin")
        while not torch.equal(new, jumped := new[new]):
            new = jumped
        if torch.equal(new, root):
            return root
        root = new


@dataclass(frozen=True)
class Meet:
    """Two labels on one tensor of which one varies along more axes than the other.

    Either the shared axes are kept whole, and then nothing ties the two, or units of the narrow one
    are tied to every unit of the wide one above them. Which of the two is known after the trace.
    """

    wide: Tensor
    narrow: Tensor
    shared: tuple[int, ...]
    reason: str


class Ledger:
    """Everything that a trace finds out about units.

    Example:
        >>> ledger = Ledger()
        >>> a, b = ledger.new(3), ledger.new(3)
        >>> ledger.join(a, b)
        >>> ledger.settle().tolist()
        [0, 1, 2, 0, 1, 2]
    """

    def __init__(self) -> None:
        self.count = 0
        self._edges: list[tuple[Tensor, Tensor]] = []
        self._pins: list[tuple[Tensor, str]] = []
        self._wholes: list[tuple[Tensor, str]] = []
        self._boxes: list[Tensor] = []
        self._meets: list[Meet] = []

    def new(self, count: int) -> Tensor:
        """Fresh units."""
        ids = torch.arange(self.count, self.count + count)
        self.count += count
        return ids

    def join(self, a: Tensor, b: Tensor, reason: str = "") -> None:
        """Tie ``a[i]`` to ``b[i]``; what meets no unit is pinned."""
        a, b = compact(*torch.broadcast_tensors(a, b))
        a, b = a.reshape(-1), b.reshape(-1)
        alone = (a == NONE) | (b == NONE)
        if bool(alone.any()):
            self.pin(
                torch.cat([a[alone], b[alone]]), reason or "it meets padding or a fixed tensor"
            )
            a, b = a[~alone], b[~alone]
        differ = a != b
        if bool(differ.any()):
            self._edges.append((a[differ], b[differ]))

    def pin(self, ids: Tensor, reason: str) -> None:
        """Say why units cannot be removed."""
        flat = compact(ids)[0].reshape(-1)
        flat = flat[flat != NONE]
        if len(flat):
            self._pins.append((flat.unique(), reason))

    def stuck(self, ids: Tensor) -> bool:
        """Whether it is known already that all of these units stay."""
        flat = compact(ids)[0].reshape(-1).unique()
        pins = [pinned for pinned, _ in self._pins]
        return bool(pins) and bool(torch.isin(flat, torch.cat(pins)).all())

    def whole(self, ids: Tensor, axis: int, reason: str) -> Tensor | None:
        """Keep the size of ``axis``: what lies along it is cut together or not at all.

        Returns:
            The label without that axis (still expanded), or ``None`` if none is left.
        """
        head = first_along(ids, axis)
        self.join(ids, head, reason)
        if not varying(head):
            self.pin(ids, reason)
            return None
        self._wholes.append((compact(head)[0].reshape(-1), reason))
        return head.expand(ids.shape)

    def block(self, ids: Tensor, axis: int, size: int, reason: str) -> None:
        """Neighbours along ``axis`` go together, ``size`` at a time, if that divides their number."""
        if ids.shape[axis] % size or size == 1:
            return
        parts = ids.unflatten(axis, (-1, size))
        head = first_along(parts, axis + 1 if axis >= 0 else axis)
        self.join(parts, head, reason)
        self._wholes.append((compact(head)[0].reshape(-1), reason))

    def box(self, ids: Tensor) -> None:
        """What is cut from ``ids`` must leave a box: whole slices along one of its axes."""
        self._boxes.append(compact(ids)[0].squeeze())

    def meet(self, meet: Meet) -> None:
        """Leave the choice of a :class:`Meet` to :meth:`settle`."""
        wide, narrow = compact(meet.wide, meet.narrow)
        self._meets.append(Meet(wide, narrow, meet.shared, meet.reason))

    def settle(self, root: Tensor | None = None) -> Tensor:
        """Make the open choices, and return the component of every unit.

        Boxes and meets whose outcome follows from what is known go first. Of a box that is still
        open, the axis with most groups is cut; of a meet, the two sides are tied.
        """
        root = self._roots(root)
        boxes, meets = list(self._boxes), list(self._meets)
        while boxes or meets:
            before = len(boxes) + len(meets)
            boxes = [b for b in boxes if not self._try_box(root[b], b, force=False)]
            meets = [m for m in meets if not self._try_meet(root, m)]
            root = self._roots(root)
            if len(boxes) + len(meets) < before:
                continue
            if meets:
                first = meets.pop(0)
                self.join(first.wide, first.narrow, first.reason)
            else:
                first_box = boxes.pop(0)
                self._try_box(root[first_box], first_box, force=True)
            root = self._roots(root)
        return root

    def reasons(self, root: Tensor) -> dict[int, str]:
        """Component -> the first reason why it is pinned."""
        found: dict[int, str] = {}
        for ids, reason in self._pins:
            for component in root[ids].unique().tolist():
                found.setdefault(component, reason)
        return found

    def why_whole(self, root: Tensor) -> dict[int, str]:
        """Component -> why several of its units are kept or cut as one."""
        found: dict[int, str] = {}
        for ids, reason in self._wholes:
            for component in root[ids[ids != NONE]].unique().tolist():
                found.setdefault(component, reason)
        return found

    def _roots(self, root: Tensor | None = None) -> Tensor:
        root = torch.arange(self.count) if root is None else root
        if not self._edges:
            return root
        a, b = (root[torch.cat(side)] for side in zip(*self._edges, strict=True))
        self._edges = []
        # Only components at the ends of new edges can change: they are numbered anew among themselves.
        ends, number = torch.cat([a, b]).unique(return_inverse=True)
        renamed = torch.arange(self.count)
        renamed[ends] = ends[components(len(ends), number[: len(a)], number[len(a) :])]
        return renamed[root]

    def _try_box(self, roots: Tensor, ids: Tensor, *, force: bool) -> bool:
        """Join across all axes but the free one, if it is clear which that is."""
        counts = [_groups_along(roots, axis) for axis in range(roots.ndim)]
        open_axes = [axis for axis, count in enumerate(counts) if count > 1]
        if len(open_axes) > 1 and not force:
            return False
        free = max(range(len(counts)), key=lambda axis: counts[axis])
        for axis in range(ids.ndim):
            if axis != free:
                self.join(ids, first_along(ids, axis).expand(ids.shape))
        return True

    def _try_meet(self, root: Tensor, meet: Meet) -> bool:
        wide = root[meet.wide]
        if all(bool((wide == first_along(wide, axis)).all()) for axis in meet.shared):
            # The shared axes keep their size: the narrow side is a tensor of fixed size here.
            self.pin(meet.narrow, meet.reason)
            return True
        extra = [axis for axis in varying(meet.wide) if axis not in meet.shared]
        if all(bool((wide == first_along(wide, axis)).all()) for axis in extra):
            self.join(meet.wide, meet.narrow, meet.reason)
            return True
        return False


def _groups_along(roots: Tensor, axis: int) -> int:
    """How many groups are left when everything across ``axis`` is joined."""
    slices = roots.movedim(axis, 0).reshape(roots.shape[axis], -1)
    values, inverse = slices.unique(return_inverse=True)
    rows = torch.arange(len(slices))[:, None].expand_as(inverse) + len(values)
    joined = components(len(values) + len(slices), rows.reshape(-1), inverse.reshape(-1))
    return len(joined[len(values) :].unique())
