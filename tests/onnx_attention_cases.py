"""Blocks of attention as exporters write them, for the tests of fusing them and of our operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx_cases import model

from secateur.runtime.compiler.attention import THEIRS, Attention, attentions
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.rewrite import sparse_model

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
INPUTS = (
    f"(float[B,S,{WIDTH}] q, float[B,L,{WIDTH}] k, float[B,L,{WIDTH}] v, float[B,1,S,L] mask)"
    f" => (float[B,S,{WIDTH}] y)"
)
# A block as exporters write it; tests put other lines in the place of these.
LINES = {
    "q": "qs = Reshape (q, split) qh = Transpose <perm = [0,2,1,3]> (qs)",
    "k": "ks = Reshape (k, split) kh = Transpose <perm = [0,2,3,1]> (ks)",
    "v": "vs = Reshape (v, split) vh = Transpose <perm = [0,2,1,3]> (vs)",
    "product": "qk = MatMul (qh, kh)",
    "scale": "scaled = Mul (qk, factor)",
    "add": "scores = Add (scaled, mask)",
    "softmax": "p = Softmax <axis = -1> (scores)",
    "mean": "o = MatMul (p, vh) ot = Transpose <perm = [0,2,1,3]> (o)",
    "join": "y = Reshape (ot, join)",
}
HELD = {
    "split": np.array([0, 0, HEADS, SIZE]),
    "join": np.array([0, 0, WIDTH]),
    "factor": np.float32(0.5),
    "zero": np.float32(0),
    "low": np.float32(-1000),
}


def block(inputs: str = INPUTS, *, held: dict[str, Any] | None = None, **lines: str) -> Any:
    parts = {**LINES, **lines}
    return model(f"{inputs} {{ {' '.join(parts.values())} }}", {**HELD, **(held or {})})


def feeds(batch: int = 2, queries: int = 5, keys: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (batch, queries, WIDTH), "k": (batch, keys, WIDTH), "v": (batch, keys, WIDTH)}
    found = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    hidden = rng.random((batch, 1, queries, keys)) < 0.4
    return {**found, "mask": np.where(hidden, np.float32(-1000), np.float32(0))}


def fused(made: Any, domain: str = THEIRS) -> tuple[tuple[Attention, ...], Any]:
    graph = Graph.of(made)
    found = tuple(replace(block, domain=domain) for block in attentions(graph))
    return found, sparse_model(graph, (), found)
