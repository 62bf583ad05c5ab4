"""Rows: what a layer's weight matrix multiplies. ``rows @ matrix.T + bias`` is the layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import NeedsData, NonFinite
from secateur.core.slots import Slot
from secateur.frontends import discover
from secateur.stats import (
    Gradient,
    Gram,
    InputNorm,
    Moments,
    Positions,
    Replay,
    Sketch,
    SquaredGradient,
    Stats,
    SynapticFlow,
    collect,
)


def slot_of(model: nn.Module, name: str) -> Slot:
    return next(s for s in discover(model) if s.name == name)


CONVOLUTIONS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("1d", nn.Conv1d(4, 6, 3), (2, 4, 9)),
    ("1d stride dilation pad", nn.Conv1d(4, 6, 3, stride=2, padding=3, dilation=2), (2, 4, 11)),
    ("2d", nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5)),
    ("2d odd kernel", nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0)), (2, 3, 6, 7)),
    ("2d no bias", nn.Conv2d(3, 4, 1, bias=False), (2, 3, 4, 4)),
    ("2d grouped", nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2), (2, 8, 6, 7)),
    ("2d depthwise", nn.Conv2d(6, 12, 3, groups=6, stride=2), (2, 6, 7, 7)),
    ("2d same", nn.Conv2d(4, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 6, 7)),
    ("2d valid", nn.Conv2d(4, 4, 2, padding="valid"), (2, 4, 4, 4)),
    ("2d reflect", nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 2, 5, 6)),
    ("2d replicate", nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 2, 5, 6)),
    ("2d circular", nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2), (1, 4, 5, 6)),
    ("2d same reflect", nn.Conv2d(2, 4, 4, padding="same", padding_mode="reflect"), (2, 2, 7, 6)),
    ("2d without batch", nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    ("3d", nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2), (1, 2, 4, 5, 3)),
    ("t1d", nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    ("t1d stride out", nn.ConvTranspose1d(4, 6, 5, 3, padding=2, output_padding=1), (2, 4, 5)),
    ("t1d grouped dilated", nn.ConvTranspose1d(4, 6, 3, 2, 1, groups=2, dilation=2), (2, 4, 5)),
    ("t2d", nn.ConvTranspose2d(3, 5, (4, 3), stride=2, padding=1, output_padding=1), (2, 3, 4, 5)),
    ("t2d grouped", nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), (2, 8, 3, 4)),
    ("t2d without batch", nn.ConvTranspose2d(3, 5, 3), (3, 4, 5)),
    ("t3d", nn.ConvTranspose3d(4, 2, 2, 2, groups=2, output_padding=(1, 0, 1)), (1, 4, 3, 2, 2)),
]


def require_draw(slot: Slot, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Rows that are drawn are those of all rows."""
    assert slot.rows is not None
    whole = slot.rows(module, inputs, output)
    picked = torch.randperm(whole.shape[1])[: 1 + whole.shape[1] // 2]
    counts = []

    def draw(count: int) -> Tensor:
        counts.append(count)
        return picked

    assert torch.equal(slot.rows(module, inputs, output, draw), whole[:, picked])
    assert counts == [whole.shape[1]]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(
    ("module", "shape"), [c[1:] for c in CONVOLUTIONS], ids=[c[0] for c in CONVOLUTIONS]
)
def test_convolution(module: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = module(x).detach()
    slot = slot_of(module, "weight")
    assert slot.rows is not None
    weight = slot.weight(module)
    rows = slot.rows(module, (x,), y)
    require_draw(slot, module, (x,), y)
    groups = module.groups
    assert rows.shape[0] == groups
    assert rows.shape[2] == weight.fan_in
    matrix = weight.matrix().reshape(groups, -1, weight.fan_in)
    product = (rows @ matrix.mT).permute(0, 2, 1).flatten(0, 1)  # (out, batch * positions)
    batched = y if y.ndim == len(module.kernel_size) + 2 else y[None]
    out = batched.transpose(0, 1).flatten(1)
    bias = module.bias.detach()[:, None] if module.bias is not None else 0.0
    torch.testing.assert_close(product + bias, out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (2, 2, 3, 5), (5,)])
def test_linear(shape: tuple[int, ...]) -> None:
    module, x = nn.Linear(5, 4), torch.randn(shape)
    slot = slot_of(module, "weight")
    assert slot.rows is not None
    rows = slot.rows(module, (x,), None)
    require_draw(slot, module, (x,), None)
    product = rows[0] @ slot.weight(module).matrix().T + module.bias
    torch.testing.assert_close(product.reshape(*shape[:-1], 4), module(x))


def test_gpt2_conv1d() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    module, x = Conv1D(6, 5), torch.randn(2, 3, 5)
    nn.init.normal_(module.bias)
    slot = slot_of(module, "weight")
    assert slot.rows is not None
    assert slot.weight(module).matrix().shape == (6, 5)
    product = slot.rows(module, (x,), None)[0] @ slot.weight(module).matrix().T + module.bias
    torch.testing.assert_close(product.reshape(2, 3, 6), module(x))


# -- recurrent layers: the cell, written by hand --------------------------------------------------


def cell(mode: str, pre_x: Tensor, pre_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step from the gates' inputs: ``W_ih x + b_ih`` and ``W_hh h + b_hh``."""
    if mode == "LSTM":
        i, f, g, o = (pre_x + pre_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if mode == "GRU":
        (rx, zx, nx), (rh, zh, nh) = pre_x.chunk(3, -1), pre_h.chunk(3, -1)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        return (1 - z) * torch.tanh(nx + r * nh) + z * h, c
    return (torch.relu if mode == "RNN_RELU" else torch.tanh)(pre_x + pre_h), c


KINDS = {
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {}),
    "RNN_TANH": (nn.RNN, {}),
    "RNN_RELU": (nn.RNN, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("mode", KINDS)
def test_packed_sequences_have_the_rows_of_each_sequence_alone(
    mode: str, bidirectional: bool, state: bool, in_order: bool
) -> None:
    kind, more = KINDS[mode]
    module: Any = kind(3, 4, 2, bidirectional=bidirectional, **more)
    lengths = [5, 3, 3, 1] if in_order else [3, 5, 1, 3]
    alone = [torch.randn(size, 3) for size in lengths]
    packed = nn.utils.rnn.pack_sequence(alone, enforce_sorted=in_order)
    start = torch.randn(2, 2 + 2 * bidirectional, 4, 4)

    def inputs(x: Any, chosen: Any) -> tuple[Any, ...]:
        if not state:
            return (x,)
        h, c = start[:, :, chosen]
        return x, ((h, c) if mode == "LSTM" else h)

    for slot in discover(module):
        if slot.rows is None:
            continue
        args = inputs(packed, slice(None))
        rows = slot.rows(module, args, module(*args))[0]
        require_draw(slot, module, args, None)
        parts = [inputs(x[:, None], slice(i, i + 1)) for i, x in enumerate(alone)]
        wanted = torch.cat([slot.rows(module, part, module(*part))[0] for part in parts])
        order = [
            torch.tensor(sorted(range(len(r)), key=r.tolist().__getitem__)) for r in (rows, wanted)
        ]
        torch.testing.assert_close(rows[order[0]], wanted[order[1]])


@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["NT", "TN"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("mode", KINDS)
def test_recurrent(mode: str, bidirectional: bool, batch_first: bool, state: bool) -> None:
    kind, more = KINDS[mode]
    module: Any = kind(3, 4, 2, bidirectional=bidirectional, batch_first=batch_first, **more)
    time, batch, ways = 5, 2, 1 + bidirectional
    x = torch.randn(batch, time, 3) if batch_first else torch.randn(time, batch, 3)
    h0, c0 = torch.randn(2, 2 * ways, batch, 4) if state else torch.zeros(2, 2 * ways, batch, 4)
    args: tuple[Any, ...] = (x,)
    if state:
        args = (x, (h0, c0) if mode == "LSTM" else h0)
    expected = module(*args)[0].detach()
    expected = expected.transpose(0, 1) if batch_first else expected
    for layer in range(2):
        outputs = []
        for way in range(ways):
            suffix = f"l{layer}" + ("_reverse" if way else "")
            pre = []
            for which in ("ih", "hh"):
                slot = slot_of(module, f"weight_{which}_{suffix}")
                assert slot.rows is not None
                rows = slot.rows(module, args, module(*args))[0]
                require_draw(slot, module, args, None)
                bias = getattr(module, f"bias_{which}_{suffix}")
                gates = rows @ slot.weight(module).matrix().T + bias
                pre.append(gates.reshape(time, batch, -1).detach())
            h, c = h0[layer * ways + way], c0[layer * ways + way]
            steps = range(time - 1, -1, -1) if way else range(time)
            out = torch.empty(time, batch, 4)
            for t in steps:
                h, c = cell(mode, pre[0][t], pre[1][t], h, c)
                out[t] = h
            outputs.append(out)
        joined = torch.cat(outputs, -1)
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", KINDS)
def test_recurrent_without_batch_axis(mode: str) -> None:
    kind, more = KINDS[mode]
    module: Any = kind(3, 4, **more)
    x = torch.randn(5, 3)
    slot = slot_of(module, "weight_hh_l0")
    assert slot.rows is not None
    rows = slot.rows(module, (x,), module(x))[0]
    torch.testing.assert_close(rows[1:], module(x)[0][:-1].detach())


def test_initial_state_passed_by_name_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(input=x, hx=torch.ones(1, 2, 4))[0]

    net = Net()
    slot = slot_of(net, "cell.weight_hh_l0")
    stats = collect(net, [slot], [Moments()], [torch.zeros(1, 2, 3)])
    assert stats(Moments(), slot.weight(net))[0].tolist() == [[1.0] * 4]


# -- discover -------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def test_tied_weights_are_one_slot() -> None:
    net = Tied()
    slots = [s for s in discover(net) if s.name.endswith("weight")]
    assert [s.name for s in slots] == ["first.weight", "head.weight"]
    assert slots[0].aliases == ("second.weight",)
    gradient = collect(
        net, slots[:1], [Gradient()], [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))]
    )
    assert gradient(Gradient(), slots[0].weight(net)).shape == (6, 6)


def test_embeddings_are_left_out() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 4)
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.words.weight

    slots = {s.name: s for s in discover(Language())}
    assert not slots["words.weight"].prunable
    assert "embedding tied to head.weight" in slots["words.weight"].reason
    assert slots["words.weight"].sensitive
    assert slots["blocks.0.weight"].prunable


class Adapted(nn.Module):
    """A layer with an adapter of low rank, with the names that PEFT gives to the parts."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        added = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + added  # type: ignore[no-any-return]

    def merge(self) -> None:
        raise NotImplementedError


class Saved(nn.Module):
    """A layer that is trained in a copy."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer)})

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save["default"](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("last", "classifier"),
    [(Adapted, "2.base_layer.weight"), (Saved, "2.modules_to_save.default.weight")],
)
def test_adapters_stay_dense(last: Any, classifier: str) -> None:
    net = nn.Sequential(Adapted(nn.Linear(8, 8)), nn.ReLU(), last(nn.Linear(8, 4)))
    found = {slot.name: slot for slot in discover(net) if slot.axes is not None}
    assert [name for name, slot in found.items() if slot.prunable] == ["0.base_layer.weight"]
    assert found[classifier].reason == "the last linear layer (classifier)"
    assert "once merged" in found["0.lora_A.default.weight"].reason
    recipe = secateur.Recipe(scope=secateur.Scope(include=("*lora_A*",)))
    assert "0.lora_A.default.weight" in [slot.name for slot in secateur.plan(net, recipe).chosen]


def test_reasons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)
            self.inner = nn.Conv2d(8, 8, 3)
            self.gate = nn.Linear(8, 4)
            self.projected = nn.LSTM(8, 8, proj_size=2)
            self.scale = nn.Parameter(torch.ones(4))
            self.table = nn.Parameter(torch.ones(4, 4))
            self.head = nn.Linear(8, 2)

    slots = {s.name: s for s in discover(Net())}
    expected = {
        "stem.weight": "reads the image",
        "stem.bias": "a bias",
        "norm.weight": "a normalisation",
        "gate.weight": "router",
        "projected.weight_ih_l0": "recurrent projection",
        "scale": "a vector",
        "table": "no rule for parameters of Net",
        "head.weight": "classifier",
    }
    for name, reason in expected.items():
        assert reason in slots[name].reason, name
        assert not slots[name].prunable
    assert slots["inner.weight"].prunable
    assert slots["stem.weight"].sensitive
    assert slots["head.weight"].sensitive
    assert all(s.prunable or s.reason for s in slots.values())


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_single_weight_is_never_an_end(kind: Any) -> None:
    module = nn.Linear(3, 2) if kind is nn.Linear else nn.Conv2d(8, 2, 3)
    assert slot_of(module, "weight").prunable


# -- collect leaves no trace ----------------------------------------------------------------------


def mixed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(64, 8), nn.Linear(8, 2),
    )  # fmt: skip


