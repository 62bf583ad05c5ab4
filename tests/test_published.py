"""Methods against references that were written from the papers, not from this library's code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from secateur import Data, FineTune, Recipe, Scope, Target
from secateur.allocate import Ranked
from secateur.frontends import discover
from secateur.learn import Distill
from secateur.pattern import NM, Elements
from secateur.recover import BiasCorrection, ColumnSweep, LeastSquares
from secateur.score import Grasp, Magnitude, ObsSaliency
from secateur.stats import SynapticFlow

EVERY = Scope(sensitive=True)


# ---- SparseGPT


def correlated(inputs: int, rows: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.eye(inputs) + 2 * torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return torch.randn(rows, inputs, generator=generator) @ mixing


def sparsegpt(weight: Tensor, gram: Tensor, keep: int, of: int, block: int) -> Tensor:
    """Algorithm 1 with N:M: masks are chosen every ``of`` columns, from updated weights."""
    w = weight.double().clone()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.zeros(len(w), last - first, dtype=w.dtype)
        gone = torch.zeros_like(w, dtype=torch.bool)
        for j in range(first, last):
            if j % of == 0:
                cost = w[:, j : j + of] ** 2 / upper.diagonal()[j : j + of] ** 2
                gone[:, j : j + of].scatter_(1, cost.topk(of - keep, 1, largest=False)[1], True)
            error = torch.where(gone[:, j], w[:, j], 0.0) / upper[j, j]
            w[:, j:last] -= error[:, None] * upper[j, j:last]
            w[gone[:, j], j] = 0
            errors[:, j - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return w


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4)])
def test_nm_masks_of_sparsegpt_are_chosen_from_updated_weights(
    keep: int, of: int, block: int
) -> None:
    torch.manual_seed(0)
    x, net = correlated(96), nn.Sequential(nn.Linear(96, 24))
    recipe = Recipe(ObsSaliency(), NM(keep, of), recovery=(ColumnSweep(block=block),), scope=EVERY)
    found = secateur.prune(net, recipe, Data(train=[x[:256], x[256:]])).model[0].weight
    gram = x.double().T @ x.double() / len(x)
    wanted = sparsegpt(net[0].weight.detach(), gram, keep, of, block)
    assert torch.equal(found != 0, wanted != 0)
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_the_mask_of_the_dense_weight_alone_is_worse() -> None:
    """What would be lost if all columns were decided before the sweep."""
    torch.manual_seed(0)
    x, net = correlated(96), nn.Sequential(nn.Linear(96, 24))
    data = Data(train=[x])

    def error(recipe: Recipe) -> float:
        pruned = secateur.prune(net, recipe, data).model
        with torch.no_grad():
            return float((pruned(x) - net(x)).square().mean())

    sweep = (ColumnSweep(),)
    live = error(Recipe(ObsSaliency(), NM(2, 4), recovery=sweep, scope=EVERY))
    fixed = error(Recipe(Magnitude(), NM(2, 4), recovery=sweep, scope=EVERY))
    assert live < 0.9 * fixed


# ---- pruning at initialisation


def grasp(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """``w * H g`` of the mean loss over all samples, logits over 200, for all weights at once."""
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    values = list(weights.values())
    loss = functional.cross_entropy(net(x) / 200, y)
    gradients = torch.autograd.grad(loss, values, create_graph=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    second = torch.autograd.grad(flow, values)  # type: ignore[arg-type]
    return {n: (p * h).detach() for (n, p), h in zip(weights.items(), second, strict=True)}


def best(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    flat = torch.cat([s.flatten() for s in scores.values()])
    bound = flat.sort(descending=True)[0][round(len(flat) * (1 - sparsity)) - 1]
    return {name: s >= bound for name, s in scores.items()}


def classifier() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def samples(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(size, 12, generator=generator) for size in sizes]
    return [(x, x[:, :4].argmax(1)) for x in xs]


@pytest.mark.parametrize("sizes", [(24,), (10, 10, 4)])
@pytest.mark.parametrize("scope", [Scope(), EVERY], ids=["default", "every"])
def test_grasp_follows_the_gradient_of_all_weights(sizes: tuple[int, ...], scope: Scope) -> None:
    net, batches = classifier(), samples(sizes)
    recipe = Recipe(Grasp(), target=Target("sparsity", 0.5), allocation=Ranked(), scope=scope)
    found = secateur.prune(net, recipe, Data(train=batches)).masks
    every = grasp(net, batches)
    assert len(found) == (3 if scope is EVERY else 2)
    wanted = best({name: every[name] for name in found}, 0.5)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_grasp_in_half_precision_is_that_of_the_same_numbers() -> None:
    half, batches = classifier().half(), samples((24,))
    recipe = Recipe(Grasp(), target=Target("sparsity", 0.5), allocation=Ranked(), scope=EVERY)
    given = [(x.half(), y) for x, y in batches]
    found = secateur.prune(half, recipe, Data(train=given)).masks
    wide = copy.deepcopy(half).float()
    wanted = secateur.prune(wide, recipe, Data(train=[(x.float(), y) for x, y in given])).masks
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert half[0].weight.dtype == torch.float16


class Normed(nn.Module):
    """Convolutions, each before a normalisation; no biases outside of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        norms: dict[str, Any] = {
            "batch": lambda: nn.BatchNorm2d(8),
            "batch, no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
            "group": lambda: nn.GroupNorm(2, 8),
            "instance": lambda: nn.InstanceNorm2d(8, affine=True),
            "layer": lambda: nn.LayerNorm([8, 6, 6]),
            "none": nn.Identity,
        }
        torch.manual_seed(4)
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 8, 8, 1, bias=False) for i in range(3)
        )
        self.norms = nn.ModuleList(norms[kind]() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize(
    "kind", ["none", "batch", "batch, no statistics", "group", "instance", "layer"]
)
def test_synaptic_flow_is_conserved_through_normalisations(kind: str) -> None:
    net = Normed(kind).eval()
    with torch.no_grad():
        for norm in net.norms:
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 2)
    slots = [s for s in discover(net) if "norm" not in s.name and "bias" not in s.name]
    batches = [torch.randn(2, 3, 6, 6)]
    flows = SynapticFlow().measure(net, slots, batches, lambda *_: torch.zeros(()))
    totals = [
        float((net.get_parameter(n).detach().double().abs() * f).sum()) for n, f in flows.items()
    ]
    assert len(totals) == 4
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-9)
    assert totals[0] > 0


