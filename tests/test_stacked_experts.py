"""Experts that are stacked in one parameter, as in Transformers 5, are pruned like layers of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oneshot_cases import alias
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur import Data, Gradual, Recipe, Scope, Target, prune
from secateur.allocate import ErdosRenyi
from secateur.core.errors import FoldError, UsageError
from secateur.core.weight import Axes
from secateur.evaluate import cost_of
from secateur.frontends import discover
from secateur.pattern import NM, Blocks, Columns, PerRow
from secateur.recover import BiasCorrection
from secateur.schedule import Polynomial
from secateur.score import Magnitude, Wanda

EXPERTS, WIDTH, INNER = 3, 8, 6


class Stacked(nn.Module):
    """Two experts of a token, of which the third is taken if its first feature is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))

    def up(self, x: Tensor, expert: int) -> Tensor:
        return functional.linear(x, self.gate_up_proj[expert])

    def down(self, x: Tensor, expert: int) -> Tensor:
        return functional.linear(x, self.down_proj[expert])

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            own = chosen(x, expert)
            if len(own):
                gate, up = self.up(x[own], expert).chunk(2, -1)
                out.index_add_(0, own, self.down(functional.silu(gate) * up, expert))
        return out


def chosen(x: Tensor, expert: int) -> Tensor:
    """Tokens of an expert: all of the first, a third of the second, few of the last."""
    return (x[:, 0] > (-9.0, 0.4, 1.2)[expert]).nonzero()[:, 0]


class Listed(Stacked):
    """The same, with a layer for each matrix."""

    def __init__(self, like: Stacked) -> None:
        nn.Module.__init__(self)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * INNER, bias=False) for _ in range(EXPERTS))
        self.downs = nn.ModuleList(nn.Linear(INNER, WIDTH, bias=False) for _ in range(EXPERTS))
        for layers, weight in ((self.ups, like.gate_up_proj), (self.downs, like.down_proj)):
            for layer, own in zip(layers, weight, strict=True):
                layer.load_state_dict({"weight": own.detach()})

    def up(self, x: Tensor, expert: int) -> Tensor:
        return self.ups[expert](x)  # type: ignore[no-any-return]

    def down(self, x: Tensor, expert: int) -> Tensor:
        return self.downs[expert](x)  # type: ignore[no-any-return]


def around(experts: nn.Module) -> nn.Module:
    return nn.Sequential(experts, nn.Linear(WIDTH, 2)).eval()


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stacked = Stacked()
    listed = Listed(stacked)
    nets = around(stacked), around(listed)
    nets[1][1].load_state_dict(nets[0][1].state_dict())  # type: ignore[index]
    return nets


def tokens(count: int = 4) -> list[Tensor]:
    own = torch.Generator().manual_seed(1)
    return [torch.randn(40, WIDTH, generator=own) for _ in range(count)]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "ria", "obc"])
def test_the_same_as_with_a_layer_for_each_expert(
    pair: tuple[nn.Module, nn.Module], name: str
) -> None:
    recipe = replace(
        alias(name), pattern=PerRow()
    )  # a pool of a weight would be one of all experts
    found, wanted = (prune(net, recipe, tokens()) for net in pair)
    assert set(found.masks) == {"0.gate_up_proj", "0.down_proj"}
    for one, other in (("gate_up_proj", "ups"), ("down_proj", "downs")):
        for expert in range(EXPERTS):
            key = f"0.{other}.{expert}.weight"
            assert torch.equal(found.masks[f"0.{one}"][expert], wanted.masks[key])
            own, theirs = (
                found.model.get_parameter(f"0.{one}")[expert],
                wanted.model.get_parameter(key),
            )
            torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", [True, False])
def test_densities_by_shape_are_those_of_a_layer_for_each_expert(
    pair: tuple[nn.Module, nn.Module], kernel: bool
) -> None:
    everything = Scope(include=("*",))
    recipe = Recipe(allocation=ErdosRenyi(kernel), target=Target("sparsity", 0.7), scope=everything)
    found, wanted = (prune(net, recipe) for net in pair)
    for one, other in (("gate_up_proj", "ups"), ("down_proj", "downs")):
        layers = [wanted.masks[f"0.{other}.{expert}.weight"] for expert in range(EXPERTS)]
        density = float(torch.stack(layers).double().mean())
        assert float(found.masks[f"0.{one}"].double().mean()) == pytest.approx(density, abs=0.01)


