"""Damaged compiled models: every one opens or is refused, and none ends the process.

The damage is done in a process of its own, so that a crash is seen and named by its seed. To see
one again: ``python tests/test_runtime_fuzz.py FIRST_SEED COUNT``.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secateur.core.errors import FormatError
from secateur.runtime import library

SEEDS = 1500
# The number of the first layer of the chain.
CHAINED = 5
# What a damaged model may ask for beyond what is there when the test begins.
MEMORY = 2 << 30

# Numbers that are wrong in interesting ways.
NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 8, 16, 17, 64, 255, 256, 65535, 65536)
NUMBERS += (2**20, 2**30, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1)

# Changes a model in place.
Damage = Callable[[random.Random, Any], None]


def compiled() -> Any:
    """Layers side by side: every layout, every type of values, every family; and a chain of three."""
    from onnx import TensorProto, helper

    from secateur.runtime.chains import chain_node
    from secateur.runtime.native import Spec, Variant
    from secateur.runtime.operators import opset, sparse_node

    rng = np.random.default_rng(0)
    wide = Spec("conv", 8, 4, groups=2, kernel=(3, 3), pads=(1, 1, 1, 1), activation="relu")
    point = Spec("conv", 16, 8, stride=(2, 2), activation="clip", beta=6.0)
    linear = Spec("linear", 16, 12, activation="gelu")
    deep = Spec("conv", 12, 1, groups=12, kernel=(3, 3), stride=(2, 2), pads=(1, 1, 1, 1))
    layers: list[tuple[Spec, Variant, str, str]] = [
        (wide, Variant("list", 1, 2), "csr", "float32"),
        (point, Variant("panels", 4, 2), "bitmask", "bfloat16"),
        (linear, Variant("blocks", 8, 1), "dense", "float32"),
        (linear, Variant("gemv", 1, 1), "bitmask", "bfloat16"),
        (linear, Variant("list", 1, 1, columns=8), "csr", "float16"),
        (Spec("conv", 12, 8), Variant("list", 1, 1), "csr", "float32"),
        (deep, Variant("depthwise", 1, 1), "dense", "bfloat16"),
        (Spec("conv", 8, 12), Variant("panels", 4, 1), "bitmask", "float32"),
    ]
    nodes, tensors = [], []
    for number, (spec, variant, layout, dtype) in enumerate(layers):
        shape: tuple[int, ...] = (spec.outputs, spec.inputs)
        if spec.kind == "conv":
            shape += spec.kernel
        weight = rng.standard_normal(shape).astype(np.float32)
        weight[rng.random(shape) < 0.7] = 0
        node, packed = sparse_node(
            weight,
            spec,
            variant,
            name=f"layer{number}",
            x=f"y{number - 1}"
            if number > CHAINED
            else "image"
            if spec.kind == "conv"
            else "tokens",
            y=f"y{number}",
            bias=rng.standard_normal(spec.outputs).astype(np.float32),
            residual="added" if number == 2 else None,
            layout=layout,
            dtype=dtype,
        )
        nodes.append(node)
        tensors += packed
    nodes[CHAINED:] = [chain_node(nodes[CHAINED:])]
    outputs = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in nodes
    ]
    graph = helper.make_graph(
        nodes,
        "layers",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", "c", "h", "w"]),
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["t", "f"]),
            helper.make_tensor_value_info("added", TensorProto.FLOAT, ["t", "g"]),
        ],
        outputs,
        tensors,
    )
    imports = [helper.make_opsetid("", 20), opset()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"image": (1, 8, 9, 10), "tokens": (5, 12), "added": (5, 16)}
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


# --- what can happen to a file --------------------------------------------------------------------


def attribute(rng: random.Random, model: Any) -> None:
    """Another number, a list of another length, another type, or nothing."""
    from onnx import helper

    node = rng.choice(model.graph.node)
    old = rng.choice(node.attribute)
    name, value = old.name, helper.get_attribute_value(old)
    node.attribute.remove(old)
    kind = rng.randrange(10)
    if isinstance(value, list) and kind < 8:
        value = list(value)
        value[rng.randrange(len(value))] = rng.choice(NUMBERS)
    elif kind < 6:
        number = rng.choice(NUMBERS)
        value = float(number) if isinstance(value, float) else number
    elif kind == 6 and isinstance(value, float):
        value = rng.choice([float("nan"), float("inf"), -float("inf"), 1e38])
    elif kind == 7:
        value = rng.choice(["text", 1.5, [1, 2, 3], [0.5]])
    elif kind == 8:
        value = [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 6))]
    else:
        return
    node.attribute.append(helper.make_attribute(name, value))


def packed_bytes(rng: random.Random, model: Any) -> None:
    """Other bytes of a weight or index, which keeps its length."""
    tensor = rng.choice([t for t in model.graph.initializer if t.raw_data])
    data = bytearray(tensor.raw_data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    tensor.raw_data = bytes(data)


def packed_length(rng: random.Random, model: Any) -> None:
    """A weight or index that is longer, shorter or empty, and says so itself."""
    tensor = rng.choice(model.graph.initializer)
    here = len(tensor.raw_data)
    size = tensor.dims[0] if tensor.dims else 1
    width = max(1, here // max(1, size))
    count = rng.choice([0, 1, size - 1, size + 1, size * 2])
    data = ((tensor.raw_data or b"\0") * 3)[: max(0, count) * width]
    tensor.raw_data = data
    del tensor.dims[:]
    tensor.dims.append(len(data) // width)


def packed_shape(rng: random.Random, model: Any) -> None:
    """A shape that does not go with the data."""
    tensor = rng.choice(model.graph.initializer)
    del tensor.dims[:]
    tensor.dims.extend(rng.choice(NUMBERS) for _ in range(rng.randrange(3)))


def packed_type(rng: random.Random, model: Any) -> None:
    """Another type, with or without as many bytes as it needs."""
    tensor = rng.choice(model.graph.initializer)
    tensor.data_type = rng.randrange(24)
    if rng.random() < 0.5:
        count = tensor.dims[0] if tensor.dims else 1
        tensor.raw_data = (tensor.raw_data * 8)[: count * rng.choice([1, 2, 4, 8])]


def wires(rng: random.Random, model: Any) -> None:
    """An input that is another tensor, or missing, or one more."""
    node = rng.choice(model.graph.node)
    names = [t.name for t in model.graph.initializer] + ["image", "tokens", "", "y0"]
    kind = rng.randrange(4)
    if kind == 0:
        node.input.append(rng.choice(names))
    elif kind == 1:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 2:
        node.op_type = rng.choice(["SparseLinear", "SparseConv", "SparseChain"])
    else:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)


DAMAGES: tuple[Damage, ...] = (
    *(attribute, attribute, attribute),
    *(packed_bytes, packed_length, packed_shape, packed_type, wires),
)


def damaged(seed: int, model: Any, whole: bytes) -> tuple[str, bytes]:
    """What was done, and the file."""
    rng = random.Random(seed)
    kind = rng.randrange(10)
    if kind == 0:
        return "truncated", whole[: rng.randrange(len(whole))]
    if kind <= 2:
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return "flipped", bytes(data)
    copy = type(model)()
    copy.CopyFrom(model)
    change = rng.choice(DAMAGES)
    for _ in range(rng.choice([1, 1, 1, 2])):
        change(rng, copy)
    return change.__name__, copy.SerializeToString()


# --- the process that may crash -------------------------------------------------------------------


def work(first: int, count: int) -> None:
    import onnxruntime

    from secateur.runtime.session import session

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model, arrays = compiled(), feeds()
    whole = model.SerializeToString()
    session(whole, 2, options=options).run(None, arrays)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    met: Counter[str] = Counter()
    for seed in range(first, first + count):
        what, data = damaged(seed, model, whole)
        print(f"seed {seed} {what}", flush=True)
        try:
            opened = session(data, 2, options=options)
        except (FormatError, MemoryError):
            met["refused"] += 1
            continue
        met["opened"] += 1
        fitting = {i.name: arrays[i.name] for i in opened.get_inputs() if i.name in arrays}
        try:
            opened.run(None, fitting)
        except Exception as error:
            # What is wrong with a run is ONNX Runtime's to say, or our operators' through it.
            if not type(error).__module__.startswith(("onnxruntime", "builtins")):
                raise
            met["run_refused"] += 1
        else:
            met["ran"] += 1
    print("ends", *(f"{key}={met[key]}" for key in ("refused", "opened", "run_refused", "ran")))


def ends(command: list[str]) -> dict[str, int]:
    """How many files met which end; fails if the process did not live to tell."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "before the first seed"
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stderr[-2000:]}"
    assert last.startswith("ends "), last
    return {key: int(n) for key, _, n in (part.partition("=") for part in last.split()[1:])}


@pytest.mark.skipif(not library.available(), reason="the native library is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_damaged_models_are_refused_and_never_crash() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    found = ends([__file__, "0", str(SEEDS)])
    # If all were refused, or none, nothing was tried.
    assert found["refused"] > SEEDS / 3
    assert found["ran"] > SEEDS / 20


def test_a_crash_is_seen_and_named() -> None:
    with pytest.raises(AssertionError, match="seed 7 flipped"):
        ends(["-c", "import os; print('seed 7 flipped', flush=True); os.abort()"])


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
