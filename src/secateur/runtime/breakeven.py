"""From which sparsity on a sparse layer is faster than a dense one, measured on this machine.

Three layers of well-known networks, and one of a language model at one token, are timed with random
weights at a few sparsities. Between two of them the ratio of the times is taken as a straight line.
The dense layer runs in ONNX Runtime where that is installed, else in PyTorch; that of the language
model always in PyTorch, because it comes in bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from secateur.runtime.machine import torch_threads
from secateur.runtime.native import Layer, Spec, Variant, candidates
from secateur.runtime.race import open_session, race, runner
from secateur.runtime.threads import Workers, workers_beside_torch

#: name -> rows that share their columns; 0 is two of every four.
PATTERNS = {"unstructured": 1, "4x1 blocks": 4, "8x1 blocks": 8, "16x1 blocks": 16, "2:4": 0}
SPARSITIES: tuple[float, ...] = (0.3, 0.55, 0.75, 0.9)
_TOKEN_SPARSITIES = (0.1, 0.4, 0.7)
_SECONDS = 0.05
_MOST_KERNELS = 3

Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A layer to time.

    Args:
        name: For people.
        spec: The layer.
        shape: Of its input.
        dtype: Of its weights: ``"float32"`` or ``"bfloat16"``.
    """

    name: str
    spec: Spec
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def positions(self) -> int:
        """Of the output: pixels or tokens. The convolutions here keep the size of the image."""
        return self.shape[-1] * self.shape[-2] if self.spec.kind == "conv" else self.shape[0]


_TOKEN = Spec("linear", 2048, 8192)
CASES = (
    Case("conv 1x1, 256 to 1024, 14x14", Spec("conv", 1024, 256), (1, 256, 14, 14)),
    Case(
        "conv 3x3, 256 to 256, 14x14",
        Spec("conv", 256, 256, kernel=(3, 3), pads=(1, 1, 1, 1)),
        (1, 256, 14, 14),
    ),
    Case("linear 768 to 3072, 128 tokens", Spec("linear", 3072, 768), (128, 768)),
    Case("linear 8192 to 2048, 1 token", _TOKEN, (1, 8192)),
    Case("linear 8192 to 2048, 1 token", _TOKEN, (1, 8192), "bfloat16"),
)


@dataclass(frozen=True)
class Point:
    """One sparsity of one pattern: milliseconds of runs that nothing disturbed, and the fastest kernel."""

    sparsity: float
    dense_ms: float
    sparse_ms: float
    ratio: float
    kernel: str


@dataclass(frozen=True)
class BreakEven:
    """Where sparse meets dense.

    Args:
        layer: Name of the case.
        dtype: Of the weights.
        pattern: One of :data:`PATTERNS`.
        against: What ran the dense layer: ``"ONNX Runtime"`` or ``"PyTorch"``.
        points: What was measured, sparser and sparser.
        sparsity: The break-even; None if none of the points is faster than dense.
        at_most: The least sparse point is faster already: the break-even lies below.
    """

    layer: str
    dtype: str
    pattern: str
    against: str
    points: tuple[Point, ...]
    sparsity: float | None
    at_most: bool


def break_evens(
    threads: int, *, cases: Sequence[Case] = CASES, seconds: float = _SECONDS
) -> Iterator[BreakEven]:
    """Measure every case with every pattern that it may have.

    Args:
        threads: For both sides.
        cases: The layers.
        seconds: For each point.

    Raises:
        MissingNative: secateur was installed without its native part.
    """
    pool = workers_beside_torch(threads)
    with torch_threads(threads):
        for case in cases:
            against, dense = dense_runner(case, threads)
            one = case.positions == 1
            for pattern in ("unstructured",) if one else PATTERNS:
                grid = _TOKEN_SPARSITIES if one else SPARSITIES
                grid = grid if PATTERNS[pattern] else (0.5,)
                points = tuple(_point(case, pattern, s, dense, pool, seconds) for s in grid)
                found, at_most = crossing([(p.sparsity, p.ratio) for p in points])
                yield BreakEven(case.name, case.dtype, pattern, against, points, found, at_most)


