"""Dynamic sparse training: what moves, what stays at zero, and what a skipped step leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import Gradual, Masks, Recipe, Scope, Target, masks_of, prune, recipes
from secateur.allocate import ErdosRenyi, Ranked, Uniform
from secateur.core.errors import NeedsData, NonFinite, UsageError
from secateur.core.weight import LINEAR
from secateur.drive.recipe_file import from_plain, to_plain
from secateur.drive.training.regrow import Regrow, TopKast, exchange
from secateur.pattern import NM, Blocks, Elements, PerRow, Rows
from secateur.schedule import Alternating, Linear, OneShot, Polynomial, share_at
from secateur.score import Movement

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(5))
Y = torch.arange(24) % 4
BATCHES = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
NAMES = ("0.weight", "2.weight")
TOTAL = 8 * 24 + 24 * 16

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}
REGROWS = {
    "rigl": Regrow(frequency=3),
    "rigl and step": Regrow(frequency=3, skip_step=False),
    "set": Regrow("random", frequency=3),
    "set instead": Regrow("random", frequency=3, skip_step=True),
}


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
        )


def recipe(regrow: Any = None, sparsity: float = 0.75, **more: Any) -> Recipe:
    pattern = more.get("pattern", Elements())
    target = None if isinstance(pattern, NM) else Target("sparsity", sparsity)
    return Recipe(target=target, regrow=regrow or Regrow(frequency=3), **more)


def start(
    wanted: Recipe, kind: str = "sgd", steps: int | None = 40
) -> tuple[nn.Sequential, Gradual]:
    model = net()
    return model, Gradual(model, OPTIMIZERS[kind](model.parameters()), wanted, steps=steps)


def backward(model: nn.Module, pruner: Gradual, t: int) -> None:
    x, y = BATCHES[t % 3]
    pruner.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, pruner: Gradual, steps: int, first: int = 0) -> None:
    for t in range(first, first + steps):
        backward(model, pruner, t)
        pruner.optimizer.step()
        pruner.step()


def slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state[parameter].values()
    return [v for v in state if isinstance(v, Tensor) and v.shape == parameter.shape]


def kept(masks: Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    values = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        values += [v.clone() for v in state.values() if isinstance(v, Tensor)]
    return values


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


# -- Top-KAST -------------------------------------------------------------------------------------


def superset(pruner: Gradual) -> Any:
    assert pruner._superset is not None
    return pruner._superset


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_topkast_is_its_definition(kind: str) -> None:
    """A and B are the largest of all values, also of those that no forward pass sees."""
    model, pruner = start(recipe(TopKast(0.25, 4), 0.75), kind, steps=None)
    values = {n: p.detach().clone() for n, p in net().named_parameters()}
    for t in range(12):
        if t % 4 == 0:
            ranks = {n: values[n].abs().flatten().argsort(descending=True) for n in NAMES}
        for name in NAMES:
            size = values[name].numel()
            narrow, wide = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
            narrow[ranks[name][: size // 4]] = True
            wide[ranks[name][: size // 2]] = True
            narrow, wide = narrow.reshape(values[name].shape), wide.reshape(values[name].shape)
            assert torch.equal(pruner.masks[name], narrow)
            assert torch.equal(superset(pruner).wide[name], wide)
            shown = torch.where(narrow, values[name], 0.0)
            assert torch.equal(model.get_parameter(name), shown)
        before = {n: v.clone() for n, v in values.items()}
        train(model, pruner, 1, t)
        values = {
            n: superset(pruner)._values.get(n, p.detach()).clone()
            for n, p in model.named_parameters()
        }
        for name in NAMES:
            wide, moved = superset(pruner).wide[name], values[name] != before[name]
            if (t + 1) % 4:
                assert not bool(moved[~wide].any())
                assert bool(moved[wide].any())
                parameter = model.get_parameter(name)
                assert parameter.grad is not None
                assert bool((parameter.grad[~wide] == 0).all())
                for slot in slots(pruner.optimizer, parameter):
                    assert bool((slot[~wide] == 0).all())
                    assert bool((slot[wide & ~pruner.masks[name]] != 0).any())
    pruned = pruner.finalize()
    assert pruned.masks.kept == TOTAL // 4
    assert any(r["grown"] for r in pruned.facts.history)
    assert not pruner.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("decoupled", [False, True])
def test_topkast_decays_the_margin_harder(decoupled: bool) -> None:
    model = net()
    parameters = model.parameters()
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, 0.1, weight_decay=0.2) if decoupled
        else torch.optim.SGD(parameters, 0.1, weight_decay=0.2)
    )  # fmt: skip
    pruner = Gradual(model, optimizer, recipe(TopKast(0.25, 100), 0.75))
    before = {n: v.clone() for n, v in superset(pruner)._values.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # only the decay is left
    optimizer.step()
    pruner.step()
    for name in NAMES:
        narrow, wide = pruner.masks[name], superset(pruner).wide[name]
        after = superset(pruner)._values[name]
        torch.testing.assert_close(after[narrow], before[name][narrow] * (1 - 0.1 * 0.2))
        # 1 / D is 4; AdamW multiplies twice, once for A's share and once for the rest.
        margin = (1 - 0.1 * 0.2) * (1 - 0.1 * 0.2 * 3) if decoupled else 1 - 0.1 * 0.2 * 4
        outside = wide & ~narrow
        assert bool(outside.any())
        torch.testing.assert_close(after[outside], before[name][outside] * margin)
        assert torch.equal(after[~wide], before[name][~wide])


def test_topkast_gradients_come_from_the_sparse_forward_pass() -> None:
    model, pruner = start(recipe(TopKast(0.25, 100), 0.75), "sgd")
    plain = net()
    pruner.masks.apply_(plain)
    x, y = BATCHES[0]
    assert torch.equal(model(x), plain(x))
    F.cross_entropy(plain(x), y).backward()
    before = {n: v.clone() for n, v in superset(pruner)._values.items()}
    train(model, pruner, 1)
    for name in NAMES:
        wide, narrow = superset(pruner).wide[name], pruner.masks[name]
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        decay = torch.where(narrow, 1e-2, 4e-2)
        expected = before[name] - 0.1 * (gradient + decay * before[name])
        torch.testing.assert_close(superset(pruner)._values[name][wide], expected[wide])


# -- AC/DC ----------------------------------------------------------------------------------------


def test_alternating_is_the_published_schedule() -> None:
    phases = Alternating(begin=5, end=85, frequency=5, unit="epochs")
    compressed = {t for t in range(100) if share_at(phases, t, 0.9) == 1.0}
    expected = set(range(85, 100))
    for begin in range(10, 75, 10):
        expected |= set(range(begin, begin + 5))
    assert compressed == expected


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_acdc_alternates_and_ends_compressed(kind: str) -> None:
    wanted = Recipe(
        target=Target("sparsity", 0.8), allocation=Ranked(), schedule=Alternating(0, 24, 4)
    )
    model, pruner = start(wanted, kind, steps=30)
    levels = []
    for t in range(30):
        masks = pruner.masks
        train(model, pruner, 1, t)
        levels.append(round(pruner.masks.sparsity, 2))
        back = masks.diff(pruner.masks)[1]
        if back.kept and t + 1 < 24:
            assert all(bool((model.get_parameter(n)[back[n]] == 0).all()) for n in NAMES)
            assert pruner.masks.kept == TOTAL, "restored"
            for state in pruner.optimizer.state.values():
                first = state.get("momentum_buffer", state.get("exp_avg"))
                assert float(first.abs().max()) == 0
                if kind == "adam":
                    assert float(state["exp_avg_sq"].abs().max()) > 0
    dense, sparse = [0.0] * 4, [0.8] * 4
    assert levels == [0.0] * 3 + sparse + dense + sparse + dense + dense + [0.8] * 7
    pruned = pruner.finalize()
    assert pruned.masks.kept == round(0.2 * TOTAL)


def test_momentum_is_kept_if_asked() -> None:
    schedule = Alternating(0, 12, 4, reset_momentum=False)
    model, pruner = start(Recipe(target=Target("sparsity", 0.8), schedule=schedule), steps=30)
    train(model, pruner, 8)
    assert pruner.masks.kept == TOTAL
    assert (
        float(pruner.optimizer.state[model.get_parameter("0.bias")]["momentum_buffer"].abs().max())
        > 0
    )


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_gradient_at_an_exchange_changes_nothing(bad: float, skip: bool) -> None:
    model, pruner = start(recipe(Regrow(frequency=4, skip_step=skip)))
    train(model, pruner, 3)
    before, masks = snapshot(model, pruner.optimizer), pruner.masks
    backward(model, pruner, 3)
    gradient = model.get_parameter("2.weight").grad
    assert gradient is not None
    gradient[0, 0] = bad
    with pytest.raises(NonFinite, match=r"step 4.*1 of 384 .*2\.weight.*NaN"):
        pruner.optimizer.step()
    assert pruner.masks == masks
    assert all(
        torch.equal(a, b) for a, b in zip(snapshot(model, pruner.optimizer), before, strict=True)
    )
    train(model, pruner, 37, 3)  # a finite gradient, and all goes on
    assert pruner.finalize().masks.kept == TOTAL // 4


def test_gradients_that_are_not_there() -> None:
    model, pruner = start(recipe(Regrow(frequency=1)))
    with pytest.raises(NeedsData, match="no pruned weight has a gradient"):
        pruner.optimizer.step()
    model, pruner = start(recipe(Regrow(frequency=4)))
    first = pruner.masks["2.weight"]
    model[2].weight.requires_grad_(False)  # frozen: it keeps its mask, the other moves
    other = pruner.masks["0.weight"]
    train(model, pruner, 4)
    assert torch.equal(pruner.masks["2.weight"], first)
    assert not torch.equal(pruner.masks["0.weight"], other)


def test_an_optimizer_step_left_out_is_made_up_for() -> None:
    """A gradient scaler leaves the optimizer's step out when it finds an infinity."""
    model, pruner = start(recipe(Regrow(frequency=4)))
    train(model, pruner, 3)
    masks = pruner.masks
    pruner.step()
    assert pruner.masks == masks
    state = copy.deepcopy(pruner.state_dict())
    assert state["regrow"]["owed"]
    train(model, pruner, 1, 3)
    assert pruner.masks != masks
    assert [r["step"] for r in pruner.facts.history] == [0, 5]


