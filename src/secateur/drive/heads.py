"""Removing attention heads by their numbers, as Transformers could before its version 5."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import UsageError
from secateur.core.facts import Facts, Note
from secateur.core.masks import Masks
from secateur.core.widths import Width
from secateur.drive.pruned import Pruned
from secateur.frontends.surgery import surgery_for
from secateur.frontends.transformers_config import layers_of
from secateur.frontends.transformers_save import example_for
from secateur.structure import Structure, apply_, couple, cuts_for

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")


def prune_heads(
    model: nn.Module, heads: Mapping[int, Iterable[int]], *, example: Any = None
) -> Pruned:
    """Remove attention heads, in place.

    **formula**: the rows of the query, key and value of a head, and its columns of the output
    projection, are cut; what is left computes what the model did with those heads set to zero.

    Args:
        model: A Transformers model.
        heads: Number of a layer -> numbers of the heads to remove, both counted from 0 as in the
            model as it is now.
        example: Inputs for a trace; made up for texts and images.

    Returns:
        The same model, with its surgery: save it as a bundle, or with
        :func:`~secateur.frontends.transformers_save.save_transformers`.

    Raises:
        UsageError: There is no such layer or head; all heads of a layer are named; the heads of a
            layer cannot be removed (the reason is in the message), or not these without others: in
            grouped-query attention the heads that share a key and value go together. Nothing is
            changed then.

    Shapes: a layer of ``h`` heads keeps ``h - len(heads[layer])``.
    Units: heads, as the configuration counts them.
    Needs: a model that can be traced.
    Source: Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019.
    Differs: ``config.pruned_heads`` is not kept: ``surgery.json`` says what was cut.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=2, vocab_size=9,
        ...                                  num_attention_heads=4, intermediate_size=4)
        >>> bert = transformers.BertModel(config)
        >>> pruned = prune_heads(bert, {0: [1, 3], 1: [0]})
        >>> [tuple(bert.encoder.layer[i].attention.self.query.weight.shape) for i in (0, 1)]
        [(4, 8), (6, 8)]
    """
    path, layers = layers_of(model)
    if not len(layers):
        raise _refused(model, "it has no list of layers", "heads are named by layer", "cut widths")
    inputs = example_for(model, example)
    structure = couple(model, inputs)
    keep: dict[str, Tensor] = {}
    notes = []
    for layer, numbers in heads.items():
        gone = sorted(set(numbers))
        if not 0 <= layer < len(layers):
            found = f"there is no layer {layer}; the layers of {path!r} are 0 to {len(layers) - 1}"
            raise _refused(model, found, "layers are counted from 0", "correct the number")
        if gone:
            width = attention_width(model, structure, layer)
            keep[width.name] = _keep(model, structure, width, layer, gone)
            notes.append(Note("pruned-heads", f"{path}.{layer}", ", ".join(map(str, gone))))
    cuts = cuts_for(model, structure, keep)
    surgery = surgery_for(model, cuts)
    apply_(model, cuts)
    return Pruned(model, Masks({}), Facts(notes=notes), surgery)


def attention_width(model: nn.Module, structure: Structure, layer: int) -> Width:
    """The width of a structure that is the heads of a layer's attention.

    Args:
        model: The model that was traced.
        structure: Its widths.
        layer: Number of the layer.

    Raises:
        UsageError: The heads of this layer are pinned, or more than one width could be meant.
    """
    path, _ = layers_of(model)
    prefix = f"{path}.{layer}."
    attention = _attention_paths(model, prefix)
    inside = [
        width
        for width in structure.widths
        if all(s.parameter.startswith(prefix) for s in width.slices)
        and any(s.parameter.startswith(attention) for s in width.slices)
        and all(len(structure_axes(structure, s.parameter, s.axis)) == s.index.numel()
                for s in width.slices)
        and _several(width)
    ]  # fmt: skip
    if len(inside) == 1:
        return inside[0]
    reasons = {
        reason for (name, _), reason in structure.pinned.items() if name.startswith(attention)
    }
    found = (
        f"{len(inside)} widths of layer {layer} could be its heads"
        if inside
        else f"the heads of layer {layer} are not a width of their own"
    )
    why = "; ".join(sorted(reasons)[:3]) or "its attention was not recognised"
    raise _refused(model, found, why, "list what can be cut with inspect --structure")
