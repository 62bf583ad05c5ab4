"""From an ordinary ONNX file to one whose sparse layers run in our operators."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.core.atomic import new_file
from secateur.core.errors import UnknownName, UsageError
from secateur.core.facts import environment
from secateur.runtime.compiler import choose as choosing
from secateur.runtime.compiler.choose import Timed
from secateur.runtime.compiler.fuse import sites
from secateur.runtime.compiler.graph import Graph, packages, read_model
from secateur.runtime.compiler.notes import notes
from secateur.runtime.compiler.sample import Sample, concrete_shapes
from secateur.runtime.compiler.shapes import replaceable
from secateur.runtime.compiler.verify import (
    HALF_TOLERANCE,
    TOLERANCE,
    agreement,
    compiled_error,
    require_same,
)
from secateur.runtime.compiler.whole import Clock, Plan, Progress, fastest
from secateur.runtime.native import Variant, has_half, isa
from secateur.runtime.operators import is_sparse
from secateur.runtime.session import require_threads, session

#: The key under which a compiled file says how it was made.
METADATA = "secateur.compiled"
PRECISIONS = ("float32", "float16")
CHOICES = ("measure", "first")
_ONE = Sample()
# Seconds that choosing may take: for the layers, and for the whole model.
_LAYERS, _WHOLE = 50.0, 25.0


@dataclass(frozen=True)
class KernelTime:
    """Milliseconds of one kernel of one layer; no variant is the dense layer in ONNX Runtime."""

    variant: Variant | None
    ms: float


@dataclass(frozen=True)
class CompiledLayer:
    """What became of one layer.

    Args:
        name: Of the layer's node.
        weight: Name of its weight in the dense file.
        kind: ``"conv"`` or ``"linear"``.
        shape: Of its weight, outputs first.
        groups: Of a convolution.
        sparsity: Share of zeros.
        fused: Operators that it replaces.
        positions: Positions of its output in one image, or tokens.
        macs: Multiply-adds of one run if it were dense.
        kernel: What it runs with; None if it stays dense.
        dense_ms: Its time alone in ONNX Runtime, None if it was not timed.
        sparse_ms: Its time alone with the best kernel.
        timings: All of them.
    """

    name: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    sparsity: float
    fused: tuple[str, ...]
    positions: int
    macs: int
    kernel: Variant | None
    dense_ms: float | None
    sparse_ms: float | None
    timings: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Compiled:
    """What was written.

    Args:
        path: The file.
        bytes: Its size.
        dense_bytes: Size of the file that it was made from.
        plan: Which layers were replaced: ``"dense"`` if none paid, ``"first"`` if nothing was
            timed, or the name of the fastest plan; ``"tuned"`` if that could be improved, and
            ``"chained"`` if layers of it run band by band in one operator.
        dense_ms: Median of the whole dense model in ONNX Runtime; None if nothing was timed.
        sparse_ms: The same of the compiled one.
        speedup: The median ratio of paired turns.
        error: Largest difference of an output, relative to the largest output.
        agreement: Share of predictions that are the same, on random inputs; None in float32.
        precision: What was asked for: with float16, layers may have kernels of half precision.
        isa: Instruction set of the kernels.
        threads: Of ONNX Runtime; None if it chose itself.
        inputs: Shapes of the inputs that the model was timed with.
        layers: Every layer that could have been replaced.
        notes: What else a user should know.
    """

    path: str
    bytes: int
    dense_bytes: int
    plan: str
    dense_ms: float | None
    sparse_ms: float | None
    speedup: float | None
    error: float
    agreement: float | None
    precision: str
    isa: str
    threads: int | None
    inputs: dict[str, tuple[int, ...]]
    layers: tuple[CompiledLayer, ...]
    notes: tuple[str, ...]


def compile_onnx(  # noqa: PLR0913 - one call says how a file is made
    path: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    precision: str = "float32",
    choose: str = "measure",
    sample: Sample = _ONE,
    progress: Progress | None = None,
) -> Compiled:
    """Write a model whose sparse layers skip their zeros.

    Batch normalisation, bias, residual and activation are fused into the layers that are replaced.
    Which ones are, and with which kernels, is measured on this machine; what is faster dense stays
    as it is. The result is run against the dense model before it is kept.

    Args:
        path: An ONNX file.
        out: The file to write; it appears whole and checked, or not at all.
        threads: Of ONNX Runtime, here and later, 1 to 256; None leaves it to ONNX Runtime.
        precision: ``"float32"``, or ``"float16"``: layers may multiply float16, where the machine
            can and where that is faster. The error, and how many predictions stay the same, is in
            what is returned.
        choose: ``"measure"``, or ``"first"``: every layer with zeros gets the first kernel that
            suits it, untimed.
        sample: Sizes of inputs whose axes are open.
        progress: Called with a stage, what is done, and how much there is.

    Raises:
        FileError: The file cannot be read or written.
        UsageError: The model is compiled already, does not run on the sample, or something that
            was asked for does not exist. Or the model is larger than one ONNX file can be.
        DataError: The compiled model computes something else.
        MissingNative: secateur was installed without its native part.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    asked = f"compiling {Path(path).name!r}"
    require_known(precision, choose)
    require_threads(threads)
    packages(asked)
    graph = read_graph(path)
    _require_fit(asked, graph.model)
    _require_arrays(asked, graph.model)
    half = precision == "float16"
    feeds = sample.feeds(graph)
    sample.require_one_batch(graph)
    found = sites(graph)
    names = {name for site in found for name in (site.x, site.y, site.residual) if name}
    shapes = concrete_shapes(graph, names, feeds)
    if choose == "first":
        timed = choosing.first(found, shapes, half=half)
        layers = tuple(layer for layer in timed if layer.best is not None)
        plan = Plan.of(graph, "first", layers)
    else:
        timed = choosing.measure(
            graph,
            found,
            shapes,
            threads=threads,
            seconds=_LAYERS,
            half=half,
            progress=progress,
        )
        plan = fastest(graph, timed, Clock(feeds, threads, _WHOLE, progress))
    error, _ = compiled_error(graph, plan.model, sample, threads=threads)
    require_same(error, asked, HALF_TOLERANCE if half else TOLERANCE)
    same = agreement(graph, plan.model, sample, threads=threads) if half else None
    compiled = Compiled(
        str(out),
        0,
        # Weights may lie in other files.
        max(Path(path).stat().st_size, graph.model.ByteSize()),
        plan.name,
        plan.dense_ms,
        plan.sparse_ms,
        plan.speedup,
        error,
        same,
        precision,
        isa(),
        threads,
        {name: tuple(x.shape) for name, x in feeds.items()},
        tuple(_facts(graph, layer, layer in plan.layers) for layer in timed),
        notes(graph, found, plan),
    )
    return _written(plan.model, compiled)