def test_with_a_gradient_scaler() -> None:
    model, pruner = start(recipe(Regrow(frequency=4)))
    scaler = torch.amp.GradScaler("cpu")
    for t in range(40):
        x, y = BATCHES[t % 3]
        pruner.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(pruner.optimizer)
        pruner.step()
        scaler.update()
    assert pruner.finalize().masks.kept == TOTAL // 4
    assert len(pruner.facts.history) > 5


def test_time_is_checked_before_training() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match="length of the training is not known"):
        Gradual(model, optimizer, recipe())
    with pytest.raises(UsageError, match=r"first exchange would be at step 31.*30 of 40"):
        Gradual(model, optimizer, recipe(Regrow(frequency=31)), steps=40)
    with pytest.raises(UsageError, match=r"ends at step 50.*after 40 steps"):
        Gradual(model, optimizer, recipe(schedule=Linear(0, 50, 5)), steps=40)
    with pytest.raises(UsageError, match="steps_per_epoch"):
        Gradual(model, optimizer, recipe(Regrow(frequency=1, unit="epochs")), steps=40)
    with pytest.raises(UsageError, match=r"ends at step 500.*after 6 steps"):
        prune(
            net(),
            Recipe(schedule=Linear(0, 500, 1), recovery=recipes.gmp(0.5, 2).recovery),
            BATCHES,
        )
    assert masks_of(model).total == 0, "nothing was attached"


