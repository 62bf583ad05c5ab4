"""Peak memory of one piece of work, exactly, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_PEAK_RESET = Path("/proc/self/clear_refs")


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Run ``work`` once; say how long it took and how far memory rose above its start.

    The kernel keeps the highest resident size itself (``VmHWM``) and lets a process reset it, so
    no short peak is missed. Memory that the allocator holds in reserve is given back first: it
    would hide the same amount of new memory.

    Args:
        work: Its result is kept until the measurement is over.

    Returns:
        ``seconds``, ``peak_extra_bytes`` and ``start_bytes``.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK_RESET.write_text("5", encoding="ascii")
    before = _kibibytes("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = _kibibytes("VmHWM")
    del result
    return {
        "seconds": round(seconds, 4),
        "peak_extra_bytes": 1024 * (peak - before),
        "start_bytes": 1024 * before,
    }


def in_fresh_process(module: str, *words: str, threads: int) -> dict[str, Any]:
    """Run ``python -m <module> <words>`` and read the JSON object in its last line.

    Args:
        module: With a main part that prints JSON.
        words: Its arguments.
        threads: For torch, in that process.

    Raises:
        RuntimeError: It failed; the message has the end of what it said.
    """
    command = [sys.executable, "-m", module, *words, "--threads", str(threads)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(words)} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _kibibytes(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
