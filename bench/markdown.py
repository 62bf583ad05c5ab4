"""What the sections of the page of results are made of."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read(folder: Path, name: str) -> dict[str, Any]:
    """Give a study, or nothing if it has not been run."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def variants(folder: Path, name: str) -> list[dict[str, Any]]:
    """Give a study and those of other depths, protocols, rates and so on, but no single arms or seeds."""
    own = re.compile(rf"{name}(-resnet\d+(-\d+epochs)?(-held-out)?(-rate[\d.]+)?(-\d+images)?)?")
    names = sorted(path.stem for path in folder.glob(f"{name}*.json") if own.fullmatch(path.stem))
    return [read(folder, each) for each in names]


def section(title: str, parts: Iterable[str]) -> str:
    """Put parts under a title; without parts there is no section."""
    found = [part for part in parts if part]
    return "\n".join([f"## {title}\n", *found]) if found else ""


def prose(text: str) -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, 105, break_on_hyphens=False, break_long_words=False) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lay out a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def goals(study: dict[str, Any]) -> str:
    """Say what was asked, what was found, and whether that is enough."""
    rows = [
        [
            g["name"],
            _told(g["found"], g["limit"]),
            f"{g['sense']} {g['limit']:g}",
            "yes" if g["met"] else "no",
        ]
        for g in study["goals"]
    ]
    return table(["goal", "found", "asked", "met"], rows) if rows else ""


def _told(found: float, limit: float) -> str:
    """Three digits, or as many as tell a number from the limit.

    Example:
        >>> _told(3.9959, 4.0), _told(4.9041, 5.0), _told(2.0, 2.0)
        ('3.996', '4.9', '2')
    """
    digits = 3
    while found != limit and digits < 6 and float(f"{found:.{digits}g}") == limit:
        digits += 1
    return f"{found:.{digits}g}"


def where(study: dict[str, Any]) -> str:
    """Say what the numbers were measured on."""
    machine, versions = study["machine"], study["versions"]
    return (
        f"{machine['processor']}, {machine['instructions']}, {study['threads']} thread(s), "
        f"torch {versions['torch']}, {study['time']['date']}.\n"
    )


def each(values: Iterable[float], form: str) -> str:
    """Write one number a seed.

    Example:
        >>> each([91.5, 91.25], ".2f")
        '91.50, 91.25'
    """
    return ", ".join(format(value, form) for value in values)


def seeds(study: dict[str, Any]) -> str:
    """Name the seeds.

    Example:
        >>> seeds({"seeds": [0, 1]}), seeds({"seeds": [3]})
        ('seeds 0, 1', 'seed 3')
    """
    return ("seeds " if len(study["seeds"]) > 1 else "seed ") + each(study["seeds"], "d")


def differences(found: list[dict[str, Any]]) -> str:
    """Lay out what ``sparse_training.difference`` gives."""
    rows = [
        [
            f"{d['arm']} above {d['than']}",
            f"{d['mean']:.2f} ± {d['standard_error_of_images']:.2f}",
            each(d["seeds"], ".2f"),
        ]
        for d in found
    ]
    return table(["points", "mean", "by seed"], rows)