def test_a_training_that_stops_early() -> None:
    model, pruner = start(recipe())
    train(model, pruner, 29)
    with pytest.raises(UsageError, match=r"step 29.*up to step 30 of 40"):
        pruner.finalize()
    train(model, pruner, 1, 29)
    pruner.finalize()
    model, pruner = start(recipe())
    train(model, pruner, 5)
    assert pruner.finalize(early=True).masks.kept == TOTAL // 4


# -- resume ---------------------------------------------------------------------------------------

RESUMED = {
    "rigl": recipe(Regrow(frequency=3), allocation=ErdosRenyi()),
    "set": recipe(Regrow("random", frequency=3)),
    "movement": recipe(Regrow(frequency=5, start="random"), criterion=Movement()),
    "2:4": recipe(Regrow(frequency=4), pattern=NM(2, 4)),
    "gradual": recipe(Regrow(frequency=3), schedule=Polynomial(0, 20, 4)),
    "topkast": recipe(TopKast(0.2, 3)),
    "acdc": Recipe(target=Target("sparsity", 0.8), schedule=Alternating(0, 20, 4)),
}


@pytest.mark.parametrize("stop", [1, 2, 3, 6, 11, 17])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_run(name: str, stop: int) -> None:
    whole, pruner = start(RESUMED[name], "adamw")
    train(whole, pruner, 40)
    expected = pruner.finalize().masks
    model, pruner = start(RESUMED[name], "adamw")
    train(model, pruner, stop)
    saved = copy.deepcopy((model.state_dict(), pruner.optimizer.state_dict(), pruner.state_dict()))
    model, pruner = start(RESUMED[name], "adamw")
    model.load_state_dict(saved[0])
    pruner.optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    train(model, pruner, 40 - stop, stop)
    assert pruner.finalize().masks == expected
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_length_is_refused() -> None:
    _, pruner = start(recipe())
    _, other = start(recipe(), steps=50)
    with pytest.raises(UsageError, match=r"training of 50 steps.*one of 40"):
        other.load_state_dict(pruner.state_dict())


