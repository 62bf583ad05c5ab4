"""Bundles: a folder comes back whole or not at all, and a model takes all of it or none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.core.errors import OutputExists, UsageError
from secateur.core.facts import Facts, LayerFacts, Note
from secateur.core.masks import Masks
from secateur.formats import Bundle, is_bundle, load_into_, read_bundle, same_bits, write_bundle


def random_mask(shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density


class Tied(nn.Module):
    """Tied weights, a batch norm with an integer buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4, bias=False)
        self.decoder = nn.Linear(6, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


RECIPE = {"criterion": "magnitude", "pattern": "2:4", "target": {"sparsity": 0.5}, "scope": []}


def facts() -> Facts:
    return Facts(
        recipe=dict(RECIPE),
        fingerprint="ab12",
        layers=[LayerFacts("encoder.weight", (4, 6), 24, 12, None, 0.25)],
        notes=[Note("left-out", "norm", "not a weight")],
        measures={"accuracy": 0.5},
    )


def small_bundle(folder: Path, seed: int = 0, overwrite: bool = False) -> tuple[nn.Module, Masks]:
    torch.manual_seed(seed)
    model = Tied()
    masks = Masks({"encoder.weight": random_mask((4, 6), 0.5, seed)})
    masks.apply_(model)
    state = model.state_dict()
    write_bundle(folder, state, masks, recipe=RECIPE, facts=facts(), overwrite=overwrite)
    return model, masks


def test_bundle_round_trip(tmp_path: Path) -> None:
    model, masks = small_bundle(tmp_path / "b")
    assert is_bundle(tmp_path / "b")
    assert not is_bundle(tmp_path)
    bundle = read_bundle(tmp_path / "b")
    assert bundle.masks == masks
    assert (bundle.recipe, bundle.facts) == (RECIPE, facts())
    other = Tied()
    weight = other.encoder.weight
    load_into_(other, bundle)
    assert other.encoder.weight is weight
    assert other.decoder.weight is weight
    for name, tensor in model.state_dict().items():
        assert same_bits(other.state_dict()[name], tensor)


def test_never_overwrites_by_accident(tmp_path: Path) -> None:
    small_bundle(tmp_path / "b", seed=1)
    before = read_bundle(tmp_path / "b").masks
    with pytest.raises(OutputExists):
        small_bundle(tmp_path / "b", seed=2)
    assert read_bundle(tmp_path / "b").masks == before
    _, masks = small_bundle(tmp_path / "b", seed=2, overwrite=True)
    assert read_bundle(tmp_path / "b").masks == masks != before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("step", ["save_file", "_seal_"])
def test_an_error_in_the_middle_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    _, masks = small_bundle(tmp_path / "b", seed=1)
    monkeypatch.setattr(f"secateur.formats.container.{step}", lambda *_, **__: 1 / 0)
    for target in ("b", "new"):
        with pytest.raises(ZeroDivisionError):
            small_bundle(tmp_path / target, seed=2, overwrite=True)
    assert read_bundle(tmp_path / "b").masks == masks
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


LOOP = """
import sys, torch
from pathlib import Path
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.formats import write_bundle
step = 0
while True:
    step += 1
    write_bundle(Path(sys.argv[1]), {"w": torch.full((300, 300), float(step))}, Masks({}),
                 recipe={"step": step}, facts=Facts(fingerprint=str(step)), overwrite=True)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_bundle(tmp_path: Path) -> None:
    for wait in (0.0, 0.0123):
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path / "b")], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            for _ in range(5):
                assert child.stdout.readline()
            time.sleep(wait)
            child.kill()
        bundle = read_bundle(tmp_path / "b")
        step = bundle.recipe["step"]
        assert step >= 5
        assert bundle.facts.fingerprint == str(step)
        assert bool((bundle.tensors["w"] == step).all())


# --- loading -------------------------------------------------------------------------------------


def load_error(model: nn.Module, tensors: dict[str, Tensor]) -> UsageError:
    """Load what must be refused, and check that the model is as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        load_into_(model, Bundle(tensors, Masks({}), {}, Facts()))
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or same_bits(tensor, before[name])
    assert all(caught.value.parts().values())
    return caught.value


def test_load_lists_all_differences_first() -> None:
    new = {name: tensor + 1 for name, tensor in Tied().state_dict().items()}
    del new["norm.bias"]
    new |= {f"extra{i}": torch.ones(1) for i in range(9)}
    new["norm.weight"] = torch.ones(5)
    new["norm.running_mean"] = torch.ones(4, dtype=torch.float64)
    found = load_error(Tied(), new).found
    assert "1 missing ('norm.bias')" in found
    assert "9 unexpected ('extra0', 'extra1', 'extra2', ...)" in found
    assert "'norm.weight': model (4,), bundle (5,)" in found
    assert "'norm.running_mean': model torch.float32, bundle torch.float64" in found


def test_load_refuses_what_one_memory_cannot_hold() -> None:
    new = {name: tensor + 1 for name, tensor in Tied().state_dict().items()}
    new["decoder.weight"] = new["decoder.weight"].clone()
    new["decoder.weight"][0, 0] += 1
    assert "share memory" in load_error(Tied(), new).found
    expanded = nn.Module()
    expanded.register_buffer("x", torch.ones(1).expand(3))
    assert "expanded" in load_error(expanded, {"x": torch.arange(3.0)}).found
    on_meta = nn.Linear(2, 2, bias=False, device="meta")
    assert "without memory" in load_error(on_meta, {"weight": torch.ones(2, 2)}).found
    lazy = nn.LazyLinear(2, bias=False)
    with pytest.raises(UsageError, match="without memory"):
        load_into_(lazy, Bundle({"weight": torch.ones(2, 2)}, Masks({}), {}, Facts()))


class Turning(nn.Module):
    """Holds factors, and a view of their memory that stands for their conjugates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("back", self.get_buffer("turn").conj())


def test_conjugates_in_the_same_memory_are_tensors_of_their_own(tmp_path: Path) -> None:
    net, fresh = Turning(), Turning()
    write_bundle(tmp_path / "b", net.state_dict(), Masks({}), recipe={}, facts=Facts())
    load_into_(fresh, read_bundle(tmp_path / "b"))
    assert torch.equal(fresh.get_buffer("turn"), net.get_buffer("turn"))
    assert torch.equal(fresh.get_buffer("back"), net.get_buffer("turn").conj())


def test_load_keeps_views_that_agree() -> None:
    base = torch.zeros(6)
    model = nn.Module()
    model.register_buffer("all", base)
    model.register_buffer("part", base[2:])
    new = torch.arange(6.0)
    load_into_(model, Bundle({"all": new, "part": new[2:].clone()}, Masks({}), {}, Facts()))
    assert base.tolist() == new.tolist()
    assert "share memory" in load_error(model, {"all": new, "part": new[:4]}).found