def read_graph(path: str | Path) -> Graph:
    """The graph of a file that ONNX Runtime accepts.

    Args:
        path: An ONNX file.

    Raises:
        FileError: It cannot be opened.
        FormatError: It is damaged, or ONNX Runtime refuses it.
    """
    model = read_model(path)
    listed = [weight.name for weight in _accepted(path).get_overridable_initializers()]
    return replace(Graph.of(model), frozen=tuple(set(listed) - replaceable(model)))


def _accepted(path: str | Path) -> Any:
    """A session; refuses what ONNX Runtime does: missing inputs, unknown operators, and such."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return session(path, 1, options=options)


def is_compiled(model: Any) -> bool:
    """Whether a model was written by :func:`compile_onnx`, or has operators of ours."""
    marked = any(item.key == METADATA for item in model.metadata_props)
    return marked or any(is_sparse(node) for node in model.graph.node)


def metadata(model: Any) -> dict[str, Any] | None:
    """What a compiled model says about how it was made; None if it says nothing."""
    for item in model.metadata_props:
        if item.key == METADATA:
            try:
                held = json.loads(item.value)
            except ValueError:  # somebody changed it; the model does not depend on it
                return None
            return held if isinstance(held, dict) else None
    return None


def require_known(precision: str, choose: str) -> None:
    """Refuse words that mean nothing, and a precision that this machine does not have.

    Raises:
        UsageError: It is so.

    Example:
        >>> require_known("float32", "first")
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if choose not in CHOICES:
        raise UnknownName("way to choose", choose, CHOICES)
    if precision == "float16" and not has_half():
        raise UsageError(
            f"precision={precision!r}",
            f"{isa()} does not multiply float16 here",
            "it needs AVX512-FP16 (Intel Sapphire Rapids and later) or Arm's FP16 (Armv8.2)",
            "leave it out",
        )


def _require_arrays(asked: str, model: Any) -> None:
    import onnx

    lacking = {onnx.TensorProto.BFLOAT16: "bfloat16"}
    for value in (*model.graph.input, *model.graph.output):
        kind = lacking.get(value.type.tensor_type.elem_type)
        if kind is not None:
            raise UsageError(
                asked,
                f"the type of {value.name!r} is {kind}",
                "ONNX Runtime takes and gives no such arrays in Python, so nothing can be compared",
                "end the model in a Cast to float, or begin with one from it",
            )


def _require_fit(asked: str, model: Any) -> None:
    if is_compiled(model):
        raise UsageError(
            asked, "it is compiled already", "only a dense file can be", "give the dense file"
        )
    isa()  # refuses a wrong SECATEUR_ISA now, by its name


def _facts(graph: Graph, layer: Timed, chosen: bool) -> CompiledLayer:
    site = layer.site
    own = [t.ms for t in layer.timings if t.variant is not None and t.variant == layer.best]
    return CompiledLayer(
        site.name,
        site.source,
        site.kind,
        tuple(map(int, site.weight.shape)),
        site.groups,
        site.sparsity,
        tuple(graph.nodes[i].op_type for i in site.nodes),
        layer.positions,
        layer.macs,
        layer.best if chosen else None,
        layer.timings[0].ms if layer.timings else None,
        own[0] if own else None,
        tuple(KernelTime(t.variant, t.ms) for t in layer.timings),
    )


def _written(model: Any, compiled: Compiled) -> Compiled:
    about = asdict(compiled)
    for key in ("path", "bytes"):
        del about[key]
    about |= {"version": version("secateur"), "machine": environment()["machine"]}
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(_plain(about), allow_nan=False)
    content = model.SerializeToString()
    with new_file(compiled.path) as temporary:
        temporary.write_bytes(content)
    return Compiled(**{**vars(compiled), "bytes": len(content)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