def test_synflow_empties_no_layer_before_a_group_norm() -> None:
    pruned = secateur.prune(
        Normed("group"),
        secateur.recipes.synflow(0.9),
        Data(train=[torch.randn(2, 3, 6, 6)]),
    )
    assert all(
        int(mask.sum()) > 0.02 * mask.numel() for mask in dict(pruned.masks.items()).values()
    )


# ---- repairs and distillation


def test_a_correction_does_not_outlive_the_values_it_was_made_for() -> None:
    torch.manual_seed(7)
    x = correlated(24) + 1.0
    net = nn.Sequential(nn.Linear(24, 12))

    def pruned(*steps: Any) -> secateur.Pruned:
        recipe = Recipe(
            Magnitude(),
            Elements(),
            Target("sparsity", 0.6),
            recovery=steps,
            scope=EVERY,
        )
        return secateur.prune(net, recipe, Data(train=[x]))

    alone, after = pruned(LeastSquares()), pruned(BiasCorrection(), LeastSquares())
    assert torch.equal(alone.model[0].bias, after.model[0].bias)
    assert torch.equal(alone.model[0].weight, after.model[0].weight)
    assert [n.topic for n in after.facts.notes].count("bias") == 1
    assert not torch.equal(pruned(BiasCorrection()).model[0].bias, net[0].bias)


class Tagger(nn.Module):
    """A class for every token; takes an attention mask."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.embed(input_ids))}


def test_padding_does_not_count_in_distillation() -> None:
    student, teacher = Tagger(0), Tagger(1)
    ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(8))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    other = torch.where(mask == 1, ids, (ids + 7) % 20)
    first, second = (
        Distill(teacher)(student, {"input_ids": each, "attention_mask": mask})
        for each in (ids, other)
    )
    assert torch.equal(first, second)
    p, q = (
        functional.log_softmax(m(ids, mask)["logits"][mask == 1] / 2, -1)
        for m in (teacher, student)
    )
    wanted = 4 * (p.exp() * (p - q)).sum(1).mean()
    assert first.item() == pytest.approx(wanted.item(), rel=1e-5)

    def tuned(tokens: Tensor) -> list[Any]:
        recipe = Recipe(
            Magnitude(),
            target=Target("sparsity", 0.5),
            recovery=(FineTune(epochs=2, lr=0.1, distill=1.0),),
            scope=EVERY,
        )
        data = Data(train=[{"input_ids": tokens, "attention_mask": mask}])
        return [entry["loss"] for entry in secateur.prune(student, recipe, data).facts.history]

    assert tuned(ids) == tuned(other)
