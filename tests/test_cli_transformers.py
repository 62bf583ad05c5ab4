"""The command line on a folder of Transformers: a small language model in half precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import secateur
from secateur.cli.main import app

transformers = pytest.importorskip("transformers")

DATA = """
import torch

def load():
    torch.manual_seed(0)
    texts = [torch.randint(0, 64, (4, 12)) for _ in range(4)]
    batches = [{"input_ids": x, "labels": x} for x in texts]
    return {"train": batches[:3], "test": batches[3:]}
"""


_LESS = ("--target", "params=80%")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained("model")
    (tmp_path / "data.py").write_text(DATA)
    return tmp_path


def secateur_(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done


def test_a_shrunk_model_is_loaded_with_plain_from_pretrained(place: Path) -> None:
    words = ("shrink", "model", "--data", "data.py:load", "--target", "params=70%", "--uniform")
    done = secateur_(*words, "-o", "small", "--pretrained", "hf", "--json")
    found = json.loads(done.stdout)
    assert found["pretrained"]["uniform"]
    assert found["proof"] < 1e-5  # in single precision, whatever the weights are in
    assert found["comparison"]["a"]["perplexity"] > 1
    topics = {(note["topic"], note["where"]) for note in found["notes"]}
    assert ("skipped", "BatchNorm") not in topics  # there is none
    plain = transformers.LlamaForCausalLM.from_pretrained("hf")
    assert plain.dtype == torch.bfloat16
    assert plain.config.intermediate_size < 96
    original = transformers.LlamaForCausalLM.from_pretrained("model")
    ours = secateur.load(original, "small").model
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, ours.eval()(ids).logits)


def test_folders_are_checked_before_the_work(place: Path) -> None:
    (place / "hf").mkdir()
    words = ("shrink", "model", "--data", "data.py:load", "-o", "small", "--pretrained", "hf")
    done = secateur_(*words, code=4)
    assert "already exists" in done.stderr
    assert not (place / "small").exists()


def test_a_model_of_another_kind_has_no_configuration(place: Path) -> None:
    (place / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 2)\n")
    words = ("shrink", "net.py:build", "--input", "1x4", "-o", "small", "--pretrained", "hf")
    done = secateur_(*words, code=2)
    assert "no PreTrainedModel" in done.stderr
    assert not (place / "small").exists()


def test_half_precision_becomes_a_file_in_float32(place: Path) -> None:
    pytest.importorskip("onnxscript")
    config = transformers.AutoConfig.from_pretrained("model", num_hidden_layers=1)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained("model")
    words = ("export", "model", "--data", "data.py:load", "-o", "model.onnx")
    done = secateur_(*words)
    assert "weights are bfloat16" in " ".join(done.output.split())
    assert (place / "model.onnx").exists()
    secateur_("export", "model", "-o", "again.onnx")  # its configuration says what it reads
    assert (place / "again.onnx").exists()


@pytest.mark.parametrize("how", [("prune", "--sparsity", "50%"), ("shrink", *_LESS)])
def test_what_is_made_of_a_folder_with_widths_per_layer_can_be_opened(
    place: Path, how: tuple[str, ...]
) -> None:
    words = ("shrink", "model", "--data", "data.py:load", "--target", "params=70%")
    done = secateur_(
        *words,
        "--allocation",
        "ranked",
        "--align",
        "1",
        "-o",
        "small",
        "--pretrained",
        "hf",
        "--json",
    )
    assert not json.loads(done.stdout)["pretrained"]["uniform"]
    name, *options = how
    done = secateur_(name, "hf", *options, "--data", "data.py:load", "-o", "out", "--json")
    then = json.loads(done.stdout)["comparison"]["b"]
    done = secateur_("evaluate", "out", "--data", "data.py:load", "--json")
    found = json.loads(done.stdout)["measurement"]
    for key in ("loss", "nonzeros"):
        assert found[key] == then[key]


def test_the_tokenizer_comes_along(place: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("model")
    for number, source in enumerate(
        ("model", "small-0", "hf-0")
    ):  # a folder, a bundle, widths per layer
        options = ("--target", "params=90%", "--recovery", "none", "--input", "tokens:1x8")
        places = ("-o", f"small-{number}", "--pretrained", f"hf-{number}")
        secateur_("shrink", source, *options, *places)
        found = transformers.AutoTokenizer.from_pretrained(f"hf-{number}")
        assert found("b a c").input_ids == [1, 0, 2]


def test_a_folder_is_written_of_a_model_whose_inputs_cannot_be_made_up(place: Path) -> None:
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8
    )
    transformers.RegNetForImageClassification(config).save_pretrained("images")
    words = ("shrink", "images", "--input", "2x3x32x32", "--target", "params=80%", "--align", "1")
    secateur_(*words, "--recovery", "none", "-o", "small", "--pretrained", "hf")
    with torch.no_grad():
        assert secateur.load_transformers("hf")(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)
