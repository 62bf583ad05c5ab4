"""After a cut: every layer is fitted once more to what it gave in the uncut network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch
from secateur.core.facts import Facts
from secateur.core.slots import Slot
from secateur.drive.structural.compensate import Told, bias_of, note_damping
from secateur.drive.structural.layer_inputs import Both
from secateur.formats import Surgery
from secateur.frontends import discover
from secateur.frontends.surgery import cuts_of
from secateur.recover import Compensation, Moments
from secateur.stats import calls_in_order, following_norms
from secateur.structure import apply_

# Zeros that are lost are told from this share of all weights: below it no one pruned to have them.
_MANY = 0.01


@torch.no_grad()
def refit_(
    model: nn.Module,
    dense: nn.Module,
    surgery: Surgery | None,
    batches: Sequence[Batch],
    *,
    how: Compensation,
    told: Told,
) -> None:
    """Fit the layers of a cut network, in execution order, to the outputs of the uncut one.

    Compensation sees the layers that read what was cut, and in later rounds a network that has
    drifted already. Here all layers are fitted, and always to the uncut network. BatchNorms take its
    statistics: what they read is to be what they read there. Layers whose inputs cannot be seen,
    that run more than once, share their weight or have groups of channels stay as they are.

    Args:
        model: Cut; its weights are changed in place.
        dense: Before the first cut.
        surgery: What was cut from ``dense`` since; ``None`` for nothing.
        batches: Calibration data.
        how: Settings.
        told: Where notes and progress go.

    Example:
        >>> import copy
        >>> from secateur.core.facts import Facts
        >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()
        >>> spoilt, x = copy.deepcopy(net), torch.randn(50, 3)
        >>> _ = nn.init.eye_(spoilt[0].weight), nn.init.ones_(spoilt[1].weight)
        >>> refit_(spoilt, net, None, [x], how=Compensation(1e-9), told=Told(Facts()))
        >>> torch.allclose(spoilt(x), net(x), atol=1e-4)
        True
    """
    calls = calls_in_order(model, batches[0])
    norms = following_norms(dense, batches[0], has="running_mean")
    _take_statistics_(model, dense, surgery)
    uncut = {slot.name: slot for slot in discover(dense)}
    rank = {path: place for place, path in enumerate(calls)}
    seen = [s for s in discover(model) if s.name in uncut and s.module in rank and s.rows]
    chosen = sorted((s for s in seen if _fits(s, calls)), key=lambda slot: rank[slot.module])
    fitted, both = set(), Both(dense, model, chosen, batches)
    for done, slot in enumerate(chosen):
        told.progress(done, len(chosen))
        wide = uncut[slot.name].weight(dense).matrix().shape[1]
        every = torch.arange(slot.weight(model).matrix().shape[1])
        moments = both.moments(slot, (wide, every), how.rows)
        if moments.count:
            used = _fit_(model, dense, slot, (surgery, moments), (how, norms.get(slot.module)))
            note_damping(told.facts, slot, how, used)
            fitted.add(slot.name)
        both.finish(slot)
    told.facts.measures["refitted_layers"] = len(fitted)
    left = [slot.name for slot in seen if slot.name not in fitted]
    if left:
        text = (
            f"{len(left)} layers were not fitted to the uncut network, since they have groups of "
            f"channels, share their weight, run more than once or read other rows: {', '.join(left)}"
        )
        told.facts.note("uncompensated", "", text)


def note_filled(model: nn.Module, dense: nn.Module, surgery: Surgery | None, facts: Facts) -> None:
    """Tell if weights that were zero have values now: zeros of an earlier pruning are lost then.

    Args:
        model: Cut, repaired and trained.
        dense: Before the first cut; it is cut here.
        surgery: What was cut from ``dense``.
        facts: Where the note goes.

    Example:
        >>> from secateur.core.facts import Facts
        >>> sparse, filled, facts = nn.Linear(2, 2), nn.Linear(2, 2), Facts()
        >>> _ = nn.init.eye_(sparse.weight), nn.init.ones_(filled.weight)
        >>> note_filled(filled, sparse, None, facts)
        >>> print(facts.notes[0].text[:49])
        2 of the 2 weights that were zero have values now
    """
    if surgery is not None:
        apply_(dense, cuts_of(surgery))
    pairs = zip(model.parameters(), dense.parameters(), strict=True)
    weights = [(new, old) for new, old in pairs if old.ndim > 1]
    zeros = sum(int((old == 0).sum()) for _, old in weights)
    filled = sum(int(((old == 0) & (new != 0)).sum()) for new, old in weights)
    if filled > _MANY * sum(old.numel() for _, old in weights):
        text = (
            f"{filled:,} of the {zeros:,} weights that were zero have values now: repair and training "
            "give every weight one. Shrink first and prune what is left, or leave recovery out"
        )
        facts.note("filled", "", text)


def _left(surgery: Surgery | None, name: str, axis: int, size: int) -> Sequence[int]:
    """Positions of an axis of the uncut network that are left."""
    selection = surgery.cuts.get(name, {}).get(axis) if surgery else None
    return range(size) if selection is None else selection.positions()


def _take_statistics_(model: nn.Module, dense: nn.Module, surgery: Surgery | None) -> None:
    for path, norm in model.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            for name in ("running_mean", "running_var"):
                old: Tensor = getattr(dense.get_submodule(path), name)
                left = _left(surgery, f"{path}.{name}".lstrip("."), 0, len(old))
                getattr(norm, name).copy_(old[torch.tensor(left, device=old.device)])


def _fits(slot: Slot, calls: Counter[str]) -> bool:
    if slot.axes is None or slot.rows is None or slot.transposed or slot.aliases:
        return False
    return slot.axes.groups == 1 and calls[slot.module] == 1


def _fit_(
    model: nn.Module,
    dense: nn.Module,
    slot: Slot,
    data: tuple[Surgery | None, Moments],
    context: tuple[Compensation, str | None],
) -> float:
    """Fit one layer; the damping that was used."""
    (surgery, moments), (how, norm) = data, context
    assert slot.axes is not None
    bias, before = bias_of(model, slot), bias_of(dense, slot)
    target, matrix = slot.tensor(model), slot.weight(dense).matrix()
    left = _left(surgery, slot.name, slot.axes.names.index("out"), len(matrix))
    rows = torch.tensor(left, device=target.device)
    if moments.alike:  # nothing before this layer has changed
        new, moved, damping = matrix[rows], torch.zeros(len(rows), device=target.device), 0.0
    else:
        found, shift, damping = how.solve(
            matrix[rows][None], moments, centred=bias is not None or norm is not None
        )
        new, moved = found[0], shift[0]
    target.copy_(slot.weight(model).like(new.to(target.dtype)))
    if bias is not None and before is not None:
        bias.copy_((before[rows] + moved).to(bias.dtype))
    elif norm is not None:  # the mean of what the norm reads moves the other way
        running: Any = model.get_submodule(norm)
        running.running_mean.sub_(moved.to(running.running_mean.dtype))
    return damping
