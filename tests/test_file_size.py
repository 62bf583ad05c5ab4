"""A target in bytes is one of the file that is really written: met, and not exceeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur import Recipe, Target
from secateur.core.masks import Masks
from secateur.formats import write_tensors
from secateur.formats.sharing import find_aliases
from secateur.formats.size import bare_bytes, plain_bytes, sparse_bytes
from secateur.pattern import Blocks, Rows


def chain(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    many = [nn.Linear(width, width, bias=False) for _ in range(layers)]
    return nn.Sequential(*many, nn.Linear(width, 4))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x).relu()).relu())


def size_of(net: nn.Module, place: Path, **recipe: Any) -> int:
    pruned = secateur.prune(net, Recipe(**recipe))
    assert not [n for n in pruned.facts.notes if n.topic == "target"]
    return (pruned.save(place) / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("layers", "width", "share"),
    [(24, 32, 0.15), (24, 32, 0.5), (24, 32, 0.8), (24, 128, 0.03), (24, 128, 0.5), (2, 200, 0.2)],
)
def test_the_file_is_not_larger_than_asked(
    layers: int, width: int, share: float, tmp_path: Path
) -> None:
    dense = secateur.measure(chain(layers, width), latency=False).cost.bytes
    asked = int(share * dense)
    found = size_of(chain(layers, width), tmp_path / "a", target=Target("bytes", asked))
    assert 0.985 * asked < found <= asked
    found = size_of(chain(layers, width), tmp_path / "b", target=Target("bytes", share))
    assert found / dense == pytest.approx(share, rel=0.015)
    assert found <= share * dense


@pytest.mark.parametrize("pattern", [Rows(), Blocks(4, 1)], ids=repr)
def test_in_groups(pattern: Any, tmp_path: Path) -> None:
    asked = 80_000
    target = Target("bytes", asked)
    found = size_of(chain(24, 64), tmp_path / "a", target=target, pattern=pattern)
    assert 0.98 * asked < found <= asked


@pytest.mark.parametrize("asked", [8_000, 12_000])
def test_with_tied_weights(asked: int, tmp_path: Path) -> None:
    found = size_of(Tied(), tmp_path / "a", target=Target("bytes", asked))
    assert 0.98 * asked < found <= asked


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_of_a_cut_network(share: float, tmp_path: Path) -> None:
    net = chain(24, 32)
    dense = secateur.measure(net, latency=False).cost.bytes
    target = Target("bytes", share)
    recipe = secateur.ShrinkRecipe(target=target, recovery=(), align=1)
    pruned = secateur.shrink(net, recipe, torch.zeros(1, 32))
    found = (pruned.save(tmp_path / "a") / "model.safetensors").stat().st_size
    assert 0.97 * share * dense < found <= share * dense
    told = pruned.facts.measures["target"]
    assert told["dense"] == pytest.approx(dense, rel=0.01)
    assert told["reached"] == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("kept", [0, 3, 400, 2_048, 4_095, 4_096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_file(kept: int, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(kept)
    mask = torch.zeros(4_096, dtype=torch.bool)
    mask[torch.randperm(4_096, generator=generator)[:kept]] = True
    weight = torch.randn(64, 64, generator=generator).to(dtype)
    tensors = {
        "a.weight": weight,
        "a.bias": torch.zeros(64),
        "größe": torch.zeros((), dtype=torch.int64),
    }
    tensors["b.weight"] = tensors["a.weight"]
    masks = Masks({"a.weight": mask.view(64, 64)})
    write_tensors(tmp_path / "f", tensors, masks)
    total = 20_000
    expected = sparse_bytes("a.weight", (64, 64), dtype, kept, total=total)
    expected += sum(plain_bytes(n, tensors[n], total=total) for n in ("a.bias", "größe"))
    expected += bare_bytes(find_aliases(tensors, masks))
    # Offsets are counted with the digits of the largest.
    assert expected - 60 <= (tmp_path / "f").stat().st_size <= expected
