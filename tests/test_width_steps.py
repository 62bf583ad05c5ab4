"""Steps of widths: multiples that runtimes like, and finer ones rather than a missed target."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.allocate.widths import (
    GivenWidths,
    RankedWidths,
    UniformWidths,
    WidthAllocation,
    WidthItem,
)
from secateur.core.errors import BudgetError
from secateur.core.facts import Facts, WidthFacts
from secateur.core.widths import Slices, Width
from secateur.drive.structural.pace import Pace
from secateur.drive.structural.shrinking import Shrinking
from secateur.drive.structural.uniform import uniform_keep
from secateur.drive.structural.width_steps import WidthSteps, step_of, units_of
from secateur.report.structure import steps_text
from secateur.schedule import Linear
from secateur.structure import couple

ALLOCATIONS = [
    UniformWidths(),
    RankedWidths(),
    RankedWidths(normalise="none", per_cost=True),
]
X = torch.zeros(1, 3, 8, 8)


class Blocks(nn.Module):
    """A residual network of two stages, wide enough for steps of 16 and of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.ups = nn.ModuleList(nn.Conv2d(64, 40 + 24 * i, 3, padding=1) for i in range(4))
        self.downs = nn.ModuleList(nn.Conv2d(40 + 24 * i, 64, 1) for i in range(4))
        self.turn = nn.Conv2d(64, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(x).relu())
        scores: torch.Tensor = self.head(self.turn(x).relu().mean((2, 3)))
        return scores


@pytest.fixture
def net() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


def cut(model: nn.Module, target: str, **settings: object) -> Facts:
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target.parse(target),
        recovery=(),
        **settings,  # type: ignore[arg-type]
    )
    return secateur.shrink(model, recipe, X).facts


def told(facts: Facts, topic: str) -> list[str]:
    return [note.text for note in facts.notes if note.topic == topic]


def off(facts: Facts) -> float:
    target = facts.measures["target"]
    return float(1 - target["reached"] / target["limit"])


def untidy(widths: list[WidthFacts], most: int = 16) -> list[tuple[str, int, int]]:
    """Cut widths that are no multiple of their step."""
    steps = {w.name: step_of(w.groups, most=most) for w in widths}
    return [
        (w.name, w.groups, w.kept) for w in widths if w.kept < w.groups and w.kept % steps[w.name]
    ]


# ---- the step of one width


@given(groups=st.integers(1, 5000), units=st.integers(1, 300), most=st.sampled_from([1, 4, 8, 16]))
def test_a_step_is_a_power_of_two_at_most_a_quarter(groups: int, units: int, most: int) -> None:
    step = step_of(groups, units, most)
    assert step.bit_count() == 1
    assert step == 1 or (step * units <= most and 4 * step <= groups)
    # The next power would be too much.
    assert 2 * step * units > most or 8 * step > groups


def test_steps_of_widths_below_a_block() -> None:
    assert [step_of(n) for n in (64, 63, 32, 31, 16, 15, 8, 7)] == [16, 8, 8, 4, 4, 2, 2, 1]


def test_heads_go_one_by_one_and_pairs_in_eights() -> None:
    def width(groups: int, *members: int, why: str = "") -> Width:
        slices = [
            Slices(f"p{i}", 0, torch.zeros(groups, n, dtype=torch.long))
            for i, n in enumerate(members)
        ]
        return Width("w", tuple(slices), torch.arange(groups), why)

    head = width(32, 64, 64, 1, why="one head")  # the 1: a table with an entry for each head
    assert (units_of(head), WidthSteps(0).of([head])) == (64, {"w": 1})
    pair = width(256, 2, 2, why="a rotary pair")
    assert (units_of(pair), WidthSteps(0).of([pair])) == (2, {"w": 8})
    flattened = width(64, 1, 49)
    assert (units_of(flattened), WidthSteps(0).of([flattened])) == (1, {"w": 16})


def test_transformer_widths() -> None:
    layer = nn.TransformerEncoderLayer(64, 8, 256, batch_first=True).eval()
    structure = couple(nn.Sequential(layer, nn.Linear(64, 3)), torch.zeros(1, 5, 64))
    steps = WidthSteps(0).of(structure.widths)
    for width in structure.widths:
        assert steps[width.name] == step_of(width.groups, units_of(width))
        assert (steps[width.name] <= 2) == (width.groups == 8)


# ---- what is chosen


@pytest.mark.parametrize("target", ["macs=50%", "bytes=60%"])
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=["uniform", "ranked", "per cost"])
def test_default_widths_are_multiples_and_meet_the_target(
    net: Blocks, allocation: WidthAllocation, target: str
) -> None:
    facts = cut(net, target, allocation=allocation)
    align = facts.measures["target"]["align"]
    assert not untidy(facts.widths, align)
    assert 0 <= off(facts) <= 0.02
    assert bool(told(facts, "widths")) == (align < 16)
    assert not told(facts, "hint")


