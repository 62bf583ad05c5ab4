"""What ``secateur doctor`` found, as tables and as JSON.

The document has ``machine`` (with ``caches``, ``instructions``, ``kernels``, ``isa``, ``load``,
``threads``, ``read_gb_per_s``, ``float32_gflops``, ``float32_by``, ``bfloat16_gflops``, ``amx``),
``break_even`` (a list of ``layer``, ``dtype``, ``pattern``, ``against``, ``sparsity``, ``at_most``
and ``points``) and ``advice``, a list of sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.units import percent
from secateur.runtime.breakeven import PATTERNS, BreakEven
from secateur.runtime.machine import Machine

_HEADS = {
    "unstructured": "any",
    "4x1 blocks": "4x1",
    "8x1 blocks": "8x1",
    "16x1 blocks": "16x1",
}


def doctor_json(
    machine: Machine, measured: Sequence[BreakEven], advice: Sequence[str]
) -> dict[str, Any]:
    """The facts as plain data."""
    return {
        "machine": {**dataclasses.asdict(machine), "amx": machine.amx},
        "break_even": [dataclasses.asdict(b) for b in measured],
        "advice": list(advice),
    }


def machine_table(machine: Machine) -> Table:
    """One row per property."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    caches = ", ".join(f"L{c.level} {_binary(c.bytes)}" for c in machine.caches)
    ratio = machine.bfloat16_gflops / machine.float32_gflops
    rows = {
        "processor": f"{machine.processor}, {machine.system}",
        "cores": f"{machine.cores} for this process; measured with {_threads(machine.threads)}",
        "caches": caches or "unknown",
        "instructions": " ".join(machine.instructions) or "unknown",
        "kernels": " ".join(machine.kernels) or "none",
        "in use": machine.isa or "none",
        "memory": f"{machine.read_gb_per_s:.1f} GB/s read (torch.sum)",
        "float32": f"{machine.float32_gflops:.0f} GFLOP/s ({machine.float32_by})",
        "bfloat16": f"{machine.bfloat16_gflops:.0f} GFLOP/s (PyTorch), {ratio:.2g}x float32",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def break_even_table(measured: Sequence[BreakEven]) -> RenderableType:
    """One row per layer and type, one column per pattern: from which sparsity on it pays."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("pays from", no_wrap=True)
    for pattern in PATTERNS:
        table.add_column(_HEADS.get(pattern, pattern), justify="right", no_wrap=True)
    for layer, dtype in dict.fromkeys((b.layer, b.dtype) for b in measured):
        row = {b.pattern: b for b in measured if (b.layer, b.dtype) == (layer, dtype)}
        name = layer if dtype == "float32" else f"{layer}, {dtype}"
        table.add_row(name, *(break_even_text(row.get(p)) for p in PATTERNS))
    against = dict.fromkeys(b.against for b in measured)
    source = " and ".join(against)
    return Group(
        table, Text(f"Against the dense layer in {source}. any: no pattern. 2:4: its speed.")
    )


def break_even_text(found: BreakEven | None) -> str:
    """A break-even in a word; for a pattern with one sparsity, its speed.

    Example:
        >>> break_even_text(None)
        '-'
        >>> break_even_text(BreakEven("a", "float32", "4x1 blocks", "PyTorch", (), 0.3, True))
        '< 30 %'
    """
    if found is None:
        return "-"
    if found.pattern == "2:4":
        return f"{1 / found.points[0].ratio:.2f}x"
    if found.sparsity is None:
        return "never"
    return f"{'< ' if found.at_most else ''}{percent(found.sparsity, 0)}"


def advice_lines(advice: Sequence[str]) -> RenderableType:
    """Sentences, each from a new line on."""
    lines = Table.grid(padding=(0, 1))
    for sentence in advice:
        lines.add_row("-", Text(sentence))
    return lines


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _binary(size: int) -> str:
    """As caches are named.

    Example:
        >>> _binary(32 << 10), _binary(48 << 20)
        ('32 KiB', '48 MiB')
    """
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
