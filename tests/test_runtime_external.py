"""ONNX models whose weights lie in other files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from odd_onnx_cases import W, both, model, node, numbers, weight  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - only where it is installed

from secateur.core.errors import FileError, UsageError  # noqa: E402
from secateur.runtime import available, compile_onnx  # noqa: E402
from secateur.runtime.compiler.graph import read_model  # noqa: E402
from secateur.runtime.race import open_session  # noqa: E402

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

LINEAR = node("MatMul", ["x", "w"], ["y"])


def save(made: Any, folder: Path) -> None:
    """As ``m.onnx``, with the weights in ``m.bin``."""
    options = {"save_as_external_data": True, "size_threshold": 0}
    onnx.save(made, str(folder / "m.onnx"), location="m.bin", **options)


@pytest.mark.parametrize("content", [None, b"abc"])
def test_files_are_missed_by_name(tmp_path: Path, content: bytes | None) -> None:
    save(model([LINEAR], {"w": weight(64, 64)}, [("x", ["N", 64])]), tmp_path)
    assert compile_onnx(tmp_path / "m.onnx", tmp_path / "s.onnx", choose="first").error < 1e-5
    (tmp_path / "m.bin").unlink()
    if content is not None:
        (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(FileError, match=r"other files.*Copy") as caught:
        compile_onnx(tmp_path / "m.onnx", tmp_path / "s.onnx", choose="first")
    assert all(caught.value.parts().values())


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_may_be_links(tmp_path: Path, link: Any) -> None:
    # So does a cache of downloads keep a model: the content elsewhere, under the name of its hash.
    (blobs := tmp_path / "blobs").mkdir()
    (names := tmp_path / "names").mkdir()
    save(model([LINEAR], {"w": W}), blobs)
    for name in ("m.onnx", "m.bin"):
        link(blobs / name, names / name)
    compile_onnx(names / "m.onnx", tmp_path / "s.onnx", choose="first")
    got, wanted = both(names / "m.onnx", tmp_path / "s.onnx", {"x": numbers(4, 16)})
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_weights_of_branches_may_lie_there_too(tmp_path: Path) -> None:
    branches = {
        f"{name}_branch": helper.make_graph(
            [node("Identity", ["v"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8])],
            [numpy_helper.from_array(numbers(8), "v")],
        )
        for name in ("then", "else")
    }
    nodes = [
        node("If", ["c"], ["s"], **branches),
        node("MatMul", ["x", "w"], ["p"]),
        node("Add", ["p", "s"], ["y"]),
    ]
    made = model(nodes, {"w": W, "c": np.array(True)})
    save(made, tmp_path)
    assert "external_data" in str(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    found, wanted = (
        open_session(held, 1).run(None, {"x": numbers(4, 16)})
        for held in (read_model(tmp_path / "m.onnx"), onnx.load(tmp_path / "m.onnx"))
    )
    np.testing.assert_array_equal(found[0], wanted[0])


@pytest.mark.parametrize("place", ["../w.bin", "/dev/zero", ".", ""])
def test_files_lie_beside_the_model(tmp_path: Path, place: str) -> None:
    (folder := tmp_path / "model").mkdir()
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": W})
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tensor,) = made.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(FileError, match="other files"):
        compile_onnx(folder / "m.onnx", tmp_path / "s.onnx", choose="first")


def test_weights_too_large_for_one_file_are_refused_before_they_are_read(tmp_path: Path) -> None:
    made = model([node("MatMul", ["x", "w"], ["y"])], {}, [("x", ["N", 8])])
    columns = 70_000_000
    tensor = made.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    tensor.dims.extend([8, columns])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "length": str(32 * columns)}.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    (tmp_path / "w.bin").touch()
    with pytest.raises(UsageError, match=r"2,240,000,\d+ bytes.*parts") as caught:
        compile_onnx(tmp_path / "m.onnx", tmp_path / "s.onnx")
    assert all(caught.value.parts().values())
