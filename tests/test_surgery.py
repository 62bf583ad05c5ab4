"""Surgery: written down, read back, replayed on the original, and refused by everything else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from secateur.core.errors import FormatError, SecateurError, UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.drive.pruned import Pruned
from secateur.formats import (
    BlockEdit,
    Surgery,
    fingerprint_of,
    parse_surgery,
    read_surgery,
    same_bits,
    shapes_hash,
    surgery_text,
)
from secateur.formats.surgery_file import _sealed
from secateur.frontends.surgery import cuts_of, replay_, surgery_for
from secateur.structure import Cuts, apply_, couple, cuts_for

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """A block that can be taken out, with a buffer that is not saved and a size of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.second = nn.Conv2d(2 * width, width, 1, bias=False)
        self.width = width
        self.register_buffer("gain", torch.linspace(1.0, 2.0, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.norm(x)).relu())
        y = y.permute(0, 2, 3, 1).flatten(1).view(len(x), -1, self.width) * self.gain
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Net(nn.Module):
    """Two residual blocks, and an output layer under two names."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.ModuleList([Residual(width), Residual(width)])
        self.head = nn.Linear(width, 4)
        self.again = nn.Linear(width, 4)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))
        return self.head(x) + self.again(x)


class Other(Net):
    """The same network under another name."""


def build(seed: int = 0, width: int = 6) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width).eval()


def cut_net(seed: int = 0, blocks: tuple[BlockEdit, ...] = ()) -> tuple[Net, Surgery]:
    """A cut network, and what was done to it."""
    model = build(seed)
    structure = couple(model, EXAMPLE)
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for width in structure.widths:
        flags = torch.rand(width.groups, generator=generator) > 0.4
        flags[:2] = torch.tensor([True, False])
        keep[width.name] = flags
    cuts = cuts_for(model, structure, keep)
    assert cuts.attributes["blocks.0"]["width"] < 6
    surgery = surgery_for(model, cuts, blocks)
    apply_(model, cuts)
    for block in blocks:
        name = block.module.rpartition(".")[2]
        model.blocks[int(name)] = nn.Identity()
    return model, surgery


def same(a: nn.Module, b: nn.Module) -> bool:
    """All parameters and buffers (saved or not), and all sizes, agree in every bit."""
    left = {**dict(a.named_parameters()), **dict(a.named_buffers())}
    right = {**dict(b.named_parameters()), **dict(b.named_buffers())}
    return (
        left.keys() == right.keys()
        and all(x.shape == right[n].shape and same_bits(x, right[n]) for n, x in left.items())
        and repr(a) == repr(b)
        and [getattr(m, "width", 0) for m in a.modules()]
        == [getattr(m, "width", 0) for m in b.modules()]
    )


def saved(folder: Path, seed: int = 0, blocks: tuple[BlockEdit, ...] = ()) -> tuple[Net, Path]:
    model, surgery = cut_net(seed, blocks)
    masks = Masks({"head.weight": torch.arange(4 * model.head.in_features).reshape(4, -1) % 3 > 0})
    masks.apply_(model)
    return model, Pruned(model, masks, Facts(), surgery).save(folder)


# -- the file ---------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
POSITIONS = st.sets(st.integers(0, 40), min_size=1).map(sorted)


@given(st.dictionaries(NAMES, st.dictionaries(st.integers(0, 3), POSITIONS, min_size=1)))
def test_cuts_to_json_and_back_is_the_identity(kept: dict[str, dict[int, list[int]]]) -> None:
    from secateur.formats import selection_of

    cuts = Cuts(kept, {"a.b": {"num_heads": 3, "config.size": 4, "normalized_shape[0]": 5}})
    surgery = Surgery(
        "a.Net",
        {n: {a: selection_of(p, 41) for a, p in axes.items()} for n, axes in kept.items()},
        {"a.b": {"num_heads": (4, 3), "config.size": (8, 4), "normalized_shape[0]": (6, 5)}},
        (
            BlockEdit(
                'b"sha256":"x', "removed", {"returns": "tuple", "more": [1, None, {"a": 0.5}]}
            ),
        ),
        shapes="0" * 64,
        weights="a" * 64,
        result="1" * 64,
        library="0.1",
    )
    again = parse_surgery(surgery_text(surgery).encode())
    assert again == surgery
    assert cuts_of(again) == cuts


def test_the_cuts_of_a_network_come_back() -> None:
    model = build()
    structure = couple(model, EXAMPLE)
    keep = {w.name: torch.arange(w.groups) % 3 != 1 for w in structure.widths}
    cuts = cuts_for(model, structure, keep)
    before = copy.deepcopy(model)
    surgery = surgery_for(model, cuts)
    assert same(model, before)
    assert cuts_of(parse_surgery(surgery_text(surgery).encode())) == cuts
    assert surgery.weights == fingerprint_of(model.state_dict())
    assert surgery.shapes == shapes_hash(model.state_dict())
    apply_(model, cuts)
    assert surgery.result == shapes_hash(model.state_dict())


def test_equal_selections_are_stored_once() -> None:
    _, surgery = cut_net()
    data = json.loads(surgery_text(surgery))
    assert len(data["selections"]) == 3 < len(data["cuts"])
    assert list(data)[:2] == ["version", "sha256"]


def test_fingerprints_see_every_bit_name_shape_and_type() -> None:
    state = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(1)}
    others = [
        {"a": torch.tensor([-0.0, 1.0]), "b": torch.tensor(1)},
        {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor(1)},
        {"a": torch.tensor([0.0, 1.0]), "c": torch.tensor(1)},
        {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(1, dtype=torch.int32)},
    ]
    assert len({fingerprint_of(s) for s in [state, *others]}) == 5
    assert fingerprint_of(dict(reversed(state.items()))) == fingerprint_of(state)
    strided = {"a": torch.tensor([[0.0, 5.0], [1.0, 5.0]])[:, 0], "b": torch.tensor(1)}
    assert fingerprint_of(strided) == fingerprint_of(state)
    assert fingerprint_of({"a": torch.empty(1, device="meta")}) == ""


# -- replay -----------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.integers(0, 1000))
def test_replay_on_the_original_weights_gives_the_cut_model(seed: int) -> None:
    model, surgery = cut_net(seed)
    other = build(seed)
    replay_(other, surgery, check_weights=True)
    assert same(other, model)


def test_load_into_a_fresh_model(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "b")
    fresh = build(seed=7)
    weight = fresh.stem.weight
    restored = secateur.load(fresh, folder)
    assert same(fresh, model)
    assert fresh.stem.weight is weight
    assert fresh.again.weight is fresh.head.weight
    assert restored.surgery == read_surgery(folder)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), model(x))
    # Saved again, it is the same bundle.
    again = restored.save(tmp_path / "c")
    for name in ("surgery.json", "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_removed_block_is_passed_through(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "b", blocks=(BlockEdit("blocks.1", "removed"),))
    fresh = build(seed=3)
    secateur.load(fresh, folder)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh(x), model(x))
    assert not any(name.startswith("blocks.1.") for name in fresh.state_dict())


def test_a_bundle_without_surgery_still_loads(tmp_path: Path) -> None:
    model = build()
    folder = Pruned(model, Masks({}), Facts()).save(tmp_path / "b")
    assert not (folder / "surgery.json").exists()
    fresh = build(seed=1)
    assert secateur.load(fresh, folder).surgery is None
    assert same(fresh, model)
    with pytest.raises(UsageError, match=r"no surgery\.json"):
        secateur.load(build(), folder, check_weights=True)


def test_pruning_twice_is_one_surgery() -> None:
    model = build()
    parts = []
    for seed in (1, 2):
        structure = couple(model, EXAMPLE)
        generator = torch.Generator().manual_seed(seed)
        keep = {w.name: torch.rand(w.groups, generator=generator) > 0.3 for w in structure.widths}
        for flags in keep.values():
            flags[-1] = True
        cuts = cuts_for(model, structure, keep)
        parts.append(surgery_for(model, cuts))
        apply_(model, cuts)
    both = parts[0].then(parts[1])
    other = build()
    replay_(other, parse_surgery(surgery_text(both).encode()), check_weights=True)
    assert same(other, model)
    with pytest.raises(UsageError, match="joining two surgeries"):
        parts[1].then(parts[0])


# -- refusals ---------------------------------------------------------------------------------------


def refused(model: nn.Module, surgery: Surgery, match: str, **options: Any) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(UsageError, match=match) as caught:
        replay_(model, surgery, **options)
    assert all(caught.value.parts().values()), caught.value.parts()
    assert "nothing was changed" in str(caught.value)
    assert same(model, before)


def test_other_models_are_refused() -> None:
    _, surgery = cut_net()
    refused(Other(), surgery, "Classes must be the same")
    refused(build(width=5), surgery, "had 6 entries")
    cut, _ = cut_net()
    refused(cut, surgery, "entries")
    deeper = build()
    deeper.blocks.append(nn.Linear(1, 1))
    refused(deeper, surgery, "names and shapes")
    untied = build()
    untied.again.weight = nn.Parameter(untied.head.weight.detach().clone())
    refused(untied, surgery, "tied differently")
    resized = build()
    resized.blocks[0].width = 7
    refused(resized, surgery, "'width' of 'blocks.0' is 7 here")
    del resized.blocks[0].width
    refused(resized, surgery, "no such attribute")


def test_other_weights_are_refused_if_asked() -> None:
    _, surgery = cut_net()
    refused(build(seed=1), surgery, "SHA-256 of its weights", check_weights=True)
    nudged = build()
    with torch.no_grad():
        nudged.blocks[1].norm.running_mean[2] += 1e-7
    refused(nudged, surgery, "SHA-256 of its weights", check_weights=True)
    unknown = replace(surgery, weights="")
    refused(build(), unknown, "does not say which weights", check_weights=True)
    replay_(build(seed=1), surgery)


def test_unknown_blocks_are_refused() -> None:
    _, surgery = cut_net()
    refused(build(), replace(surgery, blocks=(BlockEdit("blocks.0", "magic"),)), "'magic'")
    refused(build(), replace(surgery, blocks=(BlockEdit("blocks.9", "removed"),)), "no module")
    details = BlockEdit("blocks.0", "removed", {"returns": "nonsense"})
    refused(build(), replace(surgery, blocks=(details,)), "details")


def test_a_wrong_result_is_undone() -> None:
    """Everything fits and the last check fails: tensors, gradients, sizes and blocks come back."""
    _, surgery = cut_net(blocks=(BlockEdit("blocks.1", "removed"),))
    model = build()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    gradient = model.stem.weight.grad
    refused(model, replace(surgery, result="0" * 64), "shapes that it leaves")
    assert model.stem.weight.grad is gradient


def test_files_of_two_bundles_do_not_mix(tmp_path: Path) -> None:
    _, one = saved(tmp_path / "one", seed=0)
    _, two = saved(tmp_path / "two", seed=1)
    (two / "surgery.json").write_bytes((one / "surgery.json").read_bytes())
    fresh = build()
    before = copy.deepcopy(fresh)
    with pytest.raises(FormatError, match="not those that surgery"):
        secateur.load(fresh, two)
    assert same(fresh, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("surgery") / "b")[1]


@pytest.mark.parametrize("name", ["surgery.json", "model.safetensors"])
@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_altered_bytes_change_nothing(folder: Path, name: str, place: float, value: int) -> None:
    file = folder / name
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= value
    fresh = build(seed=5)
    before = copy.deepcopy(fresh)
    try:
        file.write_bytes(bad)
        with pytest.raises(FormatError) as caught:
            secateur.load(fresh, folder)
    finally:
        file.write_bytes(good)
    assert name in str(caught.value)
    assert same(fresh, before)


@settings(max_examples=30)
@given(st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(folder: Path, share: float) -> None:
    data = (folder / "surgery.json").read_bytes()
    with pytest.raises(FormatError):
        parse_surgery(data[: int(share * len(data))])


FORGED: list[Any] = [
    lambda d: d.update(version=2),
    lambda d: d.update(version=True),
    lambda d: d.update(extra=1),
    lambda d: d.pop("library"),
    lambda d: d["original"].update(shapes="ABC"),
    lambda d: d["original"].update(weights="0" * 63),
    lambda d: d["result"].update(shapes=""),
    lambda d: d["selections"][0].update(size=2**60),
    lambda d: d["selections"][0].update(runs=[]),
    lambda d: d["selections"][0].update(runs=[[0, 1], [1, 2]]),
    lambda d: d["selections"][0].update(runs=[[2, 3], [0, 1]]),
    lambda d: d["selections"][0].update(runs=[[0, 0]]),
    lambda d: d["selections"][0].update(runs=[[-1, 1]]),
    lambda d: d["selections"][0].update(runs=[[0, 99]]),
    lambda d: d["selections"][0].update(runs=[[0.0, 1]]),
    lambda d: d["cuts"][0].update(selection=99),
    lambda d: d["cuts"][0].update(selection=-1),
    lambda d: d["cuts"][0].update(axis=-1),
    lambda d: d["cuts"].append(d["cuts"][0]),
    lambda d: d["attributes"].append(d["attributes"][0]),
    lambda d: d["attributes"][0].update(name="__class__"),
    lambda d: d["attributes"][0].update(name="a.b"),
    lambda d: d["attributes"][0].update(after=-1),
    lambda d: d["attributes"][0].update(after=1.5),
    lambda d: d["blocks"].append({"module": "", "kind": "removed", "details": {}}),
    lambda d: d["blocks"].extend([{"module": "a", "kind": "removed", "details": {}}] * 2),
    lambda d: d["blocks"].append({"module": "a", "kind": "removed", "details": nested(20)}),
    lambda d: d.update(blocks={}),
]


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("number", range(len(FORGED)))
def test_forged_files_are_refused(folder: Path, number: int) -> None:
    """The hash is right, and something else is wrong."""
    data = json.loads((folder / "surgery.json").read_text())
    data["sha256"] = "0" * 64
    assert parse_surgery(_sealed(json.dumps(data, separators=(",", ":"))).encode())
    FORGED[number](data)
    with pytest.raises(FormatError) as caught:
        parse_surgery(_sealed(json.dumps(data, separators=(",", ":"))).encode())
    assert all(caught.value.parts().values()), caught.value.parts()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"version":1}', "[" * 100_000, "\xff"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_surgery(text.encode("latin-1"))


def test_unwritable_surgery_is_refused() -> None:
    hashes = {"shapes": "0" * 64, "result": "0" * 64}
    with pytest.raises(SecateurError, match="plain values"):
        surgery_text(Surgery("N", blocks=(BlockEdit("a", "b", {"c": object()}),), **hashes))
    with pytest.raises(SecateurError, match="plain values"):
        surgery_text(Surgery("N", attributes={"": {"__dict__": (1, 1)}}, **hashes))


# -- without secateur -------------------------------------------------------------------------------

SCRIPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "secateur":
            raise ImportError("secateur is not here")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import torch, replay, net
from safetensors.torch import save_file, load_file
model = replay.replay(net.Net().eval(), sys.argv[2])
x = load_file(sys.argv[3])["x"]
with torch.no_grad():
    save_file({"y": model(x)}, sys.argv[4])
assert "secateur" not in sys.modules
"""


