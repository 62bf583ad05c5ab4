"""Surgery: everything that structural pruning did to a network, as one small JSON file.

Replayed on a freshly built original network, it gives the cut one. The file is described in
``docs/formats/surgery.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import UsageError

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Selection:
    """Which positions of an axis are kept.

    Args:
        size: Length of the axis before the cut.
        runs: ``(start, stop)`` of each run of kept positions: increasing, apart, never empty.

    Example:
        >>> Selection(8, ((0, 3), (5, 6))).positions()
        [0, 1, 2, 5]
    """

    size: int
    runs: tuple[tuple[int, int], ...]

    @property
    def kept(self) -> int:
        """Length of the axis after the cut."""
        return sum(stop - start for start, stop in self.runs)

    def positions(self) -> list[int]:
        """The kept positions one by one."""
        return [position for start, stop in self.runs for position in range(start, stop)]


@dataclass(frozen=True)
class BlockEdit:
    """A module that was replaced as a whole, after the cuts.

    Args:
        module: Its path.
        kind: ``"removed"`` for a pass-through; other kinds may follow.
        details: What that kind needs to know: numbers, text, flags, lists and mappings of them.

    Example:
        >>> BlockEdit("layers.3", "removed").details
        {}
    """

    module: str
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Surgery:
    """What was done to a network, and to which one.

    Args:
        model: Import path of its class.
        cuts: Name of a parameter or buffer -> axis -> what is kept.
        attributes: Path of a module -> attribute -> (value before, value after).
        blocks: Modules that were replaced.
        shapes: :func:`shapes_hash` of the original ``state_dict``.
        weights: :func:`fingerprint_of` the original ``state_dict``; ``""`` if it had no values.
        result: :func:`shapes_hash` of the ``state_dict`` afterwards.
        library: Version of secateur that wrote it.

    Example:
        >>> cut = Surgery("torch.nn.Linear", {"weight": {0: Selection(3, ((0, 2),))}})
        >>> cut.cuts["weight"][0].kept
        2
    """

    model: str
    cuts: Mapping[str, Mapping[int, Selection]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    blocks: Sequence[BlockEdit] = ()
    shapes: str = ""
    weights: str = ""
    result: str = ""
    library: str = ""

    def then(self, later: Surgery) -> Surgery:
        """Both in one: ``later`` was made for what this one leaves.

        Raises:
            UsageError: It was made for something else, or cuts into a replaced module.

        Example:
            >>> first = Surgery("Net", {"w": {0: Selection(6, ((1, 5),))}}, result="ab")
            >>> later = Surgery("Net", {"w": {0: Selection(4, ((0, 1), (3, 4)))}}, shapes="ab")
            >>> first.then(later).cuts["w"][0].positions()
            [1, 4]
        """
        asked = "joining two surgeries"
        if later.shapes != self.result:
            raise UsageError(
                asked,
                f"the first leaves shapes {self.result[:12]!r}, the second was made for "
                f"{later.shapes[:12]!r}",
                "the second must have been made for what the first leaves",
                "join those of one network, in the order in which they were done",
            )
        later = _before_deletions(self.blocks, later)
        paths = [block.module for block in self.blocks if block.kind != "deleted"]
        for name in [*later.cuts, *later.attributes, *(b.module for b in later.blocks)]:
            inside = next((p for p in paths if name == p or name.startswith(f"{p}.")), None)
            if inside is not None:
                raise UsageError(
                    asked,
                    f"the second changes {name!r}, and the first replaced {inside!r}",
                    "cuts come before replacements, so this order cannot be written down",
                    "cut first and replace afterwards",
                )
        cuts = {name: dict(axes) for name, axes in self.cuts.items()}
        for name, axes in later.cuts.items():
            for axis, selection in axes.items():
                mine = cuts.setdefault(name, {})
                mine[axis] = _within(mine[axis], selection) if axis in mine else selection
        attributes = {path: dict(edits) for path, edits in self.attributes.items()}
        for path, edits in later.attributes.items():
            for name, (before, after) in edits.items():
                known = attributes.setdefault(path, {})
                known[name] = (known[name][0] if name in known else before, after)
        return replace(
            self,
            cuts=cuts,
            attributes=attributes,
            blocks=_joined(self.blocks, later.blocks),
            result=later.result,
            library=later.library,
        )


def selection_of(positions: Iterable[int], size: int) -> Selection:
    """Positions as runs.

    Raises:
        UsageError: They are not increasing, or not positions of an axis of this size.

    Example:
        >>> selection_of([0, 1, 2, 5], 8)
        Selection(size=8, runs=((0, 3), (5, 6)))
    """
    runs: list[tuple[int, int]] = []
    last = -1
    for position in positions:
        if not last < position < size:
            raise UsageError(
                f"keeping position {position} of an axis of {size}",
                f"the position before it is {last}" if position <= last else "it ends before that",
                "positions are counted from 0 and increase",
                "sort them, and name each one once",
            )
        if runs and position == last + 1:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
        last = position
    if not runs:
        raise UsageError(
            f"keeping nothing of an axis of {size}",
            "there are 0 positions",
            "a layer of width zero passes nothing on",
            "keep at least one",
        )
    return Selection(size, tuple(runs))


def _within(first: Selection, later: Selection) -> Selection:
    positions = first.positions()
    if later.size != len(positions):
        raise UsageError(
            "joining two surgeries",
            f"the first leaves {len(positions)} positions, the second expects {later.size}",
            "the second must have been made for what the first leaves",
            "join those of one network, in the order in which they were done",
        )
    return selection_of([positions[i] for i in later.positions()], first.size)


def shapes_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and shapes, in 64 hex digits.

    Example:
        >>> shapes_hash({"w": torch.zeros(2)}) == shapes_hash({"w": torch.ones(2)})
        True
        >>> shapes_hash({"w": torch.zeros(2)}) == shapes_hash({"w": torch.zeros(3)})
        False
    """
    lines = sorted([name, list(x.shape)] for name, x in tensors.items() if isinstance(x, Tensor))
    return hashlib.sha256(plain_json(lines).encode()).hexdigest()


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and every bit of a ``state_dict``; ``""`` without values.

    The same on every device.

    Example:
        >>> fingerprint_of({"w": torch.zeros(2)}) == fingerprint_of({"w": torch.zeros(2)})
        True
        >>> fingerprint_of({"w": torch.zeros(2)}) == fingerprint_of({"w": -torch.zeros(2)})
        False
    """
    plain = {name: x.detach() for name, x in tensors.items() if isinstance(x, Tensor)}
    if any(x.is_meta for x in plain.values()):
        return ""
    digest = hashlib.sha256()
    for name, x in sorted(plain.items()):
        kind = str(x.dtype).removeprefix("torch.")
        digest.update(f"{plain_json([name, list(x.shape), kind])}\n".encode())
        flat = x.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_CHUNK):
            digest.update(piece.numpy())
    return digest.hexdigest()


def _before_deletions(blocks: Sequence[BlockEdit], later: Surgery) -> Surgery:
    """``later`` with the names that modules had before entries of lists were deleted."""

    def old(name: str) -> str:
        for block in reversed(blocks):
            prefix = f"{block.module}."
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if block.kind == "deleted" and name.startswith(prefix) and number.isdecimal():
                name = f"{prefix}{_left(block)[int(number)]}{dot}{rest}"
        return name

    return replace(
        later,
        cuts={old(name): axes for name, axes in later.cuts.items()},
        attributes={old(path): edits for path, edits in later.attributes.items()},
        blocks=[replace(block, module=old(block.module)) for block in later.blocks],
    )


def _left(block: BlockEdit) -> list[int]:
    return [i for i in range(block.details["size"]) if i not in block.details["entries"]]


def _joined(first: Sequence[BlockEdit], later: Sequence[BlockEdit]) -> tuple[BlockEdit, ...]:
    """Both; entries that are deleted from one list in two turns are deleted at once."""
    joined = {block.module: block for block in first}
    for block in later:
        known = joined.setdefault(block.module, block)
        if known is not block:
            left, config = _left(known), dict(known.details["config"])
            for key, (before, after) in block.details["config"].items():
                config[key] = [config[key][0] if key in config else before, after]
            gone = {*known.details["entries"], *(left[i] for i in block.details["entries"])}
            details = {"entries": sorted(gone), "size": known.details["size"], "config": config}
            joined[block.module] = replace(known, details=details)
    return tuple(sorted(joined.values(), key=lambda b: b.module.count("."), reverse=True))


def plain_json(value: Any) -> str:
    """JSON in its shortest form; no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
