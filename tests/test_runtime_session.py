"""Our operators inside ONNX Runtime, against ONNX Runtime's own dense operators."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from session_cases import (
    CASES,
    Problem,
    dense,
    dense_model,
    first_variant,
    helper,
    onnx,
    onnxruntime,
    problem,
    require_same,
    sparse_model,
)

from secateur.core.errors import FormatError
from secateur.runtime import library
from secateur.runtime.native import FAMILIES, Spec, Variant, candidates, lanes
from secateur.runtime.operators import is_sparse, sparse_node, spec_of, variant_of
from secateur.runtime.session import THREADS_ENTRY, session, session_options


def run(task: Problem, threads: int = 1, **more: object) -> np.ndarray:
    return np.asarray(session(sparse_model(task, **more), threads).run(None, task.feeds)[0])


@pytest.mark.parametrize("name", CASES)
def test_like_dense_operators(name: str) -> None:
    task = problem(CASES[name])
    require_same(task, run(task, threads=2))


@pytest.mark.parametrize("name", ["3x3", "tokens", "residual", "one token"])
def test_comparison_sees_one_wrong_weight(name: str) -> None:
    task = problem(CASES[name])
    place = tuple(np.argwhere(task.weight != 0)[0])
    wrong = task.weight.copy()
    wrong[place] *= 1.01
    found = run(replace(task, weight=wrong))
    with pytest.raises(AssertionError):
        require_same(task, found)


@pytest.mark.parametrize("name", ["3x3 grouped", "tokens", "one token"])
def test_every_family(name: str) -> None:
    case = CASES[name]
    found = {v.family: v for v in candidates(case.spec, 144, 0.2)}
    found |= {"list": Variant("list", 1, 2), "panels": Variant("panels", 4, 2)}
    found["blocks"] = Variant("blocks", 4, 2)
    assert set(found) <= set(FAMILIES)
    task = problem(case)
    for variant in found.values():
        if variant.rows > 1 and case.spec.outputs // case.spec.groups % variant.rows:
            continue
        require_same(task, run(task, variant=variant))


def test_sizes_may_change_from_run_to_run() -> None:
    case = CASES["3x3 strided"]
    weights = problem(case)
    opened = session(sparse_model(weights), 2)
    for shape in ((1, 8, 20, 20), (4, 8, 20, 20), (1, 8, 33, 5), (2, 8, 7, 64), (1, 8, 20, 20)):
        task = replace(weights, feeds=problem(replace(case, shape=shape), seed=1).feeds)
        require_same(task, opened.run(None, task.feeds)[0])
    case = CASES["tokens"]
    weights = problem(case)
    opened = session(sparse_model(weights), 2)
    for shape in ((2, 31, 65), (1, 1, 65), (1, 128, 65), (5, 3, 65)):
        task = replace(weights, feeds=problem(replace(case, shape=shape), seed=1).feeds)
        require_same(task, opened.run(None, task.feeds)[0])


@pytest.mark.parametrize(
    ("name", "shape", "out"),
    [("3x3 strided", (0, 8, 20, 20), (0, 16, 10, 10)), ("tokens", (2, 0, 65), (2, 0, 33))],
)
def test_empty_batch(name: str, shape: tuple[int, ...], out: tuple[int, ...]) -> None:
    opened = session(sparse_model(problem(CASES[name])), 1)
    assert opened.run(None, {"x": np.empty(shape, np.float32)})[0].shape == out


def test_two_sessions_and_other_operators_in_one_model() -> None:
    one, two = problem(CASES["3x3"]), problem(CASES["tokens"])
    opened = [session(sparse_model(task), threads) for task, threads in ((one, 1), (two, 2))]
    for _ in range(3):
        for task, ours in zip((one, two), opened, strict=True):
            require_same(task, ours.run(None, task.feeds)[0])
    del opened[0]
    require_same(two, opened[0].run(None, two.feeds)[0])


def test_one_session_from_many_threads() -> None:
    task = problem(CASES["3x3"])
    opened = session(sparse_model(task), 2)
    inputs = [
        problem(replace(CASES["3x3"], shape=(1 + i % 3, 8, 17 + i % 5, 19)), seed=i).feeds
        for i in range(12)
    ]
    alone = [opened.run(None, feeds)[0] for feeds in inputs]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            together = list(threads.map(lambda feeds: opened.run(None, feeds)[0], inputs))
            for a, b in zip(alone, together, strict=True):
                np.testing.assert_array_equal(a, b)


def test_number_of_threads_does_not_change_the_result_beyond_rounding() -> None:
    task = problem(CASES["batch"])
    for threads in (None, 1, 2, 3):
        require_same(task, np.asarray(run(task, threads)))  # type: ignore[arg-type]


def test_same_options_for_many_sessions() -> None:
    task = problem(CASES["1x1"])
    options = session_options(1)
    for threads in (None, None, 2):
        opened = session(sparse_model(task), threads, options=options)
        require_same(task, opened.run(None, task.feeds)[0])
    plain = onnxruntime.InferenceSession(sparse_model(task), options)
    require_same(task, plain.run(None, task.feeds)[0])


def test_options_of_our_own_are_passed_on() -> None:
    task = problem(CASES["1x1"])
    for first, second in ((2, None), (None, 1), (2, 2), (2, 1), (None, None)):
        options = session_options(first)
        opened = session(sparse_model(task), second, options=options)
        require_same(task, opened.run(None, task.feeds)[0])
        wanted = second or first or 0
        assert options.intra_op_num_threads == wanted
        assert options.get_session_config_entry(THREADS_ENTRY) == str(wanted)
        # And on again: the options that come back are the ones that were given.
        assert session_options(options=options) is options
        require_same(task, session(sparse_model(task), options=options).run(None, task.feeds)[0])


def test_own_session_with_the_library_alone() -> None:
    task = problem(CASES["1x1"])
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    own = onnxruntime.InferenceSession(sparse_model(task), options)
    require_same(task, own.run(None, task.feeds)[0])
    # Registering again changes nothing, whoever does it.
    options.register_custom_ops_library(str(library.library_path()))
    require_same(task, session(sparse_model(task), options=options).run(None, task.feeds)[0])


def test_other_vector_width_takes_the_first_candidate() -> None:
    task = problem(CASES["1x1"])
    odd = Variant("list", 1, 1, columns=1)
    require_same(task, run(task, variant=odd, isa_lanes=lanes() * 2, positions=196))
    # The variant of the file is not even looked at: this one is refused where it is.
    impossible = Variant("blocks", 5, 1)
    require_same(task, run(task, variant=impossible, isa_lanes=lanes() * 2))
    with pytest.raises(FormatError, match="rows"):
        run(task, variant=impossible)


def test_file_and_plain_models(tmp_path: Path) -> None:
    task = problem(CASES["3x3"])
    path = tmp_path / "sparse.onnx"
    path.write_bytes(sparse_model(task))
    require_same(task, session(path, 1).run(None, task.feeds)[0])
    require_same(task, session(str(path)).run(None, task.feeds)[0])
    np.testing.assert_array_equal(
        session(dense_model(task), 1).run(None, task.feeds)[0], dense(task)
    )


def test_node_says_what_it_is_made_of() -> None:
    for name, case in CASES.items():
        task = problem(case)
        node = onnx.load_from_string(sparse_model(task)).graph.node[0]
        assert is_sparse(node)
        spec = spec_of(node)
        assert spec == replace(
            case.spec, alpha=np.float32(spec.alpha), beta=np.float32(spec.beta)
        ), name
        assert variant_of(node) == first_variant(case)
    stripped = onnx.load_from_string(sparse_model(task)).graph.node[0]
    del stripped.attribute[:]
    with pytest.raises(FormatError, match="outputs"):
        spec_of(stripped)
    with pytest.raises(FormatError, match="family"):
        variant_of(stripped)
    assert not is_sparse(helper.make_node("SparseConv", ["x"], ["y"]))


def test_stored_sizes() -> None:
    node, tensors = sparse_node(
        np.eye(1000, dtype=np.float32),
        Spec("linear", 1000, 1000),
        Variant("list", 1, 4),
        name="eye",
        x="x",
        y="y",
    )
    assert [t.name for t in tensors] == ["eye.values", "eye.index"]
    assert [len(t.raw_data) for t in tensors] == [4000, 1000 * 2 + 1000 * 2]
    assert list(node.input) == ["x", "eye.values", "eye.index"]
