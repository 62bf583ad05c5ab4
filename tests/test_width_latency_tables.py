"""Latency of layers: what runs, how widths align, and what tables predict."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from width_latency_cases import MadeUp, Net, Rule, X, build, macs

from secateur.allocate.widths import WidthItem
from secateur.drive.structural.layer_uses import layers_of
from secateur.drive.structural.width_latency import LayerTiming, Table, latency_cost, steps, widened
from secateur.evaluate.cost import cost_of
from secateur.runtime import layer_times
from secateur.runtime.layer_times import Chain, Layer, LayerTimes, alignment
from secateur.structure import couple


@pytest.fixture
def net() -> Net:
    return build()


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
