"""Whole residual blocks: which modules of a network can be left out, found by running it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.batches import evaluating
from secateur.core.errors import UsageError, kind_of
from secateur.structure.masked import call

_SUMS = {"aten.add", "aten.add_"}
# What the shortcut may pass through on its way to the sum.
_SAME = {"aten.clone", "aten._to_copy", "aten.mul", "aten.native_dropout", "aten.contiguous"}


class PassThrough(nn.Module):
    """What stands in the place of a removed block: it returns its first input.

    Args:
        returns: ``"tensor"``, or ``"tuple"`` for a block whose callers take the first of several.
        rest: What the others of these several are: the position or name of an argument that is
            passed on, or ``None``.

    Example:
        >>> PassThrough()(1, mask=2), PassThrough("tuple")(1)
        (1, (1,))
        >>> PassThrough("tuple", ("mask", None))(1, mask=2)
        (1, 2, None)
    """

    def __init__(self, returns: str = "tensor", rest: Sequence[int | str | None] = ()) -> None:
        super().__init__()
        self.returns, self.rest = returns, tuple(rest)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, whatever the others are."""
        first = args[0] if args else next(iter(kwargs.values()))
        if self.returns == "tensor":
            return first
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        return (first, *(given.get(place) for place in self.rest))


@dataclass(frozen=True)
class Block:
    """A module that adds something to what passes through it, so that it can be left out.

    Args:
        path: Where it is.
        returns: ``"tensor"``, or ``"tuple"`` if what passes through is the first of several.
        parameters: How many numbers go with it.
        rest: The others of several, as :class:`PassThrough` knows them.

    Example:
        >>> Block("layers.3", "tensor", 12).bypass
        {'returns': 'tensor'}
    """

    path: str
    returns: str
    parameters: int
    rest: tuple[int | str | None, ...] = ()

    @property
    def bypass(self) -> dict[str, Any]:
        """What a :class:`PassThrough` in its place has to know, as plain data."""
        return {"returns": self.returns, **({"rest": list(self.rest)} if self.rest else {})}


def blocks_of(model: nn.Module, example: Any) -> list[Block]:
    """Find the residual blocks of a network, in the order in which they run.

    A block is an entry of a ``ModuleList`` or ``Sequential`` that runs once, returns what has the
    shape of its first input, and adds that input to something on the way (so it has an identity
    shortcut). The network is run without it, too. Of blocks in blocks the outer ones are taken, but
    of a stage that is a chain of like blocks its blocks.

    Args:
        model: Left as it is.
        example: A tensor, a tuple of positional arguments, or a mapping of named ones.

    Raises:
        UsageError: The model fails on the example.

    Example:
        >>> class Add(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.inner(x)
        >>> net = nn.Sequential(nn.Linear(3, 4), Add(), nn.ReLU(), nn.Linear(4, 4), Add())
        >>> blocks_of(net, torch.zeros(1, 3))
        [Block(path='1', returns='tensor', parameters=20, rest=()), Block(path='4',
        returns='tensor', parameters=20, rest=())]
    """
    watch = _Watch({p: m for p, m in model.named_modules() if p in _entries(model)})
    with evaluating(model), torch.no_grad(), watch.hooked():
        try:
            call(model, example)
        except Exception as error:
            raise UsageError(
                f"finding the blocks of {kind_of(model)}",
                f"it fails on the example: {str(error)[:200]}",
                "blocks are found by running the network once",
                "pass an example that the model accepts",
            ) from error
    residual = {p: s for p, s in watch.seen.items() if s.runs == 1 and s.returns and s.adds}
    outer = _outer(model, residual)
    blocks = [
        Block(path, s.returns, _numbers(model.get_submodule(path)), s.rest)
        for path, s in residual.items()
        if path in outer
    ]
    return _removable(model, example, blocks)


