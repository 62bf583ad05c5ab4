"""What can be removed from a network, and what was: tables and plain data."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from secateur.core.facts import Facts
from secateur.core.widths import Width
from secateur.report.units import count, milliseconds, percent, size
from secateur.structure import Structure

_SHOWN = 3


def widths_table(structure: Structure) -> Table:
    """One row per width: what one group consists of.

    Example:
        >>> import torch
        >>> from rich.console import Console
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Console(width=70).print(widths_table(couple(net, torch.zeros(1, 4))))
        width  groups  cut together, one group
        0           3  0.weight[0], 0.bias[0], 2.weight[1]
    """
    table = _table("width", "groups")
    table.add_column("cut together, one group", ratio=1)
    for width in structure.widths:
        table.add_row(Text(width.name), str(width.groups), Text(_members(width)))
    return table


def _members(width: Width) -> str:
    listed = []
    for part in width.slices:
        times = part.index.shape[1]
        listed.append(f"{part.parameter}[{part.axis}]" + (f" x {times}" if times > 1 else ""))
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def parameters_table(rows: list[dict[str, Any]]) -> Table:
    """One row per axis of a parameter, from :func:`structure_rows`."""
    table = _table("parameter", "size")
    table.add_column("width, or why it stays", ratio=1)
    for row in rows:
        style = "green" if row["width"] else "dim"
        text = row["width"] or row["pinned"]
        if row["width"] and row["pinned"]:
            text = f"{row['width']} ({row['pinned']})"
        table.add_row(
            Text(f"{row['parameter']}[{row['axis']}]"), str(row["size"]), Text(text, style)
        )
    return table


def structure_rows(model: nn.Module, structure: Structure) -> list[dict[str, Any]]:
    """Every axis of every parameter, with the widths it belongs to or why it stays.

    Example:
        >>> import torch
        >>> from secateur.structure import couple
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> rows = structure_rows(net, couple(net, torch.zeros(1, 4)))
        >>> rows[1]["pinned"]
        'it reads a tensor of fixed size, such as the input of the model'
        >>> rows[0]["width"], rows[0]["with"]
        ('0', ['0.bias', '2.weight'])
    """
    homes: dict[tuple[str, int], list[Width]] = {}
    for width in structure.widths:
        for part in width.slices:
            homes.setdefault((part.parameter, part.axis), []).append(width)
    rows = []
    for name, parameter in model.named_parameters():
        for axis, length in enumerate(parameter.shape):
            widths = homes.get((name, axis), [])
            partners = {p for w in widths for p in w.parameters()} - {name}
            pinned = structure.pinned.get((name, axis), "")
            if name in structure.unreached:
                pinned = "the example inputs do not reach it"
            rows.append(
                {
                    "parameter": name,
                    "axis": axis,
                    "size": length,
                    "width": ", ".join(w.name for w in widths),
                    "with": sorted(partners),
                    "pinned": pinned if pinned or widths else "an axis of size 1",
                }
            )
    return rows


def cut_table(facts: Facts) -> Table:
    """One row per width that was cut.

    Example:
        >>> from rich.console import Console
        >>> from secateur.core.facts import WidthFacts
        >>> Console(width=70).print(cut_table(Facts(widths=[WidthFacts("conv1", 64, 40, ("a", "b"))])))
        width  kept / groups  removed  tensors
        conv1        40 / 64   37.5 %  2
    """
    table = _table("width", "kept / groups", "removed")
    table.add_column("tensors")
    for width in facts.widths:
        table.add_row(
            Text(width.name),
            f"{width.kept:,} / {width.groups:,}",
            percent(1 - width.kept / width.groups),
            str(len(width.parameters)),
        )
    return table


def steps_text(facts: Facts) -> Text:
    """In which multiples widths were kept, and who said so.

    Example:
        >>> target = {"unit": "macs", "align": 16}
        >>> print(steps_text(Facts({"align": 0}, measures={"target": target})))
        Widths come in multiples of 16, or of up to a quarter of a width below 64, as runtimes like \
it. align=1 (--align 1) allows any.
        >>> print(steps_text(Facts({"align": 8}, measures={"target": {**target, "align": 8}})))
        Widths come in multiples of 8, as the recipe says.
    """
    target = facts.measures["target"]
    step = target["align"]
    words = f"Widths come in multiples of {step}" if step > 1 else "Widths come in any number"
    if facts.recipe.get("align"):
        return Text(f"{words}, as the recipe says.")
    if target["unit"] == "latency":
        return Text(f"{words}: the fastest here, as measured.")
    if step == 1:
        return Text(f"{words}.")
    narrow = f"{words}, or of up to a quarter of a width below {4 * step}"
    return Text(f"{narrow}, as runtimes like it. align=1 (--align 1) allows any.")


def target_text(facts: Facts) -> Text:
    """What was asked for and what was reached, in the unit of the target.

    Example:
        >>> macs = {"unit": "macs", "dense": 13.0e6, "limit": 9.1e6, "reached": 9.0e6}
        >>> print(target_text(Facts(measures={"target": macs})))
        Target: macs 13.0 M -> 9.00 M (asked for 9.10 M).
        >>> time = {"unit": "latency", "dense": 4.1, "limit": 2.05, "reached": 2.04,
        ...         "engine": "onnxruntime", "threads": 2}
        >>> print(target_text(Facts(measures={"target": time})))
        Target: latency 4.10 ms -> 2.04 ms (asked for 2.05 ms), measured in onnxruntime with 2 \
threads on the example inputs.
    """
    told = facts.measures["target"]
    unit = told["unit"]
    words = {"latency": milliseconds, "bytes": size}.get(unit, count)
    dense, reached, asked = (words(told[key]) for key in ("dense", "reached", "limit"))
    line = f"Target: {unit} {dense} -> {reached}"
    if "given" not in facts.recipe.get("allocation", ()):  # which follows no target
        line += f" (asked for {asked})"
    if unit == "latency":
        threads = f"{told['threads']} thread{'s' if told['threads'] != 1 else ''}"
        line += f", measured in {told['engine']} with {threads} on the example inputs"
    return Text(f"{line}.")


def proof_text(facts: Facts) -> Text:
    """What was proved, in one sentence.

    Example:
        >>> facts = Facts(measures={"proof": 2e-7, "parameters": [1000, 400]})
        >>> print(proof_text(facts))
        Proved: the cut network computes what the masked one does, to 2e-07 of its largest output. \
Parameters: 1.00 k -> 400.
    """
    before, after = facts.measures["parameters"]
    return Text(
        "Proved: the cut network computes what the masked one does, to "
        f"{facts.measures['proof']:.1g} of its largest output. "
        f"Parameters: {count(before)} -> {count(after)}."
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    return table
