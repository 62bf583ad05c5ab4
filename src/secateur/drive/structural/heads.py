"""Removing attention heads by their numbers, as Transformers could before its version 5."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import require_kind
from secateur.core.errors import DataError, SecateurError, UsageError, first_line, kind_of
from secateur.core.facts import Facts, Note
from secateur.core.masks import Masks
from secateur.core.widths import Width
from secateur.drive.network import network_of
from secateur.drive.pruned import Pruned
from secateur.drive.structural.cutting import proved
from secateur.frontends.remembered import remember_
from secateur.frontends.surgery import surgery_for
from secateur.frontends.transformers_config import layers_of
from secateur.frontends.transformers_example import example_for
from secateur.structure import Cuts, Structure, apply_, couple, cuts_for

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_GROUPS = ("num_key_value_heads", "num_kv_heads")


def prune_heads(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    *,
    example: Any = None,
    layers: str | None = None,
) -> Pruned:
    """Remove attention heads, in place.

    **formula**: the rows of the query, key and value of a head, and its columns of the output
    projection, are cut; what is left computes what the model did with those heads set to zero.

    Args:
        model: A Transformers model.
        heads: Number of a layer -> numbers of the heads to remove, both counted from 0 as in the
            model as it is now.
        example: Inputs for a trace; made up for texts and images.
        layers: Path of the list of layers, for a model with several (an encoder and a decoder).

    Returns:
        The same model, with its surgery, which includes what was cut before: save it as a bundle,
        or with :func:`~secateur.frontends.transformers_save.save_transformers`. The largest relative
        difference to the model with those heads set to zero is ``facts.measures["proof"]``.

    Raises:
        UsageError: There is no such layer or head; all heads of a layer are named; the heads of a
            layer cannot be removed (the reason is in the message), or not these without others: in
            grouped-query attention the heads that share a key and value go together; or a copy
            without them does not run, or computes something else. Nothing is changed then.

    Shapes: a layer of ``h`` heads keeps ``h - len(heads[layer])``.
    Units: heads, as the configuration counts them.
    Needs: a model that can be traced.
    Source: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
    Differs: ``config.pruned_heads`` is kept up only where it exists: ``surgery.json`` says what was
    cut.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=2, vocab_size=9,
        ...                                  num_attention_heads=4, intermediate_size=4)
        >>> bert = transformers.BertModel(config)
        >>> pruned = prune_heads(bert, {0: [1, 3], 1: [0]})
        >>> [tuple(bert.encoder.layer[i].attention.self.query.weight.shape) for i in (0, 1)]
        [(4, 8), (6, 8)]
    """
    model = network_of(model)
    gone = _numbers(heads)
    path, count = _numbered(model, layers)
    example = example_for(model, example)
    structure = couple(model, example)
    keep: dict[str, Tensor] = {}
    stated: dict[str, dict[str, int]] = {}
    for layer, numbers in gone.items():
        if not 0 <= layer < count:
            found = f"there is no layer {layer}; those of {path!r} are 0 to {count - 1}"
            raise _refused(model, found, "layers are counted from 0", "correct the number")
        if numbers:
            width = attention_width(model, structure, f"{path}.{layer}")
            flags = _keep(model, width, f"layer {layer}", numbers)
            keep[width.name] = flags
            stated |= _stated(model, width, flags)
    cuts = cuts_for(model, structure, keep)
    attributes = {
        module: {**sizes, **cuts.attributes.get(module, {})} for module, sizes in stated.items()
    }
    cuts = Cuts(cuts.kept, {**cuts.attributes, **attributes})
    error = _proved(model, cuts, structure, keep, example)
    whole = remember_(
        model, surgery_for(model, cuts)
    )  # raises if it cannot be joined to earlier cuts
    apply_(model, cuts)
    _list_(model, gone)
    notes = [Note("pruned-heads", f"{path}.{n}", f"heads {which}") for n, which in gone.items()]
    return Pruned(model, Masks({}), Facts(notes=notes, measures={"proof": error}), whole)


def _proved(
    model: nn.Module, cuts: Cuts, structure: Structure, keep: Mapping[str, Tensor], example: Any
) -> float:
    """How nearly a cut copy computes what the model does with those heads set to zero."""
    do = "remove other heads"
    try:
        return proved(model, cuts, structure, keep, example).error
    except DataError as error:
        raise _refused(model, error.found, error.why, do) from error
    except SecateurError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        found = f"it does not run without them ({first_line(error)})"
        why = "its code ties their number to others in a way that no operator shows"
        raise _refused(model, found, why, do) from error


def _numbers(heads: Any) -> dict[int, list[int]]:
    """Number of a layer -> numbers of heads, in order."""
    example = "heads={0: [1]}"
    what = "a mapping from numbers of layers to numbers of heads"
    require_kind("heads", heads, Mapping, what=what, write=example)
    found = {}
    for layer, numbers in heads.items():
        require_kind("a layer", layer, Integral, what="an integer", write=example)
        listed = () if isinstance(numbers, str) else Iterable
        asked, what = f"the heads of layer {layer}", "a list of integers"
        require_kind(asked, numbers, listed, what=what, write=example)
        named = set(numbers)
        for number in named:
            asked = f"a head of layer {layer}"
            require_kind(asked, number, Integral, what="an integer", write=example)
        found[int(layer)] = sorted(map(int, named))
    return found


def attention_width(model: nn.Module, structure: Structure, layer: str) -> Width:
    """The width of a structure that is the heads of a layer's attention.

    It is the one whose groups are several rows in each of its weights, all inside one module of
    the layer: of other widths each group is a single row, or they reach out of the layer.

    Args:
        model: The model that was traced.
        structure: Its widths.
        layer: Path of the layer.

    Raises:
        UsageError: The heads of this layer are pinned, or more than one width could be meant.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9,
        ...                                  num_attention_heads=2, intermediate_size=4)
        >>> bert = transformers.BertModel(config)
        >>> structure = couple(bert, example_for(bert))
        >>> attention_width(bert, structure, "encoder.layer.0").groups
        2
    """
    inside = [
        width
        for width in structure.widths
        if all(s.parameter.startswith(f"{layer}.") for s in width.slices)
        and _rows_of_a_group(model, width) > 1
    ]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(width.name for width in inside)
        why = "a layer with two attentions (itself and an encoder) has two kinds of heads"
        found = f"{len(inside)} widths of {layer} could be its heads: {names}"
        raise _refused(model, found, why, "cut one of these widths by its name instead")
    if not any(True for _ in model.get_submodule(layer).parameters()):
        why = "a block that was removed passes its input on, and has none"
        raise _refused(model, f"{layer} has no weights", why, "name another layer")
    pinned = {reason for (n, _), reason in structure.pinned.items() if n.startswith(f"{layer}.")}
    shared = [
        w for w in structure.widths if any(s.parameter.startswith(f"{layer}.") for s in w.slices)
    ]
    tied = [width for width in shared if _rows_of_a_group(model, width) > 1]
    if tied:
        others = [s.parameter for s in tied[0].slices if not s.parameter.startswith(f"{layer}.")]
        raise _refused(
            model,
            f"the heads of {layer} are not a width of their own",
            f"they go together with those of {others[0].rpartition('.')[0]}, as where layers share "
            "one bias of positions",
            f"cut the width {tied[0].name!r} with shrink",
        )
    raise _refused(
        model,
        f"the heads of {layer} are not a width of their own",
        "; ".join(sorted(pinned)[:3])
        or f"it takes part in {', '.join(w.name for w in shared[:3]) or 'no width'}",
        "see what can be cut with secateur inspect MODEL --structure",
    )


def _keep(model: Any, width: Width, layer: str, gone: list[int]) -> Tensor:
    each = _heads_per_group(model)
    total = width.groups * each
    wrong = [head for head in gone if not 0 <= head < total]
    if wrong:
        found = f"{layer} has no head {wrong[0]}; its heads are 0 to {total - 1}"
        raise _refused(
            model, found, "heads are counted from 0 in the model as it is now", "correct it"
        )
    if len(gone) == total:
        why = "an attention without heads passes nothing on"
        raise _refused(model, f"all {total} heads of {layer} are named", why, "keep at least one")
    flags = torch.ones(width.groups, dtype=torch.bool)
    for group in range(width.groups):
        members = set(range(group * each, (group + 1) * each))
        named = members & set(gone)
        if named and named != members:
            raise _refused(
                model,
                f"in {layer} head {min(named)} is named without {sorted(members - named)}",
                f"heads {min(members)} to {max(members)} share one key and value, and go together",
                f"name all {each} heads of the group, or none of them",
            )
        flags[group] = not named
    return flags


def _heads_per_group(model: Any) -> int:
    """How many query heads share a key and value: the same before and after a cut."""
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    heads = getattr(config, "num_attention_heads", None)
    groups = next((getattr(config, name) for name in _GROUPS if hasattr(config, name)), None)
    if type(heads) is int and type(groups) is int and groups and heads % groups == 0:
        return heads // groups
    return 1


def _stated(model: Any, width: Width, flags: Tensor) -> dict[str, dict[str, int]]:
    """Numbers of heads that the attention states, whether its code uses them or not."""
    each, kept = _heads_per_group(model), int(flags.sum())
    new = dict.fromkeys(_HEADS, (width.groups * each, kept * each))
    new |= dict.fromkeys(_GROUPS, (width.groups, kept))
    found: dict[str, dict[str, int]] = {}
    for module in {s.parameter.rsplit(".", 2)[0] for s in width.slices}:
        own = vars(model.get_submodule(module))
        sizes = {name: after for name, (before, after) in new.items() if own.get(name) == before}
        if "all_head_size" in own and own["all_head_size"] % width.groups == 0:
            sizes["all_head_size"] = own["all_head_size"] // width.groups * kept
        if sizes:
            found[module] = sizes
    return found


def _list_(model: Any, gone: Mapping[int, list[int]]) -> None:
    """Transformers before version 5 kept a list of removed heads, by their first numbers."""
    told = getattr(model.config, "pruned_heads", None)
    if not isinstance(told, dict):
        return
    known = {int(layer): set(numbers) for layer, numbers in told.items()}
    for layer, numbers in gone.items():
        before = known.get(layer, set())
        left = [head for head in range(10**6) if head not in before][: max(numbers, default=0) + 1]
        known[layer] = before | {left[number] for number in numbers}
    model.config.pruned_heads = {layer: sorted(numbers) for layer, numbers in known.items()}


def _numbered(model: nn.Module, layers: str | None) -> tuple[str, int]:
    if layers is None:
        path, found = layers_of(model)
        if not len(found):
            why = "heads are named by the number of their layer"
            raise _refused(model, "it has no list of layers", why, "cut widths by their names")
        return path, len(found)
    try:
        named = model.get_submodule(layers)
    except AttributeError:
        named = None
    if not isinstance(named, nn.ModuleList):
        lists = [p for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        why = f"the lists of this model are {', '.join(lists[:6]) or 'none'}"
        raise _refused(model, f"{layers!r} is no list of layers", why, "name one of them")
    return layers, len(named)


def _rows_of_a_group(model: nn.Module, width: Width) -> int:
    """Of the weight where they are fewest; none if the width has no matrix, as that of experts."""
    matrices = (s for s in width.slices if _matrix(model, s.parameter))
    return min((s.index.shape[1] for s in matrices), default=0)


def _matrix(model: nn.Module, name: str) -> bool:
    path, _, attribute = name.rpartition(".")
    x = getattr(model.get_submodule(path), attribute)
    return bool(x.ndim > 1) and hasattr(model.get_submodule(path), "bias")


def _refused(model: nn.Module, found: str, why: str, do: str) -> UsageError:
    return UsageError(
        f"removing heads of {kind_of(model)}", found, why, f"{do}; nothing was changed"
    )