# -- recipes --------------------------------------------------------------------------------------

NEW = ("rigl", "set", "static_sparse", "topkast", "acdc")


@pytest.mark.parametrize("name", NEW)
def test_aliases_prune(name: str) -> None:
    alias: Any = recipes.ALIASES[name]
    made = alias(0.75, epochs=20)
    pruned = prune(net(), made, BATCHES)
    assert pruned.masks.kept == TOTAL // 4
    assert prune(net(), made, BATCHES).masks == pruned.masks
    events = [r for r in pruned.facts.history if "dropped" in r]
    assert len(events) == 1 if name == "static_sparse" else len(events) > 5
    losses = [r["loss"] for r in pruned.facts.history if "loss" in r]
    assert losses[-1] < losses[0]


def test_recipes_with_regrowth_are_plain_data() -> None:
    for made in (
        recipe(Regrow("random", 0.2, 50, skip_step=True)),
        recipe(TopKast(0.2)),
        *RESUMED.values(),
    ):
        assert from_plain(to_plain(made)) == made
        assert hash(from_plain(to_plain(made))) == hash(made)
    made = from_plain({"method": "rigl", "regrow": {"exchange": {"grow": "random"}}})
    assert made.regrow == Regrow("random")
    assert from_plain({"method": {"rigl": {"pattern": "2:4"}}}).target == Target("sparsity", 0.5)
    assert Recipe(regrow=Regrow()).schedule == OneShot(unit="steps")
    assert Recipe(regrow=Regrow()).fingerprint() != Recipe(regrow=TopKast()).fingerprint()


def test_fingerprints_of_before_are_unchanged() -> None:
    """Runs and files are named by them. These were written down before recipes could regrow."""
    before = {"magnitude": "9b2deebfa0d7", "gmp": "2acc1e864057", "wanda": "5ac47dc5e108",
              "sparsegpt": "537dd5fd126f", "movement": "237a9b676fb1"}  # fmt: skip
    assert {name: recipes.ALIASES[name]().fingerprint() for name in before} == before


def test_rigl_with_a_given_scope_and_uniform_densities() -> None:
    wanted = recipe(Regrow(frequency=3), scope=Scope(include=("2",)), allocation=Uniform())
    model, pruner = start(wanted)
    train(model, pruner, 40)
    assert kept(pruner.finalize().masks) == {"2.weight": 96}