FIXED = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(4, 3, 6, 6, generator=FIXED), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
NEEDS = [InputNorm(), Gram(), Sketch(8), Gradient(), SquaredGradient(), SynapticFlow(), Positions()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_collect_leaves_the_model_alone() -> None:
    net = mixed().train()
    net[1].eval()
    net[5].weight.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        collect(net, [s for s in discover(net) if s.rows], NEEDS, BATCHES)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == modes
    assert hooks(net) == 0
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [
        n != "5.weight" for n, _ in net.named_parameters()
    ]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())


@pytest.mark.parametrize("mode", KINDS)
def test_collect_leaves_the_random_state_alone_for_recurrent_layers(mode: str) -> None:
    kind, more = KINDS[mode]
    net = kind(3, 4, 2, **more)
    x, random = torch.randn(5, 2, 3), torch.get_rng_state()
    collect(net, [s for s in discover(net) if s.rows], [InputNorm()], [x])
    assert torch.equal(torch.get_rng_state(), random)


def test_hooks_go_away_when_the_forward_pass_raises() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            raise RuntimeError("out of paper")

    net = Fails().train()
    with pytest.raises(RuntimeError, match="out of paper"):
        collect(net, [s for s in discover(net) if s.rows], [InputNorm()], [torch.randn(2, 3)])
    assert hooks(net) == 0
    assert net.training
    assert net.a.training