def test_multiply_adds_are_those_of_the_tokens_that_experts_get(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    batch = tokens(1)[0]
    one, other = (cost_of(net, example=batch) for net in pair)
    assert one.macs_dense == pytest.approx(other.macs_dense)
    assert one.uncounted == ()


@pytest.mark.parametrize("criterion", [Wanda(), Magnitude()])
def test_an_expert_without_tokens_is_pruned_by_magnitude(criterion: Any) -> None:
    torch.manual_seed(0)
    net = around(Stacked())
    batches = [x.clamp(max=1.0) for x in tokens()]  # none reaches the last expert
    recipe = Recipe(criterion, PerRow(), Target("sparsity", 0.5))
    pruned = prune(net, recipe, batches)
    mask = pruned.masks["0.gate_up_proj"][-1]
    sizes = net[0].gate_up_proj[-1].detach().abs()  # type: ignore[index, union-attr]
    least = sizes.kthvalue(WIDTH // 2, dim=1, keepdim=True).values
    assert torch.equal(mask, sizes > least)
    told = [note.text for note in pruned.facts.notes if note.where == "0.gate_up_proj"]
    said = "1 of 3 experts got no token: their weights are ranked by size"
    assert told == ([said] if criterion == Wanda() else [])


def test_in_training_experts_without_tokens_are_told_once() -> None:
    torch.manual_seed(0)
    net = around(Stacked())
    batches = [(x.clamp(max=1.0), torch.zeros(len(x))) for x in tokens(6)]
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    recipe = Recipe(Wanda(), PerRow(), Target("sparsity", 0.5), schedule=Polynomial(0, 4, 1))
    pruner = Gradual(net, optimizer, recipe, data=Data(train=batches))
    for x, _ in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        pruner.step()
    told = [note.where for note in pruner.finalize().facts.notes if note.topic == "unseen"]
    assert sorted(told) == ["0.down_proj", "0.gate_up_proj"]


def test_products_with_copies_of_the_experts_cannot_be_seen() -> None:
    class Gathered(Stacked):
        def up(self, x: Tensor, expert: int) -> Tensor:
            return functional.linear(x, self.gate_up_proj[torch.tensor(expert)].clone())

    net = around(Gathered())
    pruned = prune(net, alias("wanda"), tokens())
    assert set(pruned.masks) == {"0.down_proj"}
    told = {n.where: n.text for n in pruned.facts.notes}
    assert told["0.gate_up_proj"] == "its inputs could not be seen on the data"
    assert "0.gate_up_proj" in prune(net, alias("magnitude")).masks


def test_a_shape_that_could_be_either_way_needs_a_word() -> None:
    """Up and down without a gate have the same sizes in both orders."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(2, 6, 4))
            self.down_proj = nn.Parameter(torch.randn(2, 4, 6))

    net = Plain()
    assert {slot.reason for slot in discover(net)} == {"no rule for parameters of Plain"}
    net.is_transposed = True  # type: ignore[assignment]
    assert [slot.axes.names for slot in discover(net) if slot.axes] == [("expert", "in", "out")] * 2


def test_columns_run_through_no_two_experts(pair: tuple[nn.Module, nn.Module]) -> None:
    recipe = Recipe(pattern=Columns(), target=Target("sparsity", 0.5))
    with pytest.raises(UsageError, match="3 groups, or experts"):
        prune(pair[0], recipe)


@pytest.mark.parametrize("pattern", [Blocks(rows=16, cols=1), NM(2, 4, rows=16)])
def test_no_block_reaches_into_two_experts(pattern: Any) -> None:
    """16 divides the rows of all experts, not those of one."""
    axes = Axes(("expert", "out", "in"), groups=4)
    with pytest.raises(FoldError, match="'out' axis is 12"):
        pattern.fold(torch.zeros(4, 12, 8), axes)
    assert pattern.fold(torch.zeros(4, 16, 8), axes).numel() == 4 * 16 * 8


def test_the_bundle_holds_them(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    pruned = prune(pair[0], alias("magnitude"))
    pruned.save(tmp_path / "out")
    again = secateur.load(around(Stacked()), tmp_path / "out")
    for name, mask in pruned.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert torch.equal(again.model.get_parameter(name), pruned.model.get_parameter(name))


# ---- Transformers


def language_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    experts = {"num_local_experts": 4}
    if kind == "Qwen3Moe":
        experts = {"num_experts": 4, "moe_intermediate_size": 12}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts_per_tok=2, **experts,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


KINDS = ["Mixtral", "Qwen3Moe", "GptOss"]


def more_kinds(kind: str) -> Any:
    """Experts that see all tokens, most of them as zeros; one that is shared; or split inputs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    if kind == "Llama4":
        config = transformers.Llama4TextConfig(
            **sizes, **heads, intermediate_size_mlp=24, head_dim=8, num_local_experts=4,
            num_experts_per_tok=1, interleave_moe_layer_step=1,
        )  # fmt: skip
    elif kind == "JetMoe":
        config = transformers.JetMoeConfig(
            **sizes, **heads, kv_channels=8, num_local_experts=4, num_experts_per_tok=2
        )
    else:
        config = transformers.DeepseekV3Config(
            **sizes, **heads, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
            first_k_dense_replace=0, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Llama4", "DeepseekV3", "JetMoe"])
def test_other_mixtures(kind: str) -> None:
    model = more_kinds(kind)
    pruned = prune(model, alias("sparsegpt"), [{"input_ids": IDS, "labels": IDS}] * 2)
    stacked = [name for name, mask in pruned.masks.items() if mask.ndim == 3]
    assert len(stacked) == (8 if kind == "JetMoe" else 4)
    assert not [name for name in pruned.masks if "router" in name]
    errors = {x.name: x.output_error for x in pruned.facts.layers if x.name in stacked}
    assert all(error and error < 0.2 for error in errors.values())


@pytest.mark.parametrize("kind", KINDS)
def test_routers_and_biases_stay_and_say_so(kind: str) -> None:
    reasons = {slot.name: slot.reason for slot in discover(language_model(kind))}
    unknown = {name for name, why in reasons.items() if why.startswith("no rule")}
    assert unknown <= {f"model.layers.{i}.self_attn.sinks" for i in range(2)}
    routers = [why for name, why in reasons.items() if ".gate." in name or ".router." in name]
    assert set(routers) <= {"a router of experts or a gate", "a bias"}
    assert len(routers) >= 2


IDS = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tokens_that_the_router_sends(kind: str) -> None:
    model = language_model(kind)
    path = "model.layers.1.mlp.experts"
    calls: list[Any] = []
    experts = model.get_submodule(path)
    handle = experts.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(((*args, *kwargs.values()), out)),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    (given, output) = calls[0]
    states, index = given[0].reshape(-1, 16), given[1].reshape(-1, 2)
    slot = next(s for s in discover(model) if s.name == f"{path}.gate_up_proj")
    assert slot.rows is not None
    rows = slot.rows(experts, given, output)
    assert rows is not None
    for expert in range(4):
        own = states[(index == expert).any(1)]
        found = rows[expert, : len(own)]
        assert torch.equal(*(x[x[:, 0].argsort()] for x in (found, own)))
        assert not rows[expert, len(own) :].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "snip", "woodfisher", "ria"])
def test_methods_prune_the_experts_of_language_models(kind: str, name: str) -> None:
    model = language_model(kind)
    pruned = prune(model, alias(name), [{"input_ids": IDS, "labels": IDS}] * 2)
    experts = [n for n in pruned.masks if "experts." in n]
    assert len(experts) == 4
    assert not [n for n in pruned.facts.notes if n.topic == "left-out" and n.where in experts]
    with torch.no_grad():
        assert torch.isfinite(pruned.model(input_ids=IDS).logits).all()


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_two_of_four_inputs_of_every_expert(kind: str) -> None:
    pruned = prune(language_model(kind), Recipe(pattern=NM(2, 4)))
    mask = pruned.masks["model.layers.0.mlp.experts.down_proj"]
    along = mask.movedim(1 if kind == "GptOss" else 2, -1)
    assert (along.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_biases_of_experts_take_the_change_of_means() -> None:
    """Of the means of an expert's own tokens, of which there are unlike many."""
    model = language_model("GptOss")
    path = "model.layers.0.mlp.experts"
    name = f"{path}.gate_up_proj"
    given: list[Any] = []
    experts = model.get_submodule(path)
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
    )
    recipe = Recipe(Wanda(), target=Target("sparsity", 0.7), recovery=BiasCorrection())
    data = Data(train=[{"input_ids": IDS}])
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    pruned = prune(model, recipe, data).model
    states, index = given[0][0].reshape(-1, 16), given[0][1].reshape(-1, 2)
    lost = (model.get_parameter(name) - pruned.get_parameter(name)).detach()
    change = pruned.get_parameter(f"{name}_bias") - model.get_parameter(f"{name}_bias")
    for expert in range(4):
        mean = states[(index == expert).any(1)].mean(0)
        torch.testing.assert_close(
            change[expert].detach(), mean @ lost[expert], rtol=1e-4, atol=1e-6
        )
