"""Results of a study: one JSON file with the numbers and all that is needed to judge them.

A goal is judged by its own numbers (:func:`goal`), and `tests/test_bench.py` judges the files
again, so that a file cannot say "met" beside a number that says otherwise.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.core import facts
from secateur.core.atomic import new_file

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent / "runs"
_PACKAGES = ("torch", "numpy", "safetensors", "pillow", "transformers", "onnxruntime")
_SENSES = ("at most", "at least", "less than", "more than")


def machine() -> dict[str, Any]:
    """Say what the numbers were measured on."""
    return {
        "processor": facts.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Say which software took part."""
    found = {"python": platform.python_version(), "secateur": secateur.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def goal(name: str, found: float, sense: str, limit: float) -> dict[str, Any]:
    """Judge one goal.

    Args:
        name: What was to be reached, in words.
        found: What was measured.
        sense: ``"at most"``, ``"at least"``, ``"less than"`` or ``"more than"``.
        limit: The number to compare with.

    Example:
        >>> goal("points below dense", 0.21, "at most", 0.3)["met"]
        True
    """
    return {
        "name": name,
        "found": found,
        "sense": sense,
        "limit": limit,
        "met": is_met(found, sense, limit),
    }


def is_met(found: float, sense: str, limit: float) -> bool:
    """Compare as :func:`goal` does.

    Raises:
        ValueError: The sense is none of the four.

    Example:
        >>> is_met(2.0, "more than", 2.0), is_met(2.0, "at least", 2.0)
        (False, True)
    """
    if sense not in _SENSES:
        raise ValueError(f"The sense of a goal is one of {_SENSES}, not {sense!r}.")
    outcomes = (found <= limit, found >= limit, found < limit, found > limit)
    return outcomes[_SENSES.index(sense)]


def _used() -> float:
    """Processor seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@dataclass
class Stopwatch:
    """Measures a study: wall clock, own processor time, and how busy the machine was.

    Attributes:
        started: Wall clock, seconds since 1970.
    """

    started: float = field(default_factory=time.time)
    _processor: float = field(default_factory=_used)
    _load: float = field(default_factory=lambda: os.getloadavg()[0])

    def facts(self) -> dict[str, Any]:
        """Say how long it took, and the number of running processes before and after."""
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.started)),
            "wall_seconds": round(time.time() - self.started, 1),
            "processor_seconds": round(_used() - self._processor, 1),
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }


def write(
    study: str,
    result: Mapping[str, Any],
    *,
    goals: Sequence[Mapping[str, Any]] = (),
    seeds: Sequence[int],
    watch: Stopwatch,
    folder: Path = RESULTS,
) -> Path:
    """Write ``<folder>/<study>.json``, whole or not at all.

    Args:
        study: Name of the file.
        result: The numbers.
        goals: As :func:`goal` gives them.
        seeds: All seeds that took part.
        watch: Made when the study began.
        folder: Where to.

    Returns:
        The path.
    """
    whole = {
        "study": study,
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "seeds": list(seeds),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": versions(),
        "time": watch.facts(),
        "goals": [dict(g) for g in goals],
        "result": dict(result),
    }
    path = folder / f"{study}.json"
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def ignored(folder: Path = RUNS) -> Path:
    """Make a folder that version control leaves out: what is unfinished is no result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return folder


def unfinished(name: str) -> Path:
    """Where a study keeps what it needs to go on."""
    return ignored() / name


def read(study: str, *, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a result back.

    Raises:
        FileNotFoundError: The study has not been run.
    """
    found: dict[str, Any] = json.loads((folder / f"{study}.json").read_text(encoding="utf-8"))
    return found


def seeds_of(name: str, folder: Path) -> list[int]:
    """Seeds for which a result ``<name>-seed<number>.json`` is there, the least first.

    Example:
        >>> seeds_of("gradual-dense", RESULTS)
        [0]
    """
    return sorted(int(p.stem.rpartition("seed")[2]) for p in folder.glob(f"{name}-seed*.json"))
