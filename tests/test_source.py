"""Models and data from files, Transformers folders, and ONNX files that compute the same."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.errors import DataError, FormatError, NotYet, SecateurError, UsageError
from secateur.frontends import export_onnx, load_data, load_model, onnx
from secateur.frontends.weights import load_weights_


def test_two_projects_may_have_files_of_the_same_names(tmp_path: Path) -> None:
    before = set(sys.path), {n for n in sys.modules if not n.startswith("_secateur_")}
    for size in (3, 5):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "sizes_of_mine.py").write_text(f"SIZE = {size}\n")
        (folder / "net.py").write_text(
            "import torch, sizes_of_mine\n"
            "def build(): return torch.nn.Linear(sizes_of_mine.SIZE, 1)\n"
            "def late():\n    from sizes_of_mine import SIZE\n    return torch.nn.Linear(SIZE, 2)\n"
        )
    for function, out in (("build", 1), ("late", 2)):
        for size in (3, 5):
            net = load_model(f"{tmp_path / str(size) / 'net.py'}:{function}").model
            assert (net.in_features, net.out_features) == (size, out)
    after = set(sys.path), {n for n in sys.modules if not n.startswith("_secateur_")}
    assert before == after


def test_forms_of_data(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "from secateur import Data\n"
        "def metric(model, batches): return 1.0\n"
        "def a(): return Data(test=[1])\n"
        "def b(): return {'train': [0], 'test': [1], 'calibration': 7}\n"
        "def c(): return [0], [1], metric\n"
        "def d(): return [1]\n"
    )
    load = lambda name: load_data(f"{tmp_path / 'data.py'}:{name}")  # noqa: E731
    assert [load(name).test for name in "abc"] == [[1]] * 3
    assert load("b").calibration == 7
    assert load("c").metric.__name__ == "metric"
    with pytest.raises(UsageError, match="returned a list"):
        load("d")


def test_tied_weights_are_stored_once_and_loaded_twice(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def tied() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        net[1].weight = net[0].weight
        return net

    first, second = tied(), tied()
    save_file({"0.weight": first[0].weight.detach()}, tmp_path / "w.safetensors")
    load_weights_(second, str(tmp_path / "w.safetensors"))
    assert torch.equal(second[1].weight, first[0].weight)
    untied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with pytest.raises(UsageError, match="1 missing"):
        load_weights_(untied, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_saved_from_a_wrapped_network(wrapper: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net, file = nn.Linear(4, 2), str(tmp_path / "w.safetensors")
    save_file({wrapper + name: x for name, x in net.state_dict().items()}, file)
    plain = nn.Linear(4, 2)
    load_weights_(plain, file)
    assert torch.equal(plain.weight, net.weight)
    with pytest.raises(UsageError, match="of the same model"):  # only what a wrapper puts there
        load_weights_(nn.Sequential(nn.Linear(4, 2)), file)


def test_a_network_may_have_a_part_that_is_called_module(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net, file = nn.Module(), str(tmp_path / "w.safetensors")
    net.module = nn.Linear(4, 2)
    save_file({name: x + 1 for name, x in net.state_dict().items()}, file)
    before = net.get_parameter("module.weight").detach().clone()
    load_weights_(net, file)
    assert torch.equal(net.get_parameter("module.weight"), before + 1)


def test_weights_of_another_type_are_told_as_such(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net, file = nn.Linear(4, 2), str(tmp_path / "w.safetensors")
    save_file({name: x.half() for name, x in net.state_dict().items()}, file)
    with pytest.raises(UsageError, match=r"\.to\(torch\.float16\), or save the weights"):
        load_weights_(net, file)
    load_weights_(net.half(), file)


# --- Transformers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "llama"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_transformers_folder_and_its_bundle(llama: Path, tmp_path: Path) -> None:
    loaded = load_model(str(llama))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(0, 50, (4, 12))
    batches = [{"input_ids": ids, "labels": ids}]
    pruned = secateur.prune(loaded.model, secateur.recipes.wanda(0.5), batches)
    pruned.facts.environment["source"] = dict(loaded.source)
    pruned.save(tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    found = secateur.compare(pruned, again.model, batches, latency=False)
    assert found.identical
    assert found.a.loss == found.b.loss
    assert again.masks == pruned.masks
    dense = secateur.compare(loaded.model, pruned, batches, latency=False)
    assert not dense.identical
    assert dense.kl is not None
    assert dense.kl > 0


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize(
    ("changes", "piece"),
    [
        ({"architectures": ["NoSuchModel"]}, "NoSuchModel"),
        ({"architectures": ["logging"]}, "logging"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"hidden_size": 32}, "Transformers"),
        ({"num_hidden_layers": 3}, "missing"),
    ],
)
def test_folders_that_cannot_be_right(
    llama: Path, tmp_path: Path, changes: dict[str, Any], piece: str
) -> None:
    folder = copied(llama, tmp_path / "copy", **changes)
    with pytest.raises(SecateurError) as caught:
        load_model(str(folder))
    assert piece in str(caught.value)


def test_damaged_weights_and_pickles_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path / "copy")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError):
        load_model(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError):
        load_model(str(folder))


def test_other_formats_are_not_yet() -> None:
    with pytest.raises(NotYet):
        load_model("net.onnx")


# --- ONNX --------------------------------------------------------------------------------------


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def test_export_is_checked_quiet_and_takes_any_batch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = convolutional().train()
    batch = torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.long)
    done = export_onnx(net, batch, tmp_path / "net.onnx")
    assert done.error < 1e-4
    assert done.bytes == (tmp_path / "net.onnx").stat().st_size
    assert net.training
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    many = torch.randn(11, 1, 8, 8)
    got = session.run(None, {done.inputs[0]: many.numpy()})[0]
    with torch.no_grad():
        expected = net.eval()(many)
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-5)
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_in_float32_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = convolutional().eval().to(dtype)
    batch = torch.randn(5, 1, 8, 8).to(dtype), torch.zeros(5, dtype=torch.long)
    done = export_onnx(net, batch, tmp_path / "net.onnx")
    assert str(dtype).removeprefix("torch.") in done.notes[0]
    assert {p.dtype for p in net.parameters()} == {dtype}
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    got = session.run(None, {done.inputs[0]: batch[0].float().numpy()})[0]
    with torch.no_grad():
        expected = net.float()(batch[0].float())
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-5)


def test_a_file_that_onnx_runtime_cannot_load_is_an_error_of_four_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Could not find an implementation for Mul(14)")

    monkeypatch.setattr(runtime, "InferenceSession", refuse)
    with pytest.raises(UsageError, match=r"Mul\(14\)") as caught:
        export_onnx(nn.Linear(4, 2), torch.randn(3, 4), tmp_path / "net.onnx")
    assert all(caught.value.parts().values())
    assert list(tmp_path.iterdir()) == []


class Fussy(nn.Module):
    """Like a model of Transformers: the exporter follows it in its plain form only."""

    def __init__(self, plain: str = "eager") -> None:
        super().__init__()
        self.inner, self.plain = nn.Linear(4, 2), plain
        self.config = SimpleNamespace(
            use_cache=True,
            _attn_implementation_internal="sdpa",
            _experts_implementation_internal=None,
        )

    def forward(self, x: Tensor) -> Tensor:
        mine = self.config
        if torch.compiler.is_exporting():
            if mine.use_cache:
                raise ValueError("a cache is no tensor")
            if mine._attn_implementation_internal != self.plain:
                raise ValueError("cannot view")
        return self.inner(x)


def test_what_the_exporter_cannot_follow_is_tried_in_its_plain_form(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = Fussy()
    before = dict(vars(net.config))
    done = export_onnx(net, torch.randn(3, 4), tmp_path / "net.onnx")
    assert "plain form" in done.notes[0]
    assert vars(net.config) == before
    assert export_onnx(Fussy("sdpa"), torch.randn(3, 4), tmp_path / "b.onnx").notes == ()
    with pytest.raises(UsageError, match="cannot view"):
        export_onnx(Fussy("none"), torch.randn(3, 4), tmp_path / "c.onnx")


class Reader(nn.Module):
    """Reads tokens, of one length only if its positions are for that length."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.places = nn.Parameter(torch.randn(positions, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.words(ids) + self.places).mean(1))


