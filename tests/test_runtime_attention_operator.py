"""The operator Attention: what it refuses, what it computes at the edges, and its dense form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_attention_cases import INPUTS, WIDTH, block, feeds, fused
from onnx_cases import model, native, onnx, run

from secateur.runtime.compiler.attention import OURS, THEIRS
from secateur.runtime.compiler.rebuild import dense_model
from secateur.runtime.compiler.verify import largest_error
from secateur.runtime.race import open_session


@native
def test_it_becomes_theirs_in_the_dense_model() -> None:
    made = block()
    del made.opset_import[1:]
    _, own = fused(made, OURS)
    dense = dense_model(own)
    onnx.checker.check_model(dense)
    assert [(node.op_type, node.domain) for node in dense.graph.node] == [
        ("MultiHeadAttention", THEIRS)
    ]
    assert [o.domain for o in dense.opset_import] == ["", THEIRS]
    given = feeds()
    assert largest_error(run(made, given), run(dense, given)) < 1e-5


@native
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": (2, 7, WIDTH + 3)}, r"do not fit together, or cannot be split into 3 heads"),
        ({"v": (2, 6, WIDTH)}, r"values \[2, 6, 12\] do not fit together"),
        ({"k": (3, 7, WIDTH)}, r"keys \[3, 7, 12\]"),
        ({"v": (2, 7, WIDTH + 1)}, r"cannot be split into 3 heads"),
        ({"mask": (2, 1, 5, 6)}, r"the mask has the shape \[2, 1, 5, 6\], and must have"),
        ({"mask": (2, 2, 5, 7)}, r"\[2 or 1, 3 or 1, 5, 7\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(wrong: dict[str, Any], said: str) -> None:
    loose = (
        "(float[A,S,W] q, float[B,L,X] k, float[C,M,Y] v, float[D,E,F,G] mask) => (float[N,S,Z] y)"
    )
    text = f"{loose} {{ y = secateur.Attention <abi = 1, heads = 3, scale = 0.5> (q, k, v, mask) }}"
    made = model(text, {})
    made.opset_import.append(onnx.helper.make_opsetid(OURS, 1))
    given = {**feeds(), **{name: np.zeros(shape, np.float32) for name, shape in wrong.items()}}
    with pytest.raises(Exception, match=said):
        run(made, given)


@native
@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ("abi = 1, heads = 0, scale = 0.5", "it has 0 heads"),
        ("abi = 1, scale = 0.5", "no integer attribute 'heads'"),
        ("abi = 1, heads = 3", "no float attribute 'scale'"),
        ("abi = 7, heads = 3, scale = 0.5", "written for version 7 of the operators"),
    ],
)
def test_attributes_that_mean_nothing_are_refused(attributes: str, said: str) -> None:
    text = f"{INPUTS} {{ y = secateur.Attention <{attributes}> (q, k, v, mask) }}"
    made = model(text, {})
    made.opset_import.append(onnx.helper.make_opsetid(OURS, 1))
    with pytest.raises(Exception, match=said):
        run(made, feeds())


@native
def test_nothing_in_nothing_out() -> None:
    _, own = fused(block(), OURS)
    assert [y.shape for y in run(own, feeds(batch=0))] == [(0, 5, WIDTH)]
    assert [y.shape for y in run(own, feeds(queries=0))] == [(2, 0, WIDTH)]


@native
def test_threads_change_nothing() -> None:
    _, own = fused(block(), OURS)
    given = feeds(batch=3, queries=300, keys=33)
    one, two = (open_session(own, threads).run(None, given)[0] for threads in (1, 2))
    assert np.array_equal(one, two)
