"""Experts: mixtures are found by shapes, cut exactly, written down and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.drive.structural.depth import drop_blocks
from secateur.drive.structural.experts import drop_experts
from secateur.formats import parse_surgery, surgery_text
from secateur.frontends.surgery import replay_
from secateur.structure.cut import Cuts, apply_
from secateur.structure.experts import (
    expert_cuts,
    mixtures_of,
    remove_experts_,
    without_experts,
)
from secateur.structure.masked import call, compare, predictions

transformers = pytest.importorskip("transformers")

IDS = {"input_ids": torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(0))}
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Listed(nn.Module):
    """Experts in a list, a router with a bias, the two likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5))
        self.top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        gates, index = self.router(x).softmax(-1).topk(self.top_k, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            gate = torch.where(index == number, gates, 0.0).sum(-1, keepdim=True)
            out = out + gate * expert(x)
        return x + out


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **TINY, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def qwen2() -> Any:
    config = transformers.Qwen2MoeConfig(
        **TINY,
        intermediate_size=24,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=3,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **TINY, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, head_dim=4
    )
    return transformers.GptOssForCausalLM(config)


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4},
        intermediate_size=24,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        n_shared_experts=1,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def ernie() -> Any:
    """The bias of the scores lies in a module inside the router, and has two axes."""
    config = transformers.Ernie4_5_MoeConfig(
        **TINY,
        intermediate_size=24,
        moe_intermediate_size=12,
        moe_num_experts=6,
        moe_k=2,
        moe_layer_start_index=0,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


def hand() -> nn.Module:
    return nn.Sequential(Listed(), nn.Sequential(Listed()))


TOKENS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
# build, example, experts, chosen, the key that the configuration has
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, int, str]] = {
    "mixtral": (mixtral, IDS, 6, 2, "num_local_experts"),
    "qwen2": (qwen2, IDS, 6, 3, "num_experts"),
    "gpt_oss": (gpt_oss, IDS, 6, 2, "num_local_experts"),
    "deepseek": (deepseek, IDS, 8, 2, "n_routed_experts"),
    "ernie": (ernie, IDS, 6, 2, "moe_num_experts"),
    "hand": (hand, TOKENS, 5, 2, ""),
}


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                nn.init.normal_(buffer)
    return model


@torch.no_grad()
def run(model: nn.Module, example: Any) -> list[Tensor]:
    return predictions(call(model, example))


