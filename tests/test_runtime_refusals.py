"""Wrong arguments of the runtime are refused in four parts, never with an error from below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.core.atomic import new_file
from secateur.core.errors import DataError, FileError, SecateurError, UsageError
from secateur.frontends import export_onnx
from secateur.runtime import accelerate, library, session

native = pytest.mark.skipif(not library.available(), reason="the native library is not built")


def refused(ask: Callable[[], Any], kind: type[SecateurError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        ask()
    assert all(caught.value.parts().values()), caught.value.parts()
    for word in words:
        assert word in str(caught.value)


# ---- files


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 300), tmp_path):

        def write(path: Path = path) -> None:
            with new_file(path) as temporary:
                temporary.write_text("x")

        refused(write, FileError, "writing to")
    assert not list(tmp_path.iterdir())


# ---- export


def test_exports_that_cannot_be(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net, x = nn.Linear(4, 2), torch.randn(3, 4)
    refused(lambda: export_onnx(net, x, tmp_path), FileError, "folder")
    refused(lambda: export_onnx(net, x[:0], tmp_path / "n.onnx"), DataError, "no samples")
    assert not list(tmp_path.iterdir())


@native
def test_an_accelerated_module_is_restored_before_it_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = accelerate(nn.Sequential(nn.Linear(64, 64)).eval(), minimum_sparsity=0.0)
    export = lambda: export_onnx(net, torch.randn(2, 64), tmp_path / "n.onnx")  # noqa: E731
    refused(export, UsageError, "accelerated", "restore()")


# ---- sessions and layers


@native
@pytest.mark.parametrize("threads", ["2", 2.5, 0, -1])
def test_threads_are_a_whole_number(threads: Any) -> None:
    pytest.importorskip("onnxruntime")
    refused(lambda: session(b"", threads), UsageError, f"threads={threads!r}")
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    refused(lambda: accelerate(net, threads=threads), UsageError, f"threads={threads!r}")


@native
def test_a_number_of_threads_may_come_from_numpy() -> None:
    net = nn.Sequential(nn.Linear(64, 64)).eval()
    net.get_parameter("0.weight").data *= torch.rand(64, 64) > 0.9
    wanted = net(torch.ones(1, 64)).detach()
    accelerate(net, threads=np.int64(2), choose="first")  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(net(torch.ones(1, 64)), wanted, atol=1e-5)


@native
def test_a_session_of_bytes_in_any_kind(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N] x) => (float[N] y) { y = Relu (x) }'
    )
    content = made.SerializeToString()
    for given in (content, bytearray(content), memoryview(content)):
        assert session(given, 1).get_inputs()[0].name == "x"
    for wrong in (None, 3):
        refused(lambda wrong=wrong: session(wrong), UsageError, "a path")  # type: ignore[misc]


@native
@pytest.mark.parametrize(
    ("outputs", "index", "bias"),
    [
        (0, torch.zeros(0, dtype=torch.uint8), None),
        (-8, torch.zeros(64, dtype=torch.uint8), None),
        (2**40, torch.zeros(64, dtype=torch.uint8), None),
        (8, torch.zeros(63, dtype=torch.uint8), None),
        (8, torch.zeros(64, dtype=torch.int32), None),
        (8, torch.zeros(64, dtype=torch.uint8), torch.zeros(3)),
        (8, torch.zeros(64, dtype=torch.uint8), torch.tensor(0.0)),
    ],
)
@pytest.mark.parametrize("measure", [True, False])
def test_operators_check_the_stored_weight(
    outputs: int, index: Tensor, bias: Tensor | None, measure: bool
) -> None:
    operator = torch.ops.secateur.sparse_linear
    given = torch.randn(2, 64), torch.zeros(0), index, bias, outputs, 64, 1, measure
    refused(lambda: operator(*given), UsageError, "sparse_linear")
