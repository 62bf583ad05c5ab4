"""What compiling and measuring found, as tables and as JSON.

The document of ``bench`` has at its top level ``dense_ms``, ``sparse_ms`` (medians),
``dense_range`` and ``sparse_range`` (80 % of the turns), ``speedup``, ``speedup_range`` (95 % of its
median), ``rounds``, ``max_rel_error``, ``dense_bytes``, ``sparse_bytes``, ``threads``, ``isa``,
``peak_gflops``, ``inputs``, ``notes`` and ``layers``, a list of ``name``, ``kind``, ``shape``,
``groups``, ``sparsity``, ``kernel`` (``null``: dense), ``dense_ms``, ``sparse_ms``, ``gflops`` and
``peak_share``. ``max_rel_error`` is ``null`` where no number can say it: one side has an infinity or
NaN that the other has not, or another type of numbers.

That of ``compile`` has ``path``, ``bytes``, ``dense_bytes``, ``plan``, ``dense_ms``, ``sparse_ms``,
``speedup``, ``error``, ``agreement``, ``precision``, ``isa``, ``threads``, ``inputs``, ``notes`` and
``layers``, with all timings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.core.ratios import times
from secateur.report.columns import Columns
from secateur.report.units import milliseconds, percent, size
from secateur.runtime.bench import Bench, LayerSpeed, Median
from secateur.runtime.compiler.compile import Compiled, CompiledLayer
from secateur.runtime.compiler.sample import shapes_text
from secateur.runtime.native import Variant


def compiled_json(found: Compiled) -> dict[str, Any]:
    """The facts of a compilation as plain data."""
    return dataclasses.asdict(found)


def bench_json(found: Bench) -> dict[str, Any]:
    """The facts of a measurement as plain data; medians are numbers of their own."""
    plain = dataclasses.asdict(found)
    for side in ("dense", "sparse"):
        held = plain.pop(side)
        plain[f"{side}_ms"] = held["median"]
        plain[f"{side}_range"] = (held["p10"], held["p90"])
    return plain


def kernel_text(kernel: Variant | None) -> str:
    """A kernel in a word or two: rows by vectors / how many channels it packs at a time.

    Example:
        >>> kernel_text(Variant("blocks", rows=8, vectors=4)), kernel_text(None)
        ('blocks 8x4', 'dense')
        >>> kernel_text(Variant("list", rows=1, vectors=8, columns=64))
        'list 1x8/64'
    """
    if kernel is None:
        return "dense"
    part = f"/{kernel.columns}" if kernel.columns else ""
    return f"{kernel.family} {kernel.rows}x{kernel.vectors}{part}"


def compiled_layers(found: Compiled) -> Columns:
    """One row per layer that could have been replaced."""
    table = _table("layer", "weight", "zeros", "fused", "kernel", "dense ms", "sparse ms")
    for layer in found.layers:
        table.add_row(
            Text(layer.name),
            _shape(layer),
            percent(layer.sparsity),
            " ".join(layer.fused[1:]) or "-",
            kernel_text(layer.kernel),
            _ms(layer.dense_ms),
            _ms(layer.sparse_ms),
        )
    return Columns(table, gap=1)


def compiled_text(found: Compiled) -> RenderableType:
    """What was written, and what it gained."""
    replaced = sum(layer.kernel is not None for layer in found.layers)
    lines = [
        f"Written to {found.path}: {size(found.bytes)} (dense: {size(found.dense_bytes)}); "
        f"{replaced} of {len(found.layers)} layers sparse.",
        f"The outputs differ from the dense model's by {found.error:.1g} of the largest.",
    ]
    if found.agreement is not None:
        lines.append(f"Same predictions on random inputs: {percent(found.agreement)}.")
    if found.speedup is not None and found.dense_ms is not None and found.sparse_ms is not None:
        lines.append(
            f"{milliseconds(found.dense_ms)} dense, {milliseconds(found.sparse_ms)} now: "
            f"{times(found.speedup, 'faster', 'slower')} ({found.isa} kernels)."
        )
    return Group(*map(Text, lines), *([notes_lines(found.notes)] if found.notes else []))


def bench_layers(found: Bench) -> Columns:
    """One row per layer: its kernel, and what it takes alone."""
    table = _table("layer", "weight", "zeros", "kernel", "dense ms", "sparse ms", "GFLOP/s")
    known = any(layer.peak_share is not None for layer in found.layers)
    if known:
        table.add_column("peak", justify="right", no_wrap=True)
    for layer in found.layers:
        row: list[RenderableType] = [
            Text(layer.name),
            _shape(layer),
            percent(layer.sparsity),
            kernel_text(layer.kernel),
            _ms(layer.dense_ms),
            _ms(layer.sparse_ms),
            "-" if layer.gflops is None else f"{layer.gflops:.3g}",
        ]
        table.add_row(*row, *([percent(layer.peak_share, 0)] if known else []))
    return Columns(table, gap=1)


def bench_table(found: Bench) -> RenderableType:
    """The whole model, dense and sparse."""
    table = _table("", "dense", "sparse", "change")
    table.add_row(
        "median",
        milliseconds(found.dense.median),
        milliseconds(found.sparse.median),
        times(found.speedup, "faster", "slower"),
    )
    table.add_row("80 % of turns", _range(found.dense), _range(found.sparse), "")
    table.add_row(
        "file",
        size(found.dense_bytes),
        size(found.sparse_bytes),
        times(found.dense_bytes / found.sparse_bytes, "smaller", "larger"),
    )
    table.add_row("largest difference", "", f"{found.max_rel_error:.1g}", "")
    low, high = found.speedup_range
    shapes = shapes_text(found.inputs)
    how = (
        f"{found.rounds} pairs of turns; the ratio is {low:.2f} to {high:.2f} (95 % range). "
        f"{_threads(found.threads)}, {found.isa} kernels, {shapes}."
    )
    return Group(Columns(table), Text(how))


def notes_lines(notes: Iterable[str]) -> RenderableType:
    """Notes, each from a new line on."""
    lines = Table.grid(padding=(0, 1))
    for note in notes:
        lines.add_row("note:", Text(note))
    return lines


def _threads(count: int | None) -> str:
    if count is None:
        return "ONNX Runtime's own number of threads"
    return f"{count} thread{'s' if count > 1 else ''}"


def _shape(layer: CompiledLayer | LayerSpeed) -> str:
    groups = f" /{layer.groups}" if layer.groups > 1 else ""
    return "x".join(map(str, layer.shape)) + groups


def _ms(value: float | None) -> str:
    return "-" if value is None else milliseconds(value).removesuffix(" ms")


def _range(found: Median) -> str:
    return f"{_ms(found.p10)} to {milliseconds(found.p90)}"


def _table(first: str, *others: str) -> Table:
    # Tables of layers, whose first column has a name, just fit into 80 columns with one space.
    gap, least = (1, 11) if first else (2, len("largest difference"))
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold", min_width=least)
    for name in others:
        left = name in ("weight", "fused", "kernel")
        # Names and lists of operators may be long; a number is never broken.
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "fused")
    return table
