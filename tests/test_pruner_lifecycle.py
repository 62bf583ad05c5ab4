"""From construction to finalize(): several pruners, what is refused, and what an error leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as other_tool

from secateur import (
    FineTune,
    Gradual,
    Recipe,
    Regrow,
    Scope,
    Target,
    attach_,
    detach_,
    masks_of,
    prune,
    prune_,
    recipes,
)
from secateur.core.errors import BudgetError, DataError, NonFinite, UsageError
from secateur.core.masks import Masks
from secateur.drive.training.learned import Learned
from secateur.drive.training.regrow import TopKast
from secateur.learn import Leap
from secateur.pattern import PerRow, Rows
from secateur.schedule import OneShot, Polynomial
from secateur.score import Movement, Wanda

HALF = Target("sparsity", 0.5)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def recipe(end: int = 8, **more: Any) -> Recipe:
    return Recipe(**{"target": HALF, "schedule": Polynomial(0, end, 2), **more})


def only(name: str) -> Scope:
    return Scope(include=(name,))


def train(model: nn.Module, optimizer: Any, pruners: Any, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
        for pruner in pruners:
            pruner.step()


# -- several pruners on one model -----------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pruners_of_disjoint_weights_do_not_know_each_other(order: tuple[int, int]) -> None:
    wanted = [recipe(4, scope=only("0")), recipe(10, scope=only("2"), pattern=Rows())]
    model = net()
    optimizer = sgd(model)
    pruners = [Gradual(model, optimizer, r) for r in wanted]
    train(model, optimizer, pruners, 12)
    assert [list(p.masks) for p in pruners] == [["0.weight"], ["2.weight"]]
    done = {i: pruners[i].finalize() for i in order}
    for i, name in enumerate(("0.weight", "2.weight")):
        assert list(done[i].masks) == [name]
        assert [layer.name for layer in done[i].facts.layers] == [name]
        assert done[i].facts.sparsity == pytest.approx(0.5, abs=0.01)
        assert not model.get_parameter(name)[~done[i].masks[name]].any()
    assert not masks_of(model)


def test_one_pruner_goes_on_after_another_has_ended() -> None:
    model = net()
    optimizer = sgd(model)
    first = Gradual(model, optimizer, recipe(4, scope=only("0")))
    second = Gradual(model, optimizer, recipe(12, scope=only("2")))
    train(model, optimizer, [first, second], 6)
    first.finalize()
    train(model, optimizer, [second], 6, begin=6)
    assert second.finalize().facts.sparsity == pytest.approx(0.5, abs=0.01)


def test_weights_that_another_pruner_grows_are_not_held_down() -> None:
    """Each holds its own masks only: the second one saw the first mask of the other."""

    def run(with_second: bool) -> dict[str, torch.Tensor]:
        model = net()
        optimizer = sgd(model)
        wanted = Recipe(target=HALF, regrow=Regrow("random", frequency=2), scope=only("0"))
        pruners = [Gradual(model, optimizer, wanted, steps=12)]
        if with_second:
            never = recipe(1000, scope=only("2"), schedule=Polynomial(999, 1000, 1))
            pruners.append(Gradual(model, optimizer, never))
        train(model, optimizer, pruners, 12)
        pruners[0].finalize()
        return {n: p.detach() for n, p in model.named_parameters()}

    alone, together = run(False), run(True)
    assert all(torch.equal(alone[n], together[n]) for n in alone)


@pytest.mark.parametrize("part", [{"regrow": Regrow(frequency=2)}, {"criterion": Movement()}])
def test_a_step_that_one_pruner_skips_hides_no_gradient_from_another(part: dict[str, Any]) -> None:
    """RigL takes the gradients away for a step; in whatever order the two began, both have seen them."""
    rigl = Recipe(target=HALF, regrow=Regrow(frequency=2), scope=only("0"))
    other = recipe(12, scope=only("2"), **part)

    def run(*recipes: Recipe) -> dict[str, torch.Tensor]:
        model = net()
        optimizer = sgd(model)
        pruners = [Gradual(model, optimizer, r, steps=20) for r in recipes]
        given_back = []
        optimizer.register_step_post_hook(lambda *_: given_back.append(model[2].weight.grad))
        train(model, optimizer, pruners, 20)
        assert all(gradient is not None for gradient in given_back)
        for pruner in pruners:
            pruner.finalize()
        return {name: p.detach() for name, p in model.named_parameters()}

    one, two = run(rigl, other), run(other, rigl)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_masks_of_an_earlier_run_on_other_weights_stay() -> None:
    model = net()
    given = Masks({"0.weight": torch.arange(72).reshape(12, 6) % 3 > 0})
    attach_(model, given)
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe(scope=only("2")))
    train(model, optimizer, [pruner], 8)
    assert not model[0].weight[~given["0.weight"]].any()
    pruned = pruner.finalize()
    assert set(pruned.masks) == {"0.weight", "2.weight"}
    assert torch.equal(pruned.masks["0.weight"], given["0.weight"])
    assert not masks_of(model)


def test_a_copy_of_a_model_has_masks_and_no_pruner() -> None:
    model = net()
    pruner = Gradual(model, sgd(model), recipe(scope=only("0")))
    twin = copy.deepcopy(model)
    other = Gradual(twin, sgd(twin), recipe(scope=only("2")))
    assert set(other.masks) == {"0.weight", "2.weight"}
    assert set(pruner.masks) == {"0.weight"}


def test_masks_that_were_taken_away_are_missed() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe())
    detach_(model)
    with pytest.raises(UsageError, match=r"mask of '0\.weight' is no longer on the model"):
        train(model, optimizer, [pruner], 2)


# -- buffers of the user's own --------------------------------------------------------------------


class MaskedConv(nn.Conv2d):
    """As in PixelCNN: the kernel sees only what lies before."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.register_buffer("weight_mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.weight_mask[:, :, 1:, 2:] = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * self.weight_mask, self.bias, padding=1)