def crossing(
    points: Sequence[tuple[float, float]], limit: float = 1.0
) -> tuple[float | None, bool]:
    """Where a falling line through points meets a limit, and whether it lies below the first.

    Args:
        points: Sparsity, and time relative to dense; sparser and sparser.
        limit: The ratio to reach.

    Example:
        >>> crossing([(0.5, 1.5), (0.7, 0.5)])
        (0.6, False)
        >>> crossing([(0.5, 0.9), (0.7, 0.5)]), crossing([(0.5, 1.2)])
        ((0.5, True), (None, False))
    """
    falling = _falling([ratio for _, ratio in points])
    slow = sum(ratio > limit for ratio in falling)
    if not slow:
        return points[0][0], True
    if slow == len(points):
        return None, False
    (s0, r0), (s1, r1) = ((points[i][0], falling[i]) for i in (slow - 1, slow))
    return round(s0 + (s1 - s0) * (r0 - limit) / (r0 - r1), 3), False


def _falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never rises: more zeros are never slower, only timings are noisy.

    Neighbours that rise are replaced by their mean, until none does.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [value for value, count in pools for _ in range(count)]


def pruned(spec: Spec, pattern: str, sparsity: float) -> Tensor:
    """A random weight of a pattern, as a matrix.

    Example:
        >>> weight = pruned(Spec("linear", 32, 64), "4x1 blocks", 0.5)
        >>> kept = (weight != 0).view(8, 4, 64)
        >>> bool((kept.all(1) == kept.any(1)).all())
        True
        >>> (pruned(Spec("linear", 2, 8), "2:4", 0.5) != 0).view(-1, 4).sum(1).tolist()
        [2, 2, 2, 2]
    """
    rows, weight = PATTERNS[pattern], torch.randn(spec.outputs, spec.columns) + 3.0
    if not rows:
        score = torch.rand(spec.outputs, spec.columns // 4, 4)
        return weight * (score.argsort(-1).argsort(-1) < 2).view_as(weight)
    kept = torch.rand(spec.outputs // rows, spec.columns) >= sparsity
    return weight * kept.repeat_interleave(rows, 0)


def kernels(case: Case, pattern: str, sparsity: float) -> list[Variant]:
    """The kernels worth timing for a pattern: the first of every family that can use it."""
    found = candidates(case.spec, case.positions, 1 - sparsity)
    if case.positions == 1:
        return [v for v in found if v.family == "gemv"]
    rows = PATTERNS[pattern]
    if rows > 1:
        blocks = [v for v in found if v.family == "blocks" and v.rows == rows]
        return blocks or found[:1]
    families = [v for v in found if v.family in ("list", "panels")]
    return families[:_MOST_KERNELS]


def _point(
    case: Case, pattern: str, sparsity: float, dense: Run, pool: Workers, seconds: float
) -> Point:
    x, weight = torch.randn(case.shape), pruned(case.spec, pattern, sparsity)
    held = weight.to(getattr(torch, case.dtype))
    layers = [
        Layer.from_dense(held, case.spec, variant, layout="bitmask")
        for variant in kernels(case, pattern, sparsity)
    ]
    raced = race([dense, *(_sparse(layer, x, pool) for layer in layers)], seconds=seconds)
    best = min(range(1, len(layers) + 1), key=raced.undisturbed)
    dense_ms, sparse_ms = raced.undisturbed(0), raced.undisturbed(best)
    kernel = str(layers[best - 1].variant)
    return Point(sparsity, dense_ms, sparse_ms, sparse_ms / dense_ms, kernel)


def _sparse(layer: Layer, x: Tensor, pool: Workers) -> Run:
    def run() -> None:
        layer.run(x, pool=pool)

    return run


def dense_runner(case: Case, threads: int) -> tuple[str, Run]:
    """The dense layer, and what runs it.

    Args:
        case: The layer.
        threads: Of ONNX Runtime; PyTorch has its own setting.
    """
    x, spec = torch.randn(case.shape), case.spec
    weight = torch.randn(spec.outputs, spec.columns)
    installed = find_spec("onnx") and find_spec("onnxruntime")
    if installed and case.positions > 1:
        opened = open_session(_onnx(case, weight), threads)
        return "ONNX Runtime", runner(opened, {"x": x.numpy()})
    if spec.kind == "linear":
        dtype = getattr(torch, case.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
        return "PyTorch", _torch(lambda: functional.linear(x, weight))
    kernel = weight.view(spec.outputs, spec.inputs, *spec.kernel)
    return "PyTorch", _torch(lambda: functional.conv2d(x, kernel, padding=spec.pads[:2]))


def _torch(work: Callable[[], object]) -> Run:
    def run() -> None:
        with torch.inference_mode():
            work()

    return run


def _onnx(case: Case, weight: Tensor) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    spec, y = case.spec, [None] * len(case.shape)
    if spec.kind == "conv":
        held = weight.view(spec.outputs, spec.inputs, *spec.kernel)
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=list(spec.pads))
    else:
        held = weight.T.contiguous()
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(held.numpy(), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
