"""What a network costs: parameters, non-zeros, multiply-adds, and bytes of the file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from secateur.core.batches import Batch
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.core.plain import numbers_of
from secateur.core.slots import Slot, bare
from secateur.drive.money import uses
from secateur.drive.training.held import SUFFIX, masks_of
from secateur.formats import write_bundle
from secateur.frontends import discover
from secateur.runtime.torch_layers import dense_copy


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Args:
        parameters: Numbers in all parameters; tied ones count once.
        nonzeros: How many of them are not zero.
        pruned_sparsity: Share that the masks prune of the weights that have one; ``None`` without masks.
        macs_dense: Multiply-adds of one sample, zeros included; ``None`` without an example.
        macs: Multiply-adds of one sample with a kept weight.
        bytes: Size of the bundle's ``model.safetensors``, from a file that was really written.
        uncounted: Weights that no product was seen to use, so none is in the two counts: they are
            added, as positions are, or multiplied in another way.
    """

    parameters: int
    nonzeros: int
    pruned_sparsity: float | None
    macs_dense: float | None
    macs: float | None
    bytes: int
    uncounted: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros among all parameters."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0


def cost_of(model: nn.Module, masks: Masks | None = None, example: Batch | None = None) -> Cost:
    """Count, and write the file to see how large it is.

    Multiply-adds are those of linear, convolutional and recurrent layers and of the projections of
    attention; products of two activations (inside attention) are not among them.

    Args:
        model: Left as it is. Of an accelerated one, the weights that it has packed are counted.
        masks: The weights that were pruned; they are what a file stores sparse.
        example: A batch to see how often each weight is used.

    Example:
        >>> import torch
        >>> cost = cost_of(nn.Linear(4, 2), example=torch.zeros(1, 4))
        >>> cost.parameters, cost.macs_dense
        (10, 8.0)
    """
    model = dense_copy(bare(model))
    parameters = [p.detach() for p in model.parameters()]
    dense: float | None = None
    kept: float | None = None
    uncounted: tuple[str, ...] = ()
    if example is not None:
        dense, kept, uncounted = _macs(model, example)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzeros=sum(int(numbers_of(p).count_nonzero()) for p in parameters),
        pruned_sparsity=masks.sparsity if masks else None,
        macs_dense=dense,
        macs=kept,
        bytes=file_bytes(model, masks),
        uncounted=uncounted,
    )


def file_bytes(model: nn.Module, masks: Masks | None = None) -> int:
    """Bytes of ``model.safetensors`` as a bundle has it; written to a folder that is then removed.

    Example:
        >>> import torch
        >>> net = nn.Linear(512, 512)
        >>> mask = torch.zeros(512, 512, dtype=torch.bool)
        >>> mask[0] = True
        >>> file_bytes(net) > 5 * file_bytes(net, Masks({"weight": mask}))
        True
    """
    masks = masks or Masks({})
    carried = {name + SUFFIX for name in masks_of(model)}  # a mask of the network's own is stored
    state = {n: t for n, t in model.state_dict().items() if n not in carried}
    with tempfile.TemporaryDirectory(prefix="secateur-") as place:
        folder = Path(place) / "bundle"
        write_bundle(folder, state, masks, recipe={}, facts=Facts())
        return (folder / "model.safetensors").stat().st_size


def _macs(model: nn.Module, example: Batch) -> tuple[float, float, tuple[str, ...]]:
    slots = discover(model)
    used = uses(model, slots, example)
    dense = kept = 0.0
    for slot in slots:
        if slot.name in used:
            value = slot.tensor(model)
            dense += used[slot.name] * value.numel()
            kept += used[slot.name] * int(numbers_of(value).count_nonzero())
    hidden = (slot.name for slot in slots if slot.name not in used and _multiplies(slot))
    return dense, kept, tuple(hidden)


def _multiplies(slot: Slot) -> bool:
    """Whether it may be a weight that multiplies something, out of sight."""
    looked_up = slot.kind == "Embedding" and not slot.aliases
    matrix = sum(size > 1 for size in slot.shape) > 1 and 0 not in slot.shape
    return slot.rows is None and matrix and not looked_up
