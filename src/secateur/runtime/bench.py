"""How much faster a sparse model is than itself run densely, measured side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core.errors import UsageError
from secateur.runtime.compiler.compile import compile_onnx, is_compiled, metadata, read_graph
from secateur.runtime.compiler.graph import Graph, packages
from secateur.runtime.compiler.rebuild import dense_model
from secateur.runtime.compiler.sample import Sample, not_running
from secateur.runtime.compiler.shapes import replaceable
from secateur.runtime.compiler.verify import HALF_TOLERANCE, TOLERANCE, largest_error
from secateur.runtime.compiler.whole import Progress
from secateur.runtime.native import Variant, isa
from secateur.runtime.operators import is_sparse
from secateur.runtime.race import TURN, Raced, open_session, race, runner
from secateur.runtime.session import require_threads

_ONE = Sample()
_SECONDS = 10.0


@dataclass(frozen=True)
class Median:
    """Milliseconds of one run: the median of turns, and between which 80 % of them lie."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class LayerSpeed:
    """One layer alone.

    Args:
        name: Of the layer's node.
        kind: ``"conv"`` or ``"linear"``.
        shape: Of its weight.
        groups: Of a convolution.
        sparsity: Share of zeros.
        kernel: What the model runs it with; None is dense.
        dense_ms: Its time in ONNX Runtime; None if it was not measured.
        sparse_ms: Its time with the best kernel.
        gflops: Billions of operations a second of that kernel: two for each weight that is not
            zero and each position of the output.
        peak_share: That, as a share of what the machine can do; None if that is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    sparsity: float
    kernel: Variant | None
    dense_ms: float | None
    sparse_ms: float | None
    gflops: float | None
    peak_share: float | None


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Args:
        dense: The dense model in ONNX Runtime.
        sparse: The compiled one.
        speedup: Median ratio of paired turns, dense over sparse.
        speedup_range: Its 95 % range.
        rounds: How many pairs of turns.
        max_rel_error: Largest difference of an output, relative to the largest output. Infinite if
            only one side has an infinity or NaN somewhere, or another type of numbers.
        dense_bytes: Size of the dense file; of one that was made again, that of the file that it was
            compiled from, or its own if the compiled one does not say.
        sparse_bytes: Size of the compiled file.
        threads: Of ONNX Runtime; None if it chose itself.
        isa: Instruction set of the kernels.
        peak_gflops: Billions of float32 operations a second that the machine reaches, in PyTorch's
            matrix multiplication or in the fastest of these layers; None if it was not measured.
        inputs: Shapes of the inputs.
        layers: Each layer that could be sparse.
        notes: What else a reader should know.
    """

    dense: Median
    sparse: Median
    speedup: float
    speedup_range: tuple[float, float]
    rounds: int
    max_rel_error: float
    dense_bytes: int
    sparse_bytes: int
    threads: int | None
    isa: str
    peak_gflops: float | None
    inputs: dict[str, tuple[int, ...]]
    layers: tuple[LayerSpeed, ...]
    notes: tuple[str, ...]


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    threads: int | None = None,
    sample: Sample = _ONE,
    peak: float | Callable[[], float] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time a model densely and with our operators, in turn.

    Args:
        path: An ONNX file. A dense one is compiled first, to a file that is not kept.
        against: The dense file of a compiled one; None makes it again from the compiled one.
        threads: Of ONNX Runtime, 1 to 256.
        sample: Sizes of inputs whose axes are open.
        peak: GFLOP/s that this machine reaches, or a function that measures it, for the shares in the
            layers. If a layer is faster, that counts.
        progress: Called with a stage, what is done, and how much there is.

    Raises:
        FileError: A file cannot be read.
        UsageError: A model does not run on the sample, or the two are surely not one network:
            inputs have other names, types or sizes, or outputs another number or other shapes.
        MissingNative: secateur was installed without its native part.
    """
    require_threads(threads)
    packages("measuring a model")
    with tempfile.TemporaryDirectory(prefix="secateur-") as place:
        given = read_graph(path)
        compiled_path, dense = Path(path), given
        if not is_compiled(given.model):
            compiled_path = Path(place) / "model.onnx"
            compile_onnx(path, compiled_path, threads=threads, sample=sample, progress=progress)
        compiled = given if compiled_path == Path(path) else read_graph(compiled_path)
        size = _size(path, given)
        if against is not None:
            dense = read_graph(against)
            size = _size(against, dense)
            _require_dense(dense, against)
            _require_inputs(dense, compiled, against)
        elif compiled is given:
            dense = Graph.of(dense_model(compiled.model))
            size = _size_before(compiled.model) or len(dense.model.SerializeToString())
        sparse_bytes = _size(compiled_path, compiled)
    feeds = sample.feeds(dense)
    sample.require_one_batch(dense)
    raced, error = _raced(dense.model, compiled.model, feeds, threads, against)
    about = metadata(compiled.model) or {}
    best = peak() if callable(peak) else peak
    try:
        layers, best = _layers(about.get("layers", ()), best)
    except (AttributeError, KeyError, TypeError, ValueError):  # somebody changed it
        about, layers = {}, ()
    ratio = 1 / raced.ratio(1)
    low, high = raced.ratio_range(1)
    return Bench(
        _median(raced, 0),
        _median(raced, 1),
        ratio,
        (1 / high, 1 / low),
        len(raced.times[1]),
        error,
        size,
        sparse_bytes,
        threads,
        isa(),
        best,
        {name: tuple(x.shape) for name, x in feeds.items()},
        layers,
        _notes(about, compiled, threads, error),
    )


def _size(path: str | Path, graph: Graph) -> int:
    """Bytes of a file, with weights that lie in others."""
    return max(Path(path).stat().st_size, int(graph.model.ByteSize()))


def _size_before(model: Any) -> int:
    """Bytes of the file that a model was compiled from; 0 if it does not say."""
    said = (metadata(model) or {}).get("dense_bytes")
    return said if isinstance(said, int) and said > 0 else 0


def _raced(
    dense: Any,
    compiled: Any,
    feeds: Mapping[str, np.ndarray],
    threads: int | None,
    against: str | Path | None,
) -> tuple[Raced, float]:
    first, second = open_session(dense, threads), open_session(compiled, threads)
    try:
        expected, got = first.run(None, dict(feeds)), second.run(None, dict(feeds))
    except Exception as error:
        raise not_running(feeds, error) from error
    shapes = tuple(", ".join(map(_shape, outputs)) for outputs in (got, expected))
    if against is not None and shapes[0] != shapes[1]:
        raise _other_network(against, "outputs", *shapes)
    both = [runner(first, feeds), runner(second, feeds)]
    raced = race(both, seconds=_SECONDS, drop=False, turn=TURN)
    return raced, largest_error(expected, got)


def _require_dense(graph: Graph, path: str | Path) -> None:
    if any(is_sparse(node) for node in graph.nodes):
        raise UsageError(
            f"measuring against {str(path)!r}",
            "it is compiled, too",
            "the other side of the comparison is dense",
            "give the dense file",
        )


def _require_inputs(dense: Graph, compiled: Graph, against: str | Path) -> None:
    """Refuse a network whose inputs have other names, types, or fixed sizes."""
    first, second = _inputs(compiled), _inputs(dense)
    alike = first.keys() == second.keys() and all(
        _alike(first[name], second[name]) for name in first
    )
    if not alike:
        both = (", ".join(map(_declared, held.values())) for held in (first, second))
        raise _other_network(against, "inputs", *both)


def _inputs(graph: Graph) -> dict[str, Any]:
    replaced = replaceable(graph.model)
    return {i.name: i for i in graph.model.graph.input if i.name not in replaced}


def _alike(first: Any, second: Any) -> bool:
    """Whether two inputs have one type, and may have one shape: an open axis has any size."""
    a, b = first.type.tensor_type, second.type.tensor_type
    if first.type.WhichOneof("value") != second.type.WhichOneof("value"):
        return False
    if a.elem_type != b.elem_type:
        return False
    if not (a.HasField("shape") and b.HasField("shape")):
        return True
    sizes = [[axis.dim_value for axis in kind.shape.dim] for kind in (a, b)]
    return len(sizes[0]) == len(sizes[1]) and all(
        n == m or min(n, m) <= 0 for n, m in zip(*sizes, strict=True)
    )


def _declared(value: Any) -> str:
    """An input in words: ``x float32 ?x64``."""
    import onnx

    if not value.type.HasField("tensor_type"):
        return f"{value.name} {value.type.WhichOneof('value')}"
    kind = value.type.tensor_type
    sizes = "x".join(str(a.dim_value) if a.dim_value > 0 else "?" for a in kind.shape.dim)
    return f"{value.name} {onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)} {sizes}".rstrip()


def _shape(output: Any) -> str:
    return "x".join(map(str, output.shape)) if isinstance(output, np.ndarray) else "no array"


def _other_network(against: str | Path, what: str, own: str, others: str) -> UsageError:
    return UsageError(
        f"measuring against {str(against)!r}",
        f"its {what} are {others or 'none'}, those of the compiled model {own or 'none'}",
        "these are not one network, so a ratio of their times says nothing",
        "give the file that it was compiled from",
    )


def _median(raced: Raced, which: int) -> Median:
    return Median(raced.median(which), *raced.spread(which))


def _layers(
    held: Sequence[Mapping[str, Any]], peak: float | None
) -> tuple[tuple[LayerSpeed, ...], float | None]:
    """What the file says of its layers, and the peak, which is at least what the fastest does."""
    if peak is not None:  # a busy moment may have held that product back, but not our layers
        peak = max([peak, *filter(None, map(_gflops, held))])
    return tuple(_layer(layer, peak) for layer in held), peak


def _layer(held: Mapping[str, Any], peak: float | None) -> LayerSpeed:
    kernel, gflops = held["kernel"], _gflops(held)
    return LayerSpeed(
        held["name"],
        held["kind"],
        tuple(held["shape"]),
        held["groups"],
        held["sparsity"],
        Variant(**kernel) if kernel else None,
        held["dense_ms"],
        held["sparse_ms"],
        gflops,
        gflops / peak if gflops and peak else None,
    )


def _gflops(held: Mapping[str, Any]) -> float | None:
    """Billions of operations a second on what is not zero."""
    done = 2 * held["macs"] * (1 - held["sparsity"])
    return done / held["sparse_ms"] / 1e6 if held["sparse_ms"] else None


def _notes(
    about: Mapping[str, Any], compiled: Graph, threads: int | None, error: float
) -> tuple[str, ...]:
    notes = list(about.get("notes", ()))
    tolerance = HALF_TOLERANCE if about.get("precision") == "float16" else TOLERANCE
    if not error <= tolerance:
        notes.insert(
            0,
            f"the outputs differ by {error:.2g} of the largest, and rounding stays below "
            f"{tolerance:g}: these are not the same network, or it draws random numbers",
        )
    if about and about.get("threads") != threads:
        chosen = about.get("threads") or "ONNX Runtime's own number of"
        word = "thread" if chosen == 1 else "threads"
        notes.append(f"the kernels were chosen for {chosen} {word}: compile again for these")
    if about and about.get("isa") != isa():
        notes.append(f"the kernels were chosen for {about.get('isa')}, this machine runs {isa()}")
    if not about and any(is_sparse(node) for node in compiled.nodes):
        notes.append("the file does not say how its layers were timed")
    return tuple(notes)
