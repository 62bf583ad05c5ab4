"""Forward passes of a network in which the calls of some of its modules are watched."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from secateur.core.batches import Batch, forward, to_device
from secateur.core.failing import looking_inside
from secateur.core.slots import device_of
from secateur.stats.replay import Replay


class _Enough(Exception):
    """All watched modules were reached; the rest of the forward pass is of no use."""


class Passes:
    """Runs batches through a network, and is told of every call of some modules.

    Args:
        model: In the mode in which it is to be run.
        paths: Of the modules.

    Example:
        >>> class Told(Passes):
        ...     def called(self, path, module, inputs, output):
        ...         print(path, tuple(inputs[0].shape), tuple(output.shape))
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> Told(net, ["0"]).run([torch.zeros(2, 4)], None)
        0 (2, 4) (2, 3)
    """

    def __init__(self, model: nn.Module, paths: Collection[str]) -> None:
        self.model, self.paths = model, paths
        self._ended: Counter[str] = Counter()

    def begin(self, batch: Batch) -> None:
        """A batch is about to be run."""

    def called(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A module was called; its inputs are those of its ``forward``, by position."""

    def run(self, batches: Sequence[Batch], replay: Replay | None) -> None:
        """Run batches, and end each pass where ``replay`` knows that nothing more will be called."""
        device = device_of(self.model)
        handles = [self._hook(path) for path in self.paths]
        ends = replay.ends(self.paths) if replay is not None else None
        handles += [self._end(path, ends) for path in ends or ()]
        try:
            with torch.no_grad():
                for batch in batches:
                    self._ended.clear()
                    self.begin(batch)
                    known = replay.serving(batch) if replay is not None else nullcontext()
                    with suppress(_Enough), looking_inside(self.model), known:
                        forward(self.model, to_device(batch, device))
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            inputs = args
            if kwargs:  # Transformers and others pass inputs by name
                inputs = tuple(inspect.signature(module.forward).bind(*args, **kwargs).args)
            self.called(path, module, inputs, output)

        module = self.model.get_submodule(path)
        return module.register_forward_hook(hook, with_kwargs=True)

    def _end(self, path: str, ends: Counter[str] | None) -> RemovableHandle:
        def hook(*_: Any) -> None:
            self._ended[path] += 1
            if self._ended == ends:
                raise _Enough

        return self.model.get_submodule(path).register_forward_hook(hook)
