"""What a run is measured on."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from secateur.core.batches import Batch, Data

_FEW = 128


class Calibration:
    """The calibration batches, read once, and the dense network beside the one that is pruned.

    Args:
        data: What the run was given, if anything.
        dense: The network as it was, for what is fitted to its outputs.

    Example:
        >>> import torch
        >>> sample = Calibration(Data(train=[torch.zeros(200, 3)]))
        >>> sample.given, len(sample.batches[0]), len(sample.few[0])
        (True, 200, 128)
        >>> Calibration(None).given
        False
    """

    def __init__(self, data: Data | None, dense: nn.Module | None = None) -> None:
        self.data, self.dense = data, dense

    @property
    def given(self) -> bool:
        """Whether there are training batches."""
        return self.data is not None and self.data.train is not None

    @cached_property
    def batches(self) -> list[Batch]:
        """The first samples, as many as the data say."""
        assert self.data is not None
        return self.data.sample()

    @cached_property
    def few(self) -> list[Batch]:
        """At most 128 samples, enough to say where the damage is."""
        return Data(train=self.batches, calibration=_FEW).sample()
