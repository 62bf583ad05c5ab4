"""Putting the tensors of a bundle into a model: everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.errors import UsageError, kind_of
from secateur.formats.bundle import Bundle
from secateur.formats.layouts import same_bits

_SHOWN = 3


def load_into_(model: nn.Module, bundle: Bundle) -> None:
    """Copy the tensors of a bundle into a model, in place. Tied weights stay tied.

    Args:
        model: A model of the same architecture; it keeps its device.
        bundle: What to copy. Masks are not attached: zeros stay zero until training moves them.

    Raises:
        UsageError: Names, shapes or types differ, or a tensor of the model cannot be written.
            The model is unchanged then.

    Example:
        >>> from secateur.core.facts import Facts
        >>> from secateur.core.masks import Masks
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> load_into_(layer, Bundle({"weight": torch.ones(1, 1)}, Masks({}), {}, Facts()))
        >>> layer.weight.item()
        1.0
        >>> load_into_(layer, Bundle({"w": torch.ones(1, 1)}, Masks({}), {}, Facts()))
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: loading 1 tensors into a Linear with 1: 1 missing \
('weight'); 1 unexpected ('w'). Names, shapes and types must be the same. Build the model that \
the bundle was made from.
    """
    state = model.state_dict()
    asked = f"loading {len(bundle.tensors)} tensors into {kind_of(model)} with {len(state)}"
    found = "; ".join(_differences(state, bundle.tensors))
    if found:
        why = "names, shapes and types must be the same"
        raise UsageError(asked, found, why, "build the model that the bundle was made from")
    with torch.no_grad():
        for names in _sharing(state):
            _rehearse(asked, {name: state[name] for name in names}, bundle.tensors)
        model.load_state_dict(dict(bundle.tensors), strict=True)


def _differences(state: Mapping[str, object], tensors: Mapping[str, Tensor]) -> list[str]:
    missing = [repr(name) for name in state if name not in tensors]
    unexpected = [repr(name) for name in tensors if name not in state]
    wrong, unready = [], []
    for name, own in state.items():
        if name not in tensors or not isinstance(own, Tensor):
            continue
        new = tensors[name]
        if is_lazy(own) or own.is_meta:
            unready.append(repr(name))
        elif own.shape != new.shape:
            wrong.append(f"{name!r}: model {tuple(own.shape)}, bundle {tuple(new.shape)}")
        elif own.dtype != new.dtype:
            wrong.append(f"{name!r}: model {own.dtype}, bundle {new.dtype}")
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape or type": wrong,
        "without memory in the model": unready,
    }
    return [f"{len(some)} {kind} ({_few(some)})" for kind, some in kinds.items() if some]


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _sharing(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names whose tensors share memory with another one or with themselves (expanded)."""
    groups: dict[tuple[torch.device, int], list[str]] = {}
    for name, own in state.items():
        if isinstance(own, Tensor) and own.numel():
            place = (own.device, own.untyped_storage().data_ptr())
            groups.setdefault(place, []).append(name)
    return [names for names in groups.values() if len(names) > 1 or _expanded(state[names[0]])]


def _expanded(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))


def _rehearse(asked: str, own: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Copy into a scratch copy of the shared memory first: every name must then read back right."""
    first = next(iter(own.values()))
    scratch = first.untyped_storage().clone()
    views = {
        name: torch.empty(0, dtype=x.dtype, device=x.device).set_(
            scratch, x.storage_offset(), x.shape, x.stride()
        )
        for name, x in own.items()
    }
    views = {name: x.conj() if own[name].is_conj() else x for name, x in views.items()}
    try:
        for name, view in views.items():
            view.copy_(new[name])
        bad = [
            repr(name)
            for name, view in views.items()
            if not same_bits(view.resolve_conj(), new[name])
        ]
    except RuntimeError:
        bad = [repr(name) for name in own]
    if bad:
        raise UsageError(
            asked,
            f"{_few(bad)} share memory in the model and differ in the bundle, or are expanded",
            "one piece of memory cannot hold different values",
            "untie them in the model, or load a bundle that was made with them tied",
        )
