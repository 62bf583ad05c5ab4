"""Removing blocks: out of their list where the network can be built like that, else bypassed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from secateur.core.batches import evaluating
from secateur.core.errors import UsageError, kind_of
from secateur.structure.depth import Block, PassThrough, bypassed, named_blocks
from secateur.structure.masked import call, compare
from secateur.structure.outputs import predictions
from secateur.structure.running import shared_copy
from secateur.structure.stated import edited, statements

_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class Edit:
    """A module that is replaced as a whole: what a block edit of a surgery says, as plain data.

    Args:
        module: Its path.
        kind: What is done to it.
        details: What that kind needs to know.

    Example:
        >>> Edit("layers.3", "removed", {"returns": "tensor"}).kind
        'removed'
    """

    module: str
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)


def removal_of(model: nn.Module, blocks: Sequence[Block], example: Any) -> list[Edit]:
    """How blocks are to be removed; nothing is done yet.

    Entries of a ``ModuleList`` are deleted, and later ones renumbered, if some configuration of the
    model builds just that and it computes what the model does with the blocks bypassed: both are
    tried. Elsewhere a :class:`~secateur.structure.depth.PassThrough` takes the place of the block,
    and all names stay.

    Args:
        model: Left as it is.
        blocks: From :func:`~secateur.structure.depth.blocks_of`.
        example: Inputs.

    Example:
        >>> removal_of(nn.Sequential(nn.Linear(2, 2)), [Block("0", "tensor", 6)], torch.ones(1, 2))
        [Edit(module='0', kind='removed', details={'returns': 'tensor'})]
    """
    lists: dict[str, list[Block]] = {}
    for block in blocks:
        lists.setdefault(block.path.rpartition(".")[0], []).append(block)
    edits: list[Edit] = []
    trial = shared_copy(model)
    # Inner lists first: deleting outer entries changes the paths of what is inside.
    for path in sorted(lists, key=lambda p: p.count("."), reverse=True):
        deletion = _deletion(trial, path, lists[path], example)
        plain = [Edit(b.path, "removed", b.bypass) for b in lists[path]]
        for edit in plain if deletion is None else [deletion]:
            carry_out_(trial, edit)
            edits.append(edit)
    return edits


def remove_blocks_(model: nn.Module, blocks: Sequence[str | Block], example: Any) -> list[Edit]:
    """Remove blocks in place.

    Args:
        model: Changed.
        blocks: Paths, or what :func:`~secateur.structure.depth.blocks_of` found.
        example: Inputs.

    Returns:
        What was done, for a surgery.

    Raises:
        UsageError: A path names no residual block.

    Example:
        >>> class Add(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> net = nn.Sequential(Add(), Add())
        >>> _ = remove_blocks_(net, ["0"], torch.zeros(1, 4))
        >>> net[0]
        PassThrough()
    """
    paths = [b for b in blocks if isinstance(b, str)]
    known = [b for b in blocks if isinstance(b, Block)]
    known += named_blocks(model, example, paths) if paths else []
    edits = removal_of(model, known, example)
    for edit in edits:
        carry_out_(model, edit)
    return edits


def carry_out_(model: nn.Module, edit: Edit) -> None:
    """Do one removal."""
    if edit.kind == "deleted":
        delete_entries_(model, edit.module, edit.details)
    else:
        bypass_(model, edit.module, edit.details)


def bypass_(model: nn.Module, path: str, details: Mapping[str, Any]) -> None:
    """Put a :class:`~secateur.structure.depth.PassThrough` in the place of a module.

    Raises:
        UsageError: The details are not those of a pass-through.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> bypass_(net, "0", {"returns": "tensor"})
        >>> net[0]
        PassThrough()
    """
    old = model.get_submodule(path)
    rest = details.get("rest", [])
    good = isinstance(rest, list) and all(type(x) in (int, str, type(None)) for x in rest)
    known = details.get("returns", "tensor") in ("tensor", "tuple")
    if set(details) - {"returns", "rest"} or not good or not known:
        raise UsageError(
            f"removing {kind_of(old)}",
            f"its details are {str(dict(details))[:80]}",
            "'returns' is 'tensor' or 'tuple', and 'rest' lists arguments that are passed on",
            "take the surgery that was written; nothing was changed",
        )
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = PassThrough(**details).train(old.training)


def delete_entries_(model: nn.Module, path: str, details: Mapping[str, Any]) -> None:
    """Take entries out of a ``ModuleList``; numbers of layers and the configuration follow.

    Args:
        model: The whole model.
        path: Of the list.
        details: ``entries`` (the numbers that go), ``size`` (of the list before), and ``config``
            (key -> [before, after], keys of a part of the configuration joined by dots).

    Raises:
        UsageError: The list or the configuration is another one. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.GELU()]))
        >>> delete_entries_(net, "0", {"entries": [1], "size": 3, "config": {}})
        >>> net[0]
        ModuleList(
          (0): ReLU()
          (1): GELU(approximate='none')
        )
    """
    parent, _, name = path.rpartition(".")
    old = model.get_submodule(path)
    gone, size = details.get("entries"), details.get("size")
    stated = details.get("config", {})
    _require(old, gone, size, stated, path)
    assert isinstance(old, nn.ModuleList)
    assert isinstance(gone, list)
    try:
        configs = edited(model, stated)
    except LookupError as error:
        raise _misfit(path, str(error.args[0]), "its configuration said otherwise") from error
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in configs:
            module.config = configs[id(config)]
    left = [i for i in range(len(old)) if i not in gone]
    for inner, attribute, offset in _numbers(old):
        for new, number in enumerate(left):
            setattr(old[number].get_submodule(inner), attribute, new + offset)
    kept = nn.ModuleList(old[i] for i in left).train(old.training)
    model.get_submodule(parent)._modules[name] = kept


# -- deletion ---------------------------------------------------------------------------------------


def _deletion(model: nn.Module, path: str, blocks: list[Block], example: Any) -> Edit | None:
    """How to delete the blocks of a list, if that is known to be right."""
    owner, config = model.get_submodule(path), getattr(model, "config", None)
    if not isinstance(owner, nn.ModuleList) or config is None:
        return None
    gone = sorted(int(block.path.rpartition(".")[2]) for block in blocks)
    with bypassed(model, blocks):
        wanted = _outputs(model, example)
    for stated in statements(config, len(owner), gone):
        details = {"entries": gone, "size": len(owner), "config": stated}
        trial = shared_copy(model)
        delete_entries_(trial, path, details)
        found = _outputs(trial, example) if _buildable(trial) else None
        # The same operators on the same numbers: equal in every bit.
        if wanted and found and compare(found, wanted).error == 0:
            return Edit(path, "deleted", details)
    return None


@torch.no_grad()
def _outputs(model: nn.Module, example: Any) -> Any:
    try:
        with evaluating(model):
            return predictions(call(model, example))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
        return None


def _buildable(model: nn.Module) -> bool:
    """Whether the configuration builds a network of the same names, shapes and plain values.

    It must also be one that can be written and read: GPT-Neo states its layers in a nest of lists, too.
    """
    kind: Any = type(model)
    try:
        config: Any = copy.deepcopy(model.config)
        if hasattr(config, "to_dict"):
            type(config).from_dict(config.to_dict())
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = kind(config)
    except Exception:  # a configuration that makes no sense may fail in any way
        return False
    shapes = [{n: x.shape for n, x in m.state_dict().items()} for m in (built, model)]
    return shapes[0] == shapes[1] and _plain(built) == _plain(model)


def _plain(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Numbers and words that modules carry; rates of dropping matter in training only."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and "drop" not in name and _word(value)
    }


def _word(value: Any) -> bool:
    several = isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value)
    return several or isinstance(value, _PLAIN)


def _numbers(entries: nn.ModuleList) -> list[tuple[str, str, int]]:
    """(path in an entry, attribute, offset) of the numbers that count the entries."""
    if len(entries) < 2:
        return []
    found = []
    for path, module in entries[0].named_modules():
        for name, value in vars(module).items():
            if type(value) is int and not name.startswith("_"):
                told = [_attribute(entry, path, name) for entry in entries]
                if told == list(range(value, value + len(entries))):
                    found.append((path, name, value))
    return found


def _attribute(entry: nn.Module, path: str, name: str) -> Any:
    for part in filter(None, path.split(".")):
        if part not in entry._modules:
            return None
        entry = entry._modules[part]  # type: ignore[assignment]
    return vars(entry).get(name)


def _require(old: nn.Module, gone: Any, size: Any, stated: Any, path: str) -> None:
    numbers = isinstance(gone, list) and all(type(i) is int for i in gone)
    if not isinstance(old, nn.ModuleList) or type(size) is not int or len(old) != size:
        has = f"{len(old)} entries" if isinstance(old, nn.ModuleList) else type(old).__name__
        raise _misfit(path, f"it is {has}", f"it was a list of {size!r:.20}")
    if not numbers or not all(0 <= i < size for i in gone) or len(set(gone)) != len(gone):
        raise _misfit(path, f"the entries {gone!r:.60} are named", f"there are {size}")
    pairs = isinstance(stated, Mapping) and all(
        isinstance(v, list) and len(v) == 2 for v in stated.values()
    )
    if not pairs:
        raise _misfit(path, "its configuration is stated badly", "it is key -> [before, after]")


def _misfit(path: str, found: str, why: str) -> UsageError:
    return UsageError(
        f"deleting entries of {path!r}",
        found,
        why,
        "build the original model, as before it was cut; nothing was changed",
    )
