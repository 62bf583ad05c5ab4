"""From a trace to groups: what is cut together, how wide everything is, and what is pinned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.widths import Slices, Width
from secateur.structure.named_sizes import tie_named_sizes
from secateur.structure.opaque import pin_opaque
from secateur.structure.trace import Trace, trace

Axis = tuple[str, int]


@dataclass(frozen=True)
class Structure:
    """What can be removed from a network, and why the rest cannot.

    Args:
        widths: Everything that can be made narrower.
        pinned: Axis of a parameter -> why some or all of its units stay.
        unreached: Parameters that the example did not use.
        trace: The run it was read from.
        root: The component of every unit.
    """

    widths: tuple[Width, ...]
    pinned: Mapping[Axis, str]
    unreached: tuple[str, ...]
    trace: Trace
    root: Tensor

    @cached_property
    def by_name(self) -> dict[str, Width]:
        """Widths by their names."""
        return {width.name: width for width in self.widths}

    def alive(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Which units are left: a flag for each, by number.

        Args:
            keep: Name of a width -> ``(groups,)``, True = kept. Widths that are not named stay.
        """
        dead = [self.by_name[name].units[~kept.cpu()] for name, kept in keep.items()]
        flags = torch.ones(len(self.root), dtype=torch.bool)
        if dead:
            flags[torch.cat(dead)] = False
        return flags[self.root]

    def doubt(self, name: str) -> str:
        """What may be wrong with a cut of a width though nothing forbids it; empty if nothing is known.

        Example:
            >>> class Scaled(nn.Sequential):
            ...     def forward(self, x):
            ...         x = self[0](x)
            ...         return self[1](x / x.shape[1])
            >>> structure = couple(Scaled(nn.Linear(2, 8), nn.Linear(8, 2)), torch.zeros(1, 2))
            >>> structure.doubt("0")
            'its code computes with their number, 8'
        """
        units = self.by_name[name].units
        told = list(self.trace.doubts)
        for use in self.trace.sizes:
            for attribute in use.site.attributes:
                if (use.site.module, attribute) in self.trace.valued:
                    told.append((use.units, f"its code computes with the value of {attribute}"))
        return next((why for ids, why in told if bool(torch.isin(self.root[ids], units).any())), "")


def couple(model: nn.Module, example: Any) -> Structure:
    """Trace ``model`` and find what must be cut together.

    Args:
        model: Left as it is.
        example: Inputs: a tensor, a tuple of positional arguments, or a mapping of named ones.

    Raises:
        UsageError: The model fails on the example.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> structure = couple(net, torch.zeros(1, 3, 8, 8))
        >>> [(w.name, w.groups) for w in structure.widths]
        [('0', 8)]
        >>> [(s.parameter, s.axis) for s in structure.widths[0].slices]
        [('0.weight', 0), ('0.bias', 0), ('1.weight', 0), ('1.bias', 0), ('3.weight', 1), \
('1.running_mean', 0), ('1.running_var', 0)]
        >>> structure.pinned["3.weight", 0]
        'it reaches the output of the model'
    """
    found = trace(model, example)
    pin_opaque(model, found)
    _tie_states(model, found)
    root = found.ledger.settle()
    tie_named_sizes(found, root)
    root = found.ledger.settle(root)
    if _tie_sizes(found, root):
        root = found.ledger.settle(root)
    reasons = found.ledger.reasons(root)
    parameters = [name for name, _ in model.named_parameters()]
    unreached = tuple(name for name in parameters if name not in found.reached)
    _pin_idle(found, root, set(parameters) & found.reached, reasons)
    _pin_given(model, found, root, reasons)
    _pin_whole(found, root, reasons)
    # Buffers follow the parameters that they meet, and have no reasons of their own.
    pinned = _pinned(found, root, reasons)
    pinned = {key: text for key, text in pinned.items() if key[0] in set(parameters)}
    return Structure(_widths(model, found, root, reasons), pinned, unreached, found, root)


