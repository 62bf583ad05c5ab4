"""Structural pruning of language, audio and state-space networks of Transformers.

Every architecture is built small, with random weights, norms and biases (fresh ones hide errors),
and cut in many random ways. A cut network must compute what the masked one computes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.zoo.text import PAIRED, ZOO, build, example_for, words
from secateur.structure import Cuts, Structure, apply_, couple, cuts_for, prove
from secateur.structure.masked import call, masked_outputs, predictions, prove_against

# fmt: off
SINGLE_ONLY = {"mixtral": "the grouped product of PyTorch takes no float64"}
DECODERS = [
    "gpt2",
    "neox",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "mixtral",
    "t5",
    "bart",
]


@cache
def known(name: str) -> tuple[Any, Structure]:
    """Built and coupled once; nobody changes it."""
    model = build(name)
    return model, couple(model, example_for(name))


def choose(structure: Structure, seed: int, only: str = "") -> dict[str, Tensor]:
    """Random groups to keep, in all widths or in one."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for width in structure.widths:
        flags = torch.rand(width.groups, generator=generator) < (0.6, 0.3, 0.9)[seed % 3]
        flags[int(torch.randint(width.groups, (1,), generator=generator))] = True
        if only and flags.all():
            flags[0] = False
        if only in ("", width.name):
            keep[width.name] = flags
    return keep


def cut(model: Any, structure: Structure, keep: dict[str, Tensor]) -> Any:
    """A copy that was cut."""
    small = copy.deepcopy(model)
    apply_(small, cuts_for(model, structure, keep))
    return small


def choices(structure: Structure) -> Iterator[dict[str, Tensor]]:
    """Of everything, and of each kind of width alone; `bench coverage` makes twenty."""
    yield from (choose(structure, seed) for seed in range(2))
    # Layers of one kind are alike but for their number.
    kinds = {re.sub(r"\d+", "", w.name): w.name for w in structure.widths if w.groups > 1}
    yield from (choose(structure, 7, name) for name in kinds.values())


@pytest.mark.parametrize("name", ZOO)
def test_the_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    model, structure = known(name)
    example = example_for(name)
    for number, keep in enumerate(choices(structure)):
        small = cut(model, structure, keep)
        small = small if number else copy.deepcopy(small)
        assert prove(model, small, structure, keep, example).error < 1e-5, keep


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(SINGLE_ONLY)))
def test_in_double_precision(name: str) -> None:
    _, structure = known(name)
    model = build(name).double()
    example = {k: v.double() if v.is_floating_point() else v for k, v in example_for(name).items()}
    # One group of each width: a norm over a single unit would say little in single precision.
    last = {w.name: torch.arange(w.groups) == w.groups - 1 for w in structure.widths}
    for keep in (choose(structure, 3), choose(structure, 4), last):
        assert prove(model, cut(model, structure, keep), structure, keep, example).error < 1e-10


