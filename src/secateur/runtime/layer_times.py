"""How long single layers take on this machine, at any width: what latency targets are planned with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from secateur.runtime.race import Raced, race, runner

# Layers of one race hold at most so many bytes of weights.
_BYTES = 1 << 29
# Seconds of a race; five runs of each layer are made at least.
_SECONDS = 0.2
_MOST = 15
# Waking a thread takes as long as a small layer: a layer stands several times in its model, up to so
# many multiply-adds, and the time is divided.
_MACS, _COPIES = 5e7, 8
#: Multiples that widths may come in.
MULTIPLES = (4, 8, 16, 32)
# They are tried from these widths on, between layers of this width, at these distances.
_BASES, _NEIGHBOUR = (32, 64), 64
_DISTANCES = (1, 3, 4, 7, 8, 15, 16, 31, 32)
_FREE = 1.02


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer: all that its time depends on, not its values.

    Args:
        inputs: Channels or features that it reads.
        outputs: That it writes.
        rows: Samples of a convolution, rows of the matrix that a linear layer multiplies.
        size: Spatial size of the input; empty for a linear layer.
        kernel: Of a convolution, as are all that follow, one number an axis.
        stride: Steps of the kernel.
        padding: Zeros at each side.
        dilation: Distance of taps.
        groups: Of a convolution.

    Example:
        >>> layer = Layer(8, 8, 1, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), groups=8)
        >>> layer.at(8, 4).groups, layer.macs
        (4, 2592.0)
    """

    inputs: int
    outputs: int
    rows: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        """Whether every input channel has filters of its own: it loses whole groups."""
        return self.groups > 1 and self.groups == self.inputs

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    @property
    def positions(self) -> int:
        """Positions of the output, over all samples."""
        return self.rows * math.prod(self.output_size)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.outputs * (self.inputs // self.groups) * math.prod(self.kernel)

    @property
    def macs(self) -> float:
        """Multiply-adds of one run."""
        return float(self.positions * self.weights)

    def at(self, inputs: int, outputs: int) -> Layer:
        """The same layer at other widths; of a depthwise one, the outputs say both."""
        if self.depthwise:
            each = self.outputs // self.groups
            channels = max(1, outputs // each)
            return replace(self, inputs=channels, outputs=channels * each, groups=channels)
        whole = (max(1, n // self.groups) * self.groups for n in (inputs, outputs))
        inputs, outputs = whole
        return replace(self, inputs=inputs, outputs=outputs)


#: Layers that run one after the other.
Chain = tuple[Layer, ...]
#: Chains -> milliseconds of each, measured in turn.
Timer = Callable[[Sequence[Chain]], Sequence[float]]


@dataclass
class LayerTimes:
    """A timer that measures each chain of layers once.

    Example:
        >>> times = LayerTimes(lambda chains: [chain[0].macs for chain in chains])
        >>> times([(Layer(2, 3, 1),), (Layer(2, 3, 1),)]), len(times.known)
        ([6.0, 6.0], 1)
    """

    timer: Timer
    known: dict[Chain, float] = field(default_factory=dict)

    def __call__(self, chains: Sequence[Chain]) -> list[float]:
        """Milliseconds of each; those that are new are measured together."""
        new = [chain for chain in dict.fromkeys(chains) if chain not in self.known]
        if new:
            self.known.update(zip(new, self.timer(new), strict=True))
        return [self.known[chain] for chain in chains]


def alignment(times: LayerTimes, layers: Sequence[Layer]) -> int:
    """The largest multiple that costs nothing: rounding most widths up to it takes no time.

    Kernels work on blocks of channels and pad the last one: up to the next block all widths cost the
    same, and odd ones may be slower. Where nothing is padded, each unit costs. It depends on the
    neighbours too, since data changes its layout on the way to a kernel of another kind: a layer is
    measured between two of a width that every kernel likes.

    Args:
        times: Measures.
        layers: Of the kinds that will be narrowed.

    Returns:
        One of 1, 4, 8, 16, 32.

    Example:
        >>> def blocks(chain: Chain) -> float:
        ...     return sum(-(-x.inputs // 8) * -(-x.outputs // 8) for x in chain)
        >>> alignment(LayerTimes(lambda chains: [blocks(c) for c in chains]), [Layer(64, 64, 1)])
        8
    """
    found = 1
    widths = [base + more for base in _BASES for more in _DISTANCES]
    measured = [times([_between(layer, width) for width in widths]) for layer in layers]
    for multiple in MULTIPLES:
        ratios = []
        for taken in measured:
            at = dict(zip(widths, taken, strict=True))
            for base in _BASES:
                below = [at[base + q] for q in _DISTANCES if q < multiple and q % found == 0]
                ratios.append(at[base + multiple] / max(float(np.median(below)), 1e-12))
        if ratios and float(np.median(ratios)) <= _FREE:
            found = multiple
    return found


def _between(layer: Layer, width: int) -> Chain:
    """Like the layer, into and out of a width, twice; a depthwise one in between."""
    ndim = len(layer.size)
    same = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel, strict=True))
    plain = replace(layer, stride=(1,) * ndim, padding=same, groups=1)
    if layer.depthwise:
        deep = replace(plain, inputs=width, outputs=width, groups=width)
        point = replace(plain, kernel=(1,) * ndim, padding=(0,) * ndim)
    else:
        deep, point = None, plain
    chain: list[Layer] = []
    for _ in range(2):
        into = replace(point, inputs=_NEIGHBOUR, outputs=width)
        out = replace(point, inputs=width, outputs=_NEIGHBOUR)
        chain += [into, deep, out] if deep else [into, out]
    for i in range(1, len(chain)):
        chain[i] = replace(chain[i], size=chain[i - 1].output_size)
    return tuple(chain)


def has_onnx() -> bool:
    """Whether models can be written for ONNX Runtime, and run in it."""
    return all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def stock_session(model: str | bytes, threads: int) -> Any:
    """ONNX Runtime as it comes, without operators of ours; its threads rest between runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_timer(threads: int) -> Timer:
    """Measures layers as small models in ONNX Runtime, float32.

    Example:
        >>> conv = Layer(4, 8, 1, (5,), (3,), (1,), (0,), (1,))
        >>> all(t > 0 for t in onnx_timer(1)([(Layer(4, 8, 2),), (conv,)]))
        True
    """

    def run_of(chain: Chain) -> Callable[[], None]:
        opened = stock_session(_model(chain).SerializeToString(), threads)
        shape = (chain[0].rows, chain[0].inputs, *chain[0].size)
        return runner(opened, {i.name: _noise(shape) for i in opened.get_inputs()})

    return lambda chains: _timed(chains, run_of)


def torch_timer(device: torch.device, dtype: torch.dtype) -> Timer:
    """Measures layers in PyTorch, on a device.

    Example:
        >>> torch_timer(torch.device("cpu"), torch.float32)([(Layer(4, 8, 2),)])[0] > 0
        True
    """

    def run_of(chain: Chain) -> Callable[[], None]:
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = []
        for layer in chain:
            weight = torch.from_numpy(_noise(_shape(layer))).to(device, dtype)
            how = (None, layer.stride, layer.padding, layer.dilation, layer.groups)
            convolve = (F.linear, F.conv1d, F.conv2d, F.conv3d)[len(layer.size)]
            rest = how if layer.size else ()
            calls.append(partial(_call, convolve, weight, rest))
        shape = (chain[0].rows, chain[0].inputs, *chain[0].size)
        start = torch.from_numpy(_noise(shape)).to(device, dtype)

        def run() -> None:
            with torch.inference_mode():
                for _ in range(_copies(chain)):
                    x = start
                    for call in calls:
                        x = call(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    return lambda chains: _timed(chains, run_of)


def _call(
    function: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    rest: tuple[Any, ...],
    x: torch.Tensor,
) -> torch.Tensor:
    return function(x, weight, *rest)


def _timed(
    chains: Sequence[Chain], run_of: Callable[[Chain], Callable[[], None]]
) -> Sequence[float]:
    found: list[float] = []
    for part in _parts(chains):
        raced: Raced = race([run_of(x) for x in part], seconds=_SECONDS, most=_MOST, drop=False)
        found += [raced.undisturbed(i) / _copies(chain) for i, chain in enumerate(part)]
    return found


def _parts(chains: Sequence[Chain]) -> Iterator[list[Chain]]:
    """Chains that are measured together: all, unless their weights need too much memory."""
    part: list[Chain] = []
    held = 0
    for chain in chains:
        size = 4 * sum(layer.weights for layer in chain)
        if part and held + size > _BYTES:
            yield part
            part, held = [], 0
        part.append(chain)
        held += size
    if part:
        yield part


def _copies(chain: Chain) -> int:
    return int(min(_COPIES, max(1, _MACS // max(sum(x.macs for x in chain), 1.0))))


def _shape(layer: Layer) -> tuple[int, ...]:
    """Of its weight, as torch and ONNX convolutions have it."""
    return (layer.outputs, layer.inputs // layer.groups, *layer.kernel)


def _model(chain: Chain) -> Any:
    """Copies of a chain side by side; ONNX Runtime would merge those that read the same input."""
    import onnx
    from onnx import helper

    weights, kinds = [], []
    for i, layer in enumerate(chain):
        shape = _shape(layer) if layer.size else _shape(layer)[::-1]
        weights.append(onnx.numpy_helper.from_array(_noise(shape), f"w{i}"))
        how: dict[str, Any] = {} if not layer.size else {
            "strides": layer.stride,
            "pads": (*layer.padding, *layer.padding),
            "dilations": layer.dilation,
            "group": layer.groups,
            "kernel_shape": layer.kernel,
        }  # fmt: skip
        kinds.append(("Conv" if layer.size else "MatMul", how))
    nodes, inputs, outputs = [], [], []
    float32, sizes = onnx.TensorProto.FLOAT, (chain[0].rows, chain[0].inputs, *chain[0].size)
    for copy in range(_copies(chain)):
        names = [f"x{copy}.{i}" for i in range(len(chain) + 1)]
        for i, (kind, how) in enumerate(kinds):
            nodes.append(helper.make_node(kind, [names[i], f"w{i}"], [names[i + 1]], **how))
        inputs.append(helper.make_tensor_value_info(names[0], float32, sizes))
        outputs.append(helper.make_tensor_value_info(names[-1], float32, None))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _noise(shape: Sequence[int]) -> np.ndarray:
    """Numbers whose values do not matter, made fast."""
    few = np.random.default_rng(0).standard_normal(4099).astype(np.float32)
    return np.resize(few, tuple(shape))