def test_a_bad_activation_is_named() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    x[0, 1] = math.nan
    with pytest.raises(NonFinite, match=r"'0\.weight'.*1 of 6 entries"):
        collect(net, [s for s in discover(net) if s.rows], [InputNorm()], [x])
    assert hooks(net) == 0


def test_inputs_that_are_no_tensor_are_refused() -> None:
    class Listed(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x[0])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Listed(3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.inner([x])

    outer = Net()
    with pytest.raises(NeedsData, match="first argument is a list"):
        collect(outer, [s for s in discover(outer) if s.rows], [InputNorm()], [torch.randn(2, 3)])


def test_inputs_passed_by_name_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x)

    net, x = Net(), torch.randn(5, 3)
    stats = collect(net, [slot_of(net, "a.weight")], [InputNorm()], [x])
    seen = stats(InputNorm(), slot_of(net, "a.weight").weight(net))[0]
    torch.testing.assert_close(seen, x.square().mean(0).sqrt())


def test_sequential_collection_ends_the_pass_after_the_last_watched_layer() -> None:
    calls: list[str] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("late")
            return x

    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), Spy())
    batches = [torch.randn(4, 3) for _ in range(5)]
    slots = [slot_of(net, "0.weight")]
    replay = Replay(net, [slot_of(net, f"{i}.weight") for i in range(4)], batches)
    assert len(calls) == 6  # each batch and a sample, to learn how often layers are called
    early = collect(net, slots, [Gram()], batches, replay=replay)
    assert len(calls) == 6
    whole = collect(net, slots, [Gram()], batches)
    weight = slots[0].weight(net)
    assert torch.equal(early(Gram(), weight), whole(Gram(), weight))


