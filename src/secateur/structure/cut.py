"""The cut itself: parameters, optimizer state and stated sizes become smaller, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.attention import settle_heads_
from secateur.core.batches import own_modes
from secateur.core.errors import UsageError
from secateur.structure.coupling import Structure
from secateur.structure.layers import layer_sizes
from secateur.structure.sizes import set_attribute_


@dataclass(frozen=True)
class Cuts:
    """Everything that a cut did, as plain data: it can be replayed on the uncut network.

    Args:
        kept: Name of a parameter or buffer -> axis -> the positions that were kept.
        attributes: Path of a module -> attribute -> its new value.

    Example:
        >>> Cuts({"fc.weight": {0: [0, 2]}}, {"fc": {"out_features": 2}}).attributes["fc"]
        {'out_features': 2}
    """

    kept: Mapping[str, Mapping[int, list[int]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def cuts_for(model: nn.Module, structure: Structure, keep: Mapping[str, Tensor]) -> Cuts:
    """What is to be done to keep only some groups.

    Args:
        model: The network that was traced.
        structure: From :func:`~secateur.structure.couple`.
        keep: Name of a width -> ``(groups,)``, True = kept.

    Raises:
        UsageError: A width is unknown or would lose its last group, or the code of the model states
            one number for two sizes that are to differ.

    Example:
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> structure = couple(net, torch.zeros(1, 4))
        >>> cuts_for(net, structure, {"0": torch.tensor([True, False, True])}).kept["2.weight"]
        {1: [0, 2]}
    """
    check_keep(structure, keep)
    alive = structure.alive(keep)
    kept: dict[str, dict[int, list[int]]] = {}
    for (name, axis), ids in structure.trace.axes.items():
        flags = alive[ids]
        if not bool(flags.all()):
            kept.setdefault(name, {})[axis] = flags.nonzero()[:, 0].tolist()
    attributes: dict[str, dict[str, int]] = {}
    changed: dict[tuple[str, str], set[int]] = {}
    for use in structure.trace.sizes:
        new = use.new(alive)
        for attribute in use.site.attributes:
            changed.setdefault((use.site.module, attribute), set()).add(new)
    for (module, attribute), values in changed.items():
        old = {u.old for u in structure.trace.sizes if u.site.module == module
               and attribute in u.site.attributes}  # fmt: skip
        new_values = values - old
        if len(new_values) > 1:
            raise UsageError(
                f"cutting {module or 'the model'}",
                f"its {attribute} = {min(old)} is used for sizes that become {sorted(new_values)}",
                "one attribute cannot hold two values",
                "cut these widths to the same size, or leave one of them out",
            )
        if new_values:
            attributes.setdefault(module, {})[attribute] = new_values.pop()
    for path, sizes in layer_sizes(model, kept).items():
        attributes.setdefault(path, {}).update(sizes)
    return Cuts(kept, attributes)


def check_keep(structure: Structure, keep: Mapping[str, Tensor]) -> None:
    """Raise if a choice of groups does not fit the structure."""
    for name, flags in keep.items():
        width = structure.by_name.get(name)
        if width is None:
            raise UsageError(
                f"cutting the width {name!r}",
                f"there are {len(structure.widths)} widths, and none has this name",
                "widths are named after the module that produces them",
                "list them with secateur inspect MODEL --structure",
            )
        if flags.shape != (width.groups,):
            raise UsageError(
                f"cutting the width {name!r}",
                f"{tuple(flags.shape)} flags for {width.groups} groups",
                "there is one flag a group, True = kept",
                "",
            )
        if not bool(flags.any()):
            raise UsageError(
                f"cutting all {width.groups} groups of {name!r}",
                "nothing would be left of it",
                "a layer of width zero passes nothing on",
                "keep at least one group, or remove the whole block",
            )


@torch.no_grad()
def apply_(model: nn.Module, cuts: Cuts, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Carry out cuts in place. Parameters stay the same objects, so ties and optimizers hold.

    Args:
        model: The uncut network.
        cuts: From :func:`cuts_for`, or read from a file.
        optimizer: Its state (momenta, Adam's moments) is cut along with the weights.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> apply_(layer, Cuts({"weight": {0: [0, 2]}, "bias": {0: [0, 2]}}, {"": {"out_features": 2}}))
        >>> layer
        Linear(in_features=2, out_features=2, bias=True)
    """
    _check_fits(model, cuts)
    done: set[int] = set()
    for name, axes in cuts.kept.items():
        x = _tensor(model, name)
        if id(x) in done:  # tied under another name
            continue
        done.add(id(x))
        slots = optimizer.state.get(x, {}) if optimizer is not None else {}
        twins = {key: slot for key, slot in slots.items() if alike(slot, x)}
        gradient = x.grad
        x.grad = None
        cut = _selected(x.data, axes)
        # A graph that is still alive (the last loss, say) holds autograd's record of the old shape,
        # and the next backward pass would go by it. It is dropped when the type changes.
        if x.requires_grad:
            x.data = cut.new_empty(0, dtype=_other(x.dtype))
        x.data = cut
        if gradient is not None:
            x.grad = _selected(gradient, axes)
        for key, slot in twins.items():
            along = {axis: kept for axis, kept in axes.items() if slot.shape[int(axis)] > 1}
            slots[key] = _selected(slot, along)
    for path, attributes in cuts.attributes.items():
        module = model.get_submodule(path)
        for attribute, value in attributes.items():
            set_attribute_(module, attribute, value)
    settle_heads_(model, cuts.attributes)
    _forget_(model)


