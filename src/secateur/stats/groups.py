"""Statistics of groups: what their parts need, gathered for all widths at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.batches import Batch, Loss, evaluating, micro_batches, size_of, to_device
from secateur.core.groups import Groups, Part
from secateur.core.losses import default_loss, differentiable
from secateur.core.slots import device_of
from secateur.stats.engine import Stats, collect, finite, requiring_grad
from secateur.stats.stat import Probe, Stat


class GroupProbe(Protocol):
    """A measurement that needs to know which slices make a group.

    It leaves the model exactly as it found it. Implementations are frozen dataclasses.
    """

    def measure_groups(
        self, model: nn.Module, groups: Sequence[Groups], batches: Sequence[Batch], loss: Loss
    ) -> dict[str, Tensor]:
        """Name of a width or of a parameter -> what was measured."""
        ...


def wants_data(needs: Iterable[Stat | Probe | GroupProbe]) -> bool:
    """Whether any of these runs batches; what reads weights alone says ``data = False``.

    Example:
        >>> from secateur.stats import InputNorm
        >>> from secateur.stats.neighbours import Neighbours
        >>> wants_data([Neighbours()]), wants_data([Neighbours(), InputNorm()])
        (False, True)
    """
    return any(getattr(need, "data", True) for need in needs)


def collect_groups(
    model: nn.Module,
    groups: Sequence[Groups],
    needs: Iterable[Stat | Probe | GroupProbe],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> Stats:
    """Gather what group criteria need, for every part of every width.

    The model is run in evaluation mode and left as it was. Gradients are taken for all parameters
    of the groups, also for biases, scales, embeddings and stacked experts; statistics of inputs for
    those whose inputs can be seen.

    Args:
        model: Run on its own device.
        groups: The widths, as :func:`~secateur.core.groups.groups_of` shows them.
        needs: The ``needs`` of the criterion; empty needs run nothing.
        batches: Calibration batches.
        loss: For gradients; by default :func:`~secateur.core.batches.default_loss`.
        seed: The run's, for random criteria.

    Raises:
        NonFinite: An activation or gradient is NaN or infinite; the weight is named.
    """
    parts = {part.parameter: part for g in groups for part in g.trained}
    slots = [part.slot for part in parts.values() if part.known and part.slot is not None]
    wanted: list[Any] = list(needs)
    grouped = [n for n in wanted if hasattr(n, "measure_groups")]
    gradients = [n for n in wanted if getattr(n, "source", "") == "gradients"]
    rest = [n for n in wanted if n not in grouped and n not in gradients]
    stats = collect(model, slots, rest, batches, loss=loss)
    stats.seed = seed
    loss = loss or default_loss
    for samples in {n.samples for n in gradients}:
        same = [n for n in gradients if n.samples == samples]
        for found, size in gradients_of(model, list(parts.values()), batches, loss, samples):
            for part in parts.values():
                seen = found[part.parameter].reshape(part.weight.value.shape)
                for need in same:
                    stats.update(need, part.weight, seen, size)
    with evaluating(model):
        for probe in grouped:
            moved = [to_device(b, device_of(model)) for b in batches]
            for name, value in probe.measure_groups(model, groups, moved, loss).items():
                stats.put(probe, name, finite(value, name, "a probe"))
    return stats


def gradients_of(
    model: nn.Module,
    parts: Sequence[Part],
    batches: Sequence[Batch],
    loss: Loss,
    samples: int | None = None,
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Gradients of the parameters behind ``parts``, and the samples they are over, batch by batch.

    Args:
        model: In evaluation mode meanwhile.
        parts: Whose parameters; what the loss does not reach has a gradient of zero.
        batches: Moved to the model's device.
        loss: What is differentiated.
        samples: At most so many samples a gradient.
    """
    names = list(dict.fromkeys(part.parameter for part in parts))
    parameters = [model.get_parameter(name) for name in names]
    device = device_of(model)
    for batch in micro_batches(batches, samples):
        with evaluating(model), requiring_grad(parameters), torch.enable_grad():
            value = differentiable(loss(model, to_device(batch, device)))
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(names, parameters, found, strict=True)
        yield (
            {
                n: torch.zeros_like(p) if g is None else finite(g, n, "a gradient")
                for n, p, g in pairs
            },
            size_of(batch),
        )
