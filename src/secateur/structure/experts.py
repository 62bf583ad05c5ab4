"""Mixtures of experts: finding them by their structure, and removing experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.errors import UsageError
from secateur.structure.cut import Cuts, apply_
from secateur.structure.deletion import Edit, delete_entries_

_CHOSEN = ("top_k", "per_tok", "k")
_OTHER = (*_CHOSEN[:2], "shared", "group", "capacity", "interval", "freq")
_GROUPS = ("n_group", "num_group", "num_expert_group")
_CONVERTED = ("to", "type", "float", "half", "bfloat16", "double")


@dataclass(frozen=True)
class Mixture:
    """A layer that is a mixture of experts.

    Args:
        path: Of the module that holds the experts: stacked in parameters, or a ``ModuleList``.
        router: Name of the parameter whose rows are the experts.
        experts: How many there are.
        chosen: How many a token is sent to; 0 if no attribute says so.
        groups: Experts are chosen within so many groups of neighbours; 1 if they are not.

    Example:
        >>> Mixture("mlp.experts", "mlp.gate.weight", 8, 2).block
        'mlp'
    """

    path: str
    router: str
    experts: int
    chosen: int = 0
    groups: int = 1

    @property
    def block(self) -> str:
        """Path of the module that holds the router and the experts."""
        return self.path.rpartition(".")[0]


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """Find mixtures of experts, by shapes.

    The experts of one are parameters of three axes with the same first one, or a ``ModuleList`` of
    like modules; beside them one module has a matrix with as many rows: the router.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 3, bias=False)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> mixtures_of(nn.Sequential(Block()))
        [Mixture(path='0.experts', router='0.gate.weight', experts=3, chosen=0, groups=1)]
    """
    found = []
    for path, module in model.named_modules():
        count = _count(module)
        block = path.rpartition(".")[0]
        if count < 2 or not path:
            continue
        routers = [
            f"{block}.{name}".lstrip(".")
            for name, x in model.get_submodule(block).named_parameters()
            if x.ndim == 2 and len(x) == count and name.count(".") <= 1
            if not f"{block}.{name}".lstrip(".").startswith(f"{path}.")
        ]
        if len(routers) == 1:
            near = _near(model, path, routers[0])
            chosen = _stated(near, lambda name: name in _CHOSEN or "per_tok" in name)
            groups = _stated(near, lambda name: name in _GROUPS)
            most = max((v for *_, v in chosen), default=0)
            limited = max((v for *_, v in groups if count % max(v, 1) == 0), default=1)
            found.append(Mixture(path, routers[0], count, most, max(limited, 1)))
    return found


def expert_cuts(
    model: nn.Module, keep: Mapping[str, Sequence[int]]
) -> tuple[Cuts, list[Edit], dict[str, str]]:
    """What is to be done to keep only some experts; nothing is done yet.

    Args:
        model: Left as it is.
        keep: Path of a mixture's experts -> numbers of those that stay.

    Returns:
        Cuts of the router's rows and of stacked experts with all numbers that count them; the
        entries that lists lose; and notes: where -> what happened beside.

    Raises:
        UsageError: There is no such mixture or expert, none would stay, or a router that chooses
            within groups would have groups of different sizes.

    Example:
        >>> expert_cuts(nn.Linear(2, 2), {"experts": [0]})
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: removing experts of 'experts': it is no mixture of experts.
        ...
    """
    found = {mixture.path: mixture for mixture in mixtures_of(model)}
    kept: dict[str, dict[int, list[int]]] = {}
    attributes: dict[str, dict[str, int]] = {}
    edits: list[Edit] = []
    notes: dict[str, str] = {}
    for path, numbers in keep.items():
        mixture, left = _checked(found, path, numbers), sorted(set(numbers))
        for name, axis in _rows(model, mixture).items():
            kept[name] = {axis: left}
        near = _near(model, path, mixture.router)
        for where, name, value in _counts(near, mixture.experts):
            attributes.setdefault(where, {})[name] = len(left)
            assert value
        for where, name, value in _stated(near, lambda n: n in _CHOSEN or "per_tok" in n):
            if value > len(left):
                attributes.setdefault(where, {})[name] = len(left)
                notes[path] = f"a token is sent to {len(left)} experts instead of {value}"
        if isinstance(model.get_submodule(path), nn.ModuleList):
            gone = [i for i in range(mixture.experts) if i not in left]
            details = {"entries": gone, "size": mixture.experts, "config": {}}
            edits.append(Edit(path, "deleted", details))
    for where, sizes in _config(model, found, keep, notes).items():
        attributes[where] = {**attributes.get(where, {}), **sizes}
    return Cuts(kept, attributes), edits, notes


def remove_experts_(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Remove experts in place: their rows of the router, and themselves.

    **formula** the router chooses among the kept experts only, as if the logits of all others were
    minus infinity
    **Shapes** those of the network stay
    **Units** experts
    **Needs** nothing
    **Source** REAP, arXiv 2510.13999
    **Differs** a token that was sent to more experts than are left is sent to those that are left

    Args:
        model: Changed.
        keep: Path of a mixture's experts -> numbers of those that stay.

    Returns:
        Notes: where -> what happened beside.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 3, bias=False)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> net = nn.Sequential(Block())
        >>> remove_experts_(net, {"0.experts": [0, 2]})
        {}
        >>> net[0].gate, len(net[0].experts)
        (Linear(in_features=4, out_features=2, bias=False), 2)
    """
    cuts, edits, notes = expert_cuts(model, keep)
    apply_(model, cuts)
    for edit in edits:
        delete_entries_(model, edit.module, edit.details)
    return notes