@pytest.mark.parametrize("blocks", [(), (BlockEdit("blocks.0", "removed"),)])
def test_the_script_in_the_docs_replays_without_secateur(
    tmp_path: Path, blocks: tuple[BlockEdit, ...]
) -> None:
    script = (ROOT / "docs" / "formats" / "replay.py").read_text()
    assert len(script.splitlines()) < 150
    (tmp_path / "replay.py").write_text(script)
    source = Path(__file__).read_text()
    classes = source[source.index("class Residual") : source.index("class Other")]
    header = "import torch\nfrom torch import nn, Tensor\n"
    (tmp_path / "net.py").write_text(header + classes)
    model, folder = saved(tmp_path / "b", blocks=blocks)
    x = torch.randn(2, 3, 8, 8)
    save_file({"x": x}, tmp_path / "x")
    run = [sys.executable, "-c", SCRIPT, *map(str, (tmp_path, folder, tmp_path / "x"))]
    subprocess.run([*run, str(tmp_path / "y")], check=True)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "y")["y"], model(x))
    if not blocks:
        return
    call = [sys.executable, tmp_path / "replay.py", folder, f"{tmp_path / 'net.py'}:Net"]
    shown = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    assert shown == f"Net with {sum(p.numel() for p in model.parameters()):,} parameters\n"
    file = folder / "surgery.json"
    file.write_text(file.read_text().replace('"axis":0', '"axis":1', 1))
    failed = subprocess.run(call, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "the file was altered" in failed.stderr
