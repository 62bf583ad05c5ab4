"""How long single layers take on this machine, at any width: what latency targets are planned with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
_BASES = (32, 64)
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
    def positions(self) -> int:
        """Positions of the output, over all samples."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        return self.rows * math.prod(sizes)

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


#: Layers -> milliseconds of each, measured in turn.
Timer = Callable[[Sequence[Layer]], Sequence[float]]


@dataclass
class LayerTimes:
    """A timer that measures each layer once.

    Example:
        >>> times = LayerTimes(lambda layers: [layer.macs for layer in layers])
        >>> times([Layer(2, 3, 1), Layer(2, 3, 1)]), len(times.known)
        ([6.0, 6.0], 1)
    """

    timer: Timer
    known: dict[Layer, float] = field(default_factory=dict)

    def __call__(self, layers: Sequence[Layer]) -> list[float]:
        """Milliseconds of each; those that are new are measured together."""
        new = [layer for layer in dict.fromkeys(layers) if layer not in self.known]
        if new:
            self.known.update(zip(new, self.timer(new), strict=True))
        return [self.known[layer] for layer in layers]


def alignment(times: LayerTimes, layers: Sequence[tuple[Layer, bool, bool]]) -> int:
    """The largest multiple that costs nothing: rounding a width up to it takes no time.

    Kernels work on blocks of channels, and pad the last one. From a width of one block and a bit on,
    up to the next block, all widths cost the same; where nothing is padded, each unit costs.

    Args:
        times: Measures.
        layers: Layers, and whether their inputs and outputs will be narrowed.

    Returns:
        One of 1, 4, 8, 16, 32.

    Example:
        >>> blocks = LayerTimes(lambda layers: [-(-x.outputs // 8) * 8.0 for x in layers])
        >>> alignment(blocks, [(Layer(64, 64, 1), False, True)])
        8
    """
    found = 1
    chosen = [entry for entry in layers if entry[1] or entry[2]]
    widths = [base + more for base in _BASES for more in (1, *MULTIPLES)]
    runs = [[_both(entry, width) for width in widths] for entry in chosen]
    measured = [times(run) for run in runs]
    for multiple in MULTIPLES:
        ratios = []
        for taken in measured:
            at = dict(zip(widths, taken, strict=True))
            for base in _BASES:
                below = [at[base + q] for q in (1, *MULTIPLES) if q < multiple]
                ratios.append(at[base + multiple] / max(min(below), 1e-12))
        if ratios and float(np.median(ratios)) <= _FREE:
            found = multiple
    return found


def _both(entry: tuple[Layer, bool, bool], width: int) -> Layer:
    layer, narrows_inputs, narrows_outputs = entry
    width *= layer.groups if not layer.depthwise else 1
    return layer.at(
        width if narrows_inputs else layer.inputs, width if narrows_outputs else layer.outputs
    )


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
    """Measures layers as models of one kind of node in ONNX Runtime, float32.

    Example:
        >>> times = onnx_timer(1)([Layer(4, 8, 2), Layer(4, 8, 1, (5,), (3,), (1,), (0,), (1,))])
        >>> all(t > 0 for t in times)
        True
    """

    def run_of(layer: Layer) -> Callable[[], None]:
        opened = stock_session(_model(layer).SerializeToString(), threads)
        shape = (layer.rows, layer.inputs, *layer.size)
        return runner(opened, {i.name: _noise(shape) for i in opened.get_inputs()})

    return lambda layers: _timed(layers, run_of)


def torch_timer(device: torch.device, dtype: torch.dtype) -> Timer:
    """Measures layers in PyTorch, on a device.

    Example:
        >>> torch_timer(torch.device("cpu"), torch.float32)([Layer(4, 8, 2)])[0] > 0
        True
    """

    def run_of(layer: Layer) -> Callable[[], None]:
        shape = (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
        weight = torch.from_numpy(_noise(shape)).to(device, dtype)
        x = torch.from_numpy(_noise((layer.rows, layer.inputs, *layer.size))).to(device, dtype)
        convolve = (F.linear, F.conv1d, F.conv2d, F.conv3d)[len(layer.size)]
        how = (None, layer.stride, layer.padding, layer.dilation, layer.groups)
        rest = how if layer.size else ()

        def run() -> None:
            with torch.inference_mode():
                for _ in range(_copies(layer)):
                    convolve(x, weight, *rest)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    return lambda layers: _timed(layers, run_of)


def _timed(
    layers: Sequence[Layer], run_of: Callable[[Layer], Callable[[], None]]
) -> Sequence[float]:
    found: list[float] = []
    for part in _parts(layers):
        raced: Raced = race([run_of(x) for x in part], seconds=_SECONDS, most=_MOST, drop=False)
        found += [raced.undisturbed(i) / _copies(layer) for i, layer in enumerate(part)]
    return found


def _parts(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers that are measured together: all, unless their weights need too much memory."""
    part: list[Layer] = []
    held = 0
    for layer in layers:
        size = 4 * layer.weights
        if part and held + size > _BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += size
    if part:
        yield part


def _copies(layer: Layer) -> int:
    return int(min(_COPIES, max(1, _MACS // max(layer.macs, 1.0))))


def _model(layer: Layer) -> Any:
    """Copies of the layer side by side; equal inputs would make ONNX Runtime merge them."""
    import onnx
    from onnx import helper

    linear = not layer.size
    shape = (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
    weight = onnx.numpy_helper.from_array(_noise(shape[::-1] if linear else shape), "w")
    how: dict[str, Any] = {} if linear else {
        "strides": layer.stride,
        "pads": (*layer.padding, *layer.padding),
        "dilations": layer.dilation,
        "group": layer.groups,
        "kernel_shape": layer.kernel,
    }  # fmt: skip
    nodes, inputs, outputs = [], [], []
    float32 = onnx.TensorProto.FLOAT
    for copy in range(_copies(layer)):
        x, y = f"x{copy}", f"y{copy}"
        nodes.append(helper.make_node("MatMul" if linear else "Conv", [x, "w"], [y], **how))
        sizes = (layer.rows, layer.inputs, *layer.size)
        inputs.append(helper.make_tensor_value_info(x, float32, sizes))
        outputs.append(helper.make_tensor_value_info(y, float32, None))
    graph = helper.make_graph(nodes, "layer", inputs, outputs, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _noise(shape: Sequence[int]) -> np.ndarray:
    """Numbers whose values do not matter, made fast."""
    few = np.random.default_rng(0).standard_normal(4099).astype(np.float32)
    return np.resize(few, tuple(shape))
