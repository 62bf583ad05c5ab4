"""Compensation of a cut, layer after layer, before anything is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.facts import Facts
from secateur.core.slots import Slot, device_of
from secateur.frontends import discover
from secateur.recover import Compensation, Moments
from secateur.structure import Structure, mask_

_A_SAMPLE = 128


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Told:
    """Where notes and progress (layers done, and all) go."""

    facts: Facts
    progress: Callable[[int, int], None] = _silent


@torch.no_grad()
def compensate_(
    model: nn.Module,
    structure: Structure,
    keep: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    how: Compensation,
    told: Told,
) -> None:
    """Zero the groups that go, and refit every layer that read them, in execution order.

    Args:
        model: Changed in place: masked and repaired, still of its full size.
        structure: Its structure.
        keep: The choice of groups.
        batches: Calibration data.
        how: Settings.
        told: Where notes and progress go.

    Example:
        >>> import copy
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).eval()
        >>> _ = net[0].weight.data[2].copy_(net[0].weight[1])  # the last unit is a copy
        >>> x = torch.randn(50, 4)
        >>> small, keep = copy.deepcopy(net), {"0": torch.tensor([True, True, False])}
        >>> compensate_(small, couple(net, x), keep, [x], how=Compensation(1e-9), told=Told(Facts()))
        >>> torch.allclose(small(x), net(x), atol=1e-4)
        True
    """
    dense, facts = copy.deepcopy(model), told.facts
    alive = structure.alive(keep)
    norms = following_norms(dense, batches[0])
    consumers = _consumers(dense, structure, alive, facts)
    mask_(model, structure, keep)
    order = _order(dense, consumers, batches[0])
    for done, slot in enumerate(order):
        told.progress(done, len(order))
        columns = _columns(slot, structure, alive)
        moments = _moments((dense, model), slot, columns, batches, how.rows)
        if moments.count:
            _refit_(model, dense, slot, columns, moments, (how, norms, facts))
    mask_(model, structure, keep)  # rows of a consumer that go themselves


def _consumers(model: nn.Module, structure: Structure, alive: Tensor, facts: Facts) -> list[Slot]:
    """The weights that lose inputs and whose inputs can be seen."""
    found = []
    for slot in discover(model):
        if slot.axes is None:
            continue
        ids = structure.trace.axes.get((slot.name, slot.axes.names.index("in")))
        if ids is None or bool(alive[ids].all()):
            continue
        if slot.rows is None or slot.transposed:
            facts.note("uncompensated", slot.name, "its inputs cannot be seen, so it was only cut")
        else:
            found.append(slot)
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


class _Seen(Exception):
    """The layer was reached; the rest of the forward pass is of no use."""


def _rows(model: nn.Module, slot: Slot, batch: Batch) -> list[Tensor]:
    """The rows that multiply a weight, ``(groups, rows, columns)`` for every call of its module."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        assert slot.rows is not None
        inputs = args or tuple(kwargs.values())
        found.append(slot.rows(module, inputs, out))
        raise _Seen

    module = model.get_submodule(slot.module)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        with evaluating(model):
            forward(model, to_device(batch, device_of(model)))
    except _Seen:
        pass
    finally:
        handle.remove()
    return found


def _moments(
    models: tuple[nn.Module, nn.Module],
    slot: Slot,
    columns: Tensor,
    batches: Sequence[Batch],
    most: int,
) -> Moments:
    """Sums over the inputs of one layer in the dense network and in the one as repaired so far."""
    assert slot.axes is not None
    dense, model = models
    device = device_of(model)
    moments = Moments(slot.axes.groups, len(columns), int(columns.sum()), device)
    kept = columns.nonzero()[:, 0].to(device)
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        pairs = zip(_rows(dense, slot, batch), _rows(model, slot, batch), strict=True)
        for x, z in pairs:
            wanted = min(x.shape[1], _A_SAMPLE * size_of(batch), most)
            drawn = torch.randperm(x.shape[1], generator=generator)[:wanted].to(device)
            moments.add(x.index_select(1, drawn), z.index_select(1, drawn).index_select(2, kept))
        if moments.count >= most:
            break
    return moments


def _refit_(
    model: nn.Module,
    dense: nn.Module,
    slot: Slot,
    columns: Tensor,
    moments: Moments,
    context: tuple[Compensation, Mapping[str, str], Facts],
) -> None:
    how, norms, facts = context
    module: Any = model.get_submodule(slot.module)
    norm = norms.get(slot.module)
    biased = getattr(module, "bias", None) is not None
    weight = slot.weight(dense)
    assert slot.axes is not None
    matrix = weight.matrix()
    grouped = matrix.reshape(slot.axes.groups, -1, matrix.shape[1])
    new, shift, damping = how.solve(grouped, moments, centred=biased or norm is not None)
    if damping > how.damping:
        text = f"its covariance is singular; damped by {damping:.0e} instead of {how.damping:.0e}"
        facts.note("damped", slot.name, text)
    full = torch.zeros_like(matrix, dtype=torch.float64)
    full[:, columns.to(matrix.device)] = new.flatten(0, 1)
    target = slot.tensor(model)
    target.copy_(weight.like(full.to(target.dtype)))
    moved = shift.flatten()
    if biased:
        module.bias.add_(moved.to(module.bias.dtype))
    elif norm is not None:  # the mean of what the norm reads moves the other way
        running: Any = model.get_submodule(norm)
        running.running_mean.sub_(moved.to(running.running_mean.dtype))


def following_norms(model: nn.Module, batch: Batch) -> dict[str, str]:
    """Layers whose output goes straight into a BatchNorm: path of the layer -> path of the norm.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        >>> following_norms(net, torch.zeros(1, 1, 2, 2))
        {'0': '1'}
    """
    produced: dict[int, str] = {}
    alive: list[Tensor] = []
    found: dict[str, str] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:

            def reads(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                if args and id(args[0]) in produced:
                    found[produced[id(args[0])]] = path

            handles.append(module.register_forward_pre_hook(reads))
        elif hasattr(module, "weight") and not list(module.children()):

            def writes(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
                if isinstance(out, Tensor):
                    produced[id(out)] = path
                    alive.append(out)  # an address is not used again meanwhile

            handles.append(module.register_forward_hook(writes))
    try:
        with evaluating(model), torch.no_grad():
            forward(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _order(model: nn.Module, slots: Sequence[Slot], batch: Batch) -> list[Slot]:
    """Slots in the order in which data reaches them; the others are left out."""
    seen: list[str] = []
    handles = []
    for path in {slot.module for slot in slots}:

        def note(_: nn.Module, __: Any, path: str = path) -> None:
            seen.append(path)

        handles.append(model.get_submodule(path).register_forward_pre_hook(note))
    try:
        with evaluating(model):
            forward(model, to_device(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    rank = {path: index for index, path in reversed(list(enumerate(seen)))}
    return sorted((s for s in slots if s.module in rank), key=lambda s: rank[s.module])
