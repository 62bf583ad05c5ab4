"""An ONNX file as a graph that can be asked: constants, users, shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core.errors import FileError, FormatError, MissingExtra, UsageError, first_line
from secateur.runtime.compiler.computed import ARITHMETIC, computed, numbers
from secateur.runtime.compiler.external import load_external_
from secateur.runtime.compiler.order import live, ordered, uses
from secateur.runtime.compiler.shapes import Axis, initializers, replaceable, shapes_of

OLDEST_OPSET = 7
_DOMAINS = ("", "ai.onnx")
# A protobuf message holds at most 2 GB.
_LARGEST = 2**31 - 2**20


def packages(purpose: str) -> tuple[Any, Any]:
    """The modules onnx and onnxruntime.

    Raises:
        MissingExtra: One of them is not installed.
    """
    for name in ("onnx", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise MissingExtra(name, "onnx", purpose) from None
    import onnx
    import onnxruntime

    return onnx, onnxruntime


def read_model(path: str | Path) -> Any:
    """Read an ONNX file; local functions are inlined.

    Before IR version 4 every weight had to be listed as an input, too, and some exporters kept the
    habit: where all of them are listed they are constants here. An input among others that has a
    value is one that a caller may replace, and stays one.

    Raises:
        FileError: It cannot be opened.
        FormatError: It is not an ONNX file, or is damaged.
        UsageError: Its operators are older than version 7, or it is larger than one file can be.
    """
    onnx, _ = packages("reading an ONNX file")
    path = Path(path)
    asked = f"reading {str(path)!r}"
    if path.is_dir():
        raise FileError(
            asked,
            "it is a folder",
            "a bundle or a Transformers folder is no ONNX file",
            f"export it first: secateur export {path} --output {path}.onnx",
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise FileError(
            asked, error.strerror or str(error), "the model is read from it", "check the path"
        ) from error
    except Exception as error:
        raise FormatError(
            asked,
            f"it cannot be decoded ({first_line(error)})",
            "it is not an ONNX file, or cut",
            "copy anew",
        ) from error
    _require_small(asked, model, path)
    try:
        load_external_(model, path.parent)
    except (OSError, ValueError) as error:
        raise FileError(
            asked,
            f"its weights lie in other files, and one cannot be read ({first_line(error)})",
            "it names them relative to its own folder",
            "copy them there as well",
        ) from error
    if not model.graph.node or not model.opset_import:
        raise FormatError(asked, "it holds no graph", "it is not an ONNX file, or cut", "copy anew")
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    version = opset(model)
    if 0 < version < OLDEST_OPSET:
        raise UsageError(
            asked,
            f"its operators are of version {version}",
            f"before version {OLDEST_OPSET} they had other meanings",
            "convert it with onnx.version_converter",
        )
    held = initializers(model)
    if model.ir_version < 4 or replaceable(model) == held:
        inputs = [i for i in model.graph.input if i.name not in held]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(4, model.ir_version)
    return model


def _require_small(asked: str, model: Any, path: Path) -> None:
    """Refuse a model that cannot be held as one message, before its weights are read."""
    sizes = [
        entry.value
        for t in model.graph.initializer
        for entry in t.external_data
        if entry.key == "length"
    ]
    size = path.stat().st_size + sum(int(n) for n in sizes if n.isdecimal())
    if size > _LARGEST:
        raise UsageError(
            asked,
            f"with its weights in other files it has {size:,} bytes",
            f"it is compiled as one ONNX file, which holds at most {_LARGEST:,}",
            "compile its parts",
        )


def opset(model: Any) -> int:
    """Version of the standard operators, 0 if the model uses none."""
    return max((int(o.version) for o in model.opset_import if o.domain in _DOMAINS), default=0)


def standard(node: Any, *kinds: str) -> bool:
    """Whether a node is one of these operators of the standard itself."""
    return node.domain in _DOMAINS and node.op_type in kinds


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    import onnx

    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


@dataclass(frozen=True)
class Graph:
    """The top-level graph of a model, with what follows from it.

    Args:
        model: The ONNX model; never changed.
        nodes: Those that its outputs need, each after those that it needs itself.
        producer: For each value, the number of the node that makes it.
        users: For each value, the number of each node that uses it, once per use. A use inside a
            branch or a loop counts as one of the node that holds the branch.
        outputs: Names of the graph's outputs.
        shapes: Axes of a value, where they can be inferred.
        opset: Version of the standard operators.
        frozen: Weights that a caller of the file may replace, and that are constants here.
    """

    model: Any
    nodes: tuple[Any, ...]
    producer: dict[str, int]
    users: dict[str, list[int]]
    outputs: frozenset[str]
    shapes: dict[str, tuple[Axis, ...]]
    opset: int
    _initializers: dict[str, Any]
    frozen: tuple[str, ...] = ()
    _constants: dict[str, np.ndarray | None] = field(default_factory=dict)

    @staticmethod
    def of(model: Any) -> Graph:
        """Read a model that :func:`read_model` gave."""
        outputs = frozenset(o.name for o in model.graph.output)
        nodes = live(ordered(model.graph), outputs)
        producer: dict[str, int] = {}
        users: dict[str, list[int]] = {}
        for index, node in enumerate(nodes):
            for name in node.output:
                producer[name] = index
            for name in uses(node):
                users.setdefault(name, []).append(index)
        inputs = replaceable(model)
        held = {t.name: t for t in model.graph.initializer}
        held |= {t.values.name: t for t in model.graph.sparse_initializer}
        return Graph(
            model,
            nodes,
            producer,
            users,
            outputs,
            shapes_of(model),
            opset(model),
            {name: tensor for name, tensor in held.items() if name not in inputs},
        )

    def constant(self, name: str) -> np.ndarray | None:
        """A value that no input can change: a weight, or what nodes make of constants alone."""
        if not name:
            return None
        # Without recursion: a recurrence that was unrolled is longer than Python's stack is deep.
        waiting = [name]
        while waiting:
            unknown = [p for p in self._parts(waiting[-1]) if p not in self._constants]
            waiting += unknown
            if not unknown and (last := waiting.pop()) not in self._constants:
                self._constants[last] = self._evaluate(last)
        return self._constants[name]

    def follower(self, name: str) -> int | None:
        """The node that alone uses a value, and once; None if there are more, or it is an output."""
        users = self.users.get(name, ())
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def shape(self, name: str) -> tuple[Axis, ...] | None:
        """Axes of a value; None if not even their number is known."""
        held = self._initializers.get(name)
        return tuple(held.dims) if held is not None else self.shapes.get(name)

    @cached_property
    def _computed(self) -> dict[str, tuple[Axis, ...]]:
        return shapes_of(self.model, written=False)

    def computed_shape(self, name: str) -> tuple[Axis, ...] | None:
        """Axes of a value as they follow from the inputs alone.

        The shapes that a file writes beside them may be of other inputs: people open an axis of an
        input, and leave the rest as it was.
        """
        return self._computed.get(name)

    def same_shape(self, a: str, b: str) -> bool:
        """Whether two values surely have one shape: every axis known, by number or by name.

        What follows from the inputs must not say otherwise: of one value an axis is a number, and of
        the other another number or a name.
        """
        first, second = self.shape(a), self.shape(b)
        if first is None or None in first or first != second:
            return False
        own = zip(self.computed_shape(a) or (), self.computed_shape(b) or (), strict=False)
        return not any(
            m != n and None not in (m, n) and (isinstance(m, int) or isinstance(n, int))
            for m, n in own
        )

    def _parts(self, name: str) -> list[str]:
        """What has to be constant for a value that nodes make to be so."""
        index = None if name in self._initializers else self.producer.get(name)
        if index is None or not standard(self.nodes[index], *MOVES, *ARITHMETIC):
            return []
        return [part for part in self.nodes[index].input if part]

    def _evaluate(self, name: str) -> np.ndarray | None:
        if name in self._initializers:
            return numbers(self._initializers[name])
        if name not in self.producer:
            return None
        node = self.nodes[self.producer[name]]
        if standard(node, "Constant"):
            return _stored(node)
        parts = self._parts(name)
        if not parts:
            return None
        known = [(p, held) for p in parts if (held := self._constants[p]) is not None]
        if len(known) < len(parts):
            return self._sizes(node)
        if node.op_type in MOVES:
            return MOVES[node.op_type](node, [held for _, held in known])
        made = computed(node, dict(known), self.opset) or {}
        self._constants.update(made)
        return made.get(name)

    def _sizes(self, node: Any) -> np.ndarray | None:
        """What a node takes from the shape of a value, if that is the same for all inputs."""
        index = self.producer.get(node.input[0])
        maker = (
            self.nodes[index] if index is not None and standard(node, "Gather", "Slice") else None
        )
        if maker is None or not standard(maker, "Shape") or maker.attribute:
            return None
        axes = self.computed_shape(maker.input[0]) or ()
        others = {name: self.constant(name) for name in node.input[1:] if name}
        places = {name: held for name, held in others.items() if held is not None}
        if not axes or len(places) < len(others):
            return None
        places[node.input[0]] = np.arange(len(axes))
        taken = (computed(node, places, self.opset) or {}).get(node.output[0])
        if taken is None:
            return None
        sizes = [size for size in (axes[i] for i in taken.ravel()) if isinstance(size, int)]
        return np.array(sizes, np.int64).reshape(taken.shape) if len(sizes) == taken.size else None


def _stored(node: Any) -> np.ndarray | None:
    for item in node.attribute:
        if item.name == "value":
            return numbers(item.t)
        if item.name == "sparse_value":
            return numbers(item.sparse_tensor)
        if item.name in ("value_float", "value_floats"):
            held = item.f if item.name == "value_float" else list(item.floats)
            return np.asarray(held, np.float32)
        if item.name in ("value_int", "value_ints"):
            held = item.i if item.name == "value_int" else list(item.ints)
            return np.asarray(held, np.int64)
    return None


def _axes(node: Any, parts: list[np.ndarray]) -> tuple[int, ...] | None:
    found = parts[1].tolist() if len(parts) > 1 else attribute(node, "axes")
    return None if found is None else tuple(int(axis) for axis in np.atleast_1d(found))


def _cast(node: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    import onnx

    to = onnx.helper.tensor_dtype_to_np_dtype(attribute(node, "to"))
    return parts[0].astype(to) if to in (np.float32, np.float64, np.int64, np.int32) else None


def _reshape(node: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    if len(parts) < 2 or attribute(node, "allowzero", 0):
        return None
    shape = [n or parts[0].shape[i] for i, n in enumerate(parts[1].tolist())]
    return parts[0].reshape(shape)


def _unsqueeze(node: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    axes = _axes(node, parts)
    return None if axes is None else np.expand_dims(parts[0], axes)


def _flatten(node: Any, parts: list[np.ndarray]) -> np.ndarray | None:
    axis = attribute(node, "axis", 1)
    axis += parts[0].ndim if axis < 0 else 0
    return parts[0].reshape(math.prod(parts[0].shape[:axis]), -1)


#: Operators that move the elements of a constant about, or change its type.
MOVES: dict[str, Callable[[Any, list[np.ndarray]], np.ndarray | None]] = {
    "Identity": lambda node, parts: parts[0],
    "Transpose": lambda node, parts: parts[0].transpose(attribute(node, "perm")),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda node, parts: np.squeeze(parts[0], _axes(node, parts)),
    "Cast": _cast,
    "Flatten": _flatten,
}
