"""Between the cuts of a network and ``surgery.json``: writing them down, and replaying them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import FormatError, UsageError, kind_of, with_article
from secateur.formats import (
    BlockEdit,
    Bundle,
    Selection,
    Surgery,
    fingerprint_of,
    load_into_,
    selection_of,
    shapes_hash,
)
from secateur.frontends.remembered import remember_
from secateur.structure import Cuts, apply_
from secateur.structure.branches import branch_
from secateur.structure.deletion import bypass_, delete_entries_
from secateur.structure.depth import PassThrough

__all__ = [
    "BLOCKS",
    "PassThrough",
    "class_path",
    "cuts_of",
    "load_bundle_",
    "replay_",
    "require_fit",
    "surgery_for",
    "without_memory",
]

_ORIGINAL = "build the original model, as before it was cut; nothing was changed"


#: Kind of a block edit -> what does it to a model, given the path of the module and the details.
BLOCKS: dict[str, Callable[[nn.Module, str, Mapping[str, Any]], None]] = {
    "removed": bypass_,
    "deleted": delete_entries_,
    "branches": branch_,
}


def class_path(model: nn.Module) -> str:
    """The import path of a model's class.

    Example:
        >>> class_path(nn.Linear(1, 1))
        'torch.nn.modules.linear.Linear'
    """
    return f"{type(model).__module__}.{type(model).__qualname__}"


def surgery_for(
    model: nn.Module, cuts: Cuts, blocks: Sequence[BlockEdit] = (), *, weights: bool = True
) -> Surgery:
    """Write down what is going to be done to ``model``.

    It is tried on a copy without memory, so what is written down can be replayed.

    Args:
        model: Not cut yet; left as it is.
        cuts: From :func:`~secateur.structure.cuts_for`.
        blocks: Modules that are replaced after the cuts.
        weights: Hash the values too (all of them are read once).

    Raises:
        UsageError: The cuts do not fit the model.

    Example:
        >>> cut = surgery_for(nn.Linear(2, 3, bias=False), Cuts({"weight": {0: [0, 2]}}))
        >>> cut.cuts["weight"][0].runs
        ((0, 1), (2, 3))
    """
    state = model.state_dict()
    tensors = _tensors(model)
    kept: dict[str, dict[int, Selection]] = {}
    for name, axes in cuts.kept.items():
        if name not in tensors or any(axis >= tensors[name].ndim for axis in axes):
            raise _misfit(f"cutting {name!r}", "the model has no such parameter or axis")
        shape = tensors[name].shape
        kept[name] = {axis: selection_of(axes[axis], shape[axis]) for axis in axes}
    attributes = {
        path: {name: (_size(model, path, name), after) for name, after in edits.items()}
        for path, edits in cuts.attributes.items()
    }
    plan = Surgery(
        model=class_path(model),
        cuts=kept,
        attributes=attributes,
        blocks=tuple(blocks),
        shapes=shapes_hash(state),
        weights=fingerprint_of(state) if weights else "",
        library=_version(),
    )
    skeleton = without_memory(model)
    _carry_out_(skeleton, plan)
    return replace(plan, result=shapes_hash(skeleton.state_dict()))


def cuts_of(surgery: Surgery) -> Cuts:
    """The cuts that were written down: the inverse of :func:`surgery_for`, without the blocks.

    Sizes are believed; compare them with a model first, as :func:`replay_` does.

    Example:
        >>> cuts = Cuts({"weight": {0: [0, 2]}}, {"": {"out_features": 2}})
        >>> cuts_of(surgery_for(nn.Linear(2, 3, bias=False), cuts)) == cuts
        True
    """
    kept = {
        name: {axis: selection.positions() for axis, selection in axes.items()}
        for name, axes in surgery.cuts.items()
    }
    attributes = {
        path: {name: after for name, (_, after) in edits.items()}
        for path, edits in surgery.attributes.items()
    }
    return Cuts(kept, attributes)


def replay_(model: nn.Module, surgery: Surgery, *, check_weights: bool = False) -> None:
    """Do to ``model``, in place, what was once done to another of its kind.

    Args:
        model: Freshly built, not cut.
        surgery: E.g. from :func:`~secateur.formats.read_surgery`.
        check_weights: Also require that the values are those of the model that was cut, bit for
            bit. The cut model is the old one then, if it was not trained after the cut.

    Raises:
        UsageError: The class, names, shapes, sizes or (if asked) values are others. Nothing is
            changed then.

    Example:
        >>> surgery = surgery_for(nn.Linear(2, 3), Cuts({"weight": {0: [0]}, "bias": {0: [0]}},
        ...                                             {"": {"out_features": 1}}))
        >>> layer = nn.Linear(2, 3)
        >>> replay_(layer, surgery)
        >>> layer
        Linear(in_features=2, out_features=1, bias=True)
    """
    require_fit(model, surgery, check_weights=check_weights)
    with _restored_on_error(model, surgery):
        _carry_out_(model, surgery)
        _require_result(model, surgery)
        remember_(model, surgery)


def load_bundle_(model: nn.Module, bundle: Bundle, *, check_weights: bool = False) -> None:
    """Cut a freshly built model as the bundle says, if it says so, and load its tensors, in place.

    Args:
        model: The original architecture.
        bundle: What to load.
        check_weights: As for :func:`replay_`.

    Raises:
        UsageError: The bundle does not fit the model, which is unchanged then.
        FormatError: The files of the bundle do not fit each other.

    Example:
        >>> from secateur.core.facts import Facts
        >>> from secateur.core.masks import Masks
        >>> cuts = Cuts({"weight": {0: [1]}}, {"": {"out_features": 1}})
        >>> surgery = surgery_for(nn.Linear(1, 2, bias=False), cuts)
        >>> import torch
        >>> bundle = Bundle({"weight": torch.ones(1, 1)}, Masks({}), {}, Facts(), surgery)
        >>> layer = nn.Linear(1, 2, bias=False)
        >>> load_bundle_(layer, bundle)
        >>> layer.weight.tolist()
        [[1.0]]
    """
    surgery = bundle.surgery
    if surgery is None:
        if check_weights:
            raise UsageError(
                "checking the weights before loading a bundle",
                "it has no surgery.json",
                "only a bundle of a network that was cut remembers the weights it was made from",
                "leave check_weights out",
            )
        load_into_(model, bundle)
        return
    if shapes_hash(bundle.tensors) != surgery.result:
        raise FormatError(
            "loading a bundle of a network that was cut",
            "the tensors in model.safetensors are not those that surgery.json leaves",
            "the two files were not written together, or one was altered",
            "copy the folder again from where it came; nothing was changed",
        )
    require_fit(model, surgery, check_weights=check_weights)
    with _restored_on_error(model, surgery):
        _carry_out_(model, surgery)
        _require_result(model, surgery)
        load_into_(model, bundle)
        remember_(model, surgery)


def require_fit(model: nn.Module, surgery: Surgery, *, check_weights: bool = False) -> None:
    """Raise if a surgery was made for another model; see :func:`replay_`."""
    asked = f"replaying a surgery on {kind_of(model)}"
    mine = type(model).__qualname__
    # A script is __main__ today and a module tomorrow, so only the name of the class must agree.
    if not f".{surgery.model}".endswith(f".{mine}"):
        raise _misfit(
            asked, f"it was made for {with_article(surgery.model)}", "classes must be the same"
        )
    tensors = _tensors(model)
    for name, axes in surgery.cuts.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        for axis, selection in axes.items():
            if shape is None or axis >= len(shape) or shape[axis] != selection.size:
                found = f"{name!r} is {shape or 'missing'} here; its axis {axis} had "
                raise _misfit(asked, f"{found}{selection.size} entries there")
    for path, edits in surgery.attributes.items():
        for name, (before, _) in edits.items():
            size = _size(model, path, name)
            if size != before:
                found = f"{name!r} of {path!r} is {size} here, and was {before} there"
                raise _misfit(asked, found, "sizes that the code states must be the same")
    for block in surgery.blocks:
        if block.kind not in BLOCKS:
            raise _misfit(
                asked, f"a block is {block.kind!r}", f"the known kinds are {', '.join(BLOCKS)}"
            )
        if block.module not in dict(model.named_modules()):
            raise _misfit(asked, f"there is no module {block.module!r}")
    state = model.state_dict()
    if shapes_hash(state) != surgery.shapes:
        found = f"the names and shapes of its {len(state)} tensors are not those it was made for"
        raise _misfit(asked, found)
    if check_weights and (not surgery.weights or fingerprint_of(state) != surgery.weights):
        found = (
            f"the SHA-256 of its weights is not {surgery.weights[:12]}"
            if surgery.weights
            else "the surgery does not say which weights it was made for"
        )
        raise _misfit(asked, found, "with other weights the cut network is another one")


def without_memory(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose tensors have no values.

    Example:
        >>> without_memory(nn.Linear(1, 1)).weight.is_meta
        True
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _carry_out_(model: nn.Module, surgery: Surgery) -> None:
    apply_(model, cuts_of(surgery))
    for block in surgery.blocks:
        BLOCKS[block.kind](model, block.module, block.details)


def _require_result(model: nn.Module, surgery: Surgery) -> None:
    if shapes_hash(model.state_dict()) != surgery.result:
        raise _misfit(
            f"replaying a surgery on {kind_of(model)}",
            "the shapes that it leaves are not those that it promises",
            "weights may be tied differently here, or the file was altered",
        )


@contextmanager
def _restored_on_error(model: nn.Module, surgery: Surgery) -> Iterator[None]:
    """Put back everything that a replay touches if it, or what follows, fails."""
    tensors = _tensors(model)
    values = [(x, x.data, x.grad) for x in (tensors[name] for name in surgery.cuts)]
    touched = list(model.modules())
    children = [(module, dict(module._modules)) for module in touched]
    stated = [(module, type(module), dict(vars(module))) for module in touched]
    try:
        yield
    except BaseException:
        for module, modules in children:
            module._modules.clear()
            module._modules.update(modules)
        for module, kind, attributes in stated:
            if type(module) is not kind:  # an attention of which heads were cut
                module.__class__ = kind
            vars(module).update(attributes)
        for x, value, gradient in values:
            x.grad = None
            x.data = value
            x.grad = gradient
        raise


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(remove_duplicate=False)]
    return {**dict(named), **dict(model.named_buffers(remove_duplicate=False))}


def _size(model: nn.Module, path: str, name: str) -> int:
    """An attribute of a module, by a name such as ``config.num_heads`` or ``shape[0]``."""
    asked = f"the size {name!r} of {path or 'the model'!r}"
    plain, _, entry = name.removeprefix("config.").partition("[")
    try:
        holder: Any = model.get_submodule(path)
        value: Any = getattr(holder.config if name.startswith("config.") else holder, plain)
        value = value[int(entry.rstrip("]"))] if entry else value
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _misfit(asked, "there is no such attribute") from error
    if type(value) is not int:
        raise _misfit(asked, f"it is {kind_of(value)}", "sizes are integers")
    return value


def _version() -> str:
    try:
        return version("secateur")
    except PackageNotFoundError:
        return ""


def _misfit(asked: str, found: str, why: str = "") -> UsageError:
    return UsageError(asked, found, why or "it was made for another model", _ORIGINAL)