@contextmanager
def bypassed(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Inside, blocks return their input; nothing about the model is changed otherwise.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> with bypassed(net, [Block("0", "tensor", 6)]):
        ...     net(torch.tensor([3.0, 4.0])).tolist()
        [3.0, 4.0]
    """
    modules = [(model.get_submodule(b.path), PassThrough(**b.bypass).forward) for b in blocks]
    own = [vars(module).get("forward") for module, _ in modules]
    try:
        for module, forward in modules:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), old in zip(modules, own, strict=True):
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def named_blocks(
    model: nn.Module, example: Any, paths: Iterable[str], found: list[Block] | None = None
) -> list[Block]:
    """The blocks of these names.

    Raises:
        UsageError: One of them is no block that can be left out.

    Example:
        >>> named_blocks(nn.Sequential(nn.ReLU()), torch.zeros(1), ["0"])
        Traceback (most recent call last):
            ...
        secateur.core.errors.UsageError: removing '0': it is no residual block. ...
    """
    known = {b.path: b for b in (blocks_of(model, example) if found is None else found)}
    wanted = list(dict.fromkeys(paths))
    for path in wanted:
        if path not in known:
            raise UsageError(
                f"removing {path!r}",
                "it is no residual block",
                "a block keeps the shape of its input and adds it to something; those of this "
                f"model are {', '.join(list(known)[:8]) or 'none'}",
                "name blocks of blocks_of(model, example); nothing was changed",
            )
    return [known[path] for path in wanted]


# -- the run ----------------------------------------------------------------------------------------


@dataclass
class _Seen:
    runs: int = 0
    returns: str = ""
    adds: bool = False
    rest: tuple[int | str | None, ...] = ()
    given: Tensor | None = None
    made: Tensor | None = None


@dataclass
class _Watch:
    """What goes into the candidates and comes out, and whether it is added to something."""

    modules: Mapping[str, nn.Module]
    seen: dict[str, _Seen] = field(default_factory=dict)
    # Of the running candidates: everything that is their input still, by its storage.
    inputs: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for path, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end(path), with_kwargs=True))
        try:
            with _Sums(self.inputs, self.seen):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = self.seen.setdefault(path, _Seen())
            seen.runs += 1
            first = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(first, Tensor) and first.is_floating_point():
                seen.given = first
                self.inputs[path] = {_storage(first): first}

        return hook

    def _end(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.inputs.pop(path, None)
            seen = self.seen[path]
            plain = type(output) is tuple and len(output) > 0
            made = output[0] if plain else output
            given = seen.given
            if isinstance(made, Tensor) and given is not None and made.shape == given.shape:
                seen.returns, seen.made = ("tuple" if plain else "tensor"), made
                known: dict[int, int | str] = {id(x): name for name, x in kwargs.items()}
                known |= {id(x): place for place, x in enumerate(args)}
                others = output[1:] if plain else ()
                seen.rest = tuple(None if x is None else known.get(id(x)) for x in others)

        return hook


class _Sums(TorchDispatchMode):
    """Notes where the input of a running candidate is added to something of its shape."""

    def __init__(self, inputs: dict[str, dict[int, Tensor]], seen: dict[str, _Seen]) -> None:
        # A dispatch mode cannot work without its parent's state.
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs, self.seen = inputs, seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func.overloadpacket)
        tensors = [x for x in args if isinstance(x, Tensor)]
        alike = len(tensors) == 2 and tensors[0].shape == tensors[1].shape
        if name in _SUMS and alike:
            for path, known in self.inputs.items():
                self.seen[path].adds |= any(_storage(x) in known for x in tensors)
        out = func(*args, **(kwargs or {}))
        first = out[0] if name == "aten.native_dropout" else out
        if name in _SAME and isinstance(first, Tensor) and tensors[0].shape == first.shape:
            for known in self.inputs.values():
                if _storage(tensors[0]) in known:
                    known[_storage(first)] = first
        return out


def _storage(x: Tensor) -> int:
    # Unlike a data pointer it is there on the meta device, too.
    return int(x.untyped_storage()._cdata)


def _entries(model: nn.Module) -> set[str]:
    """Entries of lists that are more than one layer and hold parameters."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for name, child in module.named_children()
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    }


def _outer(model: nn.Module, residual: Mapping[str, _Seen]) -> list[str]:
    """The outermost of blocks in blocks, but the blocks of a chain of like ones."""
    taken: list[str] = []
    for path, seen in residual.items():
        if any(path.startswith(f"{other}.") for other in taken):
            continue
        inside = [p for p in residual if p.startswith(f"{path}.")]
        inner = [p for p in inside if not any(p.startswith(f"{q}.") for q in inside)]
        kinds = {type(model.get_submodule(p)) for p in inner}
        ends = {id(residual[p].made) for p in inner}
        starts = {id(residual[p].given) for p in inner}
        chain = len(kinds) == 1 and id(seen.made) in ends and id(seen.given) in starts
        if not chain:
            taken.append(path)
    return taken


def _removable(model: nn.Module, example: Any, blocks: list[Block]) -> list[Block]:
    """Those without which the network runs."""
    if _runs(model, example, blocks):
        return blocks
    return [block for block in blocks if _runs(model, example, [block])]


@torch.no_grad()
def _runs(model: nn.Module, example: Any, gone: list[Block]) -> bool:
    try:
        with evaluating(model), bypassed(model, gone):
            call(model, example)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
        return False
    return True


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