@pytest.mark.parametrize(("positions", "free"), [(1, True), (12, False)])
def test_tokens_may_be_of_any_length_if_the_model_takes_them(
    tmp_path: Path, positions: int, free: bool
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = Reader(positions).eval()
    done = export_onnx(net, torch.randint(0, 20, (2, 12)), tmp_path / "net.onnx")
    assert done.lengths is free
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    for batch, length in ((5, 12), (3, 7)) if free else ((5, 12),):
        ids = torch.randint(0, 20, (batch, length))
        got = session.run(None, {done.inputs[0]: ids.numpy()})[0]
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(got), net(ids), atol=1e-5)


def test_a_file_that_fails_on_another_batch_is_not_kept(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = 6 if torch.compiler.is_exporting() else 4 * len(x)
            return x.new_ones(rows, 1)[: 2 * len(x)].reshape(-1, 2) + x.repeat(1, 1)

    with pytest.raises(DataError, match="fails on the file"):
        export_onnx(Fixed(), torch.randn(2, 2), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    write = onnx._write

    def planted(call: Any, *rest: Any) -> Any:
        return write(replace(call, model=nn.Sequential(call.model, Scaled())), *rest)

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.001

    monkeypatch.setattr(onnx, "_write", planted)
    with pytest.raises(DataError, match="ONNX Runtime differs"):
        export_onnx(nn.Linear(4, 2), torch.randn(3, 4), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
