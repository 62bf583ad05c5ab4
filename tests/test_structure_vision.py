"""Structural pruning of vision networks and of hand-written ones: every cut equals its mask."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bench.zoo.fresh import refresh_
from bench.zoo.handmade import NETWORKS
from bench.zoo.tokens import Attention
from bench.zoo.vision import MODELS, Example
from secateur.core.batches import evaluating
from secateur.structure import Cuts, Structure, apply_, couple, cuts_for, mask_, prove
from secateur.structure.masked import call, masked_outputs, predictions, prove_against

Keep = dict[str, Tensor]


ALL = MODELS | NETWORKS
#: Choices of groups for each; Transformers models take longer.
CHOICES = {name: 6 if name in NETWORKS else 3 for name in ALL}  # bench/coverage takes 20 of each
#: Random values are small where they are multiplied with others.
SMALL = 0.3


@functools.cache
def traced(name: str) -> tuple[nn.Module, Example, Structure]:
    """A network with random weights in double precision, an example, and its structure."""
    torch.manual_seed(0)
    model, example = ALL[name]()
    refresh_(model)
    model, example = model.eval().double(), _cast(example, torch.float64)
    return model, example, couple(model, example)


def _cast(example: Example, dtype: torch.dtype) -> Example:
    if isinstance(example, Mapping):
        return {key: _cast(x, dtype) for key, x in example.items()}
    if isinstance(example, tuple):
        return tuple(_cast(x, dtype) for x in example)
    return example.to(dtype) if example.is_floating_point() else example


def choose(structure: Structure, seed: int) -> Keep:
    """Some groups of every width; of every third choice, of one width only."""
    generator = torch.Generator().manual_seed(seed)
    widths = list(structure.widths)
    if seed % 3 == 2:
        widths = [widths[int(torch.randint(len(widths), (1,), generator=generator))]]
    keep = {}
    for width in widths:
        flags = torch.rand(width.groups, generator=generator) > 0.4
        flags[int(torch.randint(width.groups, (1,), generator=generator))] = True
        keep[width.name] = flags
    return keep


def cut(model: nn.Module, structure: Structure, keep: Keep) -> nn.Module:
    small = copy.deepcopy(model)
    apply_(small, cuts_for(model, structure, keep))
    return small


@pytest.mark.parametrize("name", ALL)
def test_a_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    model, example, structure = traced(name)
    for seed in range(CHOICES[name]):
        keep = choose(structure, seed)
        found = prove(model, cut(model, structure, keep), structure, keep, example)
        assert found.error < 1e-10, (seed, found)
        assert found.outputs


@pytest.mark.parametrize("name", ALL)
def test_in_single_precision_and_after_a_copy(name: str) -> None:
    model, example, structure = traced(name)
    model, example = copy.deepcopy(model).float(), _cast(example, torch.float32)
    keep = choose(structure, 0)
    small = copy.deepcopy(cut(model, structure, keep))
    assert prove(model, small, structure, keep, example).error < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_most_of_it_can_be_removed_and_the_rest_has_a_reason(name: str) -> None:
    model, example, structure = traced(name)
    keep = {width.name: torch.arange(width.groups) < 1 for width in structure.widths}
    small = cut(model, structure, keep)
    assert prove(model, small, structure, keep, example).error < 1e-10
    left, total = (sum(x.numel() for x in net.parameters()) for net in (small, model))
    assert left < 0.5 * total

    covered: dict[tuple[str, int], int] = {}
    for width in structure.widths:
        for part in width.slices:
            key = (part.parameter, part.axis)
            covered[key] = covered.get(key, 0) + part.index.numel()
    for parameter, x in model.named_parameters():
        for axis, size in enumerate(x.shape):
            missing = size - covered.get((parameter, axis), 0)
            assert (missing > 0) == ((parameter, axis) in structure.pinned)
    assert not [text for text in structure.pinned.values() if "no rule" in text]


@pytest.mark.parametrize("name", ALL)
def test_a_cut_network_trains(name: str) -> None:
    """Gradients are those of the masked network, unless something reduces over cut units."""
    model, example, structure = traced(name)
    keep = choose(structure, 1)
    cuts = cuts_for(model, structure, keep)
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3, momentum=0.9)
    apply_(small, cuts, optimizer)
    mask_(masked, structure, keep)
    for net in (small, masked):
        with evaluating(net):
            losses = [x.square().mean() for x in predictions(call(net, example)) if x.requires_grad]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    wanted = dict(masked.named_parameters())
    for parameter, x in small.named_parameters():
        if x.grad is None:
            continue
        assert x.grad.shape == x.shape
        assert bool(x.grad.isfinite().all())
        if not structure.trace.reductions:
            reference = _part(wanted[parameter].grad, cuts, parameter)
            scale = float(reference.abs().max()) or 1.0
            assert float((x.grad - reference).abs().max()) < 1e-8 * max(scale, 1e-6)
    optimizer.step()
    with evaluating(small), torch.no_grad():
        assert all(bool(x.isfinite().all()) for x in predictions(call(small, example)))


def _part(x: Tensor | None, cuts: Cuts, parameter: str) -> Tensor:
    assert x is not None
    for axis, positions in cuts.kept.get(parameter, {}).items():
        x = x.index_select(axis, torch.tensor(positions))
    return x


@pytest.mark.parametrize("name", ["DenseNet", "LSTM", "CrossViT", "XCA"])
def test_swapped_positions_are_noticed(name: str) -> None:
    model, example, structure = traced(name)
    for width in structure.widths:
        keep = {width.name: torch.arange(width.groups) < max(2, width.groups - 1)}
        right = cuts_for(model, structure, keep)
        wanted = masked_outputs(model, structure, keep, example)
        for parameter, axes in right.kept.items():
            for axis, positions in axes.items():
                if len(positions) < 2 or "running" in parameter:
                    continue
                swapped = [positions[-1], *positions[1:-1], positions[0]]
                kept = {**right.kept, parameter: {**axes, axis: swapped}}
                small = copy.deepcopy(model)
                apply_(small, replace(right, kept=kept))
                error = prove_against(wanted, small, example).error
                harmless = _shifts_scores(parameter)
                assert harmless or error > 1e-9, (width.name, parameter, axis)


def _shifts_scores(parameter: str) -> bool:
    """The bias of keys shifts all scores of a query alike, which a softmax ignores."""
    return parameter.endswith("wk.bias")


@pytest.mark.parametrize("name", ["DenseNet", "LSTM", "XCA"])
def test_a_missing_slice_is_noticed(name: str) -> None:
    """A parameter that was left uncut: the network fails, or computes something else."""
    model, example, structure = traced(name)
    for width in structure.widths:
        keep = {width.name: torch.arange(width.groups) < max(2, width.groups - 1)}
        right = cuts_for(model, structure, keep)
        wanted = masked_outputs(model, structure, keep, example)
        for parameter in right.kept:
            kept = {key: axes for key, axes in right.kept.items() if key != parameter}
            small = copy.deepcopy(model)
            apply_(small, replace(right, kept=kept))
            try:
                error = prove_against(wanted, small, example).error
            except RuntimeError:  # shapes do not fit
                continue
            assert error > 1e-9, (width.name, parameter)


def test_a_number_of_heads_is_told_from_a_number_in_the_code() -> None:
    """``view(b, n, 3, heads, width // heads)`` with three heads."""
    net = nn.Sequential(nn.Linear(5, 12), Attention(12, 3), nn.Linear(12, 2)).eval().double()
    example = torch.randn(2, 6, 5, dtype=torch.float64)
    structure = couple(net, example)
    # The code computes the size of a head from its input, so that is cut along.
    assert [(w.name, w.groups) for w in structure.widths] == [("0", 3), ("1.proj", 12)]
    keep = {"0": torch.tensor([True, False, True])}
    small = cut(net, structure, keep)
    assert prove(net, small, structure, keep, example).error < 1e-10


@pytest.mark.parametrize("name", ["LSTM", "LSTM both ways", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_are_seen_in_every_precision(name: str, dtype: torch.dtype) -> None:
    """In single precision PyTorch has a fused operator for them on processors."""
    model, example = NETWORKS[name]()
    structure = couple(model.to(dtype).eval(), example)
    assert structure.trace.meta
    assert "rnn" in {width.name for width in structure.widths}
