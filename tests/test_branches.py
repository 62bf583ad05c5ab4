"""Branches: a packed convolution computes what the masked one does, here and in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur
from secateur import Learned, load
from secateur.core.errors import DataError, UsageError
from secateur.core.facts import Facts
from secateur.core.slots import Slot
from secateur.core.weight import CONV2D
from secateur.drive.structural.branches import pack_branches
from secateur.evaluate.cost import cost_of
from secateur.formats import parse_surgery, surgery_text
from secateur.frontends import discover
from secateur.frontends.onnx import export_onnx
from secateur.frontends.surgery import replay_
from secateur.learn import GroupLearning, learned_branches
from secateur.learn.energy import Branches, energy_prune
from secateur.structure import couple
from secateur.structure.branches import (
    GatheredConv2d,
    branch_,
    branches_of,
    kernels_of,
    mask_branches_,
    pack_branches_,
)
from secateur.structure.masked import compare


class Net(nn.Module):
    """A stem, two convolutions that are packed, one of them with a shortcut, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 12, 3, padding=2, dilation=2, padding_mode="reflect")
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        out: Tensor = self.head((x + self.second(x)).relu().mean((2, 3)))
        return out


def build(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().eval()


def image() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def drawn(filters: int, channels: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(groups, (filters,), generator=generator)
    return ids, torch.rand(groups, channels, generator=generator) < 0.5


def learned(seed: int = 0) -> dict[str, Branches]:
    found = {}
    for name, filters, channels in (("first", 12, 8), ("second", 12, 12)):
        ids, keep = drawn(filters, channels, 3, seed)
        alive = torch.ones(filters, dtype=torch.bool)
        alive[3] = name == "first"
        found[f"{name}.weight"] = Branches(ids, keep, alive)
    return found


@settings(max_examples=30, deadline=None)
@given(
    filters=st.integers(1, 9),
    channels=st.integers(1, 7),
    groups=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_branches_compute_the_masked_convolution(
    filters: int, channels: int, groups: int, bias: bool, seed: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conv = nn.Conv2d(channels, filters, 3, padding=1, bias=bias)
        net: Any = nn.Sequential(conv).double()
        x = torch.randn(2, channels, 5, 5, dtype=torch.double)
    ids, keep = drawn(filters, channels, groups, seed)
    masked: Any = copy.deepcopy(net)
    mask_branches_(masked, {"0": (ids, keep)})
    assert masked[0].weight.count_nonzero() == 9 * kernels_of(ids, keep).sum()
    pack_branches_(net, {"0": (ids, keep)})
    assert isinstance(net[0], GatheredConv2d)
    wanted = masked(x)
    assert torch.allclose(net(x), wanted, rtol=1e-10, atol=1e-10)
    # One by one: filter f is the sum over the channels that its group reads.
    f = seed % filters
    own = keep[ids[f]]
    if bool(own.any()):
        alone = nn.functional.conv2d(x[:, own], masked[0].weight[f : f + 1, own], padding=1)
        alone = alone + (masked[0].bias[f] if bias else 0)
        assert torch.allclose(net(x)[:, f : f + 1], alone, rtol=1e-10, atol=1e-10)


def test_gradients_reach_the_branches() -> None:
    net, masked = build().double(), build().double()
    plan = {n.removesuffix(".weight"): (b.groups, b.keep) for n, b in learned().items()}
    mask_branches_(masked, plan)
    pack_branches_(net, plan)
    for model in (net, masked):
        model(image().double()).square().sum().backward()
    assert torch.allclose(net.stem.weight.grad, masked.stem.weight.grad, rtol=1e-8)
    assert all(b.weight.grad.abs().sum() > 0 for b in net.first.branches)


def test_the_order_is_left_out_where_it_is_the_identity() -> None:
    conv = nn.Conv2d(4, 4, 1)
    keep = torch.tensor([[True, True, True, True], [True, False, False, True]])
    sorted_groups: Any = GatheredConv2d(conv, branches_of(torch.tensor([0, 0, 1, 1]), keep))
    mixed: Any = GatheredConv2d(conv, branches_of(torch.tensor([0, 1, 0, 1]), keep))
    assert sorted_groups.order is None
    assert mixed.order.tolist() == [0, 2, 1, 3]
    assert mixed.channels0 is None  # a branch that reads everything gathers nothing
    assert set(mixed.state_dict()) == {
        f"branches.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")
    }


def test_packed_is_proved_and_replayed(tmp_path: Path) -> None:
    model = build()
    pruned = pack_branches(model, learned(), image())
    assert pruned.facts.measures["proof"] < 1e-5
    assert isinstance(model.first, nn.Conv2d)
    assert pruned.surgery is not None
    surgery = parse_surgery(surgery_text(pruned.surgery).encode())
    fresh = build()
    replay_(fresh, surgery, check_weights=True)
    # A replay is exact, for kernels outside the branches are dropped, not zeroed.
    assert torch.equal(fresh(image()), pruned.model(image()))
    folder = pruned.save(tmp_path / "out")
    restored = secateur.load(build(5), folder).model
    assert torch.equal(restored(image()), pruned.model(image()))


def test_filters_that_are_gone_give_their_bias() -> None:
    model = build()
    packed: Any = pack_branches(model, learned(), image()).model
    with torch.no_grad():
        made = packed.second(torch.randn(1, 12, 6, 6))
    assert torch.allclose(made[:, 3], model.second.bias[3].expand_as(made[:, 3]))


def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "secateur.structure.branches.branches_of",
        lambda groups, keep: [(c[1:], f) for c, f in branches_of(groups, keep)],
    )
    with pytest.raises(DataError, match="differs from the masked one"):
        pack_branches(build(), learned(), image())


def test_multiply_adds_are_those_of_the_branches() -> None:
    model, branches = build(), learned()
    packed = pack_branches(model, branches, image()).model
    before, after = (cost_of(net, example=image()) for net in (model, packed))
    plan = {n: (b.groups, b.keep, b.filters) for n, b in branches.items()}
    saved = 0
    for name, (ids, keep, alive) in plan.items():
        kernels = kernels_of(ids, keep)
        kernels[~alive] = False
        dead = 0 if bool(alive.all()) else int((~alive).sum())  # they read one channel of zeros
        saved += (kernels.numel() - int(kernels.sum()) - dead) * 9 * 25
        assert name
    assert before.macs is not None
    assert after.macs is not None
    assert (before.macs_dense or 0.0) - (after.macs_dense or 0.0) == saved
    names = [slot.name for slot in discover(packed) if slot.prunable]
    assert "first.branches.0.weight" in names


def test_what_would_save_nothing_stays() -> None:
    whole = Branches(
        torch.zeros(12, dtype=torch.long),
        torch.ones(1, 8, dtype=torch.bool),
        torch.ones(12, dtype=torch.bool),
    )
    pruned = pack_branches(build(), {"first.weight": whole}, image())
    assert isinstance(pruned.model.first, nn.Conv2d)
    assert [n.topic for n in pruned.facts.notes] == ["left-out"]
    assert pruned.facts.measures["kernels"] == [96, 96]


def test_traced_with_reasons() -> None:
    packed = pack_branches(build(), learned(), image()).model
    structure = couple(packed, image())
    assert not structure.widths
    assert ("first.branches.0.weight", 1) in structure.pinned
    assert structure.pinned["first.branches.0.weight", 0]
    assert "by index" in structure.pinned["stem.weight", 0]


def test_the_learned_groups_and_the_energy_rule_fit() -> None:
    """Stage 2 on logits that were learned, packed: the masks that learning leaves are the proof."""
    model = build()
    slots = [Slot("second.weight", "Conv2d", (12, 12, 3, 3), CONV2D)]
    grouped = GroupLearning(count=2, target=0.5).begin_(model, slots)
    names: Any = grouped
    names._pixels = {"second.weight": (36, 36)}
    ids = torch.arange(12) % 2
    weights = {"second.weight": model.second.weight}
    found, _ = energy_prune(
        weights, {"second.weight": ids}, {"second.weight": 1.0}, target=0.5, count=2
    )
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.second.weight.mul_(found["second.weight"].kernels()[:, :, None, None])
    packed = pack_branches(model, found, image()).model
    with torch.no_grad():
        assert compare([packed(image())], [masked(image())]).error < 1e-5
    learned_now = names.branches()
    assert isinstance(pack_branches(model, learned_now, image()).model.second, GatheredConv2d)


def test_what_was_learned_is_packed_from_the_facts_of_a_bundle(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    how = GroupLearning(count=2, target=0.5, ramp=1, lr=0.5, filters=("second.weight",))
    learned = Learned(model, optimizer, how)
    x = image()
    learned.step((x, torch.zeros(len(x), dtype=torch.long)))
    pruned = learned.harden()
    pruned.save(tmp_path / "learned")
    again = load(build(), tmp_path / "learned")
    packed = pack_branches(again.model, learned_branches(again.facts), x)
    assert any(isinstance(m, GatheredConv2d) for m in packed.model.modules())
    with torch.no_grad():
        again.model.eval(), packed.model.eval()
        assert compare([packed.model(x)], [again.model(x)]).error < 1e-5
    kept = sum(int(m.any((2, 3)).sum()) for m in pruned.masks.values())
    assert packed.facts.measures["kernels"][1] == kept
    with pytest.raises(UsageError, match="no groups"):
        learned_branches(Facts())


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    packed = pack_branches(build(), learned(), image()).model
    file = tmp_path / "net.onnx"
    exported = export_onnx(packed, image(), file)
    assert exported.error < 1e-5
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert {"Gather", "Conv", "Concat"} <= operators
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
    assert compare([torch.from_numpy(found)], [packed(image()).detach()]).error < 1e-5


def test_refusals() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4), nn.Conv2d(4, 3, 1))
    good = (torch.zeros(4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))
    for path, text in (("0", "with 2 groups"), ("1", "Linear"), ("2", "the groups are for")):
        with pytest.raises(UsageError, match=text):
            pack_branches_(net, {path: good})
    with pytest.raises(UsageError, match="below len"):
        branches_of(torch.tensor([0, 2]), torch.ones(2, 3))
    wrong: tuple[dict[str, Any], ...] = (
        {},
        {"branches": []},
        {"branches": [{"channels": [0], "filters": [0, 1]}]},
        {"branches": [{"channels": [0, 9], "filters": [0, 1, 2]}]},
        {"branches": [{"channels": [1, 0], "filters": [0, 1, 2]}]},
        {"branches": [{"channels": [0], "filters": [0, 1, 2]}, {"channels": [1], "filters": []}]},
        {"branches": [{"channels": [0], "filters": [0, 1, 2]}], "more": 1},
    )
    for details in wrong:
        with pytest.raises(UsageError, match="its details"):
            branch_(net, "2", details)
    assert isinstance(net[2], nn.Conv2d)


def test_an_image_without_a_batch_is_gathered_by_its_channels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    groups = {"2.weight": torch.arange(8) % 2}
    weights = {"2.weight": net[2].weight.detach()}
    learned, _ = energy_prune(weights, groups, {"2.weight": 1.0}, target=0.5, count=2)
    packed = pack_branches(net, learned, torch.randn(3, 12, 12))
    assert packed.facts.measures["proof"] < 1e-5
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(torch.stack([packed.model(one) for one in x]), packed.model(x))
