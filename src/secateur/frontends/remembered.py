"""What was cut so far stays on the model, so that cutting further can still be replayed."""

from __future__ import annotations

from torch import nn

from secateur.formats import Surgery

_SURGERY = "secateur_surgery"


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
