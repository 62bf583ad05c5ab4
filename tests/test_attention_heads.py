"""Heads of nn.MultiheadAttention are cut, and what is left computes what the others at zero compute."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from attention_cases import (
    EACH,
    NETWORKS,
    PADDING,
    TOLERANCE,
    E,
    H,
    L,
    N,
    S,
    build,
    first,
    heads_of,
    inputs,
    numbers,
    recipe,
    stock,
)
from torch import nn

import secateur
from secateur.core import attention
from secateur.core.attention import PrunedAttention, is_plain
from secateur.core.errors import UsageError
from secateur.drive.structural.layer_uses import layers_of
from secateur.evaluate.cost import cost_of
from secateur.frontends.surgery import replay_, surgery_for
from secateur.structure import apply_, couple, cuts_for, mask_, prove
from secateur.structure.masked import call

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_that_are_cut_are_heads_at_zero(name: str) -> None:
    net, example = build(name), NETWORKS[name][1]
    attentions = [m for m in net.modules() if isinstance(m, nn.MultiheadAttention)]
    structure, keep = couple(net, example), heads_of(net, example)
    assert len(keep) == len(attentions)
    cuts = cuts_for(net, structure, keep)
    small, masked = copy.deepcopy(net), copy.deepcopy(net)
    apply_(small, cuts)
    mask_(masked, structure, keep)
    left = [m for m in small.modules() if type(m) is PrunedAttention]
    assert len(left) == len(attentions)
    for module in left:
        kept = int(keep[next(n for n, m in small.named_modules() if m is module)].sum())
        assert (module.num_heads, module.embed_dim) == (kept, E)
        assert module.out_proj.weight.shape == (E, kept * E // H)
    wanted, found = first(call(masked, example)), first(call(small, example))
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert (wanted - first(call(net, example))).abs().max() > 1e-3  # there was something to lose
    slopes = []
    for each in (masked, small):
        out = first(call(each, example))
        out.mul(torch.cos(torch.arange(out.numel())).reshape(out.shape)).sum().backward()
        slopes.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    for parameter, slope in slopes[1].items():
        whole = slopes[0][parameter]
        for axis, kept_places in cuts.kept.get(parameter, {}).items():
            whole = whole.index_select(axis, torch.tensor(kept_places))
        torch.testing.assert_close(slope, whole, **TOLERANCE)
    proof = prove(net, copy.deepcopy(small), structure, keep, example)
    assert proof.error < 1e-12 < proof.scale


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_and_widths_are_cut_together(name: str) -> None:
    net, example = build(name), NETWORKS[name][1]
    structure = couple(net, example)
    torch.manual_seed(1)
    keep = {w.name: torch.rand(w.groups) > 0.4 for w in structure.widths}
    keep = {name: flags.index_fill(0, torch.tensor(0), True) for name, flags in keep.items()}
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    assert prove(net, small, structure, keep, example).error < 1e-12
    if name != "transformer":  # of which the width is that of its inputs
        narrow = next(m for m in small.modules() if isinstance(m, nn.MultiheadAttention))
        assert narrow.embed_dim < E


def test_without_gradients_no_fused_operator_reads_the_cut_weights() -> None:
    net, x = build("encoder"), numbers(N, L, 6)
    keep = heads_of(net, x)
    keep["stack.layers.0.self_attn"][:] = torch.tensor([True, True, False, False])  # an even number
    small, masked, structure = copy.deepcopy(net), copy.deepcopy(net), couple(net, x)
    apply_(small, cuts_for(net, structure, keep))
    mask_(masked, structure, keep)
    for padding in (None, PADDING[:, :L]):
        with torch.no_grad():  # PyTorch gives zeros for padding here, and numbers elsewhere
            found, wanted = small(x, padding), masked(x, padding)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        with torch.inference_mode():
            torch.testing.assert_close(small(x, padding), wanted, **TOLERANCE)
        torch.testing.assert_close(small(x, padding), masked(x, padding), **TOLERANCE)
    # With the first layer as PyTorch has it, the second is given nested tensors, too.
    del keep["stack.layers.0.self_attn"]
    small, masked = copy.deepcopy(net), copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    mask_(masked, structure, keep)
    assert [is_plain(layer.self_attn) for layer in small.stack.layers] == [True, False]  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(small(x, padding), masked(x, padding), **TOLERANCE)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_odd_number_of_heads_that_fill_the_width_reads_padded_inputs(layer: int) -> None:
    """Without gradients an encoder makes nested tensors of them, if it was built for even numbers."""
    torch.manual_seed(0)
    each = nn.TransformerEncoderLayer(16, 4, 8, batch_first=True)
    encoder = nn.TransformerEncoder(each, 2)
    net = nn.Sequential(nn.Linear(16, 16), encoder, nn.Linear(16, 2)).double().eval()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    keep = {"0": torch.arange(16) < 12, f"1.layers.{layer}.self_attn": torch.arange(4) < 3}
    replay_(net, surgery_for(net, cuts_for(net, couple(net, x), keep)))
    narrow, other = (encoder.layers[i].self_attn for i in (layer, 1 - layer))
    assert (narrow.num_heads, narrow.embed_dim, other.num_heads) == (3, 12, 4)  # type: ignore[union-attr]
    lengths = (5, 3, 1)
    padding = torch.arange(5) >= torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = encoder(net[0](x), src_key_padding_mask=padding)
        for row, length in enumerate(lengths):
            alone = encoder(net[0](x[row : row + 1, :length]))[0]
            torch.testing.assert_close(found[row, :length], alone, **TOLERANCE)


def test_an_odd_number_of_heads_that_was_not_cut_stays_pytorchs_own() -> None:
    net = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    keep = {"linear1": torch.arange(8) < 5}
    apply_(net, cuts_for(net, couple(net, x), keep))
    assert is_plain(net.self_attn)


def test_a_wrong_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build("encoder"), numbers(N, L, 6)
    structure, keep = couple(net, x), heads_of(net, x)
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    weight = small.stack.layers[0].self_attn.out_proj.weight  # type: ignore[union-attr, index]
    weight.data = weight.data.roll(E // H, 1)  # columns of another head
    assert prove(net, small, structure, keep, x).error > 1e-3
    monkeypatch.setattr(PrunedAttention, "_extended", lambda self, x, bias: x)
    net = build("more")
    structure, keep = couple(net, NETWORKS["more"][1]), heads_of(net, NETWORKS["more"][1])
    small = copy.deepcopy(net)
    apply_(small, cuts_for(net, structure, keep))
    assert prove(net, small, structure, keep, NETWORKS["more"][1]).error > 1e-3


# --- what stays ----------------------------------------------------------------------------------


class Own(nn.MultiheadAttention):
    """A subclass may do anything."""


def test_code_that_is_not_pytorchs_stays() -> None:
    net = build("encoder").float()
    net.stack.layers[0].self_attn.__class__ = Own  # type: ignore[union-attr, index]
    second = net.stack.layers[1].self_attn  # type: ignore[union-attr, index]
    second.forward = second.forward
    structure = couple(net, torch.randn(N, L, 6))
    assert [w.name for w in structure.widths] == [
        "stack.layers.0.linear1",
        "stack.layers.1.linear1",
    ]
    for layer in (0, 1):
        pinned = structure.pinned[f"stack.layers.{layer}.self_attn.in_proj_weight", 0]
        assert "changes the code of nn.MultiheadAttention" in pinned


def test_a_mask_for_each_head_keeps_the_heads() -> None:
    module = stock()
    given = (*inputs(module, "heads"), None, False, EACH)
    assert "fixes" in couple(module, given).pinned["in_proj_weight", 0]
    small = copy.deepcopy(module)
    structure = couple(small, given[:3])
    apply_(small, cuts_for(small, structure, {structure.widths[0].name: torch.arange(H) < 3}))
    with pytest.raises(UsageError, match="3 heads"):
        small(*given)
    assert small(*given[:3], attn_mask=EACH[: 3 * N])[0].shape == (L, N, E)


def test_heads_that_fill_a_narrower_width_are_pytorchs_again() -> None:
    net, x = build("encoder"), numbers(N, L, 6)
    structure = couple(net, x)
    half = {name: torch.arange(H) < 2 for name in heads_of(net, x)}
    net2 = copy.deepcopy(net)
    apply_(net2, cuts_for(net2, structure, half))
    structure = couple(net2, x)
    narrow = {structure.widths[0].name: torch.arange(E) % 2 == 0}
    small = copy.deepcopy(net2)
    apply_(small, cuts_for(small, structure, narrow))
    assert not any(is_plain(layer.self_attn) for layer in net2.stack.layers)  # type: ignore[union-attr]
    assert all(is_plain(layer.self_attn) for layer in small.stack.layers)  # type: ignore[union-attr]
    assert small.stack.layers[0].self_attn._qkv_same_embed_dim  # type: ignore[union-attr, index]
    assert small.stack.layers[0].self_attn.kdim == E // 2  # type: ignore[union-attr, index]
    assert prove(net2, small, structure, narrow, x).error < 1e-12


# --- runs ----------------------------------------------------------------------------------------


def test_saved_and_loaded_and_shrunk_again(tmp_path: Path) -> None:
    net, x = build("vision"), numbers(N, 3, 8, 8)
    once = secateur.shrink(net, recipe(net), x)
    twice = secateur.shrink(once.model, recipe(net, "params=90%", scope=secateur.Scope()), x)
    for number, pruned in enumerate((once, twice)):
        folder = pruned.save(tmp_path / str(number))
        again = secateur.load(build("vision"), folder).model.eval()
        assert torch.equal(again(x), pruned.model(x))
        kinds = [type(m) for m in pruned.model.modules()]
        assert [type(m) for m in again.modules()] == kinds
        assert number or PrunedAttention in kinds
    clone = copy.deepcopy(once.model)
    clone.load_state_dict(once.model.state_dict())
    assert torch.equal(clone(x), once.model(x))


def test_a_replay_that_fails_leaves_attention_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = build("encoder"), numbers(N, L, 6)
    surgery = surgery_for(net, cuts_for(net, couple(net, x), heads_of(net, x)))
    before, wanted = copy.deepcopy(net.state_dict()), net(x)
    monkeypatch.setattr("secateur.frontends.surgery.remember_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replay_(net, surgery)
    assert all(is_plain(m) for m in net.modules() if isinstance(m, nn.MultiheadAttention))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert torch.equal(net(x), wanted)


def test_the_optimizer_is_cut_along() -> None:
    net, x = build("encoder").train(), numbers(N, L, 6)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(x).square().mean().backward()
    optimizer.step()
    weight = net.stack.layers[0].self_attn.in_proj_weight  # type: ignore[union-attr, index]
    before = optimizer.state[weight]["exp_avg"].clone()
    pruned = secateur.shrink_(net, recipe(net), x, optimizer=optimizer)
    assert pruned.surgery is not None
    rows = pruned.surgery.cuts["stack.layers.0.self_attn.in_proj_weight"][0].positions()
    assert torch.equal(optimizer.state[weight]["exp_avg"], before[rows])
    net.train()(x).square().mean().backward()
    optimizer.step()


def test_multiply_adds_equal_the_formula_before_and_after() -> None:
    net, x = build("encoder").float(), torch.randn(3, L, 6)
    ends, feed_forward = L * (6 * E + E * 3), 2 * L * 2 * E * 24
    dense = cost_of(net, example=(x, torch.zeros(3)))
    assert dense.uncounted == ()
    assert dense.macs_dense == ends + feed_forward + 2 * L * 4 * E * E
    pruned = secateur.shrink(net, recipe(net, "macs=80%", align=1), x)
    inner = [
        m.num_heads * m.head_dim for m in pruned.model.modules() if isinstance(m, PrunedAttention)
    ]
    macs = ends + feed_forward + sum(L * 4 * E * width for width in inner)
    assert cost_of(pruned.model, example=(x, torch.zeros(3))).macs_dense == macs
    assert pruned.facts.measures["target"]["reached"] == macs
    assert sum(use.layer.macs for use in layers_of(pruned.model, x)) == 3 * macs


def test_multiply_adds_of_attention_between_two_sequences() -> None:
    module = stock(kdim=6, vdim=10).float()
    q, k, v = (x.float() for x in inputs(module, "none"))
    cost = cost_of(nn.ModuleList([module])[0], example=(q, k, v, torch.zeros(1)))
    # Samples lie along the second axis here, and are counted along the first.
    assert cost.macs_dense == pytest.approx((L * E + S * 6 + S * 10 + L * E) * E * N / L)


def test_repair_reads_what_the_output_projection_reads() -> None:
    net = build("encoder").float()
    data = [(torch.randn(16, L, 6), torch.randn(16, L, 3)) for _ in range(4)]
    errors, notes = [], []
    for recovery in ((), (secateur.recover.Compensation(),)):
        pruned = secateur.shrink(
            net, recipe(net, "params=80%", recovery=recovery), data[0][0], data
        )
        with torch.no_grad():
            errors.append(float(sum((pruned.model(x) - net(x)).square().mean() for x, _ in data)))
        notes = [n for n in pruned.facts.notes if n.topic == "uncompensated"]
    assert errors[1] < 0.8 * errors[0]
    assert not notes
    assert attention.is_plain(net.stack.layers[0].self_attn)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("criterion", ["activation_variance", "group_taylor", "reconstruction"])
def test_heads_are_scored_on_data(criterion: str) -> None:
    from secateur.score import GROUP_CRITERIA

    net = build("padded").float()
    data = [
        (numbers(N, L, 6, seed=i).float(), PADDING[:, :L], numbers(N, L, 3).float()) for i in (1, 2)
    ]
    mse = secateur.Data(train=data, loss=lambda m, b: (m(*b[:2]) - b[2]).square().mean())
    pruned = secateur.shrink(
        net, recipe(net, criterion=GROUP_CRITERIA[criterion]()), data[0][:2], mse
    )
    assert pruned.facts.measures["proof"] < 1e-5
    assert any(m.num_heads < H for m in pruned.model.modules() if isinstance(m, PrunedAttention))


def test_compiled_it_computes_the_same() -> None:
    net, x = build("encoder"), numbers(N, L, 6)
    apply_(net, cuts_for(net, couple(net, x), heads_of(net, x)))
    compiled = torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)


def test_the_script_in_the_docs_says_what_it_cannot_run(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "docs" / "formats" / "replay.py"
    spec = importlib.util.spec_from_file_location("replay", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    net, x = build("encoder"), numbers(N, L, 6)
    cut = secateur.shrink(net, recipe(net), x)
    with pytest.raises(ValueError, match=r"only secateur\.load"):
        script.replay(build("encoder"), cut.save(tmp_path / "heads"))
    whole = secateur.ShrinkRecipe(target=secateur.Target.parse("params=80%"), recovery=(),
                                  scope=secateur.Scope(include=("*linear1",), ignore=("embed",)))  # fmt: skip
    other = secateur.shrink(net, whole, x)
    again = script.replay(build("encoder"), other.save(tmp_path / "other"))
    assert torch.equal(again(x), other.model(x))
