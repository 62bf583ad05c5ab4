"""Inputs to time and check a model with, made from what its graph says about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from secateur.core.errors import UsageError, first_line
from secateur.runtime.compiler.graph import Graph, attribute, standard
from secateur.runtime.compiler.shapes import NO_NAMES, replaceable

_IMAGE, _SEQUENCE = 224, 128
# Of a batch of images.
_AXES = 4
# An embedding that nobody can be seen to look up still has this many rows.
_FEW = 2
# Numbers of an input: beyond any memory, and still below what numpy can count.
_MOST = 2**40


@dataclass(frozen=True)
class Sample:
    """How large the inputs are, and what is in them.

    Args:
        batch: Size of an axis that is open, and first; None is 1.
        shapes: Whole shapes of inputs by name; other open axes get 128 (a sequence) or 224 (an
            image).
        values: Whole inputs by name.
        seed: Of the random numbers.

    Example:
        >>> Sample(batch=8, shapes={"ids": (8, 64)}).batch
        8
    """

    batch: int | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0

    def feeds(self, graph: Graph) -> dict[str, np.ndarray]:
        """One array for each input of a graph that has no value of its own.

        Raises:
            UsageError: A shape or value was given for an input that is not there, or does not fit.
        """
        if self._first < 1:
            raise UsageError(
                f"a batch of {self._first}",
                "it is below 1",
                "a run needs a sample",
                "give 1 or more",
            )
        inputs = _inputs(graph)
        for name in (*self.shapes, *self.values):
            if name not in inputs:
                raise UsageError(
                    f"a shape or value for the input {name!r}",
                    f"the inputs are {', '.join(map(repr, inputs))}",
                    "there is none of that name",
                    "use one of these names",
                )
        for name, given in self.values.items():
            if not isinstance(given, np.ndarray):
                raise _not_made_up(name, type(given).__name__)
        rng = np.random.default_rng(self.seed)
        axes = _names(inputs, self)
        made = {}
        for name, value in inputs.items():
            shape = self._shape(name, value, axes)
            if math.prod(shape) > _MOST:
                raise _too_large(name, shape)
            try:
                made[name] = (
                    self.values[name] if name in self.values else _filled(graph, value, shape, rng)
                )
            except MemoryError as error:
                raise _too_large(name, shape) from error
        return made

    def require_one_batch(self, graph: Graph) -> None:
        """Refuse a batch that no input would have, because shapes say another one.

        Raises:
            UsageError: It is so.
        """
        if self.batch is None:
            return
        inputs, other = _inputs(graph), replace(self, batch=self.batch + 1)
        own, moved = (
            {name: s._shape(name, value, _names(inputs, s)) for name, value in inputs.items()}
            for s in (self, other)
        )
        for name, shape in self.shapes.items():
            dims = inputs[name].type.tensor_type.shape.dim
            first_is_open = len(dims) > 1 and dims[0].dim_value <= 0
            if own == moved and first_is_open and shape[0] != self.batch:
                raise UsageError(
                    f"a batch of {self.batch}, and the shape {'x'.join(map(str, shape))} for the "
                    f"input {name!r}",
                    f"that is a batch of {shape[0]}",
                    "shapes go first, so no input would have the other batch",
                    "leave one of them out",
                )

    @property
    def _first(self) -> int:
        return 1 if self.batch is None else self.batch

    def larger(self, graph: Graph) -> Sample | None:
        """Other sizes for the same graph; None if every axis is fixed, or was given whole."""
        if self.values:
            return None
        one, two = self.feeds(graph), Sample(self._first + 1, self.shapes, seed=self.seed + 1)
        if all(two.feeds(graph)[name].shape == array.shape for name, array in one.items()):
            return None
        return two

    def wider(self, graph: Graph) -> Sample | None:
        """One more along every open axis but the batch; None if there is none."""
        if self.values:
            return None
        declared = {i.name: i.type.tensor_type.shape.dim for i in graph.model.graph.input}
        shapes = {}
        for name, array in self.feeds(graph).items():
            dims = declared[name]
            later = [axis > 0 or len(dims) == 1 for axis in range(len(dims))]
            more = [int(ok and d.dim_value <= 0) for ok, d in zip(later, dims, strict=False)]
            if any(more) and name not in self.shapes:
                shapes[name] = tuple(n + one for n, one in zip(array.shape, more, strict=True))
        if not shapes:
            return None
        return Sample(self.batch, {**self.shapes, **shapes}, seed=self.seed + 2)

    def _shape(self, name: str, value: Any, axes: Mapping[str, int]) -> tuple[int, ...]:
        declared = value.type.tensor_type.shape.dim
        if name in self.values:
            return tuple(self.values[name].shape)
        declares = value.type.tensor_type.HasField("shape")
        if not declares and name not in self.shapes and value.type.HasField("tensor_type"):
            raise UsageError(
                f"a shape for the input {name!r}",
                "the model declares none, not even how many axes there are",
                "the model is run on a sample",
                f"give one: --shape {name}=1x128, or Sample(shapes={{{name!r}: (1, 128)}})",
            )
        if name in self.shapes:
            given = tuple(self.shapes[name])
            if not declares and min(given, default=0) >= 0:
                return given
            fits = len(given) == len(declared) and all(
                (d.dim_value <= 0 or d.dim_value == n) and n >= 0
                for d, n in zip(declared, given, strict=True)
            )
            if not fits:
                known = "x".join(d.dim_param or str(d.dim_value or "?") for d in declared)
                raise UsageError(
                    f"the shape {'x'.join(map(str, given))} for the input {name!r}",
                    f"the model declares {known}",
                    "fixed axes cannot change, and none is below 0",
                    "give a shape that fits",
                )
            return given
        return tuple(
            d.dim_value if d.dim_value > 0 else axes.get(d.dim_param, self._open(i, declared))
            for i, d in enumerate(declared)
        )

    def _open(self, axis: int, declared: Sequence[Any]) -> int:
        """Size of an open axis."""
        rank = len(declared)
        if axis == 0 and rank > 1:
            return self._first
        # TensorFlow's images have their channels last.
        last = rank == _AXES and declared[1].dim_value <= 0 < declared[3].dim_value
        return _IMAGE if rank == _AXES and axis in ((1, 2) if last else (2, 3)) else _SEQUENCE


def _inputs(graph: Graph) -> dict[str, Any]:
    """Inputs that have no value of their own."""
    replaced = replaceable(graph.model)
    return {i.name: i for i in graph.model.graph.input if i.name not in replaced}


def _names(inputs: Mapping[str, Any], sample: Sample) -> dict[str, int]:
    """Sizes of named axes: those that were given, and the batch wherever its name appears."""
    sizes: dict[str, int] = {}
    given = {**sample.shapes, **{name: value.shape for name, value in sample.values.items()}}
    for first in (True, False):
        for name, value in inputs.items():
            dims = value.type.tensor_type.shape.dim
            for axis, dim in enumerate(dims):
                if dim.dim_param in NO_NAMES:
                    continue
                if first and name in given and axis < len(given[name]):
                    sizes.setdefault(dim.dim_param, given[name][axis])
                elif not first and axis == 0 and len(dims) > 1:
                    sizes.setdefault(dim.dim_param, sample._first)
    return sizes


def _filled(
    graph: Graph, value: Any, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    import onnx

    if not value.type.HasField("tensor_type"):
        raise _not_made_up(value.name, value.type.WhichOneof("value"))
    kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    name = value.name.lower()
    if "mask" in name or kind == np.bool_:
        return np.ones(shape, kind)
    if np.issubdtype(kind, np.floating):
        return np.asarray(rng.standard_normal(shape), kind)
    if not np.issubdtype(kind, np.integer):
        raise _not_made_up(value.name, kind)
    if "type" in name or "segment" in name:
        return np.zeros(shape, kind)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=kind), shape).copy()
    return np.asarray(rng.integers(0, _rows(graph, value.name), shape), kind)


def _not_made_up(name: str, kind: object) -> UsageError:
    return UsageError(
        f"a value for the input {name!r}",
        f"its type is {kind}",
        "only arrays of numbers can be made up, and only arrays given",
        "from Python, give an array: Sample(values={...})",
    )


def _too_large(name: str, shape: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"the shape {'x'.join(map(str, shape))} for the input {name!r}",
        f"that is {math.prod(shape):.3g} numbers",
        "they do not fit into memory",
        "give a smaller shape",
    )


def _rows(graph: Graph, name: str) -> int:
    """How many rows a table has in which an input is looked up."""
    found = []
    for index in graph.users.get(name, ()):
        node = graph.nodes[index]
        if standard(node, "Cast", "Identity", "Reshape"):
            found.append(_rows(graph, node.output[0]))
        elif standard(node, "Gather") and node.input[1] == name:
            table = graph.constant(node.input[0])
            if table is not None and table.ndim > 1:
                found.append(int(table.shape[attribute(node, "axis", 0)]))
    return min(found, default=_FEW)


def concrete_shapes(
    graph: Graph, names: Iterable[str], feeds: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Shapes that values have for these inputs, found by running the model once.

    Raises:
        UsageError: The model does not run on these inputs.
    """
    import onnx
    import onnxruntime

    wanted = sorted(set(names))
    if not wanted:
        return {}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    for i, name in enumerate(wanted):
        out = f"secateur.shape.{i}"
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [out]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(out, onnx.TensorProto.INT64, None)
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it refuses is said in our words
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        opened = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        inside = {i.name for i in opened.get_inputs()}
        found = opened.run(None, {k: v for k, v in feeds.items() if k in inside})
    except Exception as error:
        raise not_running(feeds, error) from error
    return {name: tuple(map(int, shape)) for name, shape in zip(wanted, found, strict=True)}


def shapes_text(shapes: Mapping[str, Sequence[int]]) -> str:
    """The shape of each input.

    Example:
        >>> shapes_text({"x": (1, 576), "rate": ()})
        'x 1x576, rate scalar'
    """
    return ", ".join(f"{k} {'x'.join(map(str, shape)) or 'scalar'}" for k, shape in shapes.items())


def not_running(feeds: Mapping[str, np.ndarray], error: Exception) -> UsageError:
    """What to say when a model does not run on its sample."""
    return UsageError(
        f"running the model on inputs of shape {shapes_text({k: x.shape for k, x in feeds.items()})}",
        f"ONNX Runtime refuses ({first_line(error)})",
        "open axes were given sizes that may not suit the model",
        "give sizes that do: --batch N, --shape NAME=1x128",
    )
