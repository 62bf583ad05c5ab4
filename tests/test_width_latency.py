"""Latency targets: layers, tables, alignment, the closed loop under a made-up clock, and both engines."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.allocate.widths import GivenWidths, RankedWidths, UniformWidths, WidthItem
from secateur.core.errors import BudgetError, MissingExtra, UnknownName, UsageError
from secateur.core.facts import Facts
from secateur.drive.structural import budget as shrink_budget
from secateur.drive.structural import latency_clock
from secateur.drive.structural.latency_clock import Clock, Paired, clock_for
from secateur.drive.structural.layer_uses import layers_of
from secateur.drive.structural.recipe_file import from_plain, to_plain
from secateur.drive.structural.width_latency import LayerTiming, Table, latency_cost, steps, widened
from secateur.evaluate.cost import cost_of
from secateur.runtime import layer_times
from secateur.runtime.layer_times import (
    Chain,
    Layer,
    LayerTimes,
    alignment,
    onnx_timer,
    torch_timer,
)
from secateur.runtime.race import Raced
from secateur.structure import couple

X = torch.zeros(1, 3, 8, 8)
Rule = Callable[[Layer], float]


class Net(nn.Module):
    """A strided, a residual, a depthwise and a linear layer."""

    def __init__(self, width: int = 64, inside: int = 96) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, stride=2)
        self.up = nn.Conv2d(width, inside, 1)
        self.deep = nn.Conv2d(inside, inside, 3, padding="same", groups=inside)
        self.down = nn.Conv2d(inside, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.down(self.deep(self.up(x)).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@dataclass(frozen=True)
class MadeUp:
    """A clock that computes: what a layer alone takes, and what a network takes."""

    model: nn.Module
    alone: Rule
    within: Rule
    fixed: float = 0.0
    engine: str = "made up"
    threads: int = 1

    def layers(self, chains: Sequence[Chain]) -> list[float]:
        return [sum(map(self.alone, chain)) for chain in chains]

    def of(self, model: nn.Module) -> float:
        return self.fixed + sum(self.within(use.layer) for use in layers_of(model, X))

    def dense(self) -> float:
        return self.of(self.model)

    def pair(self, small: nn.Module) -> Paired:
        a, b = self.of(self.model), self.of(small)
        return Paired(a, b, b / a, (b / a, b / a), (b, b))


def use_clock(
    monkeypatch: pytest.MonkeyPatch, alone: Rule, within: Rule, fixed: float = 0.0
) -> list[MadeUp]:
    made: list[MadeUp] = []

    def clock(model: nn.Module, *_: object) -> MadeUp:
        made.append(MadeUp(copy.deepcopy(model), alone, within, fixed))
        return made[-1]

    monkeypatch.setattr(shrink_budget, "clock_for", clock)
    return made


def shrink(model: nn.Module, target: str, **how: object) -> secateur.Pruned:
    recipe = secateur.ShrinkRecipe(target=secateur.Target.parse(target), recovery=(), **how)
    return secateur.shrink(model, recipe, X)


def macs(layer: Layer) -> float:
    return layer.macs / 1000


# ---- layers


def test_layers_are_those_that_run(net: Net) -> None:
    uses = layers_of(net, X)
    names = ("stem", "up", "deep", "down", "head")
    assert [use.weight for use in uses] == [f"{name}.weight" for name in names]
    assert sum(use.layer.macs for use in uses) == cost_of(net, example=X).macs_dense
    assert [use.layer.depthwise for use in uses] == [False, False, True, False, False]
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_shared_layer_counts_each_time() -> None:
    layer = nn.Linear(4, 4)
    assert len(layers_of(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(2, 4))) == 2


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(5, 9),
    kernel=st.integers(1, 3),
    ndim=st.integers(1, 3),
    how=st.fixed_dictionaries(
        {
            "stride": st.integers(1, 3),
            "padding": st.integers(0, 2),
            "dilation": st.integers(1, 2),
            "groups": st.sampled_from([1, 2, 4]),
        }
    ),
)
def test_a_layer_is_the_convolution_it_stands_for(
    size: int, kernel: int, ndim: int, how: dict[str, int]
) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    conv = kind(4, 8, kernel, **how)
    x = torch.zeros(2, 4, *(size + i for i in range(ndim)))
    (use,) = layers_of(conv, x)
    y = conv(x)
    assert use.layer.positions == y[:, 0].numel()
    assert use.layer.weights == conv.weight.numel()
    opened = layer_times.stock_session(layer_times._model((use.layer,)).SerializeToString(), 1)
    feeds = {i.name: x.numpy() for i in opened.get_inputs()}
    assert opened.run(None, feeds)[0].shape == tuple(y.shape)


def test_transposed_weights_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    (use,) = layers_of(Conv1D(6, 4), torch.zeros(2, 3, 4))
    assert (use.layer.inputs, use.layer.outputs, use.layer.rows) == (4, 6, 6)
    assert use.widths((3, 5)) == (3, 5)


def test_each_chain_is_timed_once() -> None:
    asked: list[Chain] = []

    def timer(chains: Sequence[Chain]) -> list[float]:
        asked.extend(chains)
        return [chain[0].macs for chain in chains]

    times = LayerTimes(timer)
    one, two = (Layer(2, 3, 1),), (Layer(3, 3, 1),)
    assert times([one, two, one]) == [6.0, 9.0, 6.0]
    assert times([two, one]) == [9.0, 6.0]
    assert asked == [one, two]


# ---- alignment

DEEP = Layer(96, 96, 1, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), groups=96)
PLAIN = Layer(96, 48, 2, (9,), (2,), (1,), (0,), (1,))


def timed(rule: Rule) -> LayerTimes:
    return LayerTimes(lambda chains: [sum(map(rule, chain)) for chain in chains])


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("layers", [[Layer(256, 256, 1)], [PLAIN, DEEP], [DEEP]])
def test_alignment_of_a_staircase(block: int, layers: list[Layer]) -> None:
    def blocks(layer: Layer) -> float:
        ins = 1 if layer.depthwise else -(-layer.inputs // block)
        return float(ins * -(-layer.outputs // block))

    assert alignment(timed(blocks), layers) == block


def test_alignment_where_odd_widths_take_another_path() -> None:
    def time(layer: Layer) -> float:  # what ONNX Runtime does: blocks of 16, or no blocks
        odd = layer.inputs % 4 or layer.outputs % 4
        sides = [n if odd else -(-n // 16) * 16 for n in (layer.inputs, layer.outputs)]
        return sides[0] * sides[1] * (1.3 if odd else 1.0)

    assert alignment(timed(time), [PLAIN]) == 16


def test_alignment_of_nothing() -> None:
    assert alignment(timed(macs), []) == 1


def test_a_layer_is_judged_between_neighbours() -> None:
    for layer in (PLAIN, DEEP, Layer(7, 9, 2)):
        chain = layer_times._between(layer, 33)
        for a, b in itertools.pairwise(chain):
            assert (a.outputs, a.output_size, a.rows) == (b.inputs, b.size, b.rows)
        opened = layer_times.stock_session(layer_times._model(chain).SerializeToString(), 1)
        shape = (chain[0].rows, 64, *chain[0].size)
        feeds = {i.name: torch.zeros(shape).numpy() for i in opened.get_inputs()}
        assert opened.run(None, feeds)[0].shape == (layer.rows, 64, *chain[-1].output_size)


def test_steps_count_groups(net: Net) -> None:
    widths = couple(net, X).widths
    found = steps(widths, layers_of(net, X), 16)
    assert found == {"stem": 16, "up": 16}
    assert set(steps(widths, layers_of(net, X), 1).values()) == {1}
    narrow = Net(width=12).eval()  # a step of 16 would leave it no choice
    assert steps(couple(narrow, X).widths, layers_of(narrow, X), 16)["stem"] == 4


# ---- prediction


def test_prediction_is_exact_where_time_is_bilinear(net: Net) -> None:
    def rule(layer: Layer) -> float:
        n, m = layer.inputs, layer.outputs
        return 1 + 2 * m if layer.depthwise else 1 + 2 * n + 3 * m + 0.5 * n * m

    structure = couple(net, X)
    clock = MadeUp(net, rule, rule)
    how = LayerTiming(LayerTimes(clock.layers), step=1)
    cost, _ = latency_cost(net, structure, X, dense=clock.dense(), how=how)
    assert cost({}) == pytest.approx(clock.dense())
    for stem, inside in itertools.product((1, 7, 33, 64), (1, 50, 96)):
        small = Net(stem, inside)
        assert cost({"stem": stem, "up": inside}) == pytest.approx(clock.of(small))


@pytest.mark.parametrize("follows", [True, False])
def test_the_rest_is_predicted_as_it_behaves(net: Net, follows: bool) -> None:
    def activations(layer: Layer) -> float:
        return float(layer.positions * layer.outputs)

    def within(layer: Layer) -> float:
        return macs(layer) + (0.1 * activations(layer) if follows else 0)

    clock = MadeUp(net, macs, within, fixed=0.0 if follows else 500.0)
    how = LayerTiming(LayerTimes(clock.layers), step=1)
    cost, _ = latency_cost(net, couple(net, X), X, dense=clock.dense(), how=how)
    kept = {"stem": 32, "up": 48}
    truth = clock.of(Net(32, 48))
    assert cost.corrected(kept, truth).follows is follows
    assert cost.corrected(kept, truth)(kept) == pytest.approx(truth)


def test_layers_that_take_longer_alone_are_scaled(net: Net) -> None:
    how = LayerTiming(timed(lambda layer: 4 * macs(layer)), step=1)
    dense = sum(macs(use.layer) for use in layers_of(net, X))
    cost, _ = latency_cost(net, couple(net, X), X, dense=dense, how=how)
    assert cost({}) == pytest.approx(dense)


@settings(max_examples=60, deadline=None)
@given(times=st.lists(st.floats(0.1, 10), min_size=12, max_size=12), wide=st.integers(0, 40))
def test_tables_never_fall(times: list[float], wide: int) -> None:
    rows = tuple(tuple(times[4 * i : 4 * i + 4]) for i in range(3))
    table = Table((4, 8, 16), (2, 4, 8, 32), rows).monotone()
    pairs = zip(sum(table.times, ()), times, strict=True)
    assert all(new <= old for new, old in pairs)
    for other in (3, 9, 20):
        assert table(wide, other) <= table(wide + 1, other) + 1e-12
        assert table(other, wide) <= table(other, wide + 1) + 1e-12


@settings(max_examples=40, deadline=None)
@given(kept=st.lists(st.integers(1, 40), min_size=3, max_size=3), block=st.integers(1, 20))
def test_widening_is_free(kept: list[int], block: int) -> None:
    def spend(counts: dict[str, int]) -> float:
        return float(sum(-(-n // block) for n in counts.values()))

    items = [WidthItem(str(i), torch.zeros(40)) for i in range(3)]
    before = {str(i): n for i, n in enumerate(kept)}
    after = widened(items, before, spend)
    assert spend(after) == spend(before)
    assert all(after[k] >= before[k] for k in before)
    assert all(n == 40 or spend({**after, k: n + 1}) > spend(after) for k, n in after.items())


# ---- the closed loop


@pytest.mark.parametrize("allocation", [UniformWidths(), RankedWidths()])
@pytest.mark.parametrize("target", ["latency=2x", "latency=300", "latency=40%"])
def test_the_loop_meets_a_target_that_tables_get_wrong(
    net: Net, monkeypatch: pytest.MonkeyPatch, allocation: object, target: str
) -> None:
    # Alone, layers cost what they multiply; together they are bound by memory, and much is fixed.
    def within(layer: Layer) -> float:
        return 0.3 * macs(layer) + 0.02 * (layer.positions * layer.outputs) + 0.01 * layer.weights

    (clock,) = [use_clock(monkeypatch, macs, within, fixed=40.0)]
    pruned = shrink(net, target, allocation=allocation)
    told = pruned.facts.measures["target"]
    assert abs(told["reached"] / told["limit"] - 1) <= 0.02
    assert told["reached"] == pytest.approx(clock[0].of(pruned.model))
    assert told["dense"] == pytest.approx(clock[0].of(net))
    expected = (
        300 if target == "latency=300" else secateur.Target.parse(target).value * told["dense"]
    )
    assert told["limit"] == pytest.approx(expected)
    assert 1 <= len(told["tries"]) <= 5
    assert (told["engine"], told["threads"], told["align"]) == ("made up", 1, 1)
    assert not [n for n in pruned.facts.notes if n.topic in ("target", "latency")]
    assert pruned.facts.measures["proof"] < 1e-5
    json.dumps(pruned.facts.to_dict())


def test_one_try_is_enough_where_tables_are_right(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_clock(monkeypatch, macs, macs)
    assert len(shrink(net, "latency=2x").facts.measures["target"]["tries"]) <= 2


def test_widths_that_would_be_slower_are_not_chosen(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(layer: Layer) -> float:
        sides = [n if n < 16 else -(-n // 16) * 16 for n in (layer.inputs, layer.outputs)]
        slow = 3 if layer.outputs % 4 else 1
        return slow * layer.positions * sides[0] * sides[1] / layer.groups / 1000

    use_clock(monkeypatch, blocks, blocks)
    pruned = shrink(net, "latency=2x")
    assert pruned.facts.measures["target"]["align"] == 16
    assert {w.kept % 16 for w in pruned.facts.widths} == {0}
    told = pruned.facts.measures["target"]
    assert told["reached"] <= 1.02 * told["limit"]


def test_what_does_not_get_faster_is_not_cut(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_stem(layer: Layer) -> float:
        return float(layer.outputs) if layer.inputs == 3 else 0.0

    use_clock(monkeypatch, only_stem, only_stem)
    for allocation in (UniformWidths(), RankedWidths()):
        facts = shrink(net, "latency=2x", allocation=allocation).facts
        assert {w.name: w.kept for w in facts.widths} == {"stem": 32, "up": 96}


def test_align_is_obeyed_and_nothing_is_measured_for_it(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_clock(monkeypatch, macs, macs)
    pruned = shrink(net, "latency=2x", align=12)
    assert pruned.facts.measures["target"]["align"] == 12
    assert all(w.kept % 12 == 0 or w.kept == w.groups for w in pruned.facts.widths)


def test_a_miss_is_reported_with_its_reason(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock(monkeypatch, macs, macs)
    pruned = shrink(net, "latency=2x", align=32)
    told = pruned.facts.measures["target"]
    assert told["reached"] < 0.98 * told["limit"]
    (note,) = [n for n in pruned.facts.notes if n.topic == "target"]
    assert f"asked for {told['limit']:.4g} ms, reached {told['reached']:.4g}" in note.text
    assert "more than was asked for" in note.text or "come in steps" in note.text


def test_given_widths_that_miss_are_reported(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    use_clock(monkeypatch, macs, macs)
    pruned = shrink(net, "latency=2x", allocation=GivenWidths({"up": 0.9}))
    assert len(pruned.facts.measures["target"]["tries"]) == 1
    (note,) = [n for n in pruned.facts.notes if n.topic == "target"]
    assert "no narrower widths" in note.text


def test_a_target_below_the_floor_names_it(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = use_clock(monkeypatch, macs, macs, fixed=1000.0)
    with pytest.raises(BudgetError, match="with every width at its least") as caught:
        shrink(net, "latency=10%", allocation=UniformWidths())
    floor = clocks[0].of(Net(1, 1))
    assert f"{floor:.4g} of {clocks[0].of(net):.4g} ms remain" in str(caught.value)
    with pytest.raises(BudgetError, match="fits already"):
        shrink(net, "latency=1e6")


def test_a_floor_that_only_the_tables_see_is_tried(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tables say that nothing gets faster; the network does.
    use_clock(monkeypatch, lambda layer: 1.0, macs)
    told = shrink(net, "latency=50%", allocation=UniformWidths()).facts.measures["target"]
    assert told["reached"] <= 1.02 * told["limit"]


def test_a_busy_machine_is_said(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(MadeUp):
        def pair(self, small: nn.Module) -> Paired:
            a, b = self.of(self.model), self.of(small)
            return Paired(a, b, b / a, (0.8 * b / a, 2 * b / a), (0.8 * b, 2 * b), busy=True)

    monkeypatch.setattr(
        shrink_budget, "clock_for", lambda model, *_: Busy(copy.deepcopy(model), macs, macs)
    )
    facts = shrink(net, "latency=2x").facts
    assert any("other processes ran" in n.text for n in facts.notes if n.topic == "latency")


def test_pairs_are_judged_by_medians_unless_disturbed() -> None:
    quiet = Paired.of(Raced(((2.0,) * 20, (1.0,) * 20)))
    assert (quiet.dense, quiet.small, quiet.ratio, quiet.busy) == (2.0, 1.0, 0.5, False)
    noise = (1.0, 1.0, 1.0, 5.0, 9.0) * 4
    disturbed = Paired.of(Raced(((2.0,) * 20, noise)))
    assert disturbed.busy
    assert disturbed.ratio == 0.5
    assert Paired.of(Raced(((2.0,) * 20, (1.0,) * 20)), best=1.0).busy  # dense was twice as fast


# ---- engines


@dataclass(frozen=True)
class Sure:
    """A real clock whose verdict is known: a test makes no claim about the time of this machine."""

    real: Clock

    @property
    def engine(self) -> str:
        return self.real.engine

    @property
    def threads(self) -> int:
        return self.real.threads

    def layers(self, chains: Sequence[Chain]) -> Sequence[float]:
        return self.real.layers(chains)

    def dense(self) -> float:
        return self.real.dense()

    def pair(self, small: nn.Module) -> Paired:
        found = self.real.pair(small)
        assert min(found.dense, found.small, found.ratio, *found.ratio_range) > 0
        return replace(found, ratio=0.7)


@pytest.mark.parametrize("engine", ["", "torch"])
def test_a_real_run(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    for module in (layer_times, latency_clock):
        monkeypatch.setattr(module, "_SECONDS", 0.0)
    monkeypatch.setattr(shrink_budget, "clock_for", lambda *given: Sure(clock_for(*given)))
    torch.manual_seed(0)
    pruned = shrink(Net(16, 24).eval(), "latency=70%", engine=engine, allocation=UniformWidths())
    told = pruned.facts.measures["target"]
    assert told["engine"] == (engine or "onnxruntime")
    assert told["align"] in (1, 4, 8, 16, 32)
    assert told["reached"] == pytest.approx(told["limit"])
    assert pruned.facts.measures["proof"] < 1e-5


def test_timers_of_both_engines_know_every_kind() -> None:
    layers = [
        Layer(8, 4, 3),
        Layer(8, 4, 1, (6,), (3,), (1,), (1,), (1,)),
        Layer(8, 8, 2, (6, 5), (3, 3), (2, 1), (1, 1), (1, 1), groups=8),
        Layer(8, 4, 1, (4, 4, 4), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), groups=2),
    ]
    for timer in (onnx_timer(1), torch_timer(torch.device("cpu"), torch.float32)):
        assert all(time > 0 for time in timer([(layer,) for layer in layers]))


def test_networks_that_onnx_runtime_cannot_time_are_timed_in_torch() -> None:
    facts = Facts()
    double = nn.Linear(4, 2).double()
    assert clock_for(double, torch.zeros(1, 4).double(), "", facts).engine == "torch"
    assert "the network is in torch.float64" in facts.notes[0].text
    with pytest.raises(UsageError, match="measured in float32 on the processor"):
        clock_for(double, torch.zeros(1, 4).double(), "onnxruntime", facts)


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_clock, "has_onnx", lambda: False)
    facts = Facts()
    assert clock_for(nn.Linear(4, 2), torch.zeros(1, 4), "", facts).engine == "torch"
    assert "it is not installed" in facts.notes[0].text
    with pytest.raises(MissingExtra, match="a latency target in ONNX Runtime"):
        clock_for(nn.Linear(4, 2), torch.zeros(1, 4), "onnxruntime", facts)


def test_a_network_that_cannot_be_exported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    facts = Facts()
    assert clock_for(Odd(), torch.ones(2, 4), "", facts).engine == "torch"
    assert "not in ONNX Runtime" in facts.notes[0].text
    with pytest.raises(UsageError):
        clock_for(Odd(), torch.ones(2, 4), "onnxruntime", facts)


def test_recipes_name_their_engine() -> None:
    recipe = secateur.ShrinkRecipe(target=secateur.Target("latency", 5.0), engine="torch")
    assert from_plain(json.loads(json.dumps(to_plain(recipe)))) == recipe
    with pytest.raises(UnknownName, match="onnxruntime"):
        secateur.ShrinkRecipe(engine="onnx")


def test_masks_promise_no_latency() -> None:
    recipe = secateur.Recipe(target=secateur.Target.parse("latency=2x"))
    with pytest.raises(BudgetError, match="Zeros are as slow as other numbers") as caught:
        secateur.prune(Net(), recipe)
    assert all(caught.value.parts().values())
