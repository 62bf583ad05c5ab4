"""Attention in one operator: which blocks are taken, that they compute the same, and when it pays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_attention_cases import HEADS, INPUTS, LINES, WIDTH, block, feeds, fused
from onnx_cases import native, onnx, run, sparse, write

from secateur.core.errors import DataError
from secateur.runtime.compiler import compile as compiling
from secateur.runtime.compiler import whole
from secateur.runtime.compiler.attention import OURS, THEIRS, attentions, is_block
from secateur.runtime.compiler.compile import compile_onnx
from secateur.runtime.compiler.graph import Graph
from secateur.runtime.compiler.rewrite import sparse_model
from secateur.runtime.compiler.verify import largest_error, require_same
from secateur.runtime.race import Raced

# Each block becomes an operator of one of these domains.
DOMAINS = [pytest.param(THEIRS, id="theirs"), pytest.param(OURS, id="ours", marks=native)]


# --- which blocks are taken ---------------------------------------------------------------------


TAKEN = {
    "as it is": {},
    "the mask first": {"add": "scores = Add (mask, scaled)"},
    "divided": {"scale": "scaled = Div (qk, factor)"},
    "queries and keys scaled": {
        "q": "qs = Reshape (q, split) qt = Transpose <perm = [0,2,1,3]> (qs) qh = Mul (qt, factor)",
        "k": "ks = Reshape (k, split) kt = Transpose <perm = [0,2,3,1]> (ks) kh = Mul (factor, kt)",
        "scale": "scaled = Identity (qk)",
        "add": "scores = Add (qk, mask)",
    },
    "keys transposed twice": {
        "k": "ks = Reshape (k, split) kt = Transpose <perm = [0,2,1,3]> (ks) "
        "kh = Transpose <perm = [0,1,3,2]> (kt)",
    },
    "no numbers made zeros, with a finite mask": {
        "add": "see = Equal (mask, zero) own = Where (see, zero, low) scores = Add (scaled, own)",
        "softmax": "r = Softmax <axis = -1> (scores) bad = IsNaN (r) p = Where (bad, zero, r)",
    },
    "joined with batch and positions": {
        "join": "flat = Reshape (ot, rows) shape = Shape (q) y = Reshape (flat, shape)",
    },
}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("name", TAKEN)
def test_blocks_that_are_taken_compute_the_same(name: str, domain: str) -> None:
    made = block(held={"rows": np.array([-1, WIDTH])}, **TAKEN[name])
    found, own = fused(made, domain)
    assert [node.domain for node in own.graph.node if is_block(node)] == [domain]
    assert (found[0].heads, found[0].scale) == (
        HEADS,
        pytest.approx({"divided": 2.0, "queries and keys scaled": 0.25}.get(name, 0.5)),
    )
    assert not [node for node in own.graph.node if node.op_type in ("Softmax", "Transpose")]
    for sizes in ((2, 5, 7), (1, 1, 1), (3, 4, 4)):
        given = feeds(*sizes)
        assert largest_error(run(made, given), run(own, given)) < 1e-5


FIXED = INPUTS.replace("B", "2").replace("S", "5").replace("L", "7")
# As PyTorch's exporter swaps the axes of keys: those before them become one meanwhile.
KEYS = (
    "ks = Reshape (k, split) kt = Transpose <perm = [0,2,1,3]> (ks) kf = Reshape (kt, flat) "
    "kw = Transpose <perm = [0,2,1]> (kf) kh = Reshape (kw, back)"
)
FLAT, BACK = [2 * HEADS, 7, WIDTH // HEADS], [2, HEADS, WIDTH // HEADS, 7]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(
    ("inputs", "flat", "back"),
    [
        (FIXED, [-1, *FLAT[1:]], BACK),
        (FIXED, FLAT, [-1, *BACK[1:]]),
        (FIXED, [FLAT[0], -1, FLAT[2]], [*BACK[:3], -1]),
        (INPUTS.replace("L", "7"), [-1, *FLAT[1:]], [-1, *BACK[1:]]),
    ],
)
def test_keys_swapped_with_sizes_that_are_numbers(
    inputs: str, flat: list[int], back: list[int], domain: str
) -> None:
    made = block(inputs, held={"flat": np.array(flat), "back": np.array(back)}, k=KEYS)
    found, own = fused(made, domain)
    assert len(found) == 1
    assert largest_error(run(made, feeds()), run(own, feeds())) < 1e-5


@pytest.mark.parametrize(
    ("flat", "back"),
    [
        ([-1, FLAT[2], FLAT[1]], BACK),  # cuts rows elsewhere
        ([2, HEADS * 7, WIDTH // HEADS], BACK),
        ([-1, *FLAT[1:]], [HEADS, 2, *BACK[2:]]),  # takes heads of one sample for those of another
        ([-1, *FLAT[1:]], [2, HEADS, 7, WIDTH // HEADS]),
    ],
)
def test_keys_that_are_cut_elsewhere_are_left(flat: list[int], back: list[int]) -> None:
    made = block(FIXED, held={"flat": np.array(flat), "back": np.array(back)}, k=KEYS)
    assert attentions(Graph.of(made)) == ()


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("masked", [True, False])
def test_values_may_have_another_size(masked: bool, domain: str) -> None:
    width = HEADS * 6
    inputs = INPUTS.replace(f"{WIDTH}] v", f"{width}] v").replace(f"{WIDTH}] y", f"{width}] y")
    held = {"of_v": np.array([0, 0, HEADS, 6]), "join": np.array([0, 0, width])}
    lines = {"v": LINES["v"].replace("split", "of_v")}
    if not masked:
        lines["add"] = "scores = Identity (scaled) unused = Neg (mask)"
        lines["softmax"] = LINES["softmax"].replace("scores", "scaled")
    made = block(inputs, held=held, **lines)
    found, own = fused(made, domain)
    assert len(found) == 1
    given = feeds()
    given["v"] = np.random.default_rng(1).standard_normal((2, 7, width)).astype(np.float32)
    assert largest_error(run(made, given), run(own, given)) < 1e-5


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("axes", [("1", "1"), ("1", str(HEADS)), ("B", str(HEADS))])
def test_masks_may_be_shared(axes: tuple[str, str], domain: str) -> None:
    made = block(INPUTS.replace("float[B,1,S,L] mask", f"float[{','.join(axes)},S,L] mask"))
    found, own = fused(made, domain)
    assert len(found) == 1
    shape = (2 if axes[0] == "B" else 1, int(axes[1]), 5, 7)
    mask = 3 * np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    given = {**feeds(), "mask": mask}
    assert largest_error(run(made, given), run(own, given)) < 1e-5


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_wrong_factor_is_noticed(domain: str) -> None:
    made = block()
    graph = Graph.of(made)
    (found,) = attentions(graph)
    wrong = sparse_model(graph, (), [replace(found, scale=0.6, domain=domain)])
    error = largest_error(run(made, feeds()), run(wrong, feeds()))
    with pytest.raises(DataError, match="differs from the dense one"):
        require_same(error, "compiling")


MIXED = f"(float[B,S,{WIDTH}] q, float[B,L,{WIDTH}] k, float[B,L,{WIDTH}] v"
LEFT = {
    "shares that someone else sees": (f"{INPUTS[:-1]}, float[B,{HEADS},S,L] p)", {}),
    "another axis": (INPUTS, {"softmax": "p = Softmax <axis = 2> (scores)"}),
    "other positions first": (
        INPUTS,
        {"mean": "o = MatMul (p, vh) ot = Transpose <perm = [2,0,1,3]> (o)"},
    ),
    "a factor of each score": (
        f"{MIXED}, float[B,1,S,L] mask, float[S,L] each) => (float[B,S,{WIDTH}] y)",
        {"scale": "scaled = Mul (qk, each)"},
    ),
    "a factor of zero": (INPUTS, {"scale": "scaled = Mul (qk, zero)"}),
    "divided by zero": (INPUTS, {"scale": "scaled = Div (qk, zero)"}),
    "a mask of keys alone": (f"{MIXED}, float[B,1,1,L] mask) => (float[B,S,{WIDTH}] y)", {}),
    "a mask that adds a batch": (
        f"(float[1,S,{WIDTH}] q, float[1,L,{WIDTH}] k, float[1,L,{WIDTH}] v, float[B,1,S,L] mask)"
        f" => (float[B,S,{WIDTH}] y)",
        {},
    ),
    "a mask of unknown shape": (
        f"{MIXED}, float[B,1,S,L] m, bool[N] some) => (float[B,S,{WIDTH}] y)",
        {"add": "mask = Compress (m, some) scores = Add (scaled, mask)"},
    ),
    "no numbers made zeros, with any mask": (
        INPUTS,
        {"softmax": "r = Softmax <axis = -1> (scores) bad = IsNaN (r) p = Where (bad, zero, r)"},
    ),
    "no numbers made ones": (
        INPUTS,
        {
            "add": "see = Equal (mask, zero) own = Where (see, zero, low) "
            "scores = Add (scaled, own)",
            "softmax": "r = Softmax <axis = -1> (scores) bad = IsNaN (r) p = Where (bad, low, r)",
        },
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_blocks_that_are_left(name: str) -> None:
    inputs, lines = LEFT[name]
    assert attentions(Graph.of(block(inputs, **lines))) == ()


def test_double_precision_is_left() -> None:
    double = block(INPUTS.replace("float", "double"), held={"factor": np.float64(0.5)})
    assert attentions(Graph.of(double)) == ()


def test_before_version_13_the_softmax_had_another_axis() -> None:
    made = block(softmax="p = Softmax (scores)")
    assert len(attentions(Graph.of(made))) == 1
    made.opset_import[0].version = 11
    assert attentions(Graph.of(made)) == ()


def test_a_mask_that_is_always_zero_is_left_out() -> None:
    # What exporters write for a model without a mask: a constant condition, expanded.
    lines = "size = Shape (mask) all = Expand (yes, size) own = Where (all, zero, low)"
    made = block(held={"yes": np.array([True])}, add=f"{lines} scores = Add (scaled, own)")
    found, own = fused(made)
    assert found[0].mask == ""
    assert len(own.graph.node) == 1
    given = {**feeds(), "mask": np.zeros((2, 1, 5, 7), np.float32)}
    assert largest_error(run(made, given), run(own, given)) < 1e-5
    no = block(held={"yes": np.array([False])}, add=f"{lines} scores = Add (scaled, own)")
    assert fused(no)[0][0].mask == "own"


@pytest.mark.parametrize(
    ("first", "bound", "zero"), [(0, 0, True), (2, 1, True), (0, 1, False), (-1, 0, False)]
)
def test_a_mask_of_positions_that_are_all_seen(first: int, bound: int, zero: bool) -> None:
    lines = (
        "size = Shape <start = 3> (mask) last = Squeeze (size) at = Range (first, last, step) "
        "row = Unsqueeze (at, before) see = GreaterOrEqual (row, bound) own = Where (see, zero, low)"
    )
    held = {"first": np.int64(first), "step": np.int64(1), "bound": np.int64(bound)}
    held["before"] = np.array([0, 1, 2])
    made = block(held=held, add=f"{lines} all = Expand (own, whole) scores = Add (scaled, all)")
    made.graph.node.insert(0, onnx.helper.make_node("Shape", ["mask"], ["whole"]))
    made.graph.value_info.append(
        onnx.helper.make_tensor_value_info("all", onnx.TensorProto.FLOAT, ["B", 1, "S", "L"])
    )
    (found,) = attentions(Graph.of(made))
    assert found.mask == ("" if zero else "all")


# --- when it pays -------------------------------------------------------------------------------


def linear() -> Any:
    """A block whose queries come from a sparse layer."""
    inputs = INPUTS.replace(" q,", " x,").replace("B,", "2,").replace("S,", "5,").replace("L", "7")
    return block(
        inputs,
        held={"w": sparse(WIDTH, WIDTH)},
        q=f"q = MatMul (x, w) {LINES['q']}",
    )


@native
@pytest.mark.parametrize("fastest", ["", "Attention", "MultiHeadAttention"])
def test_the_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    def race(runners: Any, *, seconds: float, drop: bool = True, turn: float) -> Raced:
        """The last one wins; of attention, the one that shall: none, ours, or theirs."""
        count = len(runners)
        winner = count - 1
        if seconds == of_attention:
            assert count == 3
            winner = ["", "Attention", "MultiHeadAttention"].index(fastest)
        return Raced(tuple((0.5 if i == winner else 1.0,) * 9 for i in range(count)))

    of_attention = whole._ATTENTION * compiling._WHOLE
    monkeypatch.setattr(compiling, "_LAYERS", 0.1)
    monkeypatch.setattr(whole, "race", race)
    monkeypatch.setattr(whole, "_DOUBTFUL", (1.0, 1.0))
    monkeypatch.setattr(
        whole, "plans", lambda timed: {"all": tuple(t for t in timed if t.best is not None)}
    )
    path = write(tmp_path / "net.onnx", linear())
    done = compile_onnx(path, tmp_path / "own.onnx", threads=1)
    kinds = [node.op_type for node in onnx.load(tmp_path / "own.onnx").graph.node]
    assert [kind for kind in kinds if "Attention" in kind] == [fastest] * bool(fastest)
    assert ("Softmax" in kinds) is not bool(fastest)
    where = {"Attention": "an operator of secateur", "MultiHeadAttention": "ONNX Runtime's own"}
    said = [note for note in done.notes if "1 block of attention" in note]
    assert len(said) == bool(fastest)
    assert all(where[fastest] in note for note in said)
    assert done.error < 1e-5
    assert "SparseLinear" in kinds