def pixels() -> nn.Sequential:
    return nn.Sequential(MaskedConv(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU(), MaskedConv(8))


IMAGES = [(torch.randn(2, 4, 5, 5), torch.zeros(2, 5, 5, dtype=torch.long))]


def test_a_buffer_of_the_module_is_no_mask_of_ours() -> None:
    model = pixels()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not masks_of(model)
    assert not detach_(model)
    pruned = prune(model, Recipe(target=HALF, scope=only("4")))  # one round trains nothing
    assert list(pruned.masks) == ["4.weight"]
    assert pruned.model.state_dict().keys() == before.keys()
    assert torch.equal(pruned.model[0].weight_mask, before["0.weight_mask"])
    pruned.model(IMAGES[0][0])
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe(2, scope=Scope(ignore=("0", "4"))))
    for _ in range(2):
        model(IMAGES[0][0]).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert list(pruner.finalize().masks) == ["2.weight"]
    assert model.state_dict().keys() == before.keys()


def attach_one(model: nn.Module) -> None:
    mask = torch.ones_like(model.get_parameter("2.weight"), dtype=torch.bool)
    attach_(model, Masks({"2.weight": mask, "4.weight": torch.ones(8, 8, 3, 3) > 0}))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: Gradual(model, sgd(model), recipe(2)),
        lambda model: prune_(model, Recipe(target=HALF, recovery=(FineTune(1),)), IMAGES),
        lambda model: prune_(
            model, Recipe(target=HALF, schedule=Polynomial(0, 2, 1, unit="rounds"))
        ),
        lambda model: prune_(model, recipes.gmp(0.5, epochs=1), IMAGES),
        attach_one,
    ],
    ids=["gradual", "finetune", "rounds", "gmp", "attach_"],
)
def test_a_module_that_uses_the_name_is_refused_and_nothing_changes(act: Any) -> None:
    model = pixels()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"MaskedConv\) has a 'weight_mask' of its own"):
        act(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mask_of_another_tool_is_refused() -> None:
    model = net()
    other_tool.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(UsageError, match=r"torch\.nn\.utils\.prune"):
        attach_(model, Masks({"2.weight": torch.ones(8, 12, dtype=torch.bool)}))


def test_masks_of_ours_survive_copies_and_state_dicts() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe())
    train(model, optimizer, [pruner], 5)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert masks_of(twin) == pruner.masks
    average = torch.optim.swa_utils.AveragedModel(model)
    assert masks_of(average.module) == pruner.masks
    fresh = net(seed=5)
    Gradual(fresh, sgd(fresh), recipe())
    fresh.load_state_dict(model.state_dict())
    assert masks_of(fresh) == pruner.masks
    for one in (twin, fresh, model):
        detach_(one)
        attributes = [set(vars(module)) for module in one.modules()]
        assert attributes == [set(vars(module)) for module in net().modules()]


# -- the optimizer --------------------------------------------------------------------------------

SPARSE = Recipe(target=HALF, regrow=Regrow("gradient", frequency=2))