@contextmanager
def without_experts(model: nn.Module, keep: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, routers see minus infinity for all other experts: the masked network.

    Biases beside the router (that some add to the scores after a sigmoid) are minus infinity, too.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(4, 2)
        ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        >>> net = nn.Sequential(Block())
        >>> with without_experts(net, {"0.experts": [1]}):
        ...     net[0].gate(torch.zeros(4))[0].item()
        -inf
    """
    found = {mixture.path: mixture for mixture in mixtures_of(model)}
    masked: dict[int, list[int]] = {}
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for path, numbers in keep.items():
            mixture = _checked(found, path, numbers)
            gone = [i for i in range(mixture.experts) if i not in set(numbers)]
            masked[id(model.get_parameter(mixture.router))] = gone
            for name, axis in _rows(model, mixture).items():
                x = _tensor(model, name)
                if x.numel() == mixture.experts:
                    saved.append((x, x.detach().clone()))
                    x.data.index_fill_(axis, torch.tensor(gone, device=x.device), -torch.inf)
        mode = _Masked(masked)
        with mode:
            yield
        if set(masked) - mode.used:
            raise UsageError(
                f"masking experts of {', '.join(keep)}",
                "a router did not multiply by its weight in a linear layer",
                "that is where its logits are known",
                "remove experts with remove_experts_, which is not checked",
            )
    finally:
        for x, value in saved:
            x.data.copy_(value)


class _Masked(TorchFunctionMode):
    """Writes minus infinity where a router's linear layer leaves the logits of experts."""

    def __init__(self, gone: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.gone = gone
        self.used: set[int] = set()
        # Copies of a weight in another type, by their identity; they are held, so it stays theirs.
        self.copies: dict[int, tuple[Tensor, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CONVERTED and isinstance(out, Tensor) and id(args[0]) in self.gone:
            self.copies[id(out)] = (out, id(args[0]))
        if func is torch.nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            known = self.copies.get(id(weight), (weight, id(weight)))[1]
            if known in self.gone:
                self.used.add(known)
                gone = torch.tensor(self.gone[known], dtype=torch.long, device=out.device)
                return out.index_fill(-1, gone, -torch.inf)
        return out


# -- structure --------------------------------------------------------------------------------------


def _count(module: nn.Module) -> int:
    """How many experts a module holds; 0 if it holds none."""
    if isinstance(module, nn.ModuleList):
        kinds = {type(child) for child in module}
        shapes = {tuple(p.shape for p in child.parameters()) for child in module}
        return len(module) if len(kinds) == 1 and len(shapes) == 1 else 0
    sizes = {len(p) for p in module.parameters(recurse=False) if p.ndim == 3}
    return sizes.pop() if len(sizes) == 1 and not isinstance(module, nn.Conv1d) else 0


def _rows(model: nn.Module, mixture: Mixture) -> dict[str, int]:
    """Names of all tensors with an axis of experts -> that axis: the router's, and stacked ones."""
    owner = mixture.router.rpartition(".")[0]
    found = {}
    for path in dict.fromkeys((owner, mixture.path)):
        module = model.get_submodule(path)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, x in own:
            stacked = x.ndim > 0 and len(x) == mixture.experts
            # The block itself may own the router: its other matrices are not the experts'.
            mine = path == mixture.path or x.ndim == 1 or f"{path}.{name}" == mixture.router
            if stacked and mine:
                found[f"{path}.{name}".lstrip(".")] = 0
    if owner != mixture.block:
        # Ernie keeps the bias of the scores in a module inside the router, as (1, experts).
        router = model.get_submodule(owner)
        for name, x in (*router.named_parameters(), *router.named_buffers()):
            if x.numel() == mixture.experts and mixture.experts in x.shape:
                found[f"{owner}.{name}"] = x.shape.index(mixture.experts)
    return found


def _near(model: nn.Module, path: str, router: str) -> dict[str, nn.Module]:
    """The modules that may state how many experts there are: block, router, experts."""
    block, owner = path.rpartition(".")[0], router.rpartition(".")[0]
    return {p: model.get_submodule(p) for p in dict.fromkeys((block, owner, path))}


def _stated(near: Mapping[str, nn.Module], fits: Any) -> list[tuple[str, str, int]]:
    return [
        (path, name, value)
        for path, module in near.items()
        for name, value in vars(module).items()
        if type(value) is int and not name.startswith("_") and fits(name)
    ]


def _counts(near: Mapping[str, nn.Module], experts: int) -> list[tuple[str, str, int]]:
    """Attributes that count the experts."""

    def fits(name: str) -> bool:
        return _counts_experts(name) or name in ("out_features", "nf")

    return [found for found in _stated(near, fits) if found[2] == experts]


def _counts_experts(name: str) -> bool:
    return "expert" in name and not any(part in name for part in _OTHER)


def _config(
    model: nn.Module, found: Mapping[str, Mixture], keep: Mapping[str, Sequence[int]], notes: Any
) -> dict[str, dict[str, int]]:
    """What outer modules and configurations state, if all mixtures keep equally many."""
    left = {p: len(set(keep[p])) if p in keep else m.experts for p, m in found.items()}
    before = {m.experts for m in found.values()}
    outer = [
        (p, m)
        for p, m in model.named_modules()
        if any(mixture.block.startswith(f"{p}." if p else "") for mixture in found.values())
    ]
    if len(set(left.values())) > 1 or len(before) > 1:
        if any(getattr(m, "config", None) is not None for _, m in outer):
            notes[""] = "the layers keep different numbers of experts: no configuration says that"
        return {}
    (old,), (new,) = before, set(left.values())
    edits: dict[str, dict[str, int]] = {}
    for path, module in outer:
        config = getattr(vars(module).get("config"), "__dict__", {})
        for prefix, values in (("", vars(module)), ("config.", config)):
            for name, value in values.items():
                if type(value) is not int or name.startswith("_"):
                    continue
                chosen = ("per_tok" in name or name == "top_k") and value > new
                if chosen or (_counts_experts(name) and value == old):
                    edits.setdefault(path, {})[prefix + name] = new
    return edits


def _checked(found: Mapping[str, Mixture], path: str, numbers: Sequence[int]) -> Mixture:
    mixture = found.get(path)
    asked = f"removing experts of {path!r}"
    if mixture is None:
        raise UsageError(
            asked,
            "it is no mixture of experts",
            f"those of this model are {', '.join(list(found)[:6]) or 'none'}",
            "name the module that holds the experts; nothing was changed",
        )
    wrong = [i for i in numbers if not 0 <= i < mixture.experts]
    if wrong or not len(numbers):
        raise UsageError(
            asked,
            f"it has no expert {wrong[0]}" if wrong else "no expert would stay",
            f"its experts are 0 to {mixture.experts - 1}, and a token needs one",
            "correct the numbers of those that stay; nothing was changed",
        )
    size = mixture.experts // mixture.groups
    per_group = [sum(i // size == g for i in set(numbers)) for g in range(mixture.groups)]
    if len(set(per_group)) > 1:
        raise UsageError(
            asked,
            f"{per_group} experts of the {mixture.groups} groups would stay",
            "its router chooses groups first, and all of them have one size",
            "keep equally many of each group; nothing was changed",
        )
    return mixture


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    x = getattr(model.get_submodule(path), attribute)
    assert isinstance(x, Tensor)
    return x
