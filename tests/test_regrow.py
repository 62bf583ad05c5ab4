"""Dynamic sparse training: what moves, what stays at zero, and what a skipped step leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regrow_cases import (
    NAMES,
    OPTIMIZERS,
    TOTAL,
    backward,
    kept,
    net,
    recipe,
    slots,
    snapshot,
    start,
    train,
)

from secateur import Gradual, Masks, Recipe, Target, attach_, prune, recipes
from secateur.allocate import ErdosRenyi, Ranked
from secateur.core.errors import UsageError
from secateur.core.weight import LINEAR
from secateur.drive.training.regrow import Regrow, TopKast, exchange
from secateur.pattern import NM, Blocks, PerRow, Rows
from secateur.schedule import Alternating, OneShot, Polynomial

REGROWS = {
    "rigl": Regrow(frequency=3),
    "rigl and step": Regrow(frequency=3, skip_step=False),
    "set": Regrow("random", frequency=3),
    "set instead": Regrow("random", frequency=3, skip_step=True),
}


# -- the exchange itself --------------------------------------------------------------------------


def test_an_exchange_is_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        scores, promise = torch.rand(2, 40, generator=generator)
        mask = torch.rand(1, 40, generator=generator) < 0.4
        found = exchange(mask, scores[None], promise[None], 0.3)
        alive = [i for i in range(40) if mask[0, i]]
        count = math.floor(0.3 * len(alive) + 1e-9)
        dropped = sorted(alive, key=lambda i: float(scores[i]))[:count]
        stay = set(alive) - set(dropped)
        others = [i for i in range(40) if i not in stay]
        grown = sorted(others, key=lambda i: -float(promise[i]))[:count]
        assert {i for i in range(40) if found.kept[0, i]} == stay | set(grown)
        assert (found.moved, found.again) == (count, len(set(grown) & set(dropped)))


def test_pools_keep_their_counts_and_full_pools_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(30, 4, generator=generator).argsort(1) < torch.arange(30)[:, None] % 4 + 1
    scores, promise = torch.rand(2, 30, 4, generator=generator)
    found = exchange(mask, scores, promise, 0.5)
    assert torch.equal(found.kept.sum(1), mask.sum(1))
    full = mask.all(1)
    assert bool(full.any())
    assert torch.equal(found.kept[full], mask[full])
    assert found.moved == int(0.5 * int(mask[~full].sum()))
    never_again = exchange(mask, scores, promise - 2 * mask.float(), 0.2)
    gone = mask & ~never_again.kept
    assert int(gone.sum()) == never_again.moved - never_again.again
    assert not bool(gone[full].any())
    free = (~mask[~full]).sum(1)
    lost = int(0.2 * int(mask[~full].sum()))
    assert never_again.moved == lost
    assert bool((gone[~full].sum(1) <= free).all())
    ranks = scores[~full][mask[~full]].sort().values  # full pools take no share of what is dropped
    worst = mask[~full] & (scores[~full] < ranks[lost])
    assert int(gone.sum()) == int(worst.sum(1).minimum(free).sum())
    assert exchange(torch.ones(1, 5, dtype=torch.bool), scores[:1, :1], promise, 0.5).moved == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: Regrow("largest"),
        lambda: Regrow(fraction=0),
        lambda: Regrow(fraction=1),
        lambda: Regrow(end=0),
        lambda: Regrow(end=1.1),
        lambda: Regrow(frequency=0),
        lambda: Regrow(unit="rounds"),
        lambda: Regrow(start="dense"),
        lambda: TopKast(extra=0),
        lambda: TopKast(frequency=-1),
        lambda: TopKast(unit="rounds"),
        lambda: Alternating(0, 10, 3),
        lambda: Recipe(regrow=Regrow(), schedule=OneShot(1)),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        build()


# -- a whole training -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("regrow", REGROWS.values(), ids=REGROWS.keys())
def test_sparsity_is_constant_and_new_weights_start_at_zero(regrow: Regrow, kind: str) -> None:
    model, pruner = start(recipe(regrow, allocation=ErdosRenyi()), kind)
    first = kept(pruner.masks)
    assert sum(first.values()) == TOTAL // 4
    ever = pruner.masks
    for t in range(40):
        before = pruner.masks
        train(model, pruner, 1, t)
        after = pruner.masks
        assert kept(after) == first
        _, grown = before.diff(after)
        for name in NAMES:
            parameter = model.get_parameter(name)
            for values in (parameter, *slots(pruner.optimizer, parameter)):
                assert bool((values[~after[name]] == 0).all())
                assert bool((values[grown[name]] == 0).all())
        ever = Masks({n: ever[n] | after[n] for n in ever})
    assert ever.kept > 1.3 * TOTAL / 4, "masks did move"
    assert {r["step"] for r in pruner.facts.history} <= {0, *range(3, 31, 3)}
    done = pruner.finalize()
    assert kept(done.masks) == first
    assert not pruner.optimizer._optimizer_step_pre_hooks
    assert not pruner.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("anneal", [True, False])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_counts_follow_the_cosine(grow: str, anneal: bool) -> None:
    part = Regrow(grow, fraction=0.4, frequency=5, end=0.8, anneal=anneal)
    model, pruner = start(recipe(part))
    sizes = list(kept(pruner.masks).values())
    train(model, pruner, 40)
    found = {r["step"]: r["dropped"] for r in pruner.facts.history[1:]}
    expected = {}
    for step in range(5, 33, 5):
        fraction = 0.4 * (0.5 + 0.5 * math.cos(math.pi * step / 32) if anneal else 1)
        expected[step] = sum(math.floor(fraction * n + 1e-9) for n in sizes)
    assert found == {step: count for step, count in expected.items() if count}
    assert all(r["grown"] == r["dropped"] for r in pruner.facts.history[1:])


@pytest.mark.parametrize("skip", [True, False])
def test_grown_are_the_largest_dense_gradients(skip: bool) -> None:
    model, pruner = start(recipe(Regrow(frequency=6, skip_step=skip)))
    train(model, pruner, 5)
    before = pruner.masks
    backward(model, pruner, 5)
    values = {n: model.get_parameter(n).detach().clone() for n in NAMES}
    gradients = {n: model.get_parameter(n).grad.clone() for n in NAMES}  # type: ignore[union-attr]
    pruner.optimizer.step()
    if not skip:  # what is dropped is then decided after the step
        values = {n: model.get_parameter(n).detach().clone() for n in NAMES}
    pruner.step()
    fraction = 0.15 * (1 + math.cos(math.pi * 6 / 30))
    moved = 0
    for name in NAMES:
        mask, size, slope = (
            x.flatten().tolist() for x in (before[name], values[name].abs(), gradients[name].abs())
        )
        alive = sorted((i for i, m in enumerate(mask) if m), key=lambda i: size[i])
        count = int(fraction * len(alive))
        stay = alive[count:]
        others = sorted(
            (i for i in range(len(mask)) if i not in set(stay)), key=lambda i: -slope[i]
        )
        now = [i for i, m in enumerate(pruner.masks[name].flatten().tolist()) if m]
        assert now == sorted(stay + others[:count])
        moved += count
    assert pruner.facts.history[-1]["dropped"] == moved > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rigl_takes_no_step_when_it_exchanges(kind: str) -> None:
    model, pruner = start(recipe(Regrow(frequency=4)), kind)
    train(model, pruner, 3)
    counts = [copy.deepcopy(s.get("step")) for s in pruner.optimizer.state.values()]
    before, masks = snapshot(model, pruner.optimizer), pruner.masks
    backward(model, pruner, 3)
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients if g is not None]
    pruner.optimizer.step()
    pruner.step()
    assert pruner.masks != masks
    stays = {n: masks[n] & pruner.masks[n] for n in NAMES}
    for (name, now), was in zip(model.named_parameters(), before, strict=False):
        here = stays.get(name, torch.ones_like(now, dtype=torch.bool))
        assert torch.equal(now[here], was[here])
        assert bool((now[~here] == 0).all())
    after = snapshot(model, pruner.optimizer)
    dense = [n not in NAMES for n, _ in model.named_parameters()]
    assert all(torch.equal(a, b) for a, b, d in zip(after, before, dense, strict=False) if d)
    assert counts == [s.get("step") for s in pruner.optimizer.state.values()]
    for state, (name, parameter) in zip(
        pruner.optimizer.state.values(), model.named_parameters(), strict=True
    ):
        assert bool(state)
        for slot in slots(pruner.optimizer, parameter):
            assert name not in NAMES or bool((slot[~stays[name]] == 0).all())
    # The caller finds the gradients where they were.
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, c) for g, c in zip(gradients, copies, strict=True))  # type: ignore[arg-type]
    before = snapshot(model, pruner.optimizer)
    train(model, pruner, 1, 4)  # and the next step is an ordinary one
    assert not torch.equal(before[0], next(iter(model.parameters())))


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_skipped_step_can_be_asked_for(grow: str, skip: bool) -> None:
    model, pruner = start(recipe(Regrow(grow, frequency=4, skip_step=skip)))
    train(model, pruner, 3)
    before, masks = model.get_parameter("0.bias").detach().clone(), pruner.masks
    train(model, pruner, 1, 3)
    assert pruner.masks != masks
    assert torch.equal(before, model.get_parameter("0.bias")) == skip


def test_set_takes_its_step_and_exchanges() -> None:
    """Until the exchange a SET run is the run with a fixed mask, that step included."""
    model, pruner = start(recipe(Regrow("random", frequency=4)))
    fixed, other = start(recipe(Regrow("random", frequency=30)))
    assert pruner.masks == other.masks
    train(model, pruner, 4)
    train(fixed, other, 4)
    assert pruner.masks != other.masks
    for name, parameter in model.named_parameters():
        both = pruner.masks[name] & other.masks[name] if name in NAMES else slice(None)
        assert torch.equal(parameter[both], fixed.get_parameter(name)[both])


def test_random_growth_is_random_and_seeded() -> None:
    def grown(seed: int, noise: int) -> Masks:
        torch.manual_seed(noise)
        model, pruner = start(recipe(Regrow("random", frequency=4), seed=seed))
        train(model, pruner, 4)
        return pruner.masks

    assert grown(0, 1) == grown(0, 2)
    assert grown(0, 1) != grown(1, 1)
    # Uniform over what is not kept: a weight that may come back does so about as often as another.
    counts = torch.zeros(1, 100)
    mask = torch.arange(100)[None] < 50
    from secateur.core.weight import Weight
    from secateur.drive.training.regrowing import random_promise

    weight = [Weight("w", torch.zeros(10, 10), LINEAR)]
    for step in range(400):
        promise = random_promise(weight, Recipe(), step)["w"].reshape(1, -1)
        counts += exchange(mask, torch.arange(100.0)[None], promise, 0.2).kept
    rate = counts[0, 50:] / 400  # ten of sixty candidates
    assert float(rate.mean()) == pytest.approx(1 / 6, abs=0.01)
    assert float((rate - 1 / 6).abs().max()) < 4 * math.sqrt(1 / 6 * 5 / 6 / 400)


def test_the_random_state_of_the_caller_stays() -> None:
    before = torch.get_rng_state()
    model, pruner = start(recipe(Regrow("random", frequency=2)))
    train(model, pruner, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(1, 4, rows=2), Blocks(4, 2), PerRow(), Rows()], ids=repr
)
@pytest.mark.parametrize(
    "regrow",
    [Regrow(frequency=3, fraction=0.5), Regrow("random", 0.5, 3), TopKast(0.3, 3)],
    ids=["rigl", "set", "topkast"],
)
def test_groups_move_whole_and_pools_keep_their_counts(regrow: Any, pattern: Any) -> None:
    model, pruner = start(recipe(regrow, 0.5, pattern=pattern))
    first, moved = pruner.masks, False
    for t in range(40):
        train(model, pruner, 1, t)
        for name in NAMES:
            before, mask = (pattern.fold(m[name], LINEAR) for m in (first, pruner.masks))
            assert torch.equal(mask.any(2), mask.all(2))
            assert torch.equal(mask.all(2).sum(1), before.all(2).sum(1))
            moved |= not torch.equal(mask, before)
    assert moved
    if isinstance(pattern, NM):
        folded = pattern.fold(pruner.finalize().masks[NAMES[0]], LINEAR)
        assert folded[..., 0].sum(1).unique().tolist() == [pattern.keep]


@pytest.mark.parametrize("regrow", [Regrow(frequency=4), Regrow("random", frequency=4)], ids=repr)
def test_gradual_pruning_with_regrowth(regrow: Regrow) -> None:
    wanted = recipe(regrow, 0.8, schedule=Polynomial(4, 24, 4), allocation=Ranked())
    model, pruner = start(wanted)
    levels = []
    for t in range(40):
        train(model, pruner, 1, t)
        levels.append(pruner.masks.sparsity)
    assert levels == sorted(levels)
    assert sum(r["grown"] for r in pruner.facts.history) > 0
    assert pruner.finalize().masks.kept == round(0.2 * TOTAL)


@pytest.mark.parametrize(
    "regrow", [Regrow(fraction=0.5, frequency=4), Regrow("random", frequency=4)]
)
def test_gradual_pruning_with_regrowth_of_a_sparse_network(regrow: Regrow) -> None:
    """What an exchange brought back is kept like any other weight, so no update prunes more than asked."""
    wanted = recipe(regrow, 0.8, schedule=Polynomial(0, 24, 4))
    _, dense = start(wanted)
    model = net()
    attach_(model, prune(model, Recipe(target=Target("sparsity", 0.5))).masks)
    pruner = Gradual(model, OPTIMIZERS["sgd"](model.parameters()), wanted, steps=40)
    for t in range(40):
        train(model, pruner, 1, t)
        train(dense.model, dense, 1, t)
        assert pruner.masks.kept == min(dense.masks.kept, TOTAL // 2)
    assert sum(r["grown"] for r in pruner.facts.history) > 0


def test_a_start_by_criterion_keeps_the_largest() -> None:
    model, pruner = start(recipe(Regrow(frequency=3, start="criterion"), 0.5))
    sizes = net().get_parameter("0.weight").detach().abs()
    mask = pruner.masks["0.weight"]
    assert float(sizes[mask].min()) > float(sizes[~mask].max())
    train(model, pruner, 40)
    assert pruner.finalize().facts.sparsity == 0.5


def test_static_is_the_start_of_set_and_stays() -> None:
    made = recipes.static_sparse(0.9, epochs=4)
    model = net()
    pruner = Gradual(model, OPTIMIZERS["sgd"](model.parameters()), made, steps_per_epoch=3)
    first = pruner.masks
    assert first.kept == int(0.1 * TOTAL), "ERK meets the budget of the whole network"
    train(model, pruner, 12)
    assert pruner.finalize().masks == first
    for other in (recipes.set_(0.9, 4), recipes.rigl(0.9, 4)):
        model = net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        assert Gradual(model, optimizer, other, steps_per_epoch=3).masks == first
    density = {n: float(m.float().mean()) for n, m in first.items()}
    assert density["0.weight"] / density["2.weight"] == pytest.approx(
        (32 / 192) / (40 / 384), rel=0.1
    )
