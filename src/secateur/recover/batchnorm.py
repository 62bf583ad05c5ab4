"""BatchNorm re-estimation: measure the statistics of the pruned network anew."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, evaluating, forward, size_of, to_device
from secateur.core.slots import device_of


@dataclass(frozen=True)
class BatchNorm:
    """Replace every BatchNorm's running mean and variance by those of the calibration data.

    All layers are measured in one pass of training-mode normalisation; each running statistic is
    the plain average over batches.

    The data must look as in training, augmentation included: the statistics of plain images can cost
    a network that was trained on cropped ones several points.

    **formula** mean over batches of the batch mean and unbiased batch variance
    **Shapes** one number per channel
    **Units** those of the activations
    **Needs** a forward pass; several values a channel in each batch
    **Source** e.g. CrAM (arXiv 2207.14200), "BNT" in AdaPrune (arXiv 2006.10518)

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> drift = BatchNorm().reestimate_(net, [torch.tensor([[1.0], [3.0]])])
        >>> net[0].running_mean, round(drift["0"], 2)
        (tensor([2.]), 2.0)
    """

    def reestimate_(
        self, model: nn.Module, batches: Sequence[Batch], *, skip: Container[str] = ()
    ) -> dict[str, float]:
        """Update ``model`` in place.

        Args:
            model: In evaluation mode, or not: it is measured in evaluation mode.
            batches: Calibration data.
            skip: Paths of layers that keep their statistics.

        Returns:
            For each layer that the data reached the largest move of a mean, in old standard
            deviations. A batch of one sample counts if each layer has several positions of it.
        """
        layers = {n: m for n, m in model.named_modules() if _tracks(m) and n not in skip}
        if not layers or not batches:
            return {}
        old = {n: _statistics(m) for n, m in layers.items()}
        momenta = {n: m.momentum for n, m in layers.items()}
        with evaluating(model), torch.no_grad():
            try:
                for module in layers.values():
                    module.momentum = 0.0
                    module.train()
                usable = [b for b in batches if size_of(b) > 1 or _survives(model, b)]
                for module in layers.values():
                    module.reset_running_stats()
                    module.momentum = None  # torch's word for a cumulative average
                for batch in usable:
                    forward(model, to_device(batch, device_of(model)))
            except BaseException:
                for name, module in layers.items():
                    _restore_(module, old[name])
                raise
            finally:
                for name, module in layers.items():
                    module.momentum = momenta[name]
            reached = {n: m for n, m in layers.items() if int(m.num_batches_tracked)}
            for name in layers.keys() - reached.keys():
                _restore_(layers[name], old[name])
        return {
            n: float(((m.running_mean - old[n][0]).abs() / (old[n][1] + m.eps).sqrt()).max())
            for n, m in reached.items()
        }

    def drift(self, model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
        """What :meth:`reestimate_` would return; the model keeps its statistics.

        Example:
            >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
            >>> drift = BatchNorm().drift(net, [torch.tensor([[1.0], [3.0]])])
            >>> round(drift["0"], 2), net[0].running_mean
            (2.0, tensor([0.]))
        """
        old = {module: _statistics(module) for module in model.modules() if _tracks(module)}
        try:
            return self.reestimate_(model, batches)
        finally:
            for module, statistics in old.items():
                _restore_(module, statistics)


def _survives(model: nn.Module, batch: Batch) -> bool:
    """Whether every channel has more than one value: PyTorch refuses others in training mode."""
    try:
        forward(model, to_device(batch, device_of(model)))
    except ValueError:
        return False
    return True


def _statistics(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        module.running_mean.clone(),
        module.running_var.clone(),
        module.num_batches_tracked.clone(),
    )


def _restore_(module: Any, old: tuple[Tensor, Tensor, Tensor]) -> None:
    module.running_mean.copy_(old[0])
    module.running_var.copy_(old[1])
    module.num_batches_tracked.copy_(old[2])


def _tracks(module: Any) -> bool:
    batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batchnorm and module.running_mean is not None
