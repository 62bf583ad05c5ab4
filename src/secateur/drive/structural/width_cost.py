"""What a network costs as a function of its widths: parameters, multiply-adds, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.masks import Masks
from secateur.formats.sharing import find_aliases
from secateur.formats.size import bare_bytes, plain_bytes
from secateur.structure import Structure


@dataclass(frozen=True)
class WidthCost:
    """Cost of the whole model for any choice of widths.

    Every parameter (for bytes also every buffer) costs its number of elements times a factor: 1, its
    uses, or its bytes. Groups of one width take equally many positions of an axis, so sizes follow
    from counts alone.

    Args:
        shapes: Name of a parameter -> its shape.
        factors: Name of a parameter -> cost of one element; 0 leaves it out.
        losses: Name of a parameter -> (axis, width, positions a group takes).
        groups: Name of a width -> its number of groups.
        fixed: What is paid in any case.
    """

    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, float]
    losses: Mapping[str, tuple[tuple[int, str, int], ...]]
    groups: Mapping[str, int]
    fixed: float = 0.0

    def __call__(self, kept: Mapping[str, int]) -> float:
        """The cost when each width keeps so many groups; widths that are not named stay whole."""
        return self.fixed + sum(self.of(name, kept) for name in self.shapes)

    def of(self, name: str, kept: Mapping[str, int]) -> float:
        """The cost of one parameter."""
        cost = self.factors.get(name, 0.0)
        for size in self.sizes(name, kept):
            cost *= size
        return cost

    def sizes(self, name: str, kept: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one parameter."""
        sizes = list(self.shapes[name])
        for axis, width, members in self.losses.get(name, ()):
            sizes[axis] -= members * (self.groups[width] - kept.get(width, self.groups[width]))
        return tuple(sizes)

    @property
    def dense(self) -> float:
        """The cost of the uncut model."""
        return self(self.groups)


def width_cost(
    model: nn.Module, structure: Structure, unit: str, uses: Mapping[str, float] | None = None
) -> WidthCost:
    """The cost of a model in a unit, as a function of its widths.

    Args:
        model: The uncut model.
        structure: Its structure.
        unit: ``"params"``, ``"macs"`` or ``"bytes"``.
        uses: For ``"macs"``: name of a weight -> how often a sample uses each of its elements.

    Example:
        >>> import torch
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> cost = width_cost(net, couple(net, torch.zeros(1, 4)), "params")
        >>> cost.dense, cost({"0": 2})
        (23.0, 16.0)
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    losses: dict[str, list[tuple[int, str, int]]] = {}
    for width in structure.widths:
        for part in width.slices:
            losses.setdefault(part.parameter, []).append(
                (part.axis, width.name, part.index.shape[1])
            )
    fixed = 0.0
    if unit == "params":
        factors = dict.fromkeys(tensors, 1.0)
    elif unit == "macs":
        factors = dict(uses or {})
    elif unit == "bytes":
        saved = model.state_dict()
        tensors |= {name: x for name, x in model.named_buffers() if name in saved}
        factors = {name: float(x.element_size()) for name, x in tensors.items()}
        content = sum(x.numel() * x.element_size() for x in tensors.values())
        header = bare_bytes(find_aliases(saved, Masks({})))
        header += sum(plain_bytes(name, x, total=content) for name, x in tensors.items())
        fixed = float(header - content)
    else:
        raise UsageError(
            f"a target in {unit}",
            "structural pruning was asked",
            "its units are params, macs, bytes and latency",
            "write e.g. macs=50%",
        )
    return WidthCost(
        shapes={name: tuple(x.shape) for name, x in tensors.items()},
        factors=factors,
        losses={name: tuple(entries) for name, entries in losses.items()},
        groups={width.name: width.groups for width in structure.widths},
        fixed=fixed,
    )


def removable_share(model: nn.Module, structure: Structure) -> float:
    """The share of parameters that goes when every width keeps a single group.

    Example:
        >>> import torch
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> round(removable_share(net, couple(net, torch.zeros(1, 4))), 3)
        0.609
    """
    cost = width_cost(model, structure, "params")
    return 1 - cost(dict.fromkeys(cost.groups, 1)) / cost.dense if cost.dense else 0.0
