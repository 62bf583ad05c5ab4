"""The command line on data that a model cannot be run on: what is said, and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.core.batches import as_data
from secateur.core.errors import UsageError

FILES = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

def batch(inputs=16, label=3):
    return torch.zeros(8, inputs), torch.full((8,), label)

def good():
    return {"train": [batch()], "test": [batch()]}

def empty():
    return {"train": [], "test": []}

def onlytest():
    return {"test": [batch()]}

def narrow():
    return {"train": [batch(inputs=7)], "test": [batch(inputs=7)]}

def stopped(model, batches):
    raise KeyboardInterrupt

def broken(model, batches):
    raise ValueError("no such file")

def unmeasured():
    return {"train": [batch()], "test": [batch()], "metric": broken}

def impatient():
    return {"train": [batch()], "test": [batch()], "metric": stopped}

def labels():
    return {"train": [batch(label=9)], "test": [batch(label=9)]}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(FILES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str, code: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)["error"]
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("export", "net.py:build", "-o", "out.onnx"),
        ("shrink", "net.py:build", "-o", "out"),
        ("shrink", "net.py:build", "-o", "out", "--input", "1x16", "--recovery", "none"),
        ("prune", "net.py:build", "-o", "out"),
        ("prune", "net.py:build", "-o", "out", "--epochs", "1"),
        ("inspect", "net.py:build", "--structure"),
        ("evaluate", "net.py:build"),
    ],
)
def test_a_loader_without_samples_is_refused(words: tuple[str, ...], place: Path) -> None:
    error = refused(*words, "--data", "net.py:empty", code=3)
    assert "yielded no " in error["found"]
    assert (place / "out").exists() == ("--input" in words)  # where only measuring reads data


def test_what_the_exporter_cannot_follow_is_still_told_as_such(place: Path) -> None:
    pytest.importorskip("onnxscript")
    (place / "odd.py").write_text(
        "from torch import nn\n"
        "class Odd(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else x + 1)\n"
        "build = lambda: Odd(16, 2)\n"
    )
    error = refused("export", "odd.py:build", "-o", "out.onnx", "--input", "1x16", code=2)
    assert "exporter failed" in error["found"]


def test_a_model_is_exported_from_shapes(place: Path) -> None:
    pytest.importorskip("onnxscript")
    words = ("export", "net.py:build", "-o", "out.onnx")
    error = refused(*words, code=2)
    assert "nothing says what it reads" in error["found"]
    assert "--input" in error["do"]
    error = refused(*words, "--input", "1x15", code=2)
    assert "its own forward fails (RuntimeError: mat1 and mat2" in error["found"]
    assert "pass example inputs on which it runs" in error["do"]
    assert not (place / "out.onnx").exists()
    done = CliRunner().invoke(app, [*words, "--input", "1x16", "--json"])
    told = json.loads(done.stdout)["onnx"]
    assert told["bytes"] == (place / "out.onnx").stat().st_size
    assert told["error"] < 1e-5


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "net.py:build", "-o", "out", "--epochs", "1"),
        ("prune", "net.py:build", "-o", "out", "--target", "macs=50%"),
        ("prune", "net.py:build", "-o", "out", "--criterion", "wanda"),
        ("shrink", "net.py:build", "-o", "out", "--input", "1x16", "--epochs", "1"),
        ("shrink", "net.py:build", "-o", "out"),
    ],
)
def test_data_without_training_batches_are_told_from_no_data(words: tuple[str, ...]) -> None:
    error = refused(*words, "--data", "net.py:onlytest", code=2)
    assert "training batches" in error["found"]
    assert "no data was given" not in error["found"]


@pytest.mark.parametrize(
    ("data", "told"),
    [("narrow", "its own forward fails (RuntimeError: mat1"), ("labels", "its own loss fails")],
)
@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "net.py:build"),
        ("compare", "net.py:build", "net.py:build"),
        ("prune", "net.py:build", "-o", "out"),
        ("prune", "net.py:build", "-o", "out", "--epochs", "1"),
        ("prune", "net.py:build", "-o", "out", "--criterion", "taylor"),
    ],
)
def test_data_that_the_model_cannot_take_are_no_defect(
    words: tuple[str, ...], data: str, told: str, place: Path
) -> None:
    error = refused(*words, "--data", f"net.py:{data}", code=3)
    assert told in error["found"]
    only_measured = data == "labels" and words[0] == "prune" and len(words) == 4
    assert (place / "out").exists() == only_measured


@pytest.mark.parametrize("command", ["prune", "shrink", "ticket"])
@pytest.mark.parametrize(
    ("buffer", "told"),
    [("torch.eye(4).to_sparse()", "torch.sparse_coo"), ("torch.ones(4).cdouble()", "complex128")],
)
def test_what_cannot_be_saved_is_told_before_the_work(
    command: str, buffer: str, told: str, place: Path
) -> None:
    (place / "odd.py").write_text(
        "from net import *\n"
        "def odd():\n"
        f"    net = build(); net.register_buffer('adjacency', {buffer}); return net\n"
        "def unread():\n"
        "    def batches():\n"
        "        raise AssertionError('work has begun')\n"
        "        yield\n"
        "    return batches(), batches()\n"
    )
    words = (command, "odd.py:odd", "-o", "out", "--data", "odd.py:unread")
    error = refused(*words, code=2)
    assert "'adjacency'" in error["asked"]
    assert told in error["found"]
    assert "persistent=False" in error["do"]
    assert not (place / "out").exists()


def test_single_samples_are_no_batches(place: Path) -> None:
    (place / "rows.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "rows = TensorDataset(torch.zeros(8, 16), torch.zeros(8, dtype=torch.long))\n"
        "def bare(): return rows, rows\n"
        "def loaders(): return DataLoader(rows, 4), DataLoader(rows, 4)\n"
    )
    error = refused("evaluate", "net.py:build", "--data", "rows.py:bare", code=2)
    assert "a TensorDataset, a data set, was given" in error["found"]
    assert "DataLoader(TensorDataset(...), batch_size=32)" in error["do"]
    done = CliRunner().invoke(app, ["evaluate", "net.py:build", "--data", "rows.py:loaders"])
    assert done.exit_code == 0, done.output


def told(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code in (0, 6), done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_shapes_are_enough_for_multiply_adds_and_latency() -> None:
    found = told("evaluate", "net.py:build", "--input", "2x16")["measurement"]
    assert found["macs"] == found["macs_dense"] == 16 * 64 + 64 * 64 + 64 * 4
    assert found["latency"]["batch"] == 2
    assert found["accuracy"] is None
    assert found["samples"] == 0


def test_networks_are_compared_and_shrunk_on_shapes(place: Path) -> None:
    words = ("--input", "1x16", "--recovery", "none", "--target", "params=50%")
    own = told("shrink", "net.py:build", "-o", "out", *words)["comparison"]
    words = ("compare", "net.py:build", "out", "--input", "1x16", "--require", "faster")
    found = told(*words)
    for each in (own, found["comparison"]):
        assert each["b"]["macs"] < each["a"]["macs"] == 16 * 64 + 64 * 64 + 64 * 4
        assert each["speed"]["low"] <= each["speed"]["ratio"] <= each["speed"]["high"]
    faster = next(gain for gain in found["comparison"]["verdict"] if gain["name"] == "faster")
    assert found["missing"] == ([] if faster["real"] else ["faster"])


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        (("evaluate", "net.py:build", "--input", "1x15"), "its own forward fails"),
        (("compare", "net.py:build", "net.py:other", "--input", "1x16"), "its own forward fails"),
        (
            ("evaluate", "net.py:build", "--input", "1x16", "--data", "net.py:good"),
            "both were given",
        ),
        (("compare", "net.py:build", "net.py:build", "--require", "faster"), "no data was given"),
        (
            ("compare", "net.py:build", "net.py:build", "--input", "1x16", "--require", "accuracy"),
            "no data was given",
        ),
    ],
)
def test_shapes_that_will_not_do(words: tuple[str, ...], piece: str, place: Path) -> None:
    with (place / "net.py").open("a") as file:
        file.write("def other(): return nn.Linear(8, 4)\n")
    assert piece in refused(*words, code=2)["found"]


def test_a_defect_of_ours_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr("secateur.evaluate.accuracy._answer", broken)
    monkeypatch.setattr("secateur.drive.oneshot._Run._rounds", broken)
    for words in (("evaluate", "net.py:build"), ("prune", "net.py:build", "-o", "out")):
        error = refused(*words, "--data", "net.py:good", code=1)
        assert "our own mistake" in str(error)


@pytest.mark.parametrize("command", ["prune", "shrink"])
@pytest.mark.parametrize(("data", "code"), [("unmeasured", 3), ("impatient", 130)])
def test_a_result_that_could_not_be_measured_is_written(
    command: str, data: str, code: int, place: Path
) -> None:
    words = (command, "net.py:build", "-o", "out", "--data", f"net.py:{data}")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code, done.output
    assert "The result was written to out" in done.stderr
    measured = CliRunner().invoke(app, ["evaluate", "out", "--data", "net.py:good", "--json"])
    assert json.loads(measured.stdout)["measurement"]["nonzeros"] < 16 * 64 + 64 * 64 + 64 * 4


@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_a_missing_extra_is_told_before_the_work(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = (
        command,
        "net.py:build",
        "-o",
        "out",
        "--data",
        "net.py:unmeasured",
        "--onnx",
        "a.onnx",
    )
    assert "extra 'onnx'" in refused(*words, code=5)["why"]
    assert [entry.name for entry in place.iterdir() if entry.name != "__pycache__"] == ["net.py"]


@pytest.mark.parametrize("more", [("--target", "latency=2x"), ("--recipe", "r.yaml")])
def test_masks_promise_no_latency_before_anything_is_read(
    more: tuple[str, str], place: Path
) -> None:
    (place / "r.yaml").write_text("target: {latency: 2x}")
    error = refused("prune", "no-such-file.py:build", "-o", "out", *more, code=2)
    assert "remove nothing" in error["found"]
    assert "0.5" not in error["asked"]


@pytest.mark.parametrize("given", ["train", None])
def test_data_sets_of_hugging_face_are_no_batches(given: str | None) -> None:
    """They are no data sets of torch, and yield mappings, which could be batches."""

    class Rows(list[dict[str, list[int]]]):
        __module__ = "datasets.arrow_dataset"

    rows = Rows([{"input_ids": [1, 2], "label": [0]}])
    data = rows if given is None else {given: rows}
    with pytest.raises(UsageError, match=r'DataLoader\(dataset.with_format\("torch"\)'):
        as_data(data)


STREAM = """
from net import batch
from torch.utils.data import DataLoader, IterableDataset

class Rows(IterableDataset):
    def __iter__(self):
        x, y = batch()
        yield from zip(x, y)

def load():
    return {"train": DataLoader(Rows(), 4), "test": DataLoader(Rows(), 4)}
"""


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "net.py:build"),
        ("compare", "net.py:build", "net.py:build"),
        ("prune", "net.py:build", "--sparsity", "50%", "-o", "out"),
        ("shrink", "net.py:build", "--target", "params=70%", "-o", "out"),
    ],
)
def test_test_data_may_be_a_stream_without_a_length(words: tuple[str, ...], place: Path) -> None:
    (place / "stream.py").write_text(STREAM)
    found = told(*words, "--data", "stream.py:load")
    measured = found["measurement"] if "measurement" in found else found["comparison"]["b"]
    assert (measured["samples"], measured["split"]) == (8, "test")
