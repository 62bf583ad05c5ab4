"""Attacks and the objectives and curves made of them."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import Recipe, Scope, Target, prune
from secateur.core.errors import DataError, NeedsData, UsageError
from secateur.core.losses import default_loss
from secateur.evaluate.robustness import Curve, robustness
from secateur.learn import Adversarial, Attack, DeepFoolCutoff, Fgsm, Objectives, Pgd, Task

ATTACKS: dict[str, Attack] = {
    "fgsm": Fgsm(0.1),
    "pgd": Pgd(0.1, steps=5),
    "pgd-random": Pgd(0.1, step=0.03, steps=5, start=1.0),
    "deepfool": DeepFoolCutoff(delta=0.05),
    "deepfool-mean": DeepFoolCutoff(delta="mean", rho=0.95),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    # Train it a little, so that its answers mean something.
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        default_loss(net, batch(64)).backward()
        optimizer.step()
    return net


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    own = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 6, 6, generator=own)
    return x, (4.99 * x.mean((1, 2, 3)).sub(0.4).clamp(0, 0.2) * 5).long()


def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    net.eval()
    return float((net(data[0]).argmax(1) == data[1]).float().mean())


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_is_disturbed(name: str) -> None:
    net = network().train()
    net[3].eval()  # a mode of its own
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    data = batch()
    kept = data[0].clone()
    state = torch.get_rng_state()
    x, y = ATTACKS[name](net, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data[0], kept)
    assert not x.requires_grad
    assert torch.equal(y, data[1])
    assert [m.training for m in net.modules()] == modes
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    after = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_inputs_stay_in_their_domain_and_the_draw_is_repeatable(name: str) -> None:
    net = network()
    x, _ = ATTACKS[name](net, batch())
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert not torch.equal(x, batch()[0])
    assert torch.equal(x, ATTACKS[name](net, batch())[0])


@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd-random"])
def test_the_ball_is_kept_and_the_loss_rises(name: str) -> None:
    net, data = network().eval(), batch()
    x, _ = ATTACKS[name](net, data)
    assert float((x - data[0]).abs().max()) <= 0.1 + 1e-6
    assert default_loss(net, (x, data[1])).item() > default_loss(net, data).item() + 0.1


def test_many_small_steps_do_no_worse_than_one_large() -> None:
    net, data = network().eval(), batch(64)
    one, many = (default_loss(net, a(net, data)).item() for a in (Fgsm(0.1), Pgd(0.1, steps=10)))
    assert many >= one - 1e-4


def test_a_larger_step_than_the_ball_is_brought_back() -> None:
    net, data = network().eval(), batch()
    x, _ = Pgd(0.05, step=1.0, steps=3)(net, data)
    assert float((x - data[0]).abs().max()) <= 0.05 + 1e-6


def test_bounds_may_differ_from_channel_to_channel() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4, 3))
    x = torch.zeros(5, 2, 2, 2)
    data = (x, torch.zeros(5, dtype=torch.long))
    moved, _ = Fgsm(10.0, low=(-1.0, -2.0), high=(1.0, 3.0))(net, data)
    assert float(moved[:, 0].abs().max()) == 1
    assert set(moved[:, 1].unique().tolist()) <= {-2.0, 3.0}


# -- DeepFool with a cut-off ----------------------------------------------------------------------


def linear(features: int = 6, classes: int = 4) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(features, classes)


@torch.no_grad()
def distances(net: nn.Linear, x: Tensor) -> Tensor:
    """Exact distance of each sample to the nearest boundary of a linear classifier."""
    scores = net(x)
    own = scores.argmax(1)
    found = []
    for i, k in enumerate(own.tolist()):
        others = [j for j in range(scores.shape[1]) if j != k]
        found.append(
            min(
                float((scores[i, k] - scores[i, j]) / (net.weight[k] - net.weight[j]).norm())
                for j in others
            )
        )
    return torch.tensor(found)


def test_a_linear_boundary_is_crossed_at_the_analytic_distance() -> None:
    net, x = linear(), torch.randn(20, 6)
    free = {"delta": 1e9, "low": -1e9, "high": 1e9}
    moved, _ = DeepFoolCutoff(overshoot=0.02, **free)(net, (x, net(x).argmax(1)))
    assert torch.allclose((moved - x).norm(dim=1), 1.02 * distances(net, x), rtol=1e-4)
    assert bool((net(moved).argmax(1) != net(x).argmax(1)).all())
    # Just before the boundary nothing changes.
    short = x + (moved - x) * (0.98 / 1.02)
    assert bool((net(short).argmax(1) == net(x).argmax(1)).all())


def test_the_cutoff_bounds_the_root_mean_square() -> None:
    net, x = linear(), 3 * torch.randn(40, 6)
    data = (x, net(x).argmax(1))
    wide = {"low": -1e9, "high": 1e9}
    whole = (DeepFoolCutoff(delta=1e9, **wide)(net, data)[0] - x).square().mean(1).sqrt()
    for delta in (0.05, 0.3):
        cut = (DeepFoolCutoff(delta=delta, **wide)(net, data)[0] - x).square().mean(1).sqrt()
        assert torch.allclose(cut, whole.clamp(max=delta), rtol=1e-4)
        assert bool((cut < whole - 1e-4).any())  # the cut-off did something
    mean = (DeepFoolCutoff(delta="mean", **wide)(net, data)[0] - x).square().mean(1).sqrt()
    assert torch.allclose(mean, whole.clamp(max=float(whole.mean())), rtol=1e-4)
    part = (DeepFoolCutoff(delta=0.3, rho=0.9, **wide)(net, data)[0] - x).square().mean(1).sqrt()
    assert torch.allclose(part, 0.9 * whole.clamp(max=0.3), rtol=1e-4)


def test_random_starts_differ_from_batch_to_batch() -> None:
    attack = Pgd(0.1, step=0.0, steps=1, start=1.0, low=-300.0, high=300.0)  # the start alone
    for scale in (1, 255):  # whole numbers, too
        batches = [(torch.rand(8, 6) * scale).round(decimals=2 - 2 * (scale > 1)) for _ in range(6)]
        starts = [attack(linear(), (x, torch.zeros(8, dtype=torch.long)))[0] - x for x in batches]
        assert all(0 < float(start.abs().max()) <= 0.1 + 1e-4 for start in starts)
        for a, b in itertools.combinations(starts, 2):
            assert float((a - b).abs().mean()) > 0.03  # a third of 0.2 for independent draws
        again = attack(linear(), (batches[0], torch.zeros(8, dtype=torch.long)))[0] - batches[0]
        assert torch.equal(again, starts[0])


def test_what_the_bounds_cut_off_counts_for_nothing() -> None:
    net, x = linear(), torch.rand(40, 6) * (torch.rand(40, 6) > 0.5)  # many entries at the bound
    data = (x, net(x).argmax(1))
    whole = (DeepFoolCutoff(delta=1e9)(net, data)[0] - x).square().mean(1).sqrt()
    assert bool((whole > 0.02).sum() > 10)
    for delta in (0.02, 0.1):
        cut = (DeepFoolCutoff(delta=delta)(net, data)[0] - x).square().mean(1).sqrt()
        assert torch.allclose(cut, whole.clamp(max=delta), rtol=1e-4)
    mean = (DeepFoolCutoff(delta="mean")(net, data)[0] - x).square().mean(1).sqrt()
    assert torch.allclose(mean, whole.clamp(max=float(whole.mean())), rtol=1e-4)


def test_deepfool_crosses_the_boundaries_of_a_network() -> None:
    net, data = network().eval(), batch(64)
    first = net(data[0]).argmax(1)
    # Where no pixel ends at 0 or 1, all of them come across.
    moved, _ = DeepFoolCutoff(delta=10.0, max_iter=30, low=-100.0, high=100.0)(net, data)
    assert bool((net(moved).argmax(1) != first).all())


def test_a_constant_classifier_is_left_alone() -> None:
    net = nn.Linear(3, 2)
    nn.init.zeros_(net.weight)
    x = torch.rand(4, 3)
    assert torch.equal(DeepFoolCutoff()(net, (x, torch.zeros(4, dtype=torch.long)))[0], x)


# -- bad input ------------------------------------------------------------------------------------


def test_what_cannot_be_perturbed_is_refused() -> None:
    tokens: Any = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(DataError, match=r"int64"):
        Fgsm(0.1)(nn.Embedding(4, 2), tokens)
    with pytest.raises(UsageError, match="negative or not finite"):
        Fgsm(-0.1)
    with pytest.raises(UsageError, match="negative or not finite"):
        DeepFoolCutoff(delta=math.nan)
    with pytest.raises(UsageError, match="'mean'"):
        DeepFoolCutoff(delta="median")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fgsm("0.1"), "Fgsm(eps='0.1')"),  # type: ignore[arg-type]
        (lambda: Fgsm(0.1, low=1, high=0), "low is not below high"),
        (lambda: Fgsm(0.1, low=0, high=0), "low is not below high"),
        (lambda: Fgsm(0.1, low=math.nan), "Fgsm(low=nan, high=1.0)"),
        (lambda: Fgsm(0.1, high="1"), "they are no numbers"),  # type: ignore[arg-type]
        (lambda: Fgsm(0.1, low=(), high=1.0), "they are no numbers"),
        (lambda: Fgsm(0.1, low=(0.0, 0.0), high=(1.0, 1.0, 1.0)), "not as many as channels"),
        (lambda: Fgsm(0.1, low=(0.0, 2.0), high=1.0), "low is not below high"),
        (lambda: Pgd(0.1, low=1, high=0), "Pgd(low=1, high=0)"),
        (lambda: Pgd(0.1, steps=0), "how many steps, 1 or more"),
        (lambda: Pgd(0.1, steps=2.5), "Pgd(steps=...)"),  # type: ignore[arg-type]
        (lambda: Pgd(0.1, step=-0.1), "Pgd(step=-0.1)"),
        (lambda: Pgd(0.1, step="a"), "Pgd(step='a')"),  # type: ignore[arg-type]
        (lambda: Pgd(0.1, start=2), "no share from 0 to 1"),
        (lambda: Pgd(0.1, start="a"), "no share from 0 to 1"),  # type: ignore[arg-type]
        (lambda: DeepFoolCutoff(0.1), "the longest perturbation is delta="),  # type: ignore[arg-type]
        (lambda: DeepFoolCutoff(max_iter=0), "how many iterations, 1 or more"),
        (lambda: DeepFoolCutoff(candidates=1), "the predicted class is one of them"),
        (lambda: DeepFoolCutoff(candidates=2.5), "DeepFoolCutoff(candidates=...)"),  # type: ignore[arg-type]
        (lambda: DeepFoolCutoff(overshoot=-1), "DeepFoolCutoff(overshoot=-1)"),
        (lambda: DeepFoolCutoff(rho=math.inf), "DeepFoolCutoff(rho=inf)"),
        (lambda: DeepFoolCutoff(delta=None), "DeepFoolCutoff(delta=None)"),  # type: ignore[arg-type]
        (lambda: DeepFoolCutoff(low=1, high=0), "low is not below high"),
    ],
)
def test_settings_of_attacks(make: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert said in str(error.value)
    assert all(error.value.parts().values())


# -- objectives -----------------------------------------------------------------------------------


def test_the_adversarial_objective_is_the_weighted_sum() -> None:
    net, data = network().eval(), batch()
    clean = default_loss(net, data).item()
    harder = default_loss(net, Fgsm(0.1)(net, data)).item()
    for share in (0.0, 0.3, 1.0):
        found = Adversarial(Fgsm(0.1), share=share, weight=2.0)(net, data).item()
        assert found == pytest.approx(2 * ((1 - share) * clean + share * harder), rel=1e-5)
    both = Objectives((Task(), Adversarial(Fgsm(0.1))))(net, data).item()
    assert both == pytest.approx(clean + 0.5 * clean + 0.5 * harder, rel=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_adversarial_objective_takes_a_loss_of_ones_own(share: float) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"bias": self.inner.bias, "scores": self.inner(x)}  # no output to guess from

    def loss(model: nn.Module, parts: Any) -> Tensor:
        return nn.functional.cross_entropy(model(parts[0])["scores"], parts[1], label_smoothing=0.4)

    net, (x, y) = Scores(), (torch.rand(8, 6), torch.arange(8) % 3)
    here = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(net, (here, y)), here)
    harder = loss(net, ((x + 0.1 * slope.sign()).clamp(0, 1), y))
    wanted = (1 - share) * loss(net, (x, y)) + share * harder
    objective = Adversarial(Fgsm(0.1), share=share, loss=loss)
    assert objective(net, (x, y)).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert Objectives((objective,))(net, (x, y)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_training_on_perturbed_inputs_makes_robust() -> None:
    found = {}
    for name, objective in (("plain", Task()), ("robust", Adversarial(Pgd(0.1, steps=3)))):
        net = network().train()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
        for _ in range(120):
            optimizer.zero_grad()
            objective(net, batch(64)).backward()  # type: ignore[operator]
            optimizer.step()
        found[name] = net
    facts = robustness(found, [batch(64)], Pgd(0.1, steps=3), sizes=[0.1])
    plain, robust = (facts.curve(name, "Pgd").accuracy[0] for name in ("plain", "robust"))
    assert robust > plain + 0.3


# -- curves ---------------------------------------------------------------------------------------


def test_curves_are_what_a_loop_by_hand_finds() -> None:
    net, parts = network().train(), [batch(24), batch(9)]
    modes = [m.training for m in net.modules()]
    facts = robustness({"net": net}, parts, {"f": Fgsm(0), "p": Pgd(0)}, sizes=[0.2, 0.05])
    assert [m.training for m in net.modules()] == modes
    assert facts.units == 33
    assert [(c.attack, c.sizes) for c in facts.curves] == [("f", (0.05, 0.2)), ("p", (0.05, 0.2))]
    for curve, attack in zip(facts.curves, (Fgsm(0.2), Pgd(0.2)), strict=True):
        right = sum(accuracy(net, attack(net, p)) * len(p[1]) for p in parts)
        assert curve.accuracy[1] == pytest.approx(right / 33)
        natural = sum(accuracy(net, p) * len(p[1]) for p in parts)
        assert curve.natural == pytest.approx(natural / 33)
        assert curve.accuracy[1] < curve.natural
    assert len(facts.rows()) == 6
    assert facts.to_dict()["units"] == 33


def test_the_area_is_the_mean_accuracy() -> None:
    assert Curve("m", "a", (0.1, 0.3), (0.5, 0.1), 0.9).area == pytest.approx(
        (0.1 * 0.7 + 0.2 * 0.3) / 0.3
    )


def test_results_of_pruning_are_attacked_like_their_networks() -> None:
    pruned = prune(network(), Recipe(target=Target("sparsity", 0.5), scope=Scope(sensitive=True)))
    wanted = robustness(pruned.model, [batch()], Fgsm(0), sizes=[0.1])
    assert robustness(pruned, [batch()], [Fgsm(0)], sizes=0.1) == wanted
    by_name = robustness({"pruned": pruned}, [batch()], Fgsm(0), sizes=[0.1])
    assert by_name.curves[0].accuracy == wanted.curves[0].accuracy


def test_curves_that_cannot_be_measured_are_refused() -> None:
    net = network()
    wrong: Any
    for wrong in ("fgsm", Fgsm, {"f": "fgsm"}, [Fgsm(0.1), None]):
        with pytest.raises(UsageError, match="It should be an attack"):
            robustness(net, [batch()], wrong, sizes=[0.1])
    wrong = {"a": "net.py"}
    with pytest.raises(UsageError, match=r"torch\.nn\.Module"):
        robustness(wrong, [batch()], Fgsm(0.1), sizes=[0.1])
    with pytest.raises(UsageError, match="Size 0 is the natural"):
        robustness(net, [batch()], Fgsm(0.1), sizes=[0.0, 0.1])
    with pytest.raises(UsageError, match="a name of its own"):
        robustness(net, [batch()], [Pgd(0.1), Pgd(0.1, steps=20)], sizes=[0.1])
    with pytest.raises(NeedsData, match="no batches"):
        robustness(net, [], Fgsm(0.1), sizes=[0.1])
    with pytest.raises(NeedsData, match="no class targets"):
        robustness(net, [batch()[0]], Fgsm(0.1), sizes=[0.1])
    facts = robustness(net, [batch()], Fgsm(0.1), sizes=[0.1])
    with pytest.raises(UsageError, match="model/Fgsm"):
        facts.curve("model", "Pgd")


def test_a_step_of_ones_own_grows_with_the_ball() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False))
    x = torch.full((4, 1, 6, 6), 0.5)
    data = (x, net(x).argmax(1))
    for size in (0.02, 0.1, 0.4):
        moved, _ = Pgd(0.1, step=0.025, steps=7).sized(size)(net, data)
        assert float((moved - x).abs().max()) == pytest.approx(size)  # 7 steps of a quarter fill it
    assert Pgd(0.0, step=0.025).sized(0.1).step == 0.025
    assert Pgd(0.1).sized(0.2).step is None


@pytest.mark.parametrize("name", ATTACKS)
def test_halves_do_not_swallow_the_slopes_of_sure_answers(name: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3), torch.rand(512, 6)
    with torch.no_grad():
        net.weight.mul_(40)
        answers = net(x)
    ahead = answers.topk(2).values.diff().abs()[:, 0]
    sure = (ahead > 12) & (ahead < 15)  # exp(-12) / 512 is below any half
    data = (x, answers.argmax(1))
    assert int(sure.sum()) > 10
    whole, _ = ATTACKS[name](net, data)
    with torch.autocast("cpu", torch.float16):
        half, _ = ATTACKS[name](net, data)
        assert net(x).dtype is torch.float16  # the caller's autocast goes on
    assert torch.equal(half, whole)
    if name != "deepfool-mean":
        assert bool((half != x)[sure].any(1).all())