@pytest.mark.parametrize("wanted", [recipe(), SPARSE], ids=["gradual", "rigl"])
def test_the_optimizer_of_a_copy_is_refused_and_nothing_changes(wanted: Recipe) -> None:
    model = net()
    twin = sgd(copy.deepcopy(model))
    names = set(model.state_dict())
    with pytest.raises(UsageError, match=r"\(SGD\): it does not train '0\.weight'"):
        Gradual(model, twin, wanted, steps=8)
    head: Any = torch.optim.SGD(model[4].parameters(), 0.1)  # trains none that is pruned
    with pytest.raises(UsageError, match=r"nor another of the 2 weights"):
        Gradual(model, head, wanted, steps=8)
    for alien in ("x", None, model):
        with pytest.raises(UsageError, match=r"no torch\.optim\.Optimizer"):
            Gradual(model, alien, wanted, steps=8)  # type: ignore[arg-type]
    assert set(model.state_dict()) == names
    assert not twin._optimizer_step_pre_hooks
    assert not twin._optimizer_step_post_hooks


def test_an_optimizer_of_some_of_the_weights_will_do() -> None:
    model = net()
    part = torch.optim.SGD(model[2:].parameters(), 0.1)
    pruner = Gradual(model, part, recipe())
    train(model, part, [pruner], 8)
    assert pruner.finalize().masks.sparsity == pytest.approx(0.5, abs=0.01)


def test_frozen_weights_may_be_pruned_while_others_train() -> None:
    model = net()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    head = torch.optim.SGD(model[4].parameters(), 0.1)
    pruner = Gradual(model, head, recipe())
    train(model, head, [pruner], 8)
    assert pruner.finalize().masks.sparsity == pytest.approx(0.5, abs=0.01)


# -- the end --------------------------------------------------------------------------------------


def test_a_result_is_complete_after_finalize() -> None:
    model = net()
    optimizer = sgd(model)
    pruner = Gradual(model, optimizer, recipe())
    train(model, optimizer, [pruner], 4)
    with pytest.raises(UsageError, match="the schedule ends at 8"):
        pruner.finalize()
    train(model, optimizer, [pruner], 4, begin=4)  # that was no end
    pruned = pruner.finalize()
    layers = list(pruned.facts.layers)
    for act in (pruner.finalize, lambda: pruner.finalize(early=True), pruner.step):
        with pytest.raises(UsageError, match=r"finalize\(\) was called before, at step 8"):
            act()
    assert pruned.facts.layers == layers
    assert pruned.facts.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("how", [{}, {"regrow": Regrow("random", frequency=2)}], ids=repr)
def test_no_step_follows_an_early_end(how: Any) -> None:
    model = net()
    optimizer = sgd(model)
    schedule = {} if how else {"schedule": Polynomial(0, 16, 2)}
    pruner = Gradual(model, optimizer, Recipe(target=HALF, **schedule, **how), steps=16)
    train(model, optimizer, [pruner], 5)
    pruner.finalize(early=True)
    with pytest.raises(UsageError, match=r"step\(\): finalize\(\) was called before"):
        train(model, optimizer, [pruner], 3)


# -- what an error leaves behind ------------------------------------------------------------------

BATCHES = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]
NAN = [(x * float("nan"), y) for x, y in BATCHES]
WRONG = [(x, y + 50) for x, y in BATCHES]  # labels that the loss cannot take


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return {
        "state": {n: v.clone() for n, v in model.state_dict().items()},
        "attributes": [set(vars(m)) for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "hooks": [len(h) for h in hooks],
        "parameters": [id(p) for p in model.parameters()],
        "groups": [[id(p) for p in g["params"]] for g in optimizer.param_groups],
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key != "state":
            assert value == after[key], key
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(v, after["state"][n]) for n, v in before["state"].items())


@pytest.mark.parametrize(
    "wanted",
    [
        Recipe(Wanda(), PerRow(), HALF, schedule=OneShot(unit="steps")),
        Recipe(Wanda(), PerRow(), HALF, regrow=Regrow(frequency=2, start="criterion")),
        Recipe(Wanda(), PerRow(), HALF, regrow=TopKast(0.1, frequency=2)),
    ],
    ids=["oneshot", "rigl", "topkast"],
)
def test_a_pruner_that_cannot_begin_leaves_no_trace(wanted: Recipe) -> None:
    model = net()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    with pytest.raises(NonFinite):
        Gradual(model, optimizer, wanted, steps=8, data=NAN)
    assert_untouched(before, everything(model, optimizer))
    Gradual(model, optimizer, wanted, steps=8, data=BATCHES)


@pytest.mark.parametrize(
    "wanted",
    [Recipe(target=HALF, recovery=(FineTune(1),)), recipes.gmp(0.5, epochs=1)],
    ids=["finetune", "gmp"],
)
def test_a_training_that_fails_leaves_no_masks_on_the_model(wanted: Recipe) -> None:
    model = net()
    names = list(model.state_dict())
    with pytest.raises(DataError, match="its own loss fails"):
        prune_(model, wanted, WRONG)
    assert list(model.state_dict()) == names
    earlier = net()
    attach_(earlier, Masks({"0.weight": torch.ones(12, 6, dtype=torch.bool)}))
    with pytest.raises(DataError, match="its own loss fails"):
        prune_(earlier, wanted, WRONG)
    assert list(masks_of(earlier)) in (["0.weight"], [])  # rounds have taken them off already


class OneGroup(torch.optim.SGD):
    def add_param_group(self, group: Any) -> None:
        if self.param_groups:
            raise ValueError("one group only")
        super().add_param_group(group)


def muon(model: nn.Module) -> Any:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], 0.01)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: OneGroup(m.parameters(), 0.1), r"OneGroup: it refuses .*one group only"),
        (muon, "Muon: it refuses"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS: it refuses"),
    ],
    ids=["one-group", "muon", "lbfgs"],
)
def test_an_optimizer_that_cannot_learn_masks_is_refused(make: Any, words: str) -> None:
    model = net()
    optimizer = make(model)
    before = everything(model, optimizer)
    with pytest.raises(UsageError, match=words):
        Learned(model, optimizer, Leap.short(0.5))
    assert_untouched(before, everything(model, optimizer))


