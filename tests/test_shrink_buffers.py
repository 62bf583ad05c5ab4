"""Buffers of any rank are cut along with the width that they meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur.structure import couple


class Positions(nn.Module):
    """The positional encoding of PyTorch's tutorial, added to a residual width."""

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.register_buffer("pe", torch.randn(1, 50, 32), persistent=persistent)
        self.up, self.down, self.head = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 20)

    def forward(self, ids: Tensor) -> Tensor:
        pe: Any = self.pe
        h = self.embed(ids) + pe[:, : ids.shape[1]]
        h = h + self.down(self.up(h).relu())
        y: Tensor = self.head(h)
        return y


class Blurred(nn.Module):
    """A fixed filter for each channel, as in BlurPool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.register_buffer("blur", torch.rand(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        blur: Any = self.blur
        y: Tensor = self.last(F.conv2d(x, blur, stride=2, padding=1, groups=x.shape[1]))
        return y


class Whole(nn.Module):
    """Shifts that are whole numbers, and a mask over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.register_buffer("shift", torch.arange(16).reshape(1, 16, 1, 1))
        self.register_buffer("off", torch.arange(16).reshape(1, 16, 1, 1) % 5 == 0)

    def forward(self, x: Tensor) -> Tensor:
        off: Any = self.off
        x = (self.first(x) * self.shift).masked_fill(off, 0)
        y: Tensor = self.last(x)
        return y


class Projected(nn.Module):
    """A fixed matrix between two layers: only what it reads can go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(12, 4)
        self.register_buffer("basis", torch.randn(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last((self.first(x).relu() @ self.basis).relu())
        return y


class Standardised(nn.Module):
    """Hidden units less their means, over their deviations, as measured before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.randn(16))
        self.register_buffer("deviation", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last((self.first(x) - self.mean) / self.deviation)
        return y


IDS, IMAGES = torch.randint(0, 20, (2, 5)), torch.randn(2, 3, 8, 8)
CASES: Any = {
    "positions": (Positions, IDS, "embed", {"pe": 2}),
    "positions that are not saved": (lambda: Positions(persistent=False), IDS, "embed", {"pe": 2}),
    "blur": (Blurred, IMAGES, "first", {"blur": 0}),
    "whole numbers and flags": (Whole, IMAGES, "first", {"shift": 1, "off": 1}),
    "a divisor": (Standardised, torch.randn(3, 8), "first", {"mean": 0, "deviation": 0}),
    "a basis": (Projected, torch.randn(3, 8), "first", {"basis": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_buffer_is_cut_with_its_width(name: str, tmp_path: Path) -> None:
    build, example, width, cut = CASES[name]
    net = build().eval()
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("params", 0.6),
        recovery=(),
        scope=secateur.Scope(include=(width,)),
        align=1,
    )
    pruned = secateur.shrink(net, recipe, example)
    assert pruned.facts.measures["proof"] < 1e-5
    assert pruned.surgery is not None
    for buffer, axis in cut.items():
        before, after = net.get_buffer(buffer), pruned.model.get_buffer(buffer)
        positions = pruned.surgery.cuts[buffer][axis].positions()
        assert torch.equal(after, before.index_select(axis, torch.tensor(positions)))
        assert len(positions) < before.shape[axis]
    # What is not saved is in the original network.
    fresh = build().eval()
    for buffer in cut:
        fresh.get_buffer(buffer).copy_(net.get_buffer(buffer))
    loaded = secateur.load(fresh, pruned.save(tmp_path / "b")).model
    assert torch.equal(loaded(example), pruned.model(example))


def test_what_a_buffer_produces_stays() -> None:
    structure = couple(Projected(), torch.randn(3, 8))
    assert [w.name for w in structure.widths] == ["first"]
    assert "come from a buffer" in structure.pinned["last.weight", 1]


def test_bytes_of_a_buffer_count() -> None:
    net = Positions().eval()
    recipe = secateur.ShrinkRecipe(
        target=secateur.Target("bytes", 0.6),
        recovery=(),
        scope=secateur.Scope(include=("embed",)),
        align=1,
    )
    pruned = secateur.shrink(net, recipe, IDS)
    state, told = pruned.model.state_dict(), pruned.facts.measures["target"]
    values = sum(x.numel() * x.element_size() for x in state.values())
    dense = sum(x.numel() * x.element_size() for x in net.state_dict().values())
    assert told["dense"] - told["reached"] == dense - values


def test_a_buffer_that_no_weight_meets_is_not_listed() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    net.register_buffer("idle", torch.zeros(3, 4))
    structure = couple(net, torch.zeros(1, 8))
    assert [w.name for w in structure.widths] == ["0"]
    assert not any(name == "idle" for name, _ in structure.pinned)


class Flipped(nn.Module):
    """A buffer whose channels lie the other way round than those it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        scale: Any = self.scale
        y: Tensor = self.last(self.first(x) * scale.flip(1)[0])
        return y


def test_what_meets_a_turned_buffer_stays() -> None:
    structure = couple(Flipped(), torch.zeros(1, 8))
    assert not structure.widths
    assert ("first.weight", 0) in structure.pinned