def _forget_(model: nn.Module) -> None:
    """Let modules drop what they computed from the uncut weights for evaluation, as LeViT's biases."""
    with own_modes(model):
        model.train()


def _other(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype != torch.float64 else torch.float32


def alike(slot: Any, x: Tensor) -> bool:
    """Whether what an optimizer keeps for a parameter has its axes, and so can be cut along.

    Adafactor keeps means over rows and over columns: the axis that is gone has size 1.

    Example:
        >>> x = torch.zeros(4, 3)
        >>> alike(torch.zeros(4, 1), x), alike(torch.zeros(4), x)
        (True, False)
    """
    if not isinstance(slot, Tensor) or slot.ndim != x.ndim:
        return False
    return all(mine in (1, size) for mine, size in zip(slot.shape, x.shape, strict=True))


def _selected(x: Tensor, axes: Mapping[int, list[int]]) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        layout = torch.preserve_format
    for axis, positions in axes.items():
        x = x.index_select(int(axis), torch.tensor(positions, device=x.device))
    # A copy, so that no view of the old storage is kept alive. What was selected is contiguous.
    return x.clone(memory_format=layout)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(path), attribute)
    assert isinstance(value, Tensor)
    return value


def _check_fits(model: nn.Module, cuts: Cuts) -> None:
    """Everything is checked before anything changes."""
    for name, axes in cuts.kept.items():
        try:
            shape = tuple(_tensor(model, name).shape)
        except AttributeError:
            shape = ()
        for axis, positions in axes.items():
            top = max(positions, default=-1)
            if not 0 <= int(axis) < len(shape) or not positions or top >= shape[int(axis)]:
                raise UsageError(
                    f"cutting axis {axis} of {name!r}",
                    f"the model has {shape or 'no such parameter'}, the cut keeps "
                    f"{len(positions)} positions up to {top}",
                    "the cuts were made for another model",
                    "build the original model; nothing was changed",
                )
    for path, attributes in cuts.attributes.items():
        module = dict(model.named_modules()).get(path)
        lacking = [a for a in attributes if not _has(module, a)]
        if lacking:
            raise UsageError(
                f"setting {lacking[0]!r} of {path!r}",
                "there is no such attribute",
                "the cuts were made for another model",
                "build the original model; nothing was changed",
            )


def _has(module: Any, attribute: str) -> bool:
    holder = module
    if attribute.startswith("config."):
        holder, attribute = getattr(module, "config", None), attribute.removeprefix("config.")
    return holder is not None and hasattr(holder, attribute.partition("[")[0])
