"""Top-KAST and AC/DC: both by their definitions, in a training of a few steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from regrow_cases import BATCHES, NAMES, OPTIMIZERS, TOTAL, net, recipe, slots, start, train

from secateur import Gradual, Recipe, Target
from secateur.allocate import Ranked
from secateur.drive.training.regrow import TopKast
from secateur.drive.training.topkast import Superset
from secateur.schedule import Alternating, share_at

# -- Top-KAST -------------------------------------------------------------------------------------


def superset(pruner: Gradual) -> Superset:
    assert isinstance(pruner._regrowth, Superset)
    return pruner._regrowth


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


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"maximize": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"maximize": True}),
        (torch.optim.Muon, {}),
    ],
)
def test_topkast_decays_the_margin_harder(kind: Any, more: dict[str, bool]) -> None:
    model = net()
    decoupled = kind is not torch.optim.SGD
    matrices = [p for p in model.parameters() if p.ndim == 2]  # Muon takes no others
    optimizer = kind(matrices, 0.1, weight_decay=0.2, **more)
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
