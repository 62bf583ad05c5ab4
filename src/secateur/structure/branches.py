"""Intra-channel groups: a convolution as branches, each of which reads some of the channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError, kind_of
from secateur.structure.deletion import Edit
from secateur.structure.opaque import opaque

#: Group of each filter, and the channels that each group reads: ``(filters,)``, ``(groups, channels)``.
Grouping = tuple[Tensor, Tensor]


@opaque("its branches gather channels by their numbers")
class GatheredConv2d(nn.Module):
    """Branches of one convolution: each gathers its channels and convolves them with its filters.

    Their outputs are concatenated and put back into the order of the filters. It computes what the
    convolution computes with all other kernels set to zero.

    Args:
        conv: Without groups; weights are copied out of it.
        branches: ``(channels, filters)`` of each branch: numbers of what it reads, increasing, and
            of what it makes. Each filter is in one branch. A branch that reads nothing gets the
            first channel with kernels that are zero: what remains of it are its biases.

    Example:
        >>> conv = nn.Conv2d(4, 3, 1)
        >>> gathered = GatheredConv2d(conv, [([0, 1], [0, 2]), ([3], [1])])
        >>> [tuple(branch.weight.shape) for branch in gathered.branches]
        [(2, 2, 1, 1), (1, 1, 1, 1)]
        >>> gathered(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self, conv: nn.Conv2d, branches: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.branches = nn.ModuleList(_branch(conv, *branch) for branch in branches)
        # Which channels are gathered is written down in the surgery, not among the weights.
        for number, (channels, _) in enumerate(branches):
            read = list(channels) or [0]
            whole = read == list(range(conv.in_channels))
            self._index(f"channels{number}", None if whole else read, conv)
        made = [number for _, filters in branches for number in filters]
        order = sorted(range(len(made)), key=made.__getitem__)
        self._index("order", None if order == list(range(len(made))) else order, conv)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``(batch, channels, height, width)``, or of one image without a batch."""
        parts = []
        for number, branch in enumerate(self.branches):
            channels = self._buffers[f"channels{number}"]
            parts.append(branch(x if channels is None else x.index_select(-3, channels)))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -3)
        order = self._buffers["order"]
        return out if order is None else out.index_select(-3, order)

    def extra_repr(self) -> str:
        """Channels in and out, and how many kernels of all there are."""
        weights = [branch.weight for branch in self.branches if isinstance(branch, nn.Conv2d)]
        kept = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        whole = self.in_channels * self.out_channels
        return f"{self.in_channels}, {self.out_channels}, kernels={kept}/{whole}"

    def _index(self, name: str, numbers: Sequence[int] | None, conv: nn.Conv2d) -> None:
        index = None
        if numbers is not None:
            index = torch.tensor(list(numbers), dtype=torch.long).to(conv.weight.device)
        self.register_buffer(name, index, persistent=False)


def branches_of(groups: Tensor, keep: Tensor) -> list[tuple[list[int], list[int]]]:
    """``(channels, filters)`` of each branch that makes anything.

    Args:
        groups: ``(filters,)`` the group of each filter.
        keep: ``(groups, channels)``, True where a group reads a channel.

    Example:
        >>> branches_of(torch.tensor([0, 1, 0]), torch.tensor([[True, False], [True, True]]))
        [([0], [0, 2]), ([0, 1], [1])]
    """
    groups, keep = groups.cpu(), keep.cpu().bool()
    fits = groups.ndim == 1 and keep.ndim == 2 and len(groups) > 0
    if not fits or not bool(((groups >= 0) & (groups < len(keep))).all()):
        raise UsageError(
            "packing a convolution into branches",
            f"groups {tuple(groups.shape)} from {_range(groups)}, keep {tuple(keep.shape)}",
            "there is a group for each filter, and a row of channels for each group",
            "give groups (filters,) with numbers below len(keep), and keep (groups, channels)",
        )
    found = []
    for group in groups.unique().tolist():
        channels = keep[group].nonzero()[:, 0].tolist()
        found.append((channels, (groups == group).nonzero()[:, 0].tolist()))
    return found


def kernels_of(groups: Tensor, keep: Tensor) -> Tensor:
    """Which kernels stay: ``(filters, channels)``.

    Example:
        >>> kernels_of(torch.tensor([0, 1]), torch.tensor([[True, False], [True, True]])).tolist()
        [[True, False], [True, True]]
    """
    return keep.bool()[groups]


def mask_branches_(model: nn.Module, branches: Mapping[str, Grouping]) -> None:
    """Set all kernels that no branch has to zero, in place: what the packed network must compute.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 1, 1))
        >>> mask_branches_(net, {"0": (torch.tensor([0]), torch.tensor([[True, False]]))})
        >>> net[0].weight[0, 1].item()
        0.0
    """
    for path, (groups, keep) in branches.items():
        weight = _conv(model, path).weight
        kept = kernels_of(groups, keep).to(weight.device)
        _require_sizes(path, weight, kept)
        with torch.no_grad():
            # Not a product: that would keep NaN, and the sign of zeros.
            weight.masked_fill_(~kept[:, :, None, None], 0.0)


def pack_branches_(model: nn.Module, branches: Mapping[str, Grouping]) -> list[Edit]:
    r"""Replace convolutions by branches, in place.

    **formula** :math:`y_f = b_f + \sum_{c \in K(g_f)} W_{fc} * x_c`
    **Shapes** those of the convolution
    **Units** those of its output
    **Needs** groups of filters and the channels that each reads, e.g. learned ones
    **Source** Park et al., Dynamic Structure Pruning, arXiv 2303.09736
    **Differs** the kernels outside the branches are left out whatever their values

    Args:
        model: Changed.
        branches: Path of a convolution -> the group of each filter ``(filters,)`` and the channels
            that each group reads ``(groups, channels)``.

    Returns:
        What was done, for a surgery.

    Raises:
        UsageError: It is no plain ``Conv2d``, or the sizes are others. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        >>> keep = torch.tensor([[True, False], [False, True]])
        >>> edit, = pack_branches_(net, {"0": (torch.tensor([1, 0]), keep)})
        >>> edit.details["branches"]
        [{'channels': [0], 'filters': [1]}, {'channels': [1], 'filters': [0]}]
        >>> net[0]
        GatheredConv2d(
          2, 2, kernels=2/4
          (branches): ModuleList(
            (0-1): 2 x Conv2d(1, 1, kernel_size=(1, 1), stride=(1, 1))
          )
        )
    """
    edits = []
    for path, (groups, keep) in branches.items():
        _require_sizes(path, _conv(model, path).weight, kernels_of(groups, keep))
        listed = [{"channels": c, "filters": f} for c, f in branches_of(groups, keep)]
        edits.append(Edit(path, "branches", {"branches": listed}))
    for edit in edits:
        branch_(model, edit.module, edit.details)
    return edits


def branch_(model: nn.Module, path: str, details: Mapping[str, Any]) -> None:
    """Replace one convolution by the branches that an edit lists.

    Raises:
        UsageError: The module or the lists are others. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(2, 1, 1))
        >>> branch_(net, "0", {"branches": [{"channels": [1], "filters": [0]}]})
        >>> net[0].branches[0].in_channels
        1
    """
    conv = _conv(model, path)
    listed = details.get("branches")
    good = isinstance(listed, list) and len(listed) > 0 and set(details) == {"branches"}
    pairs = []
    for branch in listed if good and isinstance(listed, list) else []:
        known = isinstance(branch, Mapping) and set(branch) == {"channels", "filters"}
        if not known or not _increasing(branch["channels"]) or not _increasing(branch["filters"]):
            good = False
            break
        good = good and max(branch["channels"], default=0) < conv.in_channels
        good = good and len(branch["filters"]) > 0
        pairs.append((branch["channels"], branch["filters"]))
    made = sorted(number for _, filters in pairs for number in filters)
    if not good or made != list(range(conv.out_channels)):
        raise _misfit(
            path,
            f"its details are {str(dict(details))[:80]}",
            f"each of {conv.out_channels} filters is in one branch, and a branch reads some of "
            f"{conv.in_channels} channels",
        )
    new = GatheredConv2d(conv, pairs).train(conv.training)
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = new


def _branch(conv: nn.Conv2d, channels: Sequence[int], filters: Sequence[int]) -> nn.Conv2d:
    weight = conv.weight
    read = list(channels) or [0]
    rows, columns = (torch.tensor(list(n), device=weight.device) for n in (filters, read))
    with torch.device("meta"):
        new = nn.Conv2d(
            len(read),
            len(filters),
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
    picked = weight.detach().index_select(0, rows).index_select(1, columns)
    if not channels:
        picked = torch.zeros_like(picked)
    new.weight = nn.Parameter(picked, requires_grad=weight.requires_grad)
    if conv.bias is not None:
        bias = conv.bias.detach().index_select(0, rows)
        new.bias = nn.Parameter(bias, requires_grad=conv.bias.requires_grad)
    return new


def _conv(model: nn.Module, path: str) -> nn.Conv2d:
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or not path:
        grouped = f"with {module.groups} groups" if isinstance(module, nn.Conv2d) else ""
        raise _misfit(
            path,
            f"it is {kind_of(module)} {grouped}".rstrip(),
            "branches are made of a Conv2d inside the model, without groups",
        )
    return module


def _require_sizes(path: str, weight: Tensor, kept: Tensor) -> None:
    if kept.shape != weight.shape[:2]:
        raise _misfit(
            path,
            f"the weight is {tuple(weight.shape)}, the groups are for {tuple(kept.shape)}",
            "there is a group for each filter, and a flag for each channel",
        )


def _increasing(numbers: Any) -> bool:
    whole = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    return whole and all(a < b for a, b in zip([-1, *numbers], numbers, strict=False))


def _range(x: Tensor) -> str:
    return f"{int(x.min())} to {int(x.max())}" if x.numel() else "nothing"


def _misfit(path: str, found: str, why: str) -> UsageError:
    return UsageError(
        f"packing {path!r} into branches", found, why, "name another module; nothing was changed"
    )
