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

    All layers are measured in one pass of training-mode normalisation, each batch normalised by
    itself. What is stored is of all values together, so it does not depend on how large batches are
    or what is in which of them, but through the layers before.

    The data must look as in training, augmentation included: the statistics of plain images can cost
    a network that was trained on cropped ones several points.

    **formula** mean and unbiased variance of all values of a channel, summed in float64
    **Shapes** one number per channel
    **Units** those of the activations
    **Needs** a forward pass; several values a channel in each batch
    **Source** e.g. CrAM (arXiv 2207.14200), "BNT" in AdaPrune (arXiv 2006.10518)
    **Differs** these average the statistics of batches, which misses what differs between batches

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
                pools = {n: _Pool(m) for n, m in layers.items()}
                handles = [
                    m.register_forward_hook(pools[n].add, with_kwargs=True)
                    for n, m in layers.items()
                ]
                try:
                    for batch in usable:
                        forward(model, to_device(batch, device_of(model)))
                finally:
                    for handle in handles:
                        handle.remove()
                for pool in pools.values():
                    pool.store_()
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


class _Pool:
    """Mean and variance of everything that one layer was given."""

    def __init__(self, module: Any) -> None:
        self._module = module
        module.reset_running_stats()
        module.momentum = 1.0  # what it stores is then of the last batch alone
        self._count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, module: Any, args: tuple[Tensor, ...], kwargs: Any, _: Tensor) -> None:
        """Take up a batch: a forward hook."""
        x = args[0] if args else kwargs["input"]
        mean, variance = module.running_mean.double(), module.running_var.double()
        count = x.numel() // len(mean)
        total = self._count + count
        apart = mean - self._mean.to(mean.device)
        # Chan, Golub and LeVeque 1979: sums of squares about the means of two parts, joined.
        between = apart.square() * (self._count * count / total)
        self._squares = self._squares.to(mean.device) + variance * (count - 1) + between
        self._mean = mean - apart * (self._count / total)
        self._count = total

    def store_(self) -> None:
        if self._count:
            self._module.running_mean.copy_(self._mean)
            self._module.running_var.copy_(self._squares / (self._count - 1))


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
