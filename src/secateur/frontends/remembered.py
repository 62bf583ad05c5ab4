"""What was cut so far, and what a model was built from, stay on it for the bundles made of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from secateur.formats import Surgery

_SURGERY, _SOURCE = "secateur_surgery", "secateur_source"


def remember_(model: nn.Module, surgery: Surgery) -> Surgery:
    """Join a surgery with what was done to the model before, and keep it on the model.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> remember_(net, Surgery("Net")) is net.secateur_surgery
        True
    """
    earlier = getattr(model, _SURGERY, None)
    whole = earlier.then(surgery) if isinstance(earlier, Surgery) else surgery
    setattr(model, _SURGERY, whole)
    return whole


def surgery_of(model: nn.Module) -> Surgery | None:
    """What was cut from a model so far; ``None`` if nothing was.

    Example:
        >>> surgery_of(nn.Linear(1, 1)) is None
        True
    """
    found = getattr(model, _SURGERY, None)
    return found if isinstance(found, Surgery) else None


def remember_source_(model: nn.Module, source: Mapping[str, str]) -> None:
    """Keep on a model how its architecture is built.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> remember_source_(net, {"factory": "net.py:build"})
        >>> source_of(net)
        {'factory': 'net.py:build'}
    """
    setattr(model, _SOURCE, dict(source))


def source_of(model: nn.Module) -> dict[str, str]:
    """How the architecture of a model is built; empty if nobody said.

    Example:
        >>> source_of(nn.Linear(1, 1))
        {}
    """
    found = getattr(model, _SOURCE, None)
    return dict(found) if isinstance(found, dict) else {}