@pytest.mark.parametrize("name", CASES)
def test_cut_is_masked_and_replays(name: str) -> None:
    build, example, experts, chosen, key = CASES[name]
    model = seeded(build)
    mixtures = mixtures_of(model)
    assert len(mixtures) == (1 if name == "deepseek" else 2)
    assert {(m.experts, m.chosen) for m in mixtures} == {(experts, chosen)}
    batch = example if isinstance(example, dict) else (example, None)
    whole = run(model, example)
    pruned = drop_experts(model, 2, [batch])
    assert pruned.facts.measures["proof"] < 1e-6
    with without_experts(model, {m.path: list(range(experts // 2)) for m in mixtures[:1]} if name
                         != "deepseek" else {mixtures[0].path: [1, 2, 5, 6]}):  # fmt: skip
        assert compare(run(model, example), whole).error > 1e-3
    keep = {}
    for mixture in mixtures:
        scores = torch.tensor(pruned.facts.measures["expert_saliency"][mixture.path])
        if mixture.groups == 1:
            keep[mixture.path] = sorted(scores.argsort(descending=True)[: experts - 2].tolist())
    if len(keep) == len(mixtures):
        with without_experts(model, keep):
            wanted = run(model, example)
        assert compare(run(pruned.model, example), wanted).error < 1e-6
    assert compare(run(model, example), whole).error == 0
    if key:
        assert getattr(pruned.model.config, key) == experts - 2
        assert getattr(model.config, key) == experts
    assert pruned.surgery is not None
    fresh = seeded(build)
    replay_(fresh, parse_surgery(surgery_text(pruned.surgery).encode()), check_weights=True)
    assert compare(run(fresh, example), run(pruned.model, example)).error == 0


@pytest.mark.parametrize("build", [mixtral, qwen2])
def test_uniform_cuts_load_plainly(build: Any, tmp_path: Path) -> None:
    small: Any = drop_experts(seeded(build), 0.5, [IDS]).model
    small.save_pretrained(tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out").eval()
    assert compare(run(loaded, IDS), run(small, IDS)).error == 0
    labels = {**IDS, "labels": IDS["input_ids"], "output_router_logits": True}
    assert torch.isfinite(small(**labels).loss)  # the balance of the experts counts those left


def test_fewer_experts_than_a_token_asks_for() -> None:
    model = seeded(qwen2)
    pruned = drop_experts(model, 4, [IDS])
    assert pruned.facts.measures["proof"] < 1e-6
    config: Any = pruned.model.config
    assert config.num_experts_per_tok == 2
    assert any("2 experts instead of 3" in n.text for n in pruned.facts.notes)


def test_different_numbers_in_the_layers(tmp_path: Path) -> None:
    model = seeded(mixtral)
    first, second = (m.path for m in mixtures_of(model))
    small = copy.deepcopy(model)
    keep = {first: [0, 2, 5], second: [1, 2, 3, 4]}
    notes = remove_experts_(small, keep)
    assert "no configuration" in notes[""]
    with without_experts(model, keep):
        wanted = run(model, IDS)
    assert compare(run(small, IDS), wanted).error < 1e-6
    half = drop_experts(model, 2, [IDS], ignore=[first])
    assert [w.name for w in half.facts.widths] == [second]
    folder = half.save(tmp_path / "out")
    restored = secateur.load(seeded(mixtral), folder).model
    assert compare(run(restored, IDS), run(half.model, IDS)).error == 0


@pytest.mark.parametrize(("drop", "gone"), [(1, 2), (2, 2), (0.4, 4)])
def test_more_experts_that_go_than_were_asked_for_are_told(drop: int | float, gone: int) -> None:
    model = seeded(deepseek)
    (mixture,) = mixtures_of(model)
    pruned = drop_experts(model, drop, [IDS])
    (width,) = pruned.facts.widths
    assert width.groups - width.kept == gone
    asked = drop if isinstance(drop, int) else round(drop * width.groups)
    told = [n.text for n in pruned.facts.notes if n.where == mixture.path]
    assert any(f"{gone} experts go, not {asked}" in text for text in told) == (gone != asked)


def test_groups_of_experts_stay_of_one_size() -> None:
    model = seeded(deepseek)
    (mixture,) = mixtures_of(model)
    assert mixture.groups == 2
    with pytest.raises(UsageError, match="groups"):
        expert_cuts(model, {mixture.path: [0, 1, 2, 5]})
    pruned = drop_experts(model, 3, [IDS])  # two of each group
    assert pruned.facts.widths[0].kept == 4
    assert pruned.facts.measures["proof"] < 1e-6


def test_a_number_of_numpy_is_a_number() -> None:
    model = seeded(mixtral)
    for drop in (2, np.int64(2)):
        pruned = drop_experts(model, drop, [IDS])
        assert [width.kept for width in pruned.facts.widths] == [4, 4]
        assert drop_blocks(model, drop - 1, [IDS]).model.config.num_hidden_layers == 1


def test_a_router_that_needs_more_experts_than_are_left_is_told() -> None:
    """DeepSeek's ranks its groups by the best two experts of each."""
    with pytest.raises(UsageError, match="does not run without them"):
        drop_experts(seeded(deepseek), 6, [IDS])


def test_a_bias_that_is_added_to_scores_is_masked_too() -> None:
    """The scores are sigmoids: minus infinity gives 0, and a bias could still win."""
    model = seeded(deepseek)
    (mixture,) = mixtures_of(model)
    model.get_submodule(mixture.block).gate.e_score_correction_bias[[0, 3, 4, 7]] = 5.0
    small = copy.deepcopy(model)
    keep = {mixture.path: [1, 2, 5, 6]}
    remove_experts_(small, keep)
    with without_experts(model, keep):
        wanted = run(model, IDS)
    assert compare(run(small, IDS), wanted).error < 1e-6
    bias = model.get_submodule(mixture.block).gate.e_score_correction_bias
    assert bias[[0, 3, 4, 7]].tolist() == [5.0] * 4  # it is as it was


def test_optimizer_state_of_stacked_experts_can_be_cut() -> None:
    model = seeded(mixtral)
    optimizer = torch.optim.Adam(model.parameters())
    model(**IDS).logits.sum().backward()
    optimizer.step()
    path = mixtures_of(model)[0].path
    stacked = model.get_submodule(path).down_proj
    apply_(model, expert_cuts(model, {path: [0, 3]})[0], optimizer)
    assert optimizer.state[stacked]["exp_avg"].shape == stacked.shape
    model.zero_grad()
    model(**IDS).logits.sum().backward()
    optimizer.step()


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router loses other rows than the experts."""

    def crooked(model: nn.Module, keep: Any) -> Any:
        cuts, edits, notes = expert_cuts(model, keep)
        wrong = {
            name: {0: list(range(len(axes[0])))} if name.endswith("gate.weight") else axes
            for name, axes in cuts.kept.items()
        }
        cuts = Cuts(wrong, cuts.attributes)
        return cuts, edits, notes

    monkeypatch.setattr("secateur.drive.structural.experts.expert_cuts", crooked)
    with pytest.raises(DataError, match="differs from the masked one"):
        drop_experts(seeded(mixtral), 2, [IDS])


def test_masking_needs_to_see_the_router() -> None:
    class Hidden(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ self.router.weight.T).softmax(-1)[..., :1]

    net = nn.Sequential(Hidden())
    with pytest.raises(UsageError, match="linear layer"), without_experts(net, {"0.experts": [0]}):
        net(TOKENS)


def test_refusals() -> None:
    model = seeded(mixtral)
    path = mixtures_of(model)[0].path
    for keep, text in (
        ({"model": [0]}, "no mixture"),
        ({path: []}, "no expert would stay"),
        ({path: [6]}, "no expert 6"),
    ):
        with pytest.raises(UsageError, match=text):
            remove_experts_(model, keep)
    with pytest.raises(NeedsData):
        drop_experts(model, 1)
    for drop in (0, 6, 1.5, 0.99):
        with pytest.raises(UsageError, match="At least one expert"):
            drop_experts(model, drop, [IDS])
    with pytest.raises(UsageError, match="none of 0 mixtures"):
        drop_experts(nn.Linear(2, 2), 1, [torch.ones(1, 2)])
