"""Random values where a fresh network has ones and zeros: those hide errors."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def refresh_(model: nn.Module) -> None:
    """Random statistics, scales and shifts: fresh ones (0 and 1) hide errors."""
    for name, x in [*model.named_buffers(), *model.named_parameters()]:
        if not x.is_floating_point():
            continue
        if "running_var" in name:
            x.copy_(torch.rand_like(x) + 0.5)
        elif "running_mean" in name:
            x.copy_(0.3 * torch.randn_like(x))
        elif isinstance(x, nn.Parameter) and (x.ndim == 1 or bool((x == x.reshape(-1)[0]).all())):
            scale = x.ndim == 1 and name.endswith("weight")
            x.copy_(0.3 * torch.randn_like(x) + float(scale))