def test_a_shared_module_is_seen_at_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    net, x = Twice(), torch.randn(4, 3)
    slot = slot_of(net, "a.weight")
    for replay in (None, Replay(net, [slot], [x])):
        stats: Stats = collect(net, [slot], [Positions()], [x, x], replay=replay)
        assert float(stats(Positions(), slot.weight(net))) == 2.0


def test_convolutions_are_unfolded_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    slot, x = slot_of(net, "0.weight"), torch.randn(7, 3, 5, 5)
    weight = slot.weight(net)
    whole = collect(net, [slot], [Gram(), Positions()], [x])
    monkeypatch.setattr("secateur.stats.engine._ROWS_AT_ONCE", 3 * 25 * 9 * 2)
    sliced = collect(net, [slot], [Gram(), Positions()], [x])
    torch.testing.assert_close(sliced(Gram(), weight), whole(Gram(), weight), atol=1e-5, rtol=1e-5)
    assert float(sliced(Positions(), weight)) == float(whole(Positions(), weight)) == 25.0


class Frames(nn.Module):
    """Films ``(batch, frames, channels, height, width)``, whose frames go through a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.conv(x.flatten(0, 1))
        return seen


def test_slices_of_frames_count_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Frames(), torch.randn(2, 8, 3, 5, 5)
    slot = slot_of(net, "conv.weight")
    monkeypatch.setattr("secateur.stats.engine._ROWS_AT_ONCE", 3 * 25 * 9 * 2)
    stats = collect(net, [slot], [Positions()], [x, x])
    assert float(stats(Positions(), slot.weight(net))) == 8 * 25