@settings(max_examples=20)
@given(data=st.data(), name=st.sampled_from(["bert-class", "llama", "gpt2", "wav2vec2"]))
def test_any_choice_of_groups(data: st.DataObject, name: str) -> None:
    model, structure = known(name)
    keep = {}
    for width in structure.widths:
        flags = st.lists(st.booleans(), min_size=width.groups, max_size=width.groups)
        keep[width.name] = torch.tensor(data.draw(flags.filter(any)))
    small = cut(model, structure, keep)
    assert prove(model, small, structure, keep, example_for(name)).error < 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_a_cut_network_trains(name: str) -> None:
    """One backward step: the gradients have the new shapes, and the loss of the step is finite."""
    model, structure = known(name)
    small = cut(model, structure, choose(structure, 1)).eval()
    if name == "rwkv":
        small.train()  # without its state, which is written in place and so has no gradient
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    loss = sum(x.square().mean() for x in predictions(call(small, example_for(name))))
    assert isinstance(loss, Tensor)
    loss.backward()
    for key, p in small.named_parameters():
        assert p.grad is None or p.grad.shape == p.shape, key
    optimizer.step()
    again = predictions(call(small, example_for(name)))
    assert all(bool(x.isfinite().all()) for x in again)
    left = sum(p.numel() for p in small.parameters())
    assert left < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_of_keys_and_values_fits_after_a_cut(name: str) -> None:
    model, structure = known(name)
    small = cut(model, structure, choose(structure, 0))
    example = example_for(name)
    key = "decoder_input_ids" if name in PAIRED else "input_ids"
    rest = {k: v for k, v in example.items() if k != key}
    with torch.no_grad():
        whole = small(**example, use_cache=False).logits
        cached = small(**example, use_cache=True).logits
        past, steps = None, []
        for token in example[key].split(1, dim=1):
            out = small(**rest, **{key: token}, past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(whole, cached, atol=1e-5, rtol=1e-4)
    assert torch.allclose(whole, torch.cat(steps, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bart", "mamba"])
def test_generating_with_and_without_a_cache_gives_the_same_text(name: str) -> None:
    model, structure = known(name)
    small = cut(model, structure, choose(structure, 0))
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    found = [small.generate(words(), use_cache=flag, **options) for flag in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ZOO)
def test_most_parameters_can_be_removed(name: str) -> None:
    model, structure = known(name)
    small = cut(model, structure, {w.name: torch.arange(w.groups) == 0 for w in structure.widths})
    total = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for p in small.parameters()) / total
    # What BERT without a head returns is its residual stream, so that keeps its width.
    assert left < (0.7 if name == "bert" else 0.1), left


#: Reasons that a reader accepts, by how they begin.
ACCEPTED = (
    "they are looked up by index",  # words and positions
    "it reaches the output of the model",
    "positions of a kernel are not removed",
    "it reads a tensor of fixed size",
    "experts are chosen by data",
    "axis ",  # of one position only
    "the example inputs do not reach it",
)


@pytest.mark.parametrize("name", ZOO)
def test_what_stays_says_why(name: str) -> None:
    _, structure = known(name)
    for (parameter, axis), reason in structure.pinned.items():
        if name == "bloom" and "self_attention" in parameter:
            assert "size the code fixes" in reason  # the slopes of ALiBi, one for each head
            continue
        small = ("inv_freq", "q_norm", "k_norm", "mlp.gate.weight", "masked_spec_embed")
        if any(part in parameter for part in small):
            continue  # rotary frequencies, norms of a head, the router
        assert reason.startswith(ACCEPTED), (parameter, axis, reason)


def test_heads_of_a_group_go_together() -> None:
    _, structure = known("qwen2")
    heads = structure.by_name["model.layers.0.self_attn.q_proj"]
    sizes = {s.parameter.split(".")[-2]: s.index.shape for s in heads.slices}
    assert sizes["q_proj"] == (2, 16)
    assert sizes["k_proj"] == sizes["v_proj"] == (2, 8)


def test_rows_of_experts_keep_whole_16_bytes() -> None:
    """The kernel refuses other lengths, so neighbours go four at a time."""
    _, structure = known("mixtral")
    width = structure.by_name["model.layers.0.mlp.experts"]
    assert width.groups == 12
    assert "16 bytes" in width.why


def test_a_weight_norm_of_removed_rows_is_zero_and_not_undefined() -> None:
    normed = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(normed(nn.Linear(4, 8)), nn.ReLU(), normed(nn.Linear(8, 3)))
    example = torch.randn(2, 4)
    structure = couple(model, example)
    keep = choose(structure, 1)
    small = cut(model, structure, keep)
    assert prove(model, small, structure, keep, example).error < 1e-5
    with torch.no_grad():
        small[2].bias[0] = float("nan")
    assert prove(model, small, structure, keep, example).error == float("inf")


# -- planted errors -----------------------------------------------------------------------------


def swapped(cuts: Cuts, parameter: str, axis: int) -> Cuts:
    """The same cut, with two kept positions of one slice in the wrong order."""
    kept = {name: dict(axes) for name, axes in cuts.kept.items()}
    first, second, *rest = kept[parameter][axis]
    kept[parameter][axis] = [second, first, *rest]
    return Cuts(kept, cuts.attributes)


@pytest.mark.parametrize("name", ["bert-class", "llama", "t5", "wav2vec2", "mamba"])
def test_a_swap_in_any_slice_is_seen(name: str) -> None:
    model, structure = known(name)
    keep = choose(structure, 0)
    cuts = cuts_for(model, structure, keep)
    wanted = masked_outputs(model, structure, keep, example_for(name))
    width = structure.widths[-1]
    for part in width.slices:
        if len(cuts.kept.get(part.parameter, {}).get(part.axis, [])) < 2:
            continue
        wrong = copy.deepcopy(model)
        apply_(wrong, swapped(cuts, part.parameter, part.axis))
        error = prove_against(wanted, wrong, example_for(name)).error
        assert error > 1e-4, (part.parameter, part.axis)


@pytest.mark.parametrize("name", ["bert-class", "gpt2", "rwkv"])
def test_a_width_without_one_of_its_slices_is_seen(name: str) -> None:
    model, structure = known(name)
    keep = choose(structure, 0)
    cuts = cuts_for(model, structure, keep)
    wanted = masked_outputs(model, structure, keep, example_for(name))
    for part in structure.widths[0].slices[:6]:
        kept = {key: dict(axes) for key, axes in cuts.kept.items()}
        positions = kept[part.parameter].pop(part.axis)
        wrong = copy.deepcopy(model)
        apply_(wrong, Cuts(kept, cuts.attributes))
        assert len(positions) < len(part.index.reshape(-1))
        with pytest.raises(RuntimeError):
            prove_against(wanted, wrong, example_for(name))


BIG = """
import json, resource, torch, transformers
from secateur.structure import couple, cuts_for
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=4)).eval()
structure = couple(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
cuts = cuts_for(model, structure, {w.name: torch.arange(w.groups) % 2 == 0 for w in structure.widths})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([structure.trace.meta, len(structure.widths), len(cuts.kept), peak]))
"""


def test_a_network_of_the_shape_of_llama_2_7b_takes_little_memory() -> None:
    """Four of its 32 layers, on the meta device; their weights alone would take 4 GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BIG], capture_output=True, text=True, env=environment, check=True
    )
    meta, widths, touched, peak = json.loads(done.stdout.splitlines()[-1])
    assert meta
    assert widths == 1 + 2 * 4
    assert touched > 4 * 9
    assert peak < 1.5