def test_a_weight_has_one_mask() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = Gradual(model, optimizer, recipe(scope=only("0")))
    before = everything(model, optimizer)
    with pytest.raises(
        UsageError, match=r"learning a mask for '0\.weight': the weight carries a mask"
    ):
        Learned(model, optimizer, Leap.short(0.5))
    assert_untouched(before, everything(model, optimizer))
    learned = Learned(model, optimizer, Leap.short(0.5), scope=only("2"))  # another weight
    before = everything(model, optimizer)
    with pytest.raises(UsageError, match=r"pruning '2\.weight': it has a learned mask"):
        Learned(model, optimizer, Leap.short(0.5), scope=Scope(ignore=("0",)))
    assert_untouched(before, everything(model, optimizer))
    learned.harden(early=True)
    pruner.finalize(early=True)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in net().named_parameters()
    ]
    Learned(model, optimizer, Leap.short(0.5))


# -- learned masks and schedules of learning rates ------------------------------------------------

LR = torch.optim.lr_scheduler
SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: LR.LambdaLR(o, lambda t: 0.99**t),
    "cyclic": lambda o: LR.CyclicLR(o, 0.001, 0.01, cycle_momentum=False),
    "onecycle": lambda o: LR.OneCycleLR(o, 0.02, total_steps=40),
    "cosine": lambda o: LR.CosineAnnealingLR(o, 40),
    "warm": lambda o: LR.SequentialLR(
        o, [LR.LinearLR(o, 0.1, total_iters=3), LR.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_schedule_made_after_learned_outlives_harden(name: str, fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    learned = Learned(model, optimizer, Leap.short(0.5))
    rate = SCHEDULES[name](optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1])
        (loss + (learned.penalty() if not hardened else 0)).backward()
        optimizer.step()
        rate.step()

    hardened = False
    for _ in range(5):
        step()
        learned.step()
    learned.harden()
    hardened = True
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(
        map(id, model.parameters())
    )
    assert set(map(id, optimizer.state)) == set(map(id, model.parameters()))
    before = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        step()
    assert optimizer.param_groups[0]["lr"] != before
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_made_before_learned_is_refused(name: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    SCHEDULES[name](optimizer)
    before = everything(model, optimizer)
    with pytest.raises(UsageError, match="Make Learned first and the schedule afterwards"):
        Learned(model, optimizer, Leap.short(0.5))
    assert_untouched(before, everything(model, optimizer))
    for group in optimizer.param_groups:
        group.pop("initial_lr")
    Learned(model, optimizer, Leap.short(0.5))


# -- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "data"),
    [
        (Target("bytes", 10), None),
        (Target("params", 5), None),
        (Target("macs", 3), BATCHES),
    ],
    ids=["bytes", "params", "macs"],
)
def test_a_target_below_the_floor_is_refused_before_training(target: Target, data: Any) -> None:
    model = net()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    late = recipe(schedule=Polynomial(10, 20, 5), target=target)
    with pytest.raises(BudgetError, match="Ask for more than"):
        Gradual(model, optimizer, late, data=data)
    assert_untouched(before, everything(model, optimizer))