def test_the_default_is_coarse_here_and_align_1_is_not(net: Blocks) -> None:
    assert cut(net, "macs=50%").measures["target"]["align"] == 16
    finest = cut(net, "macs=50%", align=1)
    assert finest.measures["target"]["align"] == 1
    assert untidy(finest.widths)
    assert 0 <= off(finest) <= 0.01
    assert not told(finest, "widths")


def test_align_1_reproduces_the_finest_ranking() -> None:
    """One ranking of single groups, and the longest prefix that must go."""
    generator = torch.Generator().manual_seed(3)
    items = [WidthItem(str(n), torch.rand(n, generator=generator)) for n in (37, 64, 20)]

    def spend(kept: Mapping[str, int]) -> float:
        return float(kept["37"] * kept["64"] + kept["64"] * kept["20"])

    kept = RankedWidths(floor=0.0)(items, spend, 0.5 * spend({"37": 37, "64": 64, "20": 20}))
    rows = [(s / i.scores.mean().item(), i.name) for i in items for s in i.scores.tolist()]
    plain = {item.name: item.groups for item in items}
    for _, name in sorted(rows):
        if spend(plain) <= 0.5 * spend({"37": 37, "64": 64, "20": 20}):
            break
        plain[name] -= 1
    assert kept == plain


def test_a_block_goes_by_its_mean_not_by_its_lowest_group() -> None:
    poor = torch.cat([torch.full((4,), 0.2), torch.ones(12)])
    trap = torch.cat([torch.tensor([0.01, 1.0, 1.0, 1.0]), torch.ones(12)])
    items = [WidthItem("trap", trap, step=4), WidthItem("poor", poor, step=4)]
    kept = RankedWidths("none")(items, lambda kept: float(kept["trap"] + kept["poor"]), 28)
    assert kept == {"trap": 16, "poor": 12}


def test_what_a_block_leaves_is_given_back() -> None:
    """A large block went last; smaller ones that went before it fit again."""
    items = [
        WidthItem("wide", torch.cat([torch.full((16,), 0.5), torch.ones(16)]), step=16),
        WidthItem("thin", torch.tensor([0.1, 0.2, 0.3, 1.0])),
    ]
    kept = RankedWidths("none", floor=0)(items, lambda k: 10.0 * k["wide"] + k["thin"], 200)
    assert kept == {"wide": 16, "thin": 4}


def test_where_a_block_is_too_large_others_go_instead() -> None:
    """Everything would come from the wide width, whose blocks are a quarter of the budget."""
    items = [
        WidthItem("wide", torch.full((64,), 0.1), step=16),
        WidthItem("thin", torch.ones(40), step=4),
    ]
    kept = RankedWidths("none", floor=0)(items, lambda k: float(k["wide"] + k["thin"]), 76)
    assert kept == {"wide": 48, "thin": 28}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=["uniform", "ranked", "per cost"])
def test_coarse_steps_fit_and_fine_ones_finish(
    allocation: WidthAllocation, sizes: list[int], share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = [Width(str(i), (), torch.arange(n)) for i, n in enumerate(sizes)]
    scores = {w.name: torch.rand(w.groups, generator=generator) for w in widths}

    def spend(kept: Mapping[str, int]) -> float:
        counts = [kept[w.name] for w in widths]
        return float(sum(a * b for a, b in zip(counts, [*counts[1:], 3], strict=True)))

    limit = share * spend({w.name: w.groups for w in widths})

    def allocate(steps: Mapping[str, int]) -> Mapping[str, int]:
        items = [WidthItem(w.name, scores[w.name], step=steps[w.name]) for w in widths]
        return allocation(items, spend, limit)

    try:
        chosen = WidthSteps(0).choose(widths, allocate, cost=spend, goal=limit)
    except BudgetError:
        with pytest.raises(BudgetError):
            allocate({w.name: 1 for w in widths})
        return
    assert spend(chosen.kept) <= limit
    for width in widths:
        kept, step = chosen.kept[width.name], step_of(width.groups, most=chosen.align)
        assert kept == width.groups or kept % step == 0
    if spend(chosen.kept) < 0.98 * limit:
        # Missed: then by all, and by none less.
        for most in (16, 8, 4, 2, 1):
            try:
                other = allocate(WidthSteps(0).of(widths, most))
            except BudgetError:
                continue
            assert spend(other) <= spend(chosen.kept)
    assert all(step > chosen.align for step in chosen.missed)
    assert all(by is None or by > 0.02 for by in chosen.missed.values())


def test_a_small_network_gets_finer_steps_and_a_note() -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 2))
    facts = cut(small, "macs=60%")  # 19 of 32
    assert facts.measures["target"]["align"] == 1
    (width,) = facts.widths
    assert width.kept == 19
    (text,) = told(facts, "widths")
    assert text.startswith("widths come in any number, to meet the target: with multiples of 16 it")
    asked = cut(small, "macs=60%", align=8)  # what was asked for is kept, and the miss is told
    assert asked.widths[0].kept == 16
    assert told(asked, "target")
    assert not told(asked, "widths")


