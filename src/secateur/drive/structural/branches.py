"""Packing learned groups: convolutions become branches that gather their channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from secateur.core.batches import evaluating
from secateur.core.errors import DataError
from secateur.core.facts import Facts, environment
from secateur.core.masks import Masks
from secateur.drive.network import copy_of, network_of
from secateur.drive.pruned import Pruned
from secateur.formats import BlockEdit
from secateur.frontends.remembered import remember_
from secateur.frontends.surgery import surgery_for
from secateur.learn.energy import Branches
from secateur.structure import Cuts
from secateur.structure.branches import Grouping, kernels_of, mask_branches_, pack_branches_
from secateur.structure.masked import call, compare
from secateur.structure.outputs import predictions

# Sums over the same products in another order.
_NEAR = {torch.float64: 1e-10, torch.float32: 1e-5}


def pack_branches(
    model: nn.Module, branches: Mapping[str, Branches], example_inputs: Any
) -> Pruned:
    """Turn convolutions of a copy of ``model`` into branches, and prove it.

    **formula**: each group of filters becomes a convolution over the channels that it keeps; the
    result computes what the convolution computes with all other kernels set to zero.
    Shapes: those of the network stay.
    Units: kernels.
    Needs: groups and what each keeps, as learned by :class:`~secateur.learn.GroupLearning`.
    Source: Park et al., Dynamic Structure Pruning, arXiv 2303.09736.
    Differs: convolutions whose branches save less than one channel stay as they are, with a note.

    Args:
        model: Not changed. Fine-tune with masks before packing, or the packed network after.
        branches: Name of a weight -> its branches, as :func:`~secateur.learn.learned_branches` gives them.
        example_inputs: A tensor, a tuple, or a mapping of named inputs.

    Returns:
        The packed copy; ``facts.measures["proof"]`` is its largest relative difference to the
        masked network.

    Raises:
        UsageError: A name is not that of a plain convolution's weight.
        DataError: The packed network does not compute what the masked one does.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        >>> keep = torch.tensor([[True, True, False, False], [False, False, False, True]])
        >>> learned = Branches(torch.tensor([0, 1, 0, 1]), keep, torch.ones(4, dtype=torch.bool))
        >>> packed = pack_branches(net, {"0.weight": learned}, torch.rand(1, 4, 6, 6))
        >>> packed.facts.measures["kernels"], packed.facts.measures["proof"] < 1e-5
        ([16, 6], True)
    """
    facts = Facts({"pack_branches": sorted(branches)}, environment=environment())
    plan = _plan(branches, facts)
    model, masked, packed = network_of(model), copy_of(model), copy_of(model)
    mask_branches_(masked, plan)
    edits = pack_branches_(packed, plan)
    surgery = surgery_for(model, Cuts(), [BlockEdit(e.module, e.kind, e.details) for e in edits])
    with torch.no_grad(), evaluating(masked), evaluating(packed):
        wanted = predictions(call(masked, example_inputs))
        error = compare(predictions(call(packed, example_inputs)), wanted).error
    near = max((_NEAR.get(p.dtype, 2e-2) for p in model.parameters()), default=1e-5)
    if not error <= near:
        raise DataError(
            "packing convolutions into branches",
            f"the packed network differs from the masked one by {error:.2g} of its largest output, "
            f"and {near:g} is allowed",
            "a module may use the weight of a convolution beside calling it",
            f"leave out some of {', '.join(list(plan)[:4])}",
        )
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model, packed)]
    facts.measures |= {"proof": error, "parameters": sizes}
    return Pruned(packed, Masks({}), facts, remember_(packed, surgery))


def _plan(branches: Mapping[str, Branches], facts: Facts) -> dict[str, Grouping]:
    """The groups by path; filters that are gone make a group that reads nothing."""
    plan: dict[str, Grouping] = {}
    before = after = 0
    for name, learned in branches.items():
        path = name.removesuffix(".weight")
        groups, keep, filters = (x.cpu() for x in (learned.groups, learned.keep, learned.filters))
        if not bool(filters.all()):
            groups = torch.where(filters, groups, len(keep))
            keep = torch.cat([keep, torch.zeros(1, keep.shape[1], dtype=torch.bool)])
        kept, total = int(kernels_of(groups, keep).sum()), len(groups) * keep.shape[1]
        before, after = before + total, after + kept
        if total - kept < len(groups):
            facts.note("left-out", path, f"its branches would keep {kept} of {total} kernels")
            after += total - kept
            continue
        plan[path] = (groups, keep)
        count = len(groups.unique())
        facts.note("branches", path, f"{count} branches with {kept} of {total} kernels")
    facts.measures["kernels"] = [before, after]
    return plan
