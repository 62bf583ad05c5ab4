"""What this machine is and what it can do, read from the system and measured in about a second."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from secateur.core.errors import MissingNative, UsageError
from secateur.core.facts import cpuinfo, processor
from secateur.runtime import native
from secateur.runtime.library import available

#: The instruction sets that decide how fast a network runs, as Linux names them.
INSTRUCTIONS = (
    *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
_PROCESSORS = Path("/sys/devices/system/cpu")
_READ_BYTES = 256 << 20
_WIDTH = 1024
_SECONDS = 0.4


@dataclass(frozen=True)
class Cache:
    """One cache, as a core sees it.

    Args:
        level: 1 is nearest.
        bytes: Its size.
        shared_by: How many logical processors use it.
    """

    level: int
    bytes: int
    shared_by: int


@dataclass(frozen=True)
class Machine:
    """The machine, and what it was measured to do with ``threads`` threads.

    Args:
        processor: Its name.
        system: Operating system and architecture.
        cores: Logical processors that this process may use.
        caches: Data caches of the first of them, nearest first; empty if the system does not say.
        instructions: Those of :data:`INSTRUCTIONS` that it has.
        kernels: Instruction sets that our kernels run with here, best first; empty without the
            native library.
        isa: The one in use; None without the native library, or if ``SECATEUR_ISA`` is wrong.
        problem: Why there are no kernels; empty if there are.
        load: Processes that ran or waited for a core in the minute before; 0 if the system does not
            say.
        threads: That were measured.
        read_gb_per_s: Reading memory: ``torch.sum`` of 256 MiB of float32.
        float32_gflops: Product of two float32 matrices of 1024 x 1024, by the fastest that is here.
        float32_by: Who that was: ``"PyTorch"``, or ``"ONNX Runtime"`` where it is installed. On some
            processors one of them does not use the widest instructions.
        bfloat16_gflops: The same product in bfloat16, by PyTorch.
    """

    processor: str
    system: str
    cores: int
    caches: tuple[Cache, ...]
    instructions: tuple[str, ...]
    kernels: tuple[str, ...]
    isa: str | None
    problem: str
    load: float
    threads: int
    read_gb_per_s: float
    float32_gflops: float
    float32_by: str
    bfloat16_gflops: float

    @property
    def amx(self) -> bool:
        """Whether there is a matrix unit for bfloat16."""
        return "amx_bf16" in self.instructions or "sme" in self.instructions


def machine(threads: int) -> Machine:
    """Look at this machine and measure it.

    Args:
        threads: How many threads torch uses meanwhile.

    Raises:
        UsageError: ``threads`` is below 1, or above the processors that this process may use.
    """
    _require(threads)
    kernels, isa, problem = _kernels()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with torch_threads(threads), torch.inference_mode():
        read, half = _read_rate(), _matmul_rate(torch.bfloat16)
    float32, by = float32_rate(threads)
    return Machine(
        processor=processor(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        caches=caches(),
        instructions=_instructions(),
        kernels=kernels,
        isa=isa,
        problem=problem,
        load=load,
        threads=threads,
        read_gb_per_s=read,
        float32_gflops=float32,
        float32_by=by,
        bfloat16_gflops=half,
    )


def float32_rate(threads: int) -> tuple[float, str]:
    """GFLOP/s of a product of two float32 matrices, and by whom: see :class:`Machine`.

    Raises:
        UsageError: ``threads`` is below 1, or above the processors that this process may use.
    """
    _require(threads)
    with torch_threads(threads), torch.inference_mode():
        plain = _matmul_rate(torch.float32)
    return max((plain, "PyTorch"), (_onnxruntime_rate(threads), "ONNX Runtime"))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads, and afterwards as many as before.

    Example:
        >>> before = torch.get_num_threads()
        >>> with torch_threads(1):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Logical processors that this process may use; a container may have fewer than the machine.

    Example:
        >>> cores() >= 1
        True
    """
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def caches(folder: Path = _PROCESSORS) -> tuple[Cache, ...]:
    """Data caches of the first processor, nearest first.

    Args:
        folder: Where Linux describes processors.

    Example:
        >>> caches(Path("/nowhere"))
        ()
    """
    found = []
    for entry in sorted((folder / "cpu0" / "cache").glob("index*")):
        try:
            kind, level, size, shared = (
                (entry / name).read_text(encoding="ascii").strip()
                for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        scaled = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and scaled:
            unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[scaled[2]]
            found.append(Cache(int(level), int(scaled[1]) * unit, listed(shared)))
    return tuple(sorted(found, key=lambda c: c.level))


def listed(text: str) -> int:
    """How many numbers a list of Linux has.

    Example:
        >>> listed("0-3,8,10-11"), listed("0")
        (7, 1)
    """
    ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return sum(pair[-1] - pair[0] + 1 for pair in ends)


def _require(threads: int) -> None:
    most = cores()
    if threads < 1:
        raise UsageError(
            f"threads={threads}", "it is below 1", "a measurement needs a thread", "give 1 or more"
        )
    if threads > most:
        raise UsageError(
            f"threads={threads}",
            f"this process may use {most} processor{'s' if most > 1 else ''}",
            "threads that wait for each other would be measured, and not what the machine can do",
            f"give {f'1 to {most}' if most > 1 else 1}",
        )


def _kernels() -> tuple[tuple[str, ...], str | None, str]:
    try:
        kernels = tuple(native.isas())
    except MissingNative as missing:
        return (), None, str(missing)
    try:
        return kernels, native.isa(), ""
    except UsageError as wrong:
        return kernels, None, str(wrong)


def _instructions() -> tuple[str, ...]:
    about = cpuinfo()
    flags = set(about.get("flags", about.get("Features", "")).split())  # x86-64, Arm
    return tuple(name for name in INSTRUCTIONS if name in flags)


def _read_rate() -> float:
    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / 1e9 / _fastest(data.sum)


def _matmul_rate(dtype: torch.dtype) -> float:
    a, b = (torch.randn(_WIDTH, _WIDTH).to(dtype) for _ in range(2))
    out = torch.empty(_WIDTH, _WIDTH, dtype=dtype)
    return 2 * _WIDTH**3 / 1e9 / _fastest(lambda: torch.matmul(a, b, out=out))


def _onnxruntime_rate(threads: int) -> float:
    if not (find_spec("onnx") and find_spec("onnxruntime") and available()):
        return 0.0
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from secateur.runtime.race import open_session, runner

    square = np.random.default_rng(0).standard_normal((_WIDTH, _WIDTH), dtype=np.float32)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, square.shape) for n in "xy")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [x],
        [y],
        [numpy_helper.from_array(square, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return 2 * _WIDTH**3 / 1e9 / _fastest(runner(open_session(model, threads), {"x": square}))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: what the machine can do when it is left alone.

    The first run, which also prepares, counts where it takes longer than all others may, as a product
    in bfloat16 does on processors that have no instructions for it.
    """
    first = _seconds(work)
    if first > _SECONDS:
        return first
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        times.append(_seconds(work))
    return min(times)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
