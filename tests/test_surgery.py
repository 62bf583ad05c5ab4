"""Surgery: written down, read back, and replayed on the original, with secateur and without."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from surgery_cases import EXAMPLE, build, cut_net, same, saved

import secateur
from secateur.core.errors import UsageError
from secateur.core.facts import Facts
from secateur.core.masks import Masks
from secateur.drive.pruned import Pruned
from secateur.formats import (
    BlockEdit,
    Surgery,
    fingerprint_of,
    parse_surgery,
    read_surgery,
    shapes_hash,
    surgery_text,
)
from secateur.frontends.surgery import cuts_of, replay_, surgery_for
from secateur.structure import Cuts, apply_, couple, cuts_for

ROOT = Path(__file__).resolve().parent.parent


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
    source = Path(__file__).with_name("surgery_cases.py").read_text()
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
    (tmp_path / "code").mkdir()  # a file that imports another one beside it
    (tmp_path / "code" / "parts.py").write_text(header + classes)
    (tmp_path / "code" / "my_net.py").write_text("from parts import Net\n")
    call = [
        sys.executable,
        tmp_path / "replay.py",
        folder,
        f"{tmp_path / 'code' / 'my_net.py'}:Net",
    ]
    shown = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    assert shown == f"Net with {sum(p.numel() for p in model.parameters()):,} parameters\n"
    file = folder / "surgery.json"
    file.write_text(file.read_text().replace('"axis":0', '"axis":1', 1))
    failed = subprocess.run(call, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "the file was altered" in failed.stderr


def test_the_script_in_the_docs_loads_a_network_that_was_pruned_only(tmp_path: Path) -> None:
    net = build()
    pruned = secateur.prune(net, secateur.recipes.magnitude(0.5))
    folder = pruned.save(tmp_path / "pruned")
    script: dict[str, object] = {"__name__": "replay"}
    exec((ROOT / "docs" / "formats" / "replay.py").read_text(), script)  # noqa: S102 - our own page
    again = script["replay"](build(seed=1), folder)  # type: ignore[operator]
    for name, x in pruned.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name
