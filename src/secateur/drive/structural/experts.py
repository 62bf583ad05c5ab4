"""Removing experts of mixtures: those that add least where they are chosen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.arguments import plain_integer
from secateur.core.batches import Data, as_data, evaluating, first_of, inputs_of, lack, to_device
from secateur.core.errors import DataError, NeedsData, UsageError, first_line, kind_of
from secateur.core.facts import Facts, WidthFacts, environment
from secateur.core.masks import Masks
from secateur.core.select import keep_top
from secateur.core.selectors import matches, require_hits
from secateur.core.slots import device_of
from secateur.drive.network import copy_of, network_of
from secateur.drive.pruned import Pruned
from secateur.formats import BlockEdit
from secateur.frontends.remembered import remember_
from secateur.frontends.surgery import surgery_for
from secateur.stats.experts import expert_outputs
from secateur.structure.cut import apply_
from secateur.structure.deletion import delete_entries_
from secateur.structure.experts import Mixture, expert_cuts, mixtures_of, without_experts
from secateur.structure.masked import call, compare
from secateur.structure.outputs import predictions

# Sums over fewer numbers; gates of half precision are rounded after another softmax.
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4}


def drop_experts(
    model: nn.Module,
    drop: int | float,
    data: Any = None,
    *,
    example_inputs: Any = None,
    ignore: Sequence[str] = (),
) -> Pruned:
    r"""Remove the experts of least saliency from every mixture of a copy of ``model``.

    **formula**: :math:`S_j = \frac{1}{|X_j|} \sum_{x \in X_j} g_j(x) \lVert f_j(x) \rVert_2`; the
    lowest of each layer go. What is left computes what the model computes when the router's logits
    of the removed experts are minus infinity; this is checked.
    Shapes: those of the network stay.
    Units: experts.
    Needs: batches of inputs.
    Source: REAP, arXiv 2510.13999.
    Differs: a token that was sent to more experts than are left is sent to those that are left, with
    a note.

    Args:
        model: Any torch module with mixtures of experts. It is not changed.
        drop: How many experts of each layer go, or which share of them (below 1). Where a router has
            groups, each loses equally many: more may go then, with a note.
        data: Batches; their first is the example by default.
        example_inputs: A tensor, a tuple, or a mapping of named inputs.
        ignore: Selectors of mixtures that stay whole.

    Returns:
        The copy, with a width for each layer and the saliencies in its facts, and the surgery.

    Raises:
        UsageError: There is no mixture, or fewer experts than are to go, or the network does not run
            without them.
        NeedsData: No batches were given.
        DataError: The result does not compute what the masked model does.

    Example:
        >>> import transformers
        >>> config = transformers.MixtralConfig(
        ...     hidden_size=8, num_hidden_layers=1, vocab_size=9, num_attention_heads=2,
        ...     num_key_value_heads=2, intermediate_size=4, num_local_experts=4)
        >>> mixtral = transformers.MixtralForCausalLM(config)
        >>> small = drop_experts(mixtral, 1, [{"input_ids": torch.ones(2, 5, dtype=torch.long)}])
        >>> small.model.config.num_local_experts
        3
    """
    begun = time.perf_counter()
    drop = plain_integer(drop)
    found = as_data(data)
    model = network_of(model)
    mixtures = _chosen(model, ignore)
    if found is None or found.train is None:
        raise NeedsData(
            "removing experts",
            lack(found),
            "their saliency is measured on training batches",
            "pass data=",
        )
    example = _first(model, found) if example_inputs is None else example_inputs
    batches = found.sample()
    scores = {m.path: expert_outputs(model, m.path, batches) for m in mixtures}
    keep = {m.path: _kept(m, scores[m.path], drop) for m in mixtures}
    small = copy_of(model)
    cuts, edits, notes = expert_cuts(small, keep)
    surgery = surgery_for(small, cuts, [BlockEdit(e.module, e.kind, e.details) for e in edits])
    apply_(small, cuts)
    for edit in edits:
        delete_entries_(small, edit.module, edit.details)
    error = _proof(model, small, keep, example)
    facts = Facts({"drop_experts": drop}, environment=environment())
    facts.widths = [
        WidthFacts(m.path, m.experts, len(keep[m.path]), (m.router,), "experts") for m in mixtures
    ]
    for where, text in notes.items():
        facts.note("experts", where, text)
    for mixture in mixtures:
        total, gone = _asked(mixture, drop), mixture.experts - len(keep[mixture.path])
        if gone != total:
            text = (
                f"{gone} experts go, not {total}: each of its {mixture.groups} groups loses as many"
            )
            facts.note("experts", mixture.path, text)
    facts.measures = {
        "expert_saliency": {path: values.tolist() for path, values in scores.items()},
        "proof": error,
        "parameters": [sum(p.numel() for p in net.parameters()) for net in (model, small)],
        "seconds": time.perf_counter() - begun,
    }
    return Pruned(small, Masks({}), facts, remember_(small, surgery))


def _chosen(model: nn.Module, ignore: Sequence[str]) -> list[Mixture]:
    mixtures = mixtures_of(model)
    require_hits(ignore, [(m.path, "") for m in mixtures], "the selector of mixtures")
    chosen = [m for m in mixtures if not any(matches(s, m.path, "") for s in ignore)]
    if not chosen:
        raise UsageError(
            f"removing experts of {kind_of(model)}",
            f"none of {len(mixtures)} mixtures takes part",
            "a mixture has stacked or listed experts, and beside them a router with a row for each",
            "see mixtures_of(model)",
        )
    return chosen


def _first(model: nn.Module, data: Data) -> Any:
    assert data.train is not None
    positional, named = inputs_of(to_device(first_of(data.train), device_of(model)))
    return named or positional


def _asked(mixture: Mixture, drop: int | float) -> int:
    return drop if isinstance(drop, int) else round(drop * mixture.experts)


def _kept(mixture: Mixture, scores: Tensor, drop: int | float) -> list[int]:
    """The experts of highest saliency; of each group equally many."""
    size = mixture.experts // mixture.groups
    total = _asked(mixture, drop)
    each = size - -(-total // mixture.groups)
    if total < 1 or each < 1 or (not isinstance(drop, int) and not drop < 1):
        raise UsageError(
            f"removing {drop} of the experts of {mixture.path!r}",
            f"it has {mixture.experts} in {mixture.groups} groups",
            "at least one expert goes, and one of each group stays",
            "give a number of experts, or a share below 1",
        )
    flags = keep_top(scores.float().reshape(mixture.groups, size).cpu(), each)
    return flags.reshape(-1).nonzero()[:, 0].tolist()


def _proof(model: nn.Module, small: nn.Module, keep: dict[str, list[int]], example: Any) -> float:
    with torch.no_grad(), evaluating(model), without_experts(model, keep):
        wanted = predictions(call(model, example))
    try:
        with torch.no_grad(), evaluating(small):
            found = predictions(call(small, example))
    except (RuntimeError, ValueError, TypeError, IndexError) as failure:
        raise UsageError(
            f"removing experts of {kind_of(model)}",
            f"it does not run without them ({first_line(failure)})",
            "a router may need more experts than are left, e.g. two of each of its groups",
            "remove fewer",
        ) from failure
    error = compare(found, wanted).error
    near = max(_NEAR.get(p.dtype, 5e-2) for p in model.parameters())
    if not error <= near:
        raise DataError(
            "the proof of removed experts",
            f"the cut network differs from the masked one by {error:.2g}, {near:g} is allowed",
            "its router uses the logits in a way that is not understood",
            "leave its mixtures out with ignore=, and report the network, please",
        )
    return error
