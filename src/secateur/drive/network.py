"""The network that is given to a run: without wrappers, and copied where it must stay as it is."""

from __future__ import annotations

import copy

from torch import nn

from secateur.drive.training import ranks


def network_of(model: nn.Module) -> nn.Module:
    """The plain network to work on, from inside wrappers of ``torch.compile`` or data parallelism.

    Its weights have their plain names, so what is saved loads into the plain network; and its
    modules can be watched, which compiled code does not allow.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> network_of(torch.compile(net, backend="eager")) is net
        True
    """
    return ranks.bare(model)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of :func:`network_of`, to be changed.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> copy_of(net) is net
        False
    """
    return copy.deepcopy(network_of(model))
