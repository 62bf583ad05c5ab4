"""ONNX models made node by node, compiled, and compared with themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - only where it is installed

from secateur.runtime import compile_onnx, session  # noqa: E402
from secateur.runtime.compiler.compile import Compiled  # noqa: E402

node = helper.make_node
Feeds = dict[str, np.ndarray]


def weight(*shape: int) -> np.ndarray:
    """Random, with 80 % zeros."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * (rng.random(shape) > 0.8)).astype(np.float32)


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


W = weight(16, 8)
X = ("x", ["N", 16])


def model(
    nodes: list[Any],
    held: dict[str, np.ndarray],
    inputs: list[tuple[Any, ...]] | None = None,
    outputs: tuple[Any, ...] = ("y",),
    **options: Any,
) -> Any:
    """A model; inputs are (name, shape) or (name, shape, type), outputs names or whole types."""
    made = [
        helper.make_tensor_value_info(name, rest[1] if rest[1:] else TensorProto.FLOAT, rest[0])
        for name, *rest in inputs or [X]
    ]
    results = [
        helper.make_tensor_value_info(o, TensorProto.FLOAT, None) if isinstance(o, str) else o
        for o in outputs
    ]
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in held.items()]
    graph = helper.make_graph(nodes, "net", made, results, weights)
    options = {"ir_version": 8, "opset_imports": [helper.make_opsetid("", 17)]} | options
    return helper.make_model(graph, **options)


def compiled(tmp_path: Path, made: Any, **options: Any) -> tuple[Compiled, Path, Path]:
    """What compiling says, the dense file and the compiled one."""
    dense, sparse = tmp_path / "dense.onnx", tmp_path / "sparse.onnx"
    dense.write_bytes(made.SerializeToString())
    done = compile_onnx(dense, sparse, threads=1, **({"choose": "first"} | options))
    return done, dense, sparse


def both(dense: Path, sparse: Path, feeds: Feeds) -> tuple[list[Any], list[Any]]:
    return session(dense, 1).run(None, feeds), session(sparse, 1).run(None, feeds)


def close(tmp_path: Path, made: Any, feeds: Feeds, **options: Any) -> Compiled:
    """Compile a model and compare what it computes."""
    done, dense, sparse = compiled(tmp_path, made, **options)
    for a, b in zip(*both(dense, sparse, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return done