def test_nothing_fits_in_coarse_steps_but_finer_ones_do(net: Blocks) -> None:
    facts = cut(net, "macs=3%", allocation=UniformWidths())
    assert facts.measures["target"]["align"] < 16
    assert "nothing fits the target" in told(facts, "widths")[0]
    assert 0 <= off(facts) <= 0.02
    with pytest.raises(BudgetError):
        cut(net, "macs=0.001%")


def test_given_widths_are_as_given(net: Blocks) -> None:
    facts = cut(net, "macs=50%", allocation=GivenWidths({"stem": 0.33}))
    assert {w.name: w.kept for w in facts.widths}["stem"] == 21
    assert facts.measures["target"]["align"] == 1
    assert not told(facts, "widths")


def test_alike_widths_stay_aligned(net: Blocks) -> None:
    structure = couple(net, X)
    ups = [w for w in structure.widths if w.groups == 64]
    keep = {w.name: torch.arange(64) < 48 - 16 * (i % 2) for i, w in enumerate(ups)}
    evened = uniform_keep(structure, keep, None, dict.fromkeys(keep, 16))
    assert {int(flags.sum()) % 16 for flags in evened.values()} == {0}
    whole = {w.name: torch.ones(w.groups, dtype=torch.bool) for w in structure.widths}
    same = uniform_keep(structure, whole, None, dict.fromkeys(whole, 48))
    assert all(bool(flags.all()) for flags in same.values())  # 40, 64, 88, ... are no multiples
    facts = cut(net, "macs=50%", uniform=True)
    assert not untidy(facts.widths, facts.measures["target"]["align"])


@pytest.mark.parametrize("rounds", [2, 5])
def test_rounds_remember_the_uncut_widths(net: Blocks, rounds: int) -> None:
    facts = cut(net, "macs=40%", rounds=rounds)
    assert not untidy(facts.widths, facts.measures["target"]["align"])
    assert facts.measures["target"]["align"] >= 8
    assert 0 <= off(facts) <= 0.02
    assert not told(facts, "target")


class Scores(nn.Module):
    """The first output of a Transformers model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)[0]
        return out


@pytest.mark.parametrize("kind", ["mobilenet", "bert"])
def test_real_networks_meet_the_target(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "mobilenet":
        config = transformers.MobileNetV2Config(tf_padding=False, num_labels=10)
        net = Scores(transformers.MobileNetV2ForImageClassification(config)).eval()
        example = torch.zeros(1, 3, 32, 32)
    else:
        config = transformers.BertConfig(
            vocab_size=99,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
        )
        net = Scores(transformers.BertForSequenceClassification(config)).eval()
        example = torch.arange(12)[None]
    recipe = secateur.ShrinkRecipe(target=secateur.Target("macs", 0.5), recovery=())
    facts = secateur.shrink(net, recipe, example).facts
    assert 0 <= off(facts) <= 0.02
    assert facts.measures["target"]["align"] == 16
    assert not untidy([w for w in facts.widths if w.groups > 4])


# ---- while training


@pytest.mark.parametrize("align", [0, 1])
def test_shrinking_uses_the_same_steps(net: Blocks, align: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    recipe = secateur.ShrinkRecipe(target=secateur.Target("macs", 0.5), recovery=(), align=align)
    pace = Pace(Linear(0, 8, 1))
    shrinking = Shrinking(net, optimizer, recipe, pace=pace, example_inputs=X)
    for _ in range(8):
        shrinking.step()
    facts = shrinking.finalize().facts
    assert 0 <= off(facts) <= 0.02
    found = facts.measures["target"]["align"]
    if align:
        assert found == 1
        assert untidy(facts.widths)
        assert not told(facts, "widths")
    else:
        assert not untidy(facts.widths, found)
        assert bool(told(facts, "widths")) == (found < 16)
    costs = [event["cost"][1] for event in facts.history]
    assert costs == sorted(costs, reverse=True)
    assert all(event["cost"][1] <= event["limit"] for event in facts.history)


# ---- what is said


def test_words() -> None:
    def text(align: int, unit: str, step: int) -> str:
        target = {"unit": unit, "align": step}
        return str(steps_text(Facts({"align": align}, measures={"target": target})))

    assert text(0, "macs", 16).startswith("Widths come in multiples of 16, or of up to a quarter")
    assert "below 16" in text(0, "macs", 4)
    assert text(0, "macs", 1) == "Widths come in any number."
    assert text(1, "macs", 1) == "Widths come in any number, as the recipe says."
    assert text(0, "latency", 8) == "Widths come in multiples of 8: the fastest here, as measured."
