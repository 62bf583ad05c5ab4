"""Compensation of a cut, layer after layer, before anything is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch
from secateur.core.facts import Facts
from secateur.core.slots import Slot
from secateur.drive.structural.layer_inputs import Both
from secateur.frontends import discover
from secateur.recover import Compensation, Moments
from secateur.stats import following_norms, in_order
from secateur.structure import Structure, mask_

_READERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Told:
    """Where notes and progress (layers done, and all) go."""

    facts: Facts
    progress: Callable[[int, int], None] = _silent


def note_damping(facts: Facts, slot: Slot, how: Compensation, used: float) -> None:
    """Tell if more damping was needed than was asked for."""
    if used > how.damping:
        text = f"its covariance is singular; damped by {used:.0e} instead of {how.damping:.0e}"
        facts.note("damped", slot.name, text)


def bias_of(model: nn.Module, slot: Slot) -> Tensor | None:
    """What is added to the product with a weight; a recurrent layer has one for each of its weights.

    Example:
        >>> net = nn.LSTM(2, 1)
        >>> bias_of(net, discover(net)[0]) is net.bias_ih_l0
        True
    """
    bias = getattr(model.get_submodule(slot.module), slot.bias_name, None)
    return bias if isinstance(bias, Tensor) else None


@torch.no_grad()
def compensate_(
    model: nn.Module,
    structure: Structure,
    keep: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    how: Compensation,
    told: Told,
) -> frozenset[str]:
    """Zero the groups that go, and refit every layer that read them, in execution order.

    Args:
        model: Changed in place: masked and repaired, still of its full size.
        structure: Its structure.
        keep: The choice of groups.
        batches: Calibration data.
        how: Settings.
        told: Where notes and progress go.

    Returns:
        Paths of the BatchNorms right behind a refitted layer: their means were moved with it.

    Example:
        >>> import copy
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).eval()
        >>> _ = net[0].weight.data[2].copy_(net[0].weight[1])  # the last unit is a copy
        >>> x = torch.randn(50, 4)
        >>> small, keep = copy.deepcopy(net), {"0": torch.tensor([True, True, False])}
        >>> _ = compensate_(small, couple(net, x), keep, [x], how=Compensation(1e-9), told=Told(Facts()))
        >>> torch.allclose(small(x), net(x), atol=1e-4)
        True
    """
    dense, facts = copy.deepcopy(model), told.facts
    alive = structure.alive(keep)
    norms = following_norms(dense, batches[0], has="running_mean")
    consumers = _consumers(dense, structure, alive, facts)
    mask_(model, structure, keep)
    order = in_order(dense, consumers, batches)
    fitted, both = set(), Both(dense, model, order, batches)
    for done, slot in enumerate(order):
        told.progress(done, len(order))
        columns = _columns(slot, structure, alive)
        sizes = (len(columns), columns.nonzero()[:, 0])
        moments = both.moments(slot, sizes, how.rows)
        if moments.count:
            _refit_(model, dense, slot, columns, moments, (how, norms, facts))
            fitted.add(slot.module)
        else:
            facts.note("uncompensated", slot.name, "its inputs could not be seen in both networks")
        both.finish(slot)
    mask_(model, structure, keep)  # rows of a consumer that go themselves
    return frozenset(norm for layer, norm in norms.items() if layer in fitted)


def _consumers(model: nn.Module, structure: Structure, alive: Tensor, facts: Facts) -> list[Slot]:
    """The weights that lose inputs and whose inputs can be seen."""
    found = []
    for slot in discover(model):
        if slot.axes is None:
            continue
        ids = structure.trace.axes.get((slot.name, slot.axes.names.index("in")))
        if ids is None or bool(alive[ids].all()):
            continue
        if slot.axes.stacked:
            text = "experts get other tokens in a cut network, so it was only cut"
            facts.note("uncompensated", slot.name, text)
        elif len(slot.owners(model)) > 1:
            facts.note("uncompensated", slot.name, "several layers share it, so it was only cut")
        elif slot.rows is None or slot.transposed:
            facts.note("uncompensated", slot.name, "its inputs cannot be seen, so it was only cut")
        else:
            found.append(slot)
    for name, why in _unseen(model, structure, alive).items():
        facts.note("uncompensated", name, why)
    return found


def _unseen(model: nn.Module, structure: Structure, alive: Tensor) -> dict[str, str]:
    """Weights that lose inputs and that nothing is known of but how they are cut, and why."""
    known = {slot.name for slot in discover(model) if slot.axes is not None}
    found = {}
    for (name, axis), ids in structure.trace.axes.items():
        path = name.rpartition(".")[0]
        owner, inside, weight = path.partition("parametrizations.")
        module = model.get_submodule(owner.rstrip(".") if inside else path)
        reads = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        lost = axis == reads or (isinstance(module, nn.Bilinear) and axis == 2)
        if name in known or not isinstance(module, _READERS) or not lost or bool(alive[ids].all()):
            continue
        if getattr(module, weight or name.rpartition(".")[2]).ndim < 2:  # a bias reads nothing
            continue
        if inside:
            found[owner + weight] = "it is computed by a parametrization, so it was only cut"
        else:
            found[name] = "its inputs cannot be seen, so it was only cut"
    return found


def _columns(slot: Slot, structure: Structure, alive: Tensor) -> Tensor:
    """Which columns of the weight as a matrix stay, for one group."""
    assert slot.axes is not None
    axis = slot.axes.names.index("in")
    flags = alive[structure.trace.axes[slot.name, axis]]
    view = [1] * len(slot.shape)
    view[axis] = len(flags)
    spread = flags.reshape(view).expand(slot.shape)
    return slot.axes.cube(spread)[0].flatten()


def _refit_(
    model: nn.Module,
    dense: nn.Module,
    slot: Slot,
    columns: Tensor,
    moments: Moments,
    context: tuple[Compensation, Mapping[str, str], Facts],
) -> None:
    how, norms, facts = context
    norm, bias = norms.get(slot.module), bias_of(model, slot)
    weight = slot.weight(dense)
    assert slot.axes is not None
    matrix = weight.matrix()
    grouped = matrix.reshape(slot.axes.groups, -1, matrix.shape[1])
    new, shift, damping = how.solve(grouped, moments, centred=bias is not None or norm is not None)
    note_damping(facts, slot, how, damping)
    full = torch.zeros_like(matrix, dtype=torch.float64)
    full[:, columns.to(matrix.device)] = new.flatten(0, 1)
    target = slot.tensor(model)
    target.copy_(weight.like(full.to(target.dtype)))
    moved = shift.flatten()
    if bias is not None:
        bias.add_(moved.to(bias.dtype))
    elif norm is not None:  # the mean of what the norm reads moves the other way
        running: Any = model.get_submodule(norm)
        running.running_mean.sub_(moved.to(running.running_mean.dtype))
