"""Groups: slices of several parameters that are cut together or not at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """Where the groups of a width lie in one parameter.

    Args:
        parameter: Its name (or that of a buffer).
        axis: Which of its axes is cut.
        index: ``(groups, members)``: the positions along that axis, for every group.
    """

    parameter: str
    axis: int
    index: Tensor


@dataclass(frozen=True)
class Width:
    """Groups of one kind: the filters of a layer, the heads of an attention, a residual width.

    A group is what is cut together or not at all: one position (or several) in each of ``slices``.

    Args:
        name: Path of the module that produces the units first.
        slices: Everything that one group consists of.
        units: ``(groups,)``: the component number of each group in the trace.
        why: Why several units make one group, if they do.
    """

    name: str
    slices: tuple[Slices, ...]
    units: Tensor
    why: str = ""

    @property
    def groups(self) -> int:
        """How many groups there are; at least one must stay."""
        return len(self.units)

    def parameters(self) -> list[str]:
        """Names of all parameters that lose something."""
        return list(dict.fromkeys(s.parameter for s in self.slices))
