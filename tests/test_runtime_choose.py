"""Which layers and kernels a compiled ONNX file gets: what is faster on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_cases import FUSED, PAD, SAME, WL, X2, dense, model, native, onnx, run, sparse, write

from secateur.runtime.compiler import compile as compiling
from secateur.runtime.compiler import whole
from secateur.runtime.compiler.choose import Timed, Timing
from secateur.runtime.compiler.compile import compile_onnx, metadata
from secateur.runtime.compiler.fuse import sites
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.lone import Lone
from secateur.runtime.compiler.site import Site
from secateur.runtime.compiler.verify import largest_error
from secateur.runtime.compiler.whole import plans
from secateur.runtime.native import Variant
from secateur.runtime.operators import is_sparse
from secateur.runtime.race import Raced


def timed(ratio: float, number: int, groups: int = 1) -> Timed:
    weight = np.ones((groups, 1, 1, 1), np.float32)
    site = Site("n", "conv", (number,), "x", "y", weight, None, "w", groups=groups)
    kernel = Variant("list", 1, 4)
    return Timed(site, 1, 1, (Timing(None, 1.0, 1.0), Timing(kernel, ratio, ratio)), kernel)


def test_plans_leave_ties_dense_and_try_sets_once() -> None:
    layers = [timed(0.5, 0), timed(0.9, 1), timed(0.98, 2), timed(1.2, 3), timed(0.6, 4, groups=8)]
    found = {
        name: [layer.site.nodes[0] for layer in chosen] for name, chosen in plans(layers).items()
    }
    assert found == {
        "all that win": [0, 1, 4],
        "all that win, depthwise dense": [0, 1],
        "clear wins": [0, 4],
        "near losses, too": [0, 1, 2, 3, 4],
    }
    assert list(plans([timed(0.5, 0)])) == ["all that win"]
    assert plans([timed(2.0, 0)]) == {}


@dataclass(frozen=True)
class Pretend:
    """A clock for which a model takes what ``cost`` says about the names of its sparse nodes."""

    cost: Callable[[set[str]], float]
    seconds: float = 1.0

    def runner(self, made: Any) -> set[str]:
        return {node.name for node in made.graph.node if is_sparse(node)}

    def race(self, runners: list[set[str]], share: float, drop: bool = True) -> Raced:
        return Raced(tuple((self.cost(run),) * 9 for run in runners))

    def say(self, stage: str, done: float, total: float) -> None:
        pass


@native
@pytest.mark.parametrize(
    ("cost", "name", "layers"),
    [
        (lambda names: 10.0 - len(names), "near losses, too", {"a", "b", "c"}),
        (lambda names: 10.0 if len(names) < 3 else 9.9, "dense", set()),
        (lambda names: 10.0 + len(names), "dense", set()),
        # A choice that no plan makes: only the layer that looked worst alone, and not the best one.
        (lambda names: 10.0 - 3 * ("c" in names) + ("a" in names), "tuned", {"b", "c"}),
    ],
)
def test_the_whole_model_decides(
    cost: Callable[[set[str]], float], name: str, layers: set[str]
) -> None:
    body = f"""(float[N,8,6,6] x) => (float[N,8,6,6] y) {{
    p = Conv <{PAD}> (x, w) q = Conv <{PAD}> (p, w) y = Conv <{PAD}> (q, w) }}"""
    made = model(body, SAME)
    for node, text in zip(made.graph.node, "abc", strict=True):
        node.name = text
    graph = Graph.of(made)
    kernel = Variant("list", 1, 4)
    alone = [
        Timed(site, 36, 1, (Timing(None, 1.0 + i, 1.0), Timing(kernel, ratio, ratio)), kernel)
        for i, (site, ratio) in enumerate(zip(sites(graph), (0.6, 0.99, 1.2), strict=True))
    ]
    found = whole.fastest(graph, alone, Pretend(cost))
    assert (found.name, {layer.site.name for layer in found.layers}) == (name, layers)
    assert found.speedup == pytest.approx(10.0 / cost(layers) if layers else 1.0)


@native
def test_a_layer_alone_computes_the_same_densely_and_sparsely() -> None:
    body, weights, version, _ = FUSED["residual on the left"]
    graph = Graph.of(model(body, weights, version))
    (site,) = sites(graph)
    lone = Lone(graph, site, {"x": (1, 8, 6, 6)}, copies=3)
    feeds = lone.feeds()
    assert len(feeds) == 3
    outputs = [run(made, feeds) for made in (lone.dense(), lone.sparse(Variant("list", 1, 4), 36))]
    assert largest_error(*outputs) < 1e-5


@native
def test_measured_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is fastest here, every layer has its timings, and the file says so."""
    monkeypatch.setattr(compiling, "_LAYERS", 0.2)
    monkeypatch.setattr(compiling, "_WHOLE", 0.2)
    weights = {"w": sparse(64, 64), "b": dense(64)}
    body = (
        "(float[N,T,64] x) => (float[N,T,64] y) { c = MatMul (x, w) d = Add (c, b) y = Relu (d) }"
    )
    out = tmp_path / "b.onnx"
    found = compile_onnx(write(tmp_path / "a.onnx", model(body, weights)), out, threads=1)
    (layer,) = found.layers
    assert layer.timings[0].variant is None
    assert len(layer.timings) > 1
    assert layer.dense_ms == layer.timings[0].ms
    assert found.speedup is not None
    assert (layer.kernel is None) == (found.plan == "dense")
    about = metadata(onnx.load(str(out)))
    assert about is not None
    assert about["plan"] == found.plan
    assert len(about["layers"][0]["timings"]) == len(layer.timings)


@native
def test_a_model_that_no_plan_makes_faster_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_LAYERS", 0.1)
    monkeypatch.setattr(compiling, "_WHOLE", 0.1)
    monkeypatch.setattr(whole, "plans", lambda timed: {})
    monkeypatch.setattr(whole, "_DOUBTFUL", (1.0, 1.0))
    path = write(tmp_path / "a.onnx", model(f"{X2} {{ y = MatMul (x, w) }}", WL))
    found = compile_onnx(path, tmp_path / "b.onnx", threads=1)
    assert (found.plan, found.speedup) == ("dense", 1.0)
    assert any("dense model" in note for note in found.notes)
    assert [node.op_type for node in onnx.load(str(tmp_path / "b.onnx")).graph.node] == ["MatMul"]