def _tie_states(model: nn.Module, found: Trace) -> None:
    """The state that a recurrent layer gives is the one that it reads, also if one step was traced."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        for name in module._parameters:
            if name.startswith("weight_hh"):
                read = found.axes.get((f"{path}.{name}".lstrip("."), 1))
                given = name.replace("hh", "hr")
                given = given if given in module._parameters else name
                made = found.axes.get((f"{path}.{given}".lstrip("."), 0))
                if read is not None and made is not None:
                    found.ledger.join(made.reshape(-1, len(read)), read)


def _tie_sizes(found: Trace, root: Tensor) -> bool:
    """Tie units that one attribute counts in several places: it can hold one number only."""
    pinned = torch.zeros(len(root), dtype=torch.bool)
    pinned[torch.tensor(list(found.ledger.reasons(root)), dtype=torch.long)] = True
    groups: dict[tuple[str, str, int], list[Tensor]] = {}
    for use in found.sizes:
        for attribute in use.site.attributes if use.sure else ():
            groups.setdefault((use.site.module, attribute, use.old), []).append(use.units)
    tied = False
    for (path, attribute, _), (first, *others) in groups.items():
        for units in others:
            a, b = root[first[:, 0].clamp(min=0)], root[units[:, 0].clamp(min=0)]
            if torch.equal(a, b) or (_stays(a, pinned) and _stays(b, pinned)):
                continue
            reason = f"{attribute} of {path or 'the model'} counts them, too"
            if first.shape != units.shape:
                found.ledger.join(first[:, 0], units[:, 0], reason)
            else:
                found.ledger.join(first, units, reason)
            tied = True
    return tied


def _stays(own: Tensor, pinned: Tensor) -> bool:
    """Whether a size cannot change."""
    return bool(pinned[own].all()) or len(own.unique()) == 1


def _pin_idle(found: Trace, root: Tensor, used: set[str], reasons: dict[int, str]) -> None:
    """Pin components without a parameter that the example reaches."""
    live = torch.zeros(len(root), dtype=torch.bool)
    for (name, _), ids in found.axes.items():
        if name in used:
            live[root[ids]] = True
    for own in (root[ids] for ids in found.axes.values()):
        for component in own[~live[own]].tolist():
            reasons.setdefault(component, "the example inputs do not reach it")


def _pin_given(model: nn.Module, found: Trace, root: Tensor, reasons: dict[int, str]) -> None:
    """Pin what buffers alone produce: to the weights that read it, it is like an input of the model."""
    made = torch.zeros(len(root), dtype=torch.bool)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (name, axis), ids in found.axes.items():
        if name in parameters and parameters[name].ndim > 1 and not _reads(model, name, axis):
            made[root[ids]] = True
    for own in (root[ids] for (name, _), ids in found.axes.items() if name not in parameters):
        for component in own[~made[own]].tolist():
            reasons.setdefault(component, "they come from a buffer, as if from an input")


def _reads(model: nn.Module, name: str, axis: int) -> bool:
    """Whether the inputs of a layer lie along this axis of its weight."""
    module = model.get_submodule(name.rpartition(".")[0])
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    layer = isinstance(module, kinds) or hasattr(module, "nf")
    return layer and axis != _out_axis(module)


def _pin_whole(found: Trace, root: Tensor, reasons: dict[int, str]) -> None:
    """Pin components that take in a whole axis: without them nothing would be left of it."""
    why = found.ledger.why_whole(root)
    for (name, axis), ids in found.axes.items():
        own = root[ids]
        if bool((own == own[0]).all()):
            component = int(own[0])
            told = why.get(component, "")
            text = f"together they are the whole of axis {axis} of {name}"
            if len(ids) == 1:
                text = f"axis {axis} of {name} has one position only, and that stays"
            reasons.setdefault(component, f"{text}: {told}" if told else text)


def _pinned(found: Trace, root: Tensor, reasons: Mapping[int, str]) -> dict[Axis, str]:
    result: dict[Axis, str] = {}
    stuck = torch.zeros(len(root), dtype=torch.bool)
    stuck[torch.tensor(list(reasons), dtype=torch.long)] = True
    for key, ids in found.axes.items():
        own = root[ids]
        hit = own[stuck[own]]
        if len(hit):
            listed = dict.fromkeys(reasons[c] for c in hit.unique().tolist()[:8])
            share = "" if len(hit) == len(own) else f"{len(hit)} of {len(own)}: "
            result[key] = share + "; ".join(listed)
    return result


def _widths(
    model: nn.Module, found: Trace, root: Tensor, reasons: Mapping[int, str]
) -> tuple[Width, ...]:
    keys = list(found.axes)
    if not keys:
        return ()
    where = torch.cat([torch.full((len(found.axes[k]),), i) for i, k in enumerate(keys)])
    place = torch.cat([torch.arange(len(found.axes[k])) for k in keys])
    own = root[torch.cat([found.axes[k] for k in keys])]
    free = ~torch.isin(own, torch.tensor(sorted(reasons), dtype=torch.long))
    where, place, own = where[free], place[free], own[free]
    if not len(own):
        return ()
    family = _families(own, where, len(keys))
    why = found.ledger.why_whole(root)
    widths = []
    order = torch.argsort(family, stable=True)
    for part in order.split(torch.bincount(family).tolist()):
        if len(part):
            widths.append(_width(model, (where[part], place[part], own[part]), keys, why))
    widths.sort(key=lambda w: keys.index((w.slices[0].parameter, w.slices[0].axis)))
    return tuple(_unique_names(widths))


def _families(own: Tensor, where: Tensor, kinds: int) -> Tensor:
    """A number per entry, equal for components with the same count in every axis."""
    pairs, inverse, counts = torch.unique(
        own * kinds + where, return_inverse=True, return_counts=True
    )
    generator = torch.Generator().manual_seed(0)
    # A component's signature is a sum of random numbers, one for each (axis, count) in it.
    table = torch.randint(2**62, (kinds,), generator=generator)
    mixed = (table[pairs % kinds] * (2 * counts + 1)) ^ (table[pairs % kinds] >> (counts % 13))
    components, which = torch.unique(pairs // kinds, return_inverse=True)
    signature = torch.zeros(len(components), dtype=torch.long).scatter_add_(0, which, mixed)
    _, family = torch.unique(signature, return_inverse=True)
    result: Tensor = family[which][inverse]
    return result


def _width(
    model: nn.Module,
    entries: tuple[Tensor, Tensor, Tensor],
    keys: list[Axis],
    why: Mapping[int, str],
) -> Width:
    where, place, own = entries
    kinds = where.unique().tolist()
    first = _producer(model, [keys[k] for k in kinds])
    lead = keys.index(first)
    mine = where == lead
    # Groups are listed in the order in which they lie in the parameter that produces them.
    units, position = torch.unique(own[mine], return_inverse=True)
    starts = torch.full((len(units),), 2**62).scatter_reduce(0, position, place[mine], "amin")
    units = units[torch.argsort(starts)]
    rank = torch.empty(int(own.max()) + 1, dtype=torch.long)
    rank[units] = torch.arange(len(units))
    slices = []
    for kind in [lead, *[k for k in kinds if k != lead]]:
        chosen = where == kind
        order = torch.argsort(rank[own[chosen]] * 2**40 + place[chosen])
        name, axis = keys[kind]
        slices.append(Slices(name, axis, place[chosen][order].reshape(len(units), -1)))
    told = next((why[u] for u in units.tolist() if u in why), "")
    return Width(first[0].rpartition(".")[0] or first[0], tuple(slices), units, told)


def _producer(model: nn.Module, keys: list[Axis]) -> Axis:
    """The first weight whose outputs these are; else the first parameter at all."""
    for name, axis in keys:
        path, _, _ = name.rpartition(".")
        module = model.get_submodule(path)
        weight = (
            module.get_parameter(name.rpartition(".")[2]) if _is_parameter(module, name) else None
        )
        if weight is not None and weight.ndim > 1 and axis == _out_axis(module):
            return name, axis
    return keys[0]


def _is_parameter(module: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in module._parameters


def _out_axis(module: nn.Module) -> int:
    swapped = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return (
        1
        if swapped or isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or hasattr(module, "nf")
        else 0
    )


def _unique_names(widths: list[Width]) -> list[Width]:
    seen: dict[str, int] = {}
    found = []
    for width in widths:
        count = seen[width.name] = seen.get(width.name, 0) + 1
        name = width.name if count == 1 else f"{width.name}#{count}"
        found.append(Width(name, width.slices, width.units, width.why))
    return found
