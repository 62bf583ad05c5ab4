"""Block influence and expert saliency, by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from group_cases import BATCHES, X, close, scores
from torch import Tensor, nn

from secateur.core.errors import DataError, UsageError
from secateur.core.groups import groups_of
from secateur.core.widths import Slices, Width
from secateur.frontends import discover
from secateur.score import (
    BlockInfluence,
    ExpertSaliency,
)
from secateur.stats import (
    collect,
    collect_groups,
)
from secateur.stats.experts import expert_outputs
from secateur.testing import SampleGroups, check_group_criterion, sample_groups

# -- blocks ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.size * self.fc(x)
        return out


def test_block_influence_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(0.1), Block(0.0), Block(2.0), nn.Linear(5, 3))
    criterion = BlockInfluence(("0", "1", "2"))
    found = criterion(collect(net, [], criterion.needs, BATCHES))
    expected, x = [], X
    for block in list(net)[:3]:
        y = block(x).detach()
        cosines = [
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for a, b in zip(x.double(), y.double(), strict=True)
        ]
        expected.append(1 - sum(cosines) / 12)
        x = y
    close(found[[0, 2]], [expected[0], expected[2]], 1e-4)
    assert float(found[1].abs()) < 1e-12
    assert not any(m._forward_hooks for m in net.modules())
    two = BlockInfluence(("0", "1", "2"), span=2, measure="angle")
    angles = two(collect(net, [], two.needs, BATCHES))
    assert angles.shape == (2,)
    close(angles[0], math.acos(1 - expected[0]) / math.pi, 1e-3)
    start, end = net[0](X), net[:3](X)
    cosine = F.cosine_similarity(start, end, dim=-1).mean().detach()
    close(angles[1], cosine.arccos() / math.pi, 1e-3)
    wide, last = BlockInfluence(("0", "1"), span=3), BlockInfluence(("3",))
    with pytest.raises(UsageError, match="span"):
        collect(net, [], wide.needs, BATCHES)
    with pytest.raises(UsageError, match="keeps the shape"):
        collect(net, [], last.needs, BATCHES)


def test_a_block_that_does_not_run_is_named() -> None:
    net = nn.Sequential(nn.Linear(5, 5))
    net.extra = nn.Linear(5, 5)
    net.forward = net[0].forward  # type: ignore[method-assign]
    criterion = BlockInfluence(("extra",))
    with pytest.raises(DataError, match="'extra'"):
        collect(net, [], criterion.needs, BATCHES)


# -- experts --------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two of four experts for each token; the last one is never chosen."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4)
        with torch.no_grad():
            self.router.weight[3], self.router.bias[3] = 0, -100
        self.experts = (
            Stack() if stacked else nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))
        )
        self.stacked = stacked

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gates, index = self.router(flat).softmax(-1).topk(2)
        if self.stacked:
            mixed: Tensor = self.experts(flat, index, gates)
            return mixed.reshape(x.shape)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):  # type: ignore[arg-type]
            token, place = torch.where(index == i)
            out.index_add_(0, token, expert(flat[token]) * gates[token, place, None])
        return out.reshape(x.shape)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, states: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        made = torch.einsum("eoi,ti->teo", self.weight, states)
        chosen = made.gather(1, index[..., None].expand(-1, -1, 5))
        return (chosen * gates[..., None]).sum(1)


@torch.no_grad()
def reap(net: Mixture, x: Tensor) -> list[float]:
    flat = x.reshape(-1, 5)
    gates, index = net.router(flat).softmax(-1).topk(2)
    found = []
    for e in range(4):
        expert: Any = net.experts
        w = (expert.weight[e] if net.stacked else expert[e].weight).double()
        values = [
            float(gates[t, k]) * float((w @ flat[t].double()).norm())
            for t in range(len(flat))
            for k in range(2)
            if int(index[t, k]) == e
        ]
        found.append(sum(values) / len(values) if values else 0.0)
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stack"])
def test_expert_saliency_by_hand(stacked: bool) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 5), Mixture(stacked), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(6, 3, 5)
    expected = reap(net[1], net[0](x))  # type: ignore[arg-type]
    assert expected[3] == 0
    path = "1.experts"
    close(expert_outputs(net, path, [x[:2], x[2:]]), expected, 1e-4)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    one = torch.arange(4)[:, None]
    slices = [Slices("1.router.weight", 0, one), Slices("1.router.bias", 0, one)]
    slices += [Slices("1.experts.weight", 0, one)] if stacked else []
    groups = groups_of(net, [Width("1", tuple(slices), torch.arange(4))], discover(net))
    sample = SampleGroups(net, groups, [x])
    check_group_criterion(ExpertSaliency(), sample)
    close(scores(ExpertSaliency(), net, {"1": groups[0]}, [x])["1"], expected, 1e-4)


def test_experts_that_run_on_every_token_count_where_they_are_chosen() -> None:
    class Dense(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 5)
            gates, index = self.router(flat).softmax(-1).topk(2)
            full = torch.zeros(len(flat), 4).scatter(1, index, gates)
            made = torch.stack([e(flat) for e in self.experts], 1)  # type: ignore[union-attr]
            return (made * full[..., None]).sum(1).reshape(x.shape)

    torch.manual_seed(1)
    net, x = Dense(False), torch.randn(6, 3, 5)
    close(expert_outputs(net, "experts", [x]), reap(net, x), 1e-4)


def test_experts_that_no_mixture_is_linear_in_are_refused() -> None:
    torch.manual_seed(1)

    class Bent(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    with pytest.raises(UsageError, match="not linear"):
        expert_outputs(nn.Sequential(Bent(False)), "0.experts", [torch.randn(4, 5)])
    sample = sample_groups("plain")
    with pytest.raises(UsageError, match="no experts"):
        collect_groups(sample.model, sample.groups, ExpertSaliency().needs, sample.batches)


def test_expert_saliency_of_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, vocab_size=50, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5)
    ids = torch.randint(0, 50, (3, 8))
    block = net.model.layers[0].mlp
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        net(ids)
    handle.remove()
    x = seen[0].reshape(-1, 16)
    expected = [0.0] * 4
    counts = [0] * 4
    with torch.no_grad():
        _, gates, index = block.gate(x)
        for t, k in itertools.product(range(len(x)), range(2)):
            e = int(index[t, k])
            gate, up = F.linear(x[t], block.experts.gate_up_proj[e]).chunk(2)
            out = F.linear(F.silu(gate) * up, block.experts.down_proj[e])
            expected[e] += float(gates[t, k]) * float(out.norm())
            counts[e] += 1
    means = [s / max(1, c) for s, c in zip(expected, counts, strict=True)]
    found = expert_outputs(net, "model.layers.0.mlp.experts", [{"input_ids": ids}])
    close(found, means, 1e-4)
